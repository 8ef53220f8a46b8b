"""Strategies beyond those of the paper."""
