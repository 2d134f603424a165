"""What each part of TinyBERT's recipe is worth: each left out in turn, over three seeds (`make ablations`).

Writes data/results/ablations.json after each run; a run that the file already holds (same settings, data and models) is not
repeated, so the whole, hours on two cores, may be stopped at any time, and two calls with different --seeds may run side by
side. Lessons 08 and 09 draw the file. Every run takes as many steps as the full recipe's: one on fewer texts gets more epochs.
Options: --data questions movie_reviews, --seeds 0 1 2, --only NAME …, --precision, and --general DIR: then one row is made, the
full recipe from the student that ``tinylib general`` made there.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runs import FOLDER, LAYERS, Results, measured, options, stage1_of, sweep, taught

from tinylib import course, distill, general, train
from tinylib import prune as pruning
from tinylib.bert import Bert
from tinylib.distill import LayerMap, Settings
from tinylib.train import Examples

FILE = FOLDER / "ablations.json"
DATA = ("questions", "movie_reviews")
# The full recipe: one augmented copy of each text, so that an epoch is two passes over as many texts as the data has. The
# cache has room for every row's teacher outputs: made anew in training, they would be rounded as the training is.
FULL = course.LAPTOP.settings.replace(augment=1, epochs_intermediate=2, epochs_prediction=1, cache_gb=6.0)
SPARSITY = 0.6


@dataclass(frozen=True)
class Variant:
    """One row of the table: what of the full recipe is changed, and how it is trained."""

    changes: dict
    train: Callable[[Bert, Examples, Settings], Bert]
    paper: str | None = None  # the row of the paper's tables 2 and 3 that asks the same


@functools.lru_cache(maxsize=1)
def _matched(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
    student, projections = distill.first_student(teacher, settings, examples)
    distill.distill_intermediate(teacher, student, examples, settings, projections=projections)
    return student


def matched(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
    """Return a student after the intermediate step; rows that share it and follow each other run it once."""
    return copy.deepcopy(_matched(teacher, examples, settings))


def distilled(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
    """Run both steps of task distillation."""
    student = matched(teacher, examples, settings)
    distill.distill_prediction(teacher, student, examples, settings)
    return student


def from_general(folder: Path) -> Callable[[Bert, Examples, Settings], Bert]:
    """Return the training that runs both steps from the general student of a folder."""

    def both_steps(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
        student, projections = general.load(folder, teacher)
        distill.distill_intermediate(teacher, student, examples, settings, projections=projections)
        distill.distill_prediction(teacher, student, examples, settings)
        return student

    return both_steps


def pruned_meanwhile(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
    """Run both steps; in the second, the student loses weights while it learns."""
    student, pruner = matched(teacher, examples, settings), pruning.while_distilling(SPARSITY, examples, settings)
    distill.distill_prediction(teacher, student, examples, settings, after_step=pruner)
    return student


def from_labels(teacher: Bert, examples: Examples, settings: Settings, student: Bert | None = None) -> Bert:
    """Train a student on the labels, for as many epochs as both steps have unless it has been through the first."""
    epochs = settings.epochs_prediction + (0 if student else settings.epochs_intermediate)
    student = student or distill.first_student(teacher, settings)[0]
    train.fit(
        student, train.loader(examples, settings.batch_size, seed=settings.seed), train.classification_loss, epochs=epochs,
        lr=settings.lr_prediction, seed=settings.seed, label="labels",
    )  # fmt: skip
    return student


def labels_after_matching(teacher: Bert, examples: Examples, settings: Settings) -> Bert:
    """Match the layers, then train on the labels in the place of the teacher's soft targets."""
    return from_labels(teacher, examples, settings, matched(teacher, examples, settings))


