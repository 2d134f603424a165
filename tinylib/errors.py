"""The one exception that the package raises for a user's mistake, and the one warning that it gives."""


class UserError(ValueError):
    """Say in one sentence what is wrong, where, and what to do about it.

    The command line prints the sentence and exits with code 2; in a notebook it is the last line of the
    traceback.
    """


class UserNote(UserWarning):
    """Say in one sentence what the user should know of the result; the command line prints it as a note."""
