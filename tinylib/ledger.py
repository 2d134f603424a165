"""The Pareto ledger: what each model that a lesson makes is worth and costs, kept in the learner's cache.

One JSON file, one row a model; a model that is measured again takes its old row's place. Lessons 09 and 10 draw it, with the
rows that the course's authors measured greyed behind (``course_rows``).
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from tinylib import datasets, measure
from tinylib.bert import Bert
from tinylib.models import cache_folder

COSTS = {"megabytes": "size of the file (MB)", "milliseconds": "latency (ms)", "parameters": "parameters"}
FIELDS = {"name": str, "lesson": str, "data": str, "tier": str, "accuracy": float, "parameters": int, "megabytes": float,
          "milliseconds": float}  # fmt: skip


def path() -> Path:
    """Return the ledger's file; it may not exist."""
    return cache_folder() / "ledger.json"


def entry(name: str, model: Bert, accuracy: float, megabytes: float | None = None) -> dict:
    """Measure a model: parameters, megabytes of its float32 weights unless its file's are given, latency of 32 tokens."""
    costs = measure.summary(model)
    size = costs.megabytes if megabytes is None else megabytes
    return {
        "name": name, "accuracy": accuracy, "parameters": costs.parameters, "megabytes": size,
        "milliseconds": costs.latency.median,
    }  # fmt: skip


def add(rows: Sequence[dict], lesson: str, data: str, tier: str) -> None:
    """Write rows (as ``entry`` and ``job.row`` give them) into the ledger, each in the place of one of the same name.

    A ledger that cannot be written stops no lesson: it is said, and the lesson goes on.
    """
    fresh = [{"lesson": lesson, "data": data, "tier": tier} | {k: r[k] for k in FIELDS if k in r} for r in rows]
    keys = {_key(row) for row in fresh}
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path()}.lock"):
            kept = [row for row in _read(path()) if _key(row) not in keys]
            aside = path().with_suffix(".tmp")
            aside.write_text(json.dumps(kept + fresh, indent=1) + "\n", encoding="utf-8")
            os.replace(aside, path())
    except OSError as error:
        print(f"the ledger {path()} could not be written ({error.strerror or error}); the lesson goes on without it")


def rows(data: str, tier: str) -> list[dict]:
    """Return the learner's rows of one data set and tier, in the order in which they were added."""
    return [row for row in _read(path()) if (row["data"], row["tier"]) == (data, tier)]


def course_rows(data: str, tier: str) -> list[dict]:
    """Return the rows that ship with the course (data/results/ledger.json): measured on the authors' machine."""
    shipped = datasets.data_folder() / "results" / "ledger.json"
    return [row for row in _read(shipped) if (row["data"], row["tier"]) == (data, tier)]


def front(rows: Sequence[dict], cost: str = "megabytes") -> list[dict]:
    """Return the rows that no other row beats, cheapest first: none is at most as dear and at least as accurate.

    Of rows that are alike in both, the first one stands for all.
    """
    best, found = -1.0, []
    for row in sorted(rows, key=lambda r: (r[cost], -r["accuracy"])):
        if row["accuracy"] > best:
            found.append(row)
            best = row["accuracy"]
    return found


def numbers(*groups: Sequence[dict]) -> dict[str, int]:
    """Number the models of all groups by name, from 1, the largest file first, as the pictures name them."""
    largest: dict[str, float] = {}
    for row in (row for rows in groups for row in rows):
        largest.setdefault(row["name"], row["megabytes"])
    return {name: i for i, name in enumerate(sorted(largest, key=lambda name: -largest[name]), start=1)}


def _key(row: dict) -> tuple:
    return row["name"], row["data"], row["tier"]


def _read(file: Path) -> list[dict]:
    """Return a ledger's rows; a damaged file is moved aside, not written over, since someone may want to mend it."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(_is_row(row) for row in found):
            return found
    except ValueError:  # no JSON, or no UTF-8
        pass
    moved = file.with_name("ledger.damaged.json")
    with contextlib.suppress(OSError):
        os.replace(file, moved)
        print(f"the ledger {file} is damaged: it is now {moved.name}, and a new one begins")
    return []


def _is_row(row: object) -> bool:
    numbers = (int, float)
    return isinstance(row, dict) and all(
        isinstance(row.get(name), numbers if kind is not str else str) and not isinstance(row.get(name), bool)
        for name, kind in FIELDS.items()
    )
