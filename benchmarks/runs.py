"""What the long measurements share: how a student is measured, and a results file that may be added to at any time."""

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

from tinylib import course, datasets, general, train
from tinylib.bert import Bert
from tinylib.metrics import accuracy

FOLDER = datasets.data_folder() / "results"
LAYERS = 6, 4  # of the laptop tier's teacher and student


def options(about: str, names: Iterable[str], seeds: list[int]) -> argparse.ArgumentParser:
    """Return the options that every long measurement has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names)
    parser.add_argument("--precision", choices=train.PRECISIONS, default="bfloat16")
    return parser


def stage1_of(folder: Path) -> str:
    """Return how a general student came to be, for the name of its row: "3600 steps, cut along the states"."""
    told = general.card(folder)["settings"]
    starts = {"teacher": "cut from the teacher", "states": "cut along the states", "fitted": "cut and fitted"}
    shape = "" if told["student"] == "4x312" else f"{told['student']}, "
    return f"{shape}{told['steps']} steps, {starts.get(told['start'], told['start'])}"


def taught(data: str) -> tuple[course.Prepared, Bert, dict]:
    """Return a data set, its teacher and the teacher's accuracy.

    Computed in full precision: the teacher goes into the cache that lessons take it from.
    """
    train.set_precision("highest")
    prepared = course.prepare(data, base=course.LAPTOP.base)
    teacher = course.teacher(prepared)
    return prepared, teacher, {s: round(course.score(teacher, prepared, s), 4) for s in ("validation", "test")}


def measured(model: Bert, teacher: Bert, prepared: course.Prepared, seed: int) -> dict:
    """Return one run's row: accuracy, and how close the student is to its teacher, on validation and test texts together.

    Accuracy counts right and wrong, which a few hundred texts do coarsely; the share of equal verdicts and KL(teacher ‖
    student) in nats see differences that it cannot.
    """
    row, logits = {"seed": seed}, {}
    for split in ("validation", "test"):
        logits[split] = [train.predict(m, prepared.encoded[split]) for m in (model, teacher)]
        row[split] = round(accuracy(prepared.labels[split], logits[split][0].argmax(-1)), 4)
    said, told = (torch.cat(both) for both in zip(*logits.values(), strict=True))
    row["agreement"] = round(accuracy(told.argmax(-1), said.argmax(-1)), 4)
    kl = F.kl_div(said.log_softmax(-1), told.log_softmax(-1), reduction="batchmean", log_target=True)
    return row | {"kl": round(kl.item(), 4)}


def sweep(results: "Results", names: Iterable[str], args, make: Callable[[str, int], dict], **more) -> None:
    """Make the rows that the file lacks, seed by seed, in the precision that was asked for, and save after each."""
    train.set_precision(args.precision)
    for seed, name in itertools.product(args.seeds, names):
        if (not args.only or name in args.only) and not results.has(name, seed):
            row = make(name, seed)
            print(f"{results.part}, {name}: {row}", flush=True)
            results.add(name, row, machine=machine(args.precision), **more)


def machine(precision: str) -> str:
    """Return the class of this machine, to be told beside what was measured on it."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a run, {precision} precision, torch {torch.__version__}"


def save(store: dict, file: Path) -> None:
    """Write a JSON file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{file}.tmp")
    aside.write_text(json.dumps(store, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


class Results:
    """Runs in a JSON file: part (a data set) -> name -> a row a seed. A part that another recipe made begins anew.

    Several processes may add to one file.
    """

    def __init__(self, file: Path, part: str, recipe: dict):
        self.file, self.part, self.recipe = file, part, json.loads(json.dumps(recipe))  # tuples as JSON reads them back

    def has(self, name: str, seed: int) -> bool:
        """Tell whether a run is in the file."""
        return any(row["seed"] == seed for row in self._read()[self.part]["runs"].get(name, []))

    def add(self, name: str, row: dict, **more) -> None:
        """Add a run's row, and what else is to be said of the part."""
        with FileLock(f"{self.file}.lock"):
            store = self._read()
            part = store[self.part]
            before = self._stored().get(self.part)
            if before and not part["runs"]:  # the first row of a new recipe: keep what the old one measured
                kept = self.file.with_suffix(".old.json")
                save((json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}) | {self.part: before}, kept)
            part |= more
            rows = part["runs"].setdefault(name, [])
            part["runs"][name] = sorted([r for r in rows if r["seed"] != row["seed"]] + [row], key=lambda r: r["seed"])
            save(store, self.file)

    def _stored(self) -> dict:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def _read(self) -> dict:
        store = self._stored()
        if store.get(self.part, {}).get("recipe") != self.recipe:
            store[self.part] = {"recipe": self.recipe, "runs": {}}
        return store
