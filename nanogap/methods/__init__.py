"""Strategies beyond those of the paper, their settings, and those of your own."""

from nanogap.methods import before, in_decoder, reader
from nanogap.methods.own import BUILT_IN, code_of, find

__all__ = ["BUILT_IN", "before", "code_of", "find", "in_decoder", "reader"]
