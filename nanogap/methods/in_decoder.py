"""Strategies that prune between two layers of the decoder."""
