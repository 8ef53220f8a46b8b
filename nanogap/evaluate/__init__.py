"""REC accuracy on any weights: `python -m nanogap.evaluate`."""
