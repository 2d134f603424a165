"""Measure the course's students over three seeds: the defaults of `tinylib distill`, pruned, and labels alone (`make results`).

Writes data/results/students.json after each run; a run that the file already holds (same settings, data and models) is not
repeated. Lesson 09 draws the file. Options: --data movie_reviews questions inference, --seeds 0 1 2, --only NAME …, --precision.
"""

import argparse
import itertools

import ablations
from runs import FOLDER, Results, machine, measured

from tinylib import course, train

FILE = FOLDER / "students.json"
DATA = ("movie_reviews", "questions", "inference")
SETTINGS = course.LAPTOP.settings
RUNS = {
    "both steps": (SETTINGS, ablations.distilled),
    f"{ablations.SPARSITY:.0%} pruned meanwhile": (SETTINGS, ablations.pruned_meanwhile),
    "labels only, random start": (SETTINGS.replace(start="random"), ablations.from_labels),
}


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RUNS)
    parser.add_argument("--precision", choices=train.PRECISIONS, default="bfloat16")
    args = parser.parse_args()
    for data in args.data:
        train.set_precision("highest")  # the teacher goes into the cache that lessons take it from
        prepared = course.prepare(data, base=course.LAPTOP.base)
        teacher, results = course.teacher(prepared), Results(FILE, data, ablations.recipe(prepared, SETTINGS, args.precision))
        train.set_precision(args.precision)
        texts = ablations.texts_of(prepared)(SETTINGS.augment)
        reference = {s: round(course.score(teacher, prepared, s), 4) for s in ("validation", "test")}
        for seed, (name, (settings, make)) in itertools.product(args.seeds, RUNS.items()):
            if (not args.only or name in args.only) and not results.has(name, seed):
                row = measured(make(teacher, texts, settings.replace(seed=seed)), teacher, prepared, seed)
                print(f"{data}, {name}: {row}", flush=True)
                results.add(name, row, teacher=reference, machine=machine(args.precision), command="make results")


if __name__ == "__main__":
    main()
