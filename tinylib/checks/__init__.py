"""Exercise checks: run a learner's attempt against an oracle and name the mistake.

``names()`` lists the checks, ``run(name, attempt)`` returns a ``Report`` and never raises on a learner's mistake. A check is a
function in one of the modules here, registered under the exercise's name; it calls the attempt on small random inputs and
raises ``Wrong`` with a sentence that says what is wrong and why; what it returns, if anything, is a remark on a right answer.
"""

import importlib

from tinylib.checks.core import CHECKS, Report, run_check

PARTS = ("start", "attention", "transformer", "teacher", "distill", "prune", "losses", "general", "augment", "tinybert",
         "deployment", "scaling")  # fmt: skip

for part in PARTS:
    importlib.import_module(f"tinylib.checks.{part}")

__all__ = ["Report", "names", "run"]


def names() -> list[str]:
    """Return the names of all checks, in the order of the lessons."""
    return list(CHECKS)


def run(name, attempt) -> Report:
    """Check an attempt and print nothing: the report shows itself at the end of a cell.

    ``attempt`` is what the exercise asks for, a function as a rule. A mistake of the learner's, an exception in the attempt
    and a call of exit() included, is a report with ``passed=False`` and a message that says what is wrong and why; only an
    interrupt (Ctrl+C) goes through.
    """
    return run_check(name, attempt)