def variants(full: Settings) -> dict[str, Variant]:
    """Name the rows of the table."""
    w, both = full.weights, full.epochs_intermediate + full.epochs_prediction
    only_prediction = {"epochs_intermediate": 0, "epochs_prediction": both}
    return {
        "full": Variant({}, distilled, "TinyBERT4"),
        f"full, {SPARSITY:.0%} pruned meanwhile": Variant({}, pruned_meanwhile),
        "without prediction loss": Variant({}, labels_after_matching, "without prediction loss"),
        "without stage 1, cut from the teacher": Variant({"start": "teacher"}, distilled),
        "without stage 1, cut along the states": Variant({"start": "states"}, distilled),
        "without stage 1, cut and fitted": Variant({"start": "fitted"}, distilled),
        "without stage 1, random start": Variant({"start": "random"}, distilled, "without stage 1"),
        "without the intermediate step": Variant(only_prediction, distilled),
        "without augmentation": Variant({"augment": 0}, distilled, "without augmentation"),
        "without embedding loss": Variant({"weights": replace(w, embedding=0.0)}, distilled, "without embedding loss"),
        "without hidden loss": Variant({"weights": replace(w, hidden=0.0)}, distilled, "without hidden loss"),
        "without attention loss": Variant({"weights": replace(w, attention=0.0)}, distilled, "without attention loss"),
        "a tenth of the attention loss": Variant({"weights": replace(w, attention=0.1)}, distilled),
        "a hundredth of the attention loss": Variant({"weights": replace(w, attention=0.01)}, distilled),
        "without hidden and attention loss": Variant(
            {"weights": replace(w, hidden=0.0, attention=0.0)}, distilled, "without Transformer losses"
        ),
        "random start, without attention loss": Variant({"start": "random", "weights": replace(w, attention=0.0)}, distilled),
        "top map": Variant({"layer_map": tuple(LayerMap.top(*LAYERS))}, distilled, "top mapping"),
        "bottom map": Variant({"layer_map": tuple(LayerMap.bottom(*LAYERS))}, distilled, "bottom mapping"),
        "attention probabilities": Variant({"weights": replace(w, attention_on="probabilities")}, distilled),
        "teacher's outputs in int8": Variant({"cache_dtype": "int8"}, distilled),
        "labels only, general start": Variant({"augment": 0}, from_labels, "without stage 2"),
        "labels only, random start": Variant({"augment": 0, "start": "random"}, from_labels),
        "labels only, random start, 5e-4": Variant({"augment": 0, "start": "random", "lr_prediction": 5e-4}, from_labels),
        "labels only, general start, 5e-4": Variant({"augment": 0, "lr_prediction": 5e-4}, from_labels),
        "soft targets only, random start": Variant(only_prediction | {"start": "random", "augment": 0}, distilled),
    }


def equal_steps(settings: Settings, full: Settings) -> Settings:
    """Give a run on fewer texts as many more epochs, so that what differs is the data and not the number of steps."""
    factor = (1 + full.augment) // (1 + settings.augment)
    return settings.replace(
        epochs_intermediate=settings.epochs_intermediate * factor, epochs_prediction=settings.epochs_prediction * factor
    )


def run(name: str, variant: Variant, seed: int, teacher: Bert, texts: Callable[[int], Examples]) -> Bert:
    """Train one student."""
    settings = equal_steps(FULL.replace(**variant.changes), FULL).replace(seed=seed)
    print(f"{name}, seed {seed}: {settings}", flush=True)
    return variant.train(teacher, texts(settings.augment), settings)


def texts_of(prepared: course.Prepared) -> Callable[[int], Examples]:
    """Return a function that gives the training texts and so many copies, the same ones to every row and seed."""
    return functools.lru_cache(maxsize=2)(lambda copies: course.augmented(prepared, copies, course.LAPTOP.base))


def measure(data: str, args) -> None:
    """Run what is missing on one data set."""
    prepared, teacher, reference = taught(data)
    results = Results(FILE, data, course.recipe(prepared, FULL) | {"precision": args.precision})
    rows, texts = variants(FULL), texts_of(prepared)
    if args.general:
        rows = {f"full, {stage1_of(args.general)}": Variant({}, from_general(args.general))}

    def make(name: str, seed: int) -> dict:
        return measured(run(name, rows[name], seed, teacher, texts), teacher, prepared, seed)

    sweep(results, rows, args, make, teacher=reference, command="make ablations")


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = options(__doc__, variants(FULL), seeds=[0, 1, 2])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--general", type=Path, metavar="DIR")
    args = parser.parse_args()
    for data in args.data:
        measure(data, args)


if __name__ == "__main__":
    main()
