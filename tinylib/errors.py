"""The one exception that the package raises for a user's mistake, the one warning that it gives, and an error told apart."""

import errno
import re

LONGEST = 1200  # characters of a sentence; what is cut out of a longer one is the middle of something quoted


class UserError(ValueError):
    """Say in one sentence what is wrong, where, and what to do about it.

    The command line prints the sentence and exits with code 2; in a notebook it is the last line of the
    traceback. What it quotes (a file's name, a cell) cannot break the line nor command the terminal: see ``plain``.
    """

    def __init__(self, sentence: str):
        super().__init__(plain(sentence))


class UserNote(UserWarning):
    """Say in one sentence what the user should know of the result; the command line prints it as a note."""

    def __init__(self, sentence: str):
        super().__init__(plain(sentence))


def plain(text: str) -> str:
    """Return a text as one printable line: line breaks as spaces, other control characters escaped, the overlong cut."""
    line = " ".join(part for part in (piece.strip() for piece in text.splitlines()) if part)
    if not line.isprintable():  # an escape sequence out of a file could recolour or rewrite what the terminal shows
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


# as torch and the operating system say it, and as oneDNN does, which gives no reason (a missing implementation is a "descriptor")
FULL = re.compile("out of memory|allocate memory|could not create a primitive(?! desc)")


def is_full_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory is full, as Python or as torch says it, on a GPU or on a CPU."""
    if isinstance(error, OSError):  # a mapping of a file; what the file is called says nothing
        return error.errno == errno.ENOMEM or FULL.search(error.strerror or str(error)) is not None
    return isinstance(error, MemoryError) or FULL.search(str(error)) is not None
