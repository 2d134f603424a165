"""What makes general distillation, TinyBERT's stage 1, better at equal cost (`make stage1`): where the student starts, which
layers it learns from, what of the attention is matched, its shape, its vocabulary.

Each variant gets the operations of --steps steps of the default (``general.Settings``), and so fewer steps where one costs
more. Its losses on held-out text are those of ``general.distill_general``, attention on scores whatever it trained on; they
compare variants with the same map. All share the second yardstick: one epoch of soft targets on movie reviews, and then how
close the student is to its teacher. Rows without stage 1 and the shipped student show the scale.

Writes data/results/stage1.json after each run; a run that the file already holds (same settings, corpus, data and precision)
is not repeated. Options: --steps, --seeds 0 1 2, --only NAME …, --precision, --out FILE, and --general DIR: then one row is made,
for the student that ``tinylib general`` made there.
"""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from runs import FOLDER, LAYERS, Results, measured, options, stage1_of, sweep, taught
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinylib import corpus as corpora
from tinylib import course, distill, general, layers, measure, models
from tinylib.bert import Bert
from tinylib.layers import Distiller, LayerMap, Projections
from tinylib.text import load_tokenizer

FILE = FOLDER / "stage1.json"
BASE, CORPUS, DATA = course.LAPTOP.base, "corpus", "movie_reviews"
COMMON = 10  # times that a piece occurs in corpus and task, to have a vector of its own in the smaller vocabulary
TASK = distill.Settings(epochs_intermediate=0, epochs_prediction=1, lr_prediction=1e-4)


@dataclass(frozen=True)
class Variant:
    """One row of the table: what of the default stage 1 is changed."""

    changes: dict = field(default_factory=dict)
    common: int = 0  # pieces that occur less often are read as [UNK]
    start: str | None = None  # no stage 1 of its own: the task starts here (distill.first_student)
    folder: Path | None = None  # nor here: a general student, whose stage 1 is done


@dataclass(frozen=True)
class Materials:
    """What all runs share: the pretrained teacher and the task's, the corpus and the task's data."""

    pretrained: Bert
    corpus: dict[str, corpora.Corpus]
    teacher: Bert
    prepared: course.Prepared


def variants() -> dict[str, Variant]:
    """Name the rows of the table."""
    w = general.Settings().weights
    shapes = {shape: Variant({"student": shape}) for shape in ("4x264", "4x384", "3x384", "6x240")}
    return {
        "default": Variant(),  # 4x312 cut from the teacher, uniform map, scores
        "random start": Variant({"start": "random"}),
        "cut along the states": Variant({"start": "states"}),
        "cut and fitted": Variant({"start": "fitted"}),
        "SVD embeddings, random layers": Variant({"start": "embeddings"}),
        "top map": Variant({"layer_map": tuple(LayerMap.top(*LAYERS))}),
        "bottom map": Variant({"layer_map": tuple(LayerMap.bottom(*LAYERS))}),
        "attention probabilities": Variant({"weights": replace(w, attention_on="probabilities")}),
        "value relations": Variant({"weights": replace(w, attention_on="values")}),
        "without attention loss": Variant({"weights": replace(w, attention=0.0)}),
        "a tenth of the attention loss": Variant({"weights": replace(w, attention=0.1)}),
        **shapes,
        f"pieces that occur {COMMON} times": Variant(common=COMMON),
        # many more steps: what the short runs are on the way to
        "the shipped student": Variant(folder=models.shipped_folder() / general.SHIPPED["4x312"]),
        "no stage 1, cut from the teacher": Variant(start="teacher"),
        "no stage 1, cut along the states": Variant(start="states"),
        "no stage 1, cut and fitted": Variant(start="fitted"),
        "6x240, no stage 1, cut along the states": Variant({"student": "6x240"}, start="states"),
        "6x240, no stage 1, cut and fitted": Variant({"student": "6x240"}, start="fitted"),
        "no stage 1, random start": Variant(start="random"),
    }


def operations(teacher: Bert, settings: general.Settings) -> int:
    """Count the operations of one step on a sequence of full length: matrix products, as lesson 07 counts them.

    Against ``measure.flops`` this has what a loss adds: the teacher's scores once more, the value projections once more.
    """
    student = general.first_student(teacher, settings.replace(start="random"))
    layer_map = layers.choose_map(teacher.config, student.config, settings.layer_map)
    pair = Distiller(student, layers.first_projections(teacher, student.config, "random", settings.seed)).to(course.device())
    ids = torch.zeros(1, settings.max_length, dtype=torch.long, device=course.device())
    batch = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "segments": ids}
    # fused attention would not be counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(layers.matching_loss(teacher, layer_map, settings.weights)(pair, batch).values()).backward()
    return counter.get_total_flops()


