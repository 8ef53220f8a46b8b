"""The one error that a user's mistake raises: a line that says what, why and the next command."""


class NanogapError(ValueError):
    """A mistake that the user can mend; commands print its text on one line and exit with 2."""
