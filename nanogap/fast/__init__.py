"""The same words, sooner."""
