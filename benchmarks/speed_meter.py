"""How a contestant of the speed benchmark takes its turns: a process that does n steps when told to and says what they took.

Commands come on stdin, a line each: ``go N``, ``fill``, ``stop``; answers go to stdout as ``@`` and JSON, since libraries
print there too. Standard library only: the environment of another tool may hold nothing of ours.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Meter:
    """Called from inside a training loop: ``step()`` after each step, which does not return before it is this process' turn."""

    def __init__(self, fill: Callable[[], dict] | None = None):
        self.fill, self.left, self.tokens, self.marks = fill, 0, 0, []
        self.loading = 0

    def ready(self, **said) -> None:
        """Say that everything is loaded, and wait for the first turn."""
        self.loading = peak_memory()
        forget_peak()
        answer(ready=True, **said)
        self.wait()

    def saw(self, tokens: int) -> None:
        """Count the real tokens of a batch, which is what speeds are compared by: batches differ in length."""
        self.tokens += int(tokens)

    def step(self, *_) -> None:
        """Note the time; at the end of a turn answer and wait for the next."""
        self.marks.append(time.perf_counter())
        self.left -= 1
        if self.left == 0:
            cpu, times = time.process_time() - self.busy, [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
            answer(seconds=self.marks[-1] - self.marks[0], cpu=cpu, tokens=self.tokens, times=times)
            self.wait()

    def wait(self) -> None:
        """Do as told until told to go on; leave the process at ``stop``, or when nobody is there any more."""
        while True:
            command, *more = sys.stdin.readline().split() or ["stop"]
            if command == "go":
                self.left, self.tokens, self.busy = int(more[0]), 0, time.process_time()
                self.marks = [time.perf_counter()]
                return
            if command == "fill":
                answer(**self.fill())
            if command == "stop":
                answer(loading=self.loading, running=peak_memory())
                raise SystemExit


def answer(**said) -> None:
    """Write one answer."""
    print("\n@" + json.dumps(said), flush=True)


def peak_memory() -> int:
    """Return the most memory in bytes that this process held: resident, the interpreter and mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # macOS gives bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the peak begin anew, where the system can (Linux): reading a checkpoint takes more than training on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
