"""Mistakes that the user can mend: commands print the text on one line and exit with status 2."""


class NanogapError(ValueError):
    """Says what is wrong, why, and what to do next."""


class ItemError(NanogapError):
    """A mistake in one picture or one expression: of many, the others can still be asked."""
