"""SIGTERM, by which batch systems and notebook services end a process: a training saves itself first, then stops."""

import contextlib
import signal
from collections.abc import Iterator

EXIT_CODE = 128 + signal.SIGTERM  # what a shell shows of a process that the signal ended


class Stopped(KeyboardInterrupt):
    """Say that SIGTERM came; like Ctrl-C it is no error that code should catch."""


class _State:
    """Whether a training runs, which stops at its next step by itself, and whether it has been asked to."""

    depth = 0
    asked = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Answer SIGTERM inside: at once, or, while a training runs, after the step that it is in. For the main thread."""
    _State.asked = False
    before = signal.signal(signal.SIGTERM, _answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _State.asked = False


def _answer(signum: int, frame) -> None:
    _State.asked = True
    if not _State.depth:
        raise Stopped


def asked() -> bool:
    """Tell whether SIGTERM has come."""
    return _State.asked


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a training decide inside when it stops."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.asked and not _State.depth:  # it came after the last step had begun: nobody else would answer it
        raise Stopped
