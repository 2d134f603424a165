"""What structured pruning costs and saves: the course's student without heads, neurons or layers (`make structured`).

Writes data/results/structured.json after each run; a run that the file already holds is not repeated. Lesson 10 draws the file.
Each row starts from the student of seed 0, loses parts that are chosen by magnitude, Taylor or movement, and trains two epochs on
the teacher's soft targets; the seed decides the texts that Taylor reads and the order of the recovery. "dense, trained on" is the
control that trains on as long and loses nothing. Options: --seeds 0 1 2, --only NAME …, --precision.
"""

import copy
from collections.abc import Callable

from runs import FOLDER, Results, measured, options, sweep, taught

from tinylib import course, measure
from tinylib import prune as pruning
from tinylib.bert import Bert

FILE = FOLDER / "structured.json"
SETTINGS = course.LAPTOP.settings
RECOVERY = {"epochs": 2, "lr": 2e-4}
WIDE = {"neurons": 2 / 3}
BOTH = {"heads": 1 / 2, "neurons": 2 / 3}


def at_once(parts: dict, how: str) -> Callable:
    """Return a run that removes the parts in one cut, by magnitude or Taylor importance, and recovers."""

    def run(student: Bert, examples, loss_fn, seed: int) -> Bert:
        importance = pruning.taylor_importance(student, examples, loss_fn, seed=seed) if how == "taylor" else None
        smaller = pruning.shrink(student, **parts, importance=importance)
        pruning.recover(smaller, examples, loss_fn, seed=seed, **RECOVERY)
        return smaller

    return run


def learnt(parts: dict) -> Callable:
    """Return a run that learns by movement which parts to close while it distils."""

    def run(student: Bert, examples, loss_fn, seed: int) -> Bert:
        return pruning.learn_structure(student, examples, loss_fn, seed=seed, **parts, **RECOVERY)[0]

    return run


def trained_on(student: Bert, examples, loss_fn, seed: int) -> Bert:
    """Train a copy on for as long as the others recover."""
    same = copy.deepcopy(student)
    pruning.recover(same, examples, loss_fn, seed=seed, **RECOVERY)
    return same


RUNS = {
    "dense": lambda student, *_: student,
    "dense, trained on": trained_on,
    "⅔ of the neurons, Taylor": at_once(WIDE, "taylor"),
    "half the heads, ⅔ of the neurons, Taylor": at_once(BOTH, "taylor"),
    "half the heads, ⅔ of the neurons, movement": learnt(BOTH),
    "half the heads, ⅔ of the neurons, magnitude": at_once(BOTH, "magnitude"),
    "layers 1 2 4, half the neurons, Taylor": at_once({"neurons": 1 / 2, "layers": (1, 2, 4)}, "taylor"),
}


def costs(model: Bert) -> dict:
    """Return what is the same on every machine: parameters, bytes of the float32 weights, operations of 32 tokens."""
    return {
        "parameters": measure.parameters(model), "megabytes": round(measure.weight_bytes(model) / 1e6, 2),
        "gigaflops": round(measure.flops(model.config, 32) / 1e9, 4),
    }  # fmt: skip


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = options(__doc__, RUNS, seeds=[0, 1, 2])
    args = parser.parse_args()
    data = course.LAPTOP.data
    prepared, teacher, reference = taught(data)
    examples = prepared.examples("train")
    loss_fn = pruning.teacher_loss(teacher, examples)
    results = Results(FILE, data, course.recipe(prepared, SETTINGS) | {"recovery": RECOVERY, "precision": args.precision})
    student = course.student(prepared)  # in full precision: it goes into the cache that lessons take it from

    def make(name: str, seed: int) -> dict:
        made = RUNS[name](student, examples, loss_fn, seed)
        return measured(made, teacher, prepared, seed) | costs(made)

    sweep(results, RUNS, args, make, teacher=reference, command="make structured")


if __name__ == "__main__":
    main()
