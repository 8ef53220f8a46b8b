"""python -m nanogap: the commands, listed; and the question itself (nanogap/show/commands.py)."""

import sys

from nanogap.show.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
