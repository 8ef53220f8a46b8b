"""nanogap: Grounding-Aware Token Pruning (arXiv 2506.21873), from scratch and small.

    model = nanogap.load("weights/mini")
    result = model.ground("image.jpg", "the man on the left", prune="random", keep=72, mode="gap")
"""

import os
import signal
import sys
import warnings

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))   # no traceback while a command imports
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")   # nothing here needs it

from nanogap import gap, image, methods, prompt, prune  # noqa: E402
from nanogap.checks.loading import load  # noqa: E402
from nanogap.errors import NanogapError  # noqa: E402
from nanogap.show import explain_ids  # noqa: E402

__all__ = ["NanogapError", "explain_ids", "gap", "image", "load", "methods", "prompt", "prune"]
__version__ = "0.1.0"
