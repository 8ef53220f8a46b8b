"""Speed and memory: `python -m nanogap.bench`."""
