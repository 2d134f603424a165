"""Task distillation, the second stage of TinyBERT: the intermediate step, then the prediction step.

Equation numbers are those of Jiao et al. 2020 (arXiv 1909.10351v5). The losses and the matching of layers, which the first
stage shares, are offered under this module's name too.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tinylib import general
from tinylib.bert import Bert, BertConfig
from tinylib.checkpoint import steps_done
from tinylib.encoders import Teacher
from tinylib.errors import UserError, UserNote
from tinylib.layers import (
    Distiller,
    LayerMap,
    Projections,
    TeacherOutputs,
    Wanted,
    Weights,
    choose_map,
    counts_of,
    drop_outputs,
    first_projections,
    fitting,
    intermediate_losses,
    matching_loss,
    student_config,
    teacher_forward,
    teacher_logits,
    teacher_outputs,
)
from tinylib.losses import (
    attention_loss,
    attention_probability_loss,
    embedding_loss,
    hidden_loss,
    prediction_loss,
    soft_target_loss,
)
from tinylib.paging import aside
from tinylib.student import SEEN, automatic_start, new_student, states_basis, unseeing
from tinylib.tasks import standard_units
from tinylib.train import Batch, Examples, History, fit, loader

__all__ = [
    "Distiller",
    "LayerMap",
    "Projections",
    "Result",
    "Settings",
    "TeacherOutputs",
    "Weights",
    "attention_loss",
    "attention_probability_loss",
    "distill",
    "distill_intermediate",
    "distill_prediction",
    "embedding_loss",
    "first_student",
    "hidden_loss",
    "intermediate_losses",
    "soft_target_loss",
    "student_config",
    "teacher_forward",
]

@dataclass(frozen=True)
class Settings:
    """How a student is distilled; the defaults are those of the laptop tier."""

    student: str = "4x312"
    start: str = "general"  # the shipped general student where one fits this teacher, else "states" where its layers can be cut
    layer_map: tuple[int, ...] | None = None  # None: LayerMap.uniform
    augment: int = 0  # copies of each training text (course.augmented)
    weights: Weights = Weights()
    temperature: float = 1.0  # "t = 1 works well" (section 4.2)
    epochs_intermediate: int = 3
    lr_intermediate: float = 5e-4
    epochs_prediction: int = 2
    lr_prediction: float = 1e-4
    batch_size: int = 32
    cache_gb: float = 3.0  # teacher outputs are kept on disk up to this size, else computed anew each epoch
    cache_dtype: str = "float16"  # or "int8", half the room
    seed: int = 0

    def replace(self, **changes) -> "Settings":
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Result:
    """A distilled student and the histories of its two steps."""

    student: Bert
    projections: Projections
    intermediate: History
    prediction: History


def distill_intermediate(
    teacher: Teacher,
    student: Bert,
    examples: Examples,
    settings: Settings,
    checkpoint: Path | None = None,
    after_epoch=None,
    projections: Projections | None = None,
    keep_outputs: bool = False,
) -> tuple[Projections, History]:
    """Train the student's inside to look like the teacher's: embedding, hidden and attention losses (section 3.2, step 1).

    The teacher's outputs are kept on disk meanwhile, in ``settings.cache_dtype``, if ``settings.cache_gb`` allows
    (``layers.teacher_outputs``), and longer with ``keep_outputs``, for another run on the same texts. A student of
    ``first_student`` wants the ``projections`` that came with it; without any they begin in the basis that ``settings.start``
    names, for "general" in the word table's. Raises UserError for a layer map that does not fit, for ``settings.weights`` that
    are all 0, and where the disk has no room for the outputs.
    """
    layer_map = choose_map(teacher.config, student.config, settings.layer_map)
    if projections is None:
        start, basis = settings.start, None
        if start in SEEN:  # of a run that goes on its checkpoint holds them
            going_on = steps_done(checkpoint)
            start, basis = (unseeing(start), None) if going_on else _begin(teacher, student.config, settings, examples)
        projections = first_projections(teacher, student.config, start, settings.seed, basis)
    weights = fitting(teacher, settings.weights, say=True)
    if settings.epochs_intermediate and not (weights.embedding or weights.hidden or weights.attention):
        raise UserError("the weights are all 0, so the intermediate step teaches nothing; leave it out with epochs_intermediate=0")
    wanted, outputs = Wanted.by(layer_map, weights), contextlib.nullcontext()
    layers = wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations
    heads = math.gcd(teacher.config.num_attention_heads, student.config.num_attention_heads)
    size = TeacherOutputs.bytes_needed(teacher, examples, *layers, heads, settings.cache_dtype)
    batches = loader(examples, settings.batch_size, seed=settings.seed)
    left = settings.epochs_intermediate * len(batches) > steps_done(checkpoint)  # else the teacher has nothing more to say
    if left and size <= settings.cache_gb * 1e9:
        outputs = teacher_outputs(
            teacher, examples, *layers, keep=keep_outputs, heads=heads, dtype=settings.cache_dtype
        )
    elif left:
        small = TeacherOutputs.bytes_needed(teacher, examples, *layers, heads, "int8")
        _say_uncached(size, settings, small <= settings.cache_gb * 1e9)
    elif settings.epochs_intermediate and not keep_outputs:  # a run that stopped just before it deleted them
        drop_outputs(teacher, examples, *layers, heads, settings.cache_dtype)
    with outputs as cached, aside(teacher) if cached else contextlib.nullcontext():
        history = fit(
            Distiller(student, projections), batches,
            matching_loss(teacher, layer_map, weights, cached), counts=counts_of(weights),
            epochs=settings.epochs_intermediate, lr=settings.lr_intermediate, seed=settings.seed, label="intermediate step",
            checkpoint=checkpoint, after_epoch=after_epoch and (lambda pair, epoch: after_epoch(pair.student, epoch)),
        )  # fmt: skip
    return projections, history


def _say_uncached(size: int, settings: Settings, fits_halved: bool) -> None:
    """Tell that the teacher works anew in every epoch, and what would spare it that."""
    epochs, needed = settings.epochs_intermediate, math.ceil(size / 1e8) / 10
    if epochs > 1 and settings.cache_gb > 0:  # 0 is how one asks for it
        half = " or --cache-dtype int8, which halves it," if fits_halved else ""
        warnings.warn(
            f"the teacher's outputs would take {needed:g} GB on the disk, more than the {settings.cache_gb:g} that it may, so it "
            f"computes them anew in each of {epochs} epochs; --cache-gb {needed:g}{half} spares it that", UserNote, stacklevel=3,
        )  # fmt: skip


def distill_prediction(
    teacher: Teacher, student: Bert, examples: Examples, settings: Settings, checkpoint: Path | None = None,
    after_epoch=None, after_step=None,
) -> History:  # fmt: skip
    """Train the student's logits on the teacher's, soft targets only (eq. 10; section 3.2, step 2; ``prediction_loss``).

    The teacher's are computed once a text, or not at all where the intermediate step has (``layers.teacher_logits``). Raises
    UserError for a student that has not the teacher's labels in the teacher's order, and for a teacher without any.
    """
    if not settings.epochs_prediction and student.config.head != "regression":  # whose head still learns its unit below
        student.eval()
        return History()
    check_labels(teacher, student)
    targets = teacher_logits(teacher, examples.encoded)

    def losses(model: Bert, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["ids"], batch["mask"], batch["segments"]).logits
        return {
            "prediction": prediction_loss(logits, wanted[batch["rows"].cpu()].to(logits.device), settings.temperature)
        }

    with aside(teacher), standard_units(student, examples.encoded, targets) as wanted:
        return fit(
            student, loader(examples, settings.batch_size, seed=settings.seed + 1), losses,
            epochs=settings.epochs_prediction, lr=settings.lr_prediction, seed=settings.seed + 1, label="prediction step",
            checkpoint=checkpoint, after_epoch=after_epoch, after_step=after_step,
        )  # fmt: skip


def check_labels(teacher: Teacher, student: Bert) -> None:
    """Raise UserError unless the student's head gives what the teacher's does: a score, or a logit for each of the same labels.

    Labels that nobody named (LABEL_0, …) go with any, if they are as many.
    """
    ours, theirs = student.config, teacher.config
    if not theirs.outputs:
        raise UserError("the teacher has no labels to teach in the prediction step; fine-tune it first, or set epochs_prediction=0")
    differ = ours.labels != theirs.labels and not (ours.unnamed or theirs.unnamed)
    if ours.outputs != theirs.outputs or (ours.outputs > 1 and differ):
        said, told = (", ".join(config.labels) or "none" for config in (ours, theirs))
        remedy = "give it the same labels in the same order"
        raise UserError(f"the student's labels are {said}, the teacher's {told} (in this order); {remedy}")


def first_student(
    teacher: Teacher, settings: Settings, examples: Examples | None = None
) -> tuple[Bert, Projections]:
    """Return the student that ``settings.start`` asks for and its projections: a general student's own, else new ones.

    examples: the texts that a start at "states" or "fitted" looks at (``student.new_student``); with them "states" is also what
    "general" falls back on where no general student is shipped for this teacher. Raises UserError as ``student.new_student``.
    """
    config = student_config(teacher, settings.student)
    layer_map = choose_map(teacher.config, config, settings.layer_map)
    if settings.start == "general" and (folder := general.shipped_for(teacher, config)):
        return general.load(folder, teacher)
    start, basis = _begin(teacher, config, settings, examples)
    if start == "random" and settings.start == "general":
        why = f"a student of width {config.hidden_size} is wider than its teacher ({teacher.config.hidden_size})"
        warnings.warn(f"{why}, so it starts from random weights", UserNote, stacklevel=2)
    texts = None if examples is None else examples.encoded
    student = new_student(teacher, config, layer_map, start, torch.Generator().manual_seed(settings.seed), basis, texts)
    return student, first_projections(teacher, config, start, settings.seed, basis)


def _begin(
    teacher: Teacher, student: BertConfig, settings: Settings, examples: Examples | None
) -> tuple[str, Float[Tensor, "Ct Cs"] | None]:
    """Return the start that the settings come to without a general student's help, and the basis of one that texts are seen for."""
    start = settings.start
    if start == "general":
        start = automatic_start(teacher, student.hidden_size)
        if start == "teacher" and examples is not None and not general.shipped_for(teacher, student):
            start = "states"
    if start not in SEEN or examples is None:
        return start, None
    layer_map = choose_map(teacher.config, student, settings.layer_map)
    return start, states_basis(teacher, examples.encoded, (0, *layer_map), student.hidden_size)


