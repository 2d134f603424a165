"""The one exception that the package raises for a user's mistake, the one warning that it gives, and an error told apart."""


class UserError(ValueError):
    """Say in one sentence what is wrong, where, and what to do about it.

    The command line prints the sentence and exits with code 2; in a notebook it is the last line of the
    traceback.
    """


class UserNote(UserWarning):
    """Say in one sentence what the user should know of the result; the command line prints it as a note."""


def is_full_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory is full, as Python or as torch says it, on a GPU or on a CPU."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "allocate memory"))
