"""Wrong and right answers to every exercise: MUTANTS[name] = [(attempt, words of the message), …], RIGHT[name] = [attempt, …].

`make mutants` prints how many of them the checks tell apart.
"""

import importlib
import pkgutil

FEWEST = 10  # wrong answers that each exercise must have


def collect() -> tuple[list[tuple], list[tuple]]:
    """Return (name, attempt, words) of all wrong answers and (name, attempt) of all right ones, lesson by lesson."""
    parts = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name != "__main__"]
    wrong = [(name, f, words) for part in parts for name, rows in part.MUTANTS.items() for f, words in rows]
    right = [(name, f) for part in parts for name, rows in part.RIGHT.items() for f in rows]
    return wrong, right