def distill(
    teacher: Teacher, examples: Examples, settings: Settings | None = None, student: Bert | None = None,
    projections: Projections | None = None, folder: Path | None = None, after_epoch=None, after_step=None,
) -> Result:  # fmt: skip
    """Run TinyBERT's task distillation: intermediate step, then prediction step.

    ``student`` starts from ``settings.start`` unless one is given (a student of general distillation, say, with its
    ``projections``). With ``folder``
    each step checkpoints there and a second call goes on where the first one stopped. ``after_step`` is called after each
    step of the prediction step: ``prune.while_distilling`` gives one under which the student loses weights as it learns.
    Raises UserError, before the first step, for a teacher that has no labels or others than the student.
    """
    settings = settings or Settings()
    steps = [folder / f"{name}.safetensors" if folder else None for name in ("intermediate", "prediction")]
    if student is None and steps_done(steps[0]):  # which holds what is trained already: any student of its shape will do
        student, projections = first_student(teacher, settings.replace(start=unseeing(settings.start)))
    elif student is None:
        student, projections = first_student(teacher, settings, examples)
    if settings.epochs_prediction or student.config.head == "regression":
        check_labels(teacher, student)
    student.to(next(teacher.parameters()).device)
    projections, intermediate = distill_intermediate(teacher, student, examples, settings, steps[0], after_epoch, projections)
    prediction = distill_prediction(teacher, student, examples, settings, steps[1], after_epoch, after_step)
    return Result(student, projections, intermediate, prediction)
