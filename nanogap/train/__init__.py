"""The mini models, from nothing: `python -m nanogap.train`."""
