"""Measure the course's students over three seeds: the defaults of `tinylib distill`, pruned, and labels alone (`make results`).

Writes data/results/students.json after each run; a run that the file already holds (same settings, data and models) is not
repeated. Lesson 09 draws the file. Options: --data movie_reviews questions inference, --seeds 0 1 2, --only NAME …, --precision.
"""

import ablations
from runs import FOLDER, Results, measured, options, sweep, taught

from tinylib import course

FILE = FOLDER / "students.json"
DATA = ("movie_reviews", "questions", "inference")
SETTINGS = course.LAPTOP.settings
RUNS = {
    "both steps": (SETTINGS, ablations.distilled),
    f"{ablations.SPARSITY:.0%} pruned meanwhile": (SETTINGS, ablations.pruned_meanwhile),
    "labels only, random start": (SETTINGS.replace(start="random"), ablations.from_labels),
    # the rate of the intermediate step, at which the distilled students learn three epochs of five
    "labels only, random start, 5e-4": (SETTINGS.replace(start="random", lr_prediction=5e-4), ablations.from_labels),
}


def measure(data: str, args) -> None:
    """Run what is missing on one data set."""
    prepared, teacher, reference = taught(data)
    results = Results(FILE, data, course.recipe(prepared, SETTINGS) | {"precision": args.precision})
    texts = ablations.texts_of(prepared)(SETTINGS.augment)

    def make(name: str, seed: int) -> dict:
        settings, trained = RUNS[name]
        return measured(trained(teacher, texts, settings.replace(seed=seed)), teacher, prepared, seed)

    sweep(results, RUNS, args, make, teacher=reference, command="make results")


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = options(__doc__, RUNS, seeds=[0, 1, 2])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    args = parser.parse_args()
    for data in args.data:
        measure(data, args)


if __name__ == "__main__":
    main()