def rows_of(given: Materials, times: int) -> Tensor:
    """Return each piece's row of the word table: its own if it occurs so often in the training texts, else [UNK]'s."""
    tokenizer, size = load_tokenizer(BASE), given.pretrained.config.vocab_size
    sources = (given.corpus["train"].encoded(range(len(given.corpus["train"]))), given.prepared.encoded["train"])
    counts = sum(torch.cat(encoded.ids).bincount(minlength=size) for encoded in sources)
    rare = counts < times
    rare[tokenizer.all_special_ids] = False
    return torch.arange(size).masked_fill(rare, tokenizer.unk_token_id)


def read_as(student: Bert, rows: Tensor) -> None:
    """Let the student read rare pieces as [UNK], which trains it as a table without their rows would."""
    student.embeddings.word.register_forward_pre_hook(lambda module, ids: (rows.to(ids[0].device)[ids[0]],))


def rounded(measured: dict[str, float]) -> dict[str, float]:
    """Return held-out losses as they are stored."""
    return {name: round(value, 4) for name, value in measured.items() if name != "step"}


def first_stage(
    variant: Variant, settings: general.Settings, given: Materials
) -> tuple[Bert, Projections | None, dict]:
    """Return the student that the task starts from, with the task's head, its projections and its part of the row."""
    if variant.start:
        task = TASK.replace(start=variant.start, seed=settings.seed, student=settings.student)
        texts = given.prepared.examples("train")
        student, projections = distill.first_student(given.teacher, task, texts)
        return student, projections, {"steps": 0, "parameters": measure.parameters(student)}
    if variant.folder:
        student, projections = general.load(variant.folder, given.teacher)
        told = general.card(variant.folder)
        row = {"steps": told["settings"]["steps"], "seconds": told["seconds"], "losses": rounded(told["validation"][-1])}
        return student, projections, row | {"parameters": measure.parameters(student)}
    seen = general.first_texts(settings, given.corpus)
    student = general.first_student(given.pretrained, settings, general.first_basis(given.pretrained, settings, seen), seen)
    rows = rows_of(given, variant.common) if variant.common else torch.arange(student.config.vocab_size)
    read_as(student, rows)
    result = general.distill_general(given.pretrained, given.corpus, settings, student)
    losses = rounded(result.history.measured[-1])
    row = {"steps": settings.steps, "seconds": round(result.history.seconds), "losses": losses}
    # as lesson 09 gets it: in float16, with the teacher's head cut to size
    with tempfile.TemporaryDirectory() as folder:
        card = general.card_of(result, settings, BASE, CORPUS, given.corpus["train"].tokens, "", "benchmarks/stage1.py")
        general.save(result, given.pretrained, Path(folder), card)
        student, projections = general.load(Path(folder), given.teacher)
    read_as(student, rows)
    unread = (len(rows) - len(rows.unique())) * student.config.hidden_size
    return student, projections, row | {"parameters": measure.parameters(student) - unread}


def run(variant: Variant, settings: general.Settings, given: Materials) -> dict:
    """Run stage 1, then the short task, and measure: costs, held-out losses by layer, closeness to the teacher."""
    student, projections, row = first_stage(variant, settings, given)
    task = TASK.replace(seed=settings.seed)
    result = distill.distill(given.teacher, given.prepared.examples("train"), task, student, projections)
    return row | measured(result.student, given.teacher, given.prepared, settings.seed)


def recipe(settings: general.Settings, given: Materials, precision: str) -> dict:
    """Return what decides the runs; with another recipe they are started anew."""
    return {
        "corpus": corpora.fingerprint(CORPUS), "data": given.prepared.fingerprint, "precision": precision,
        "general": asdict(settings), "task": asdict(TASK),
    }  # fmt: skip


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = options(__doc__, variants(), seeds=[0, 1, 2])
    parser.add_argument("--general", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    names = {stage1_of(args.general): Variant(folder=args.general)} if args.general else variants()
    prepared, teacher, reference = taught(DATA)
    default = general.Settings(steps=args.steps, measure_every=10 * args.steps)  # at the end alone
    corpus = corpora.load(CORPUS, BASE, default.max_length)
    given = Materials(Bert.from_pretrained(BASE, head=None).to(course.device()), corpus, teacher, prepared)
    results = Results(args.out, DATA, recipe(default, given, args.precision))
    budget = args.steps * operations(given.pretrained, default)

    def make(name: str, seed: int) -> dict:
        variant = names[name]
        settings = default.replace(seed=seed, **variant.changes)
        settings = settings.replace(steps=round(budget / operations(given.pretrained, settings)))
        return run(variant, settings, given)

    sweep(results, names, args, make, teacher=reference, command="make stage1")


if __name__ == "__main__":
    main()
