"""Knowledge distillation: Hinton's soft targets and TinyBERT's four losses, and the two steps of its second stage.

Equation numbers are those of Jiao et al. 2020 (arXiv 1909.10351v5) unless another paper is named. Every loss is a mean over
real tokens (or pairs of real tokens) only, so padding changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylib.bert import Bert, BertConfig, BertOutput
from tinylib.errors import UserError
from tinylib.student import new_student, start_basis
from tinylib.train import Batch, Examples, History, fit, loader, predict


def soft_target_loss(
    student_logits: Float[Tensor, "B K"], teacher_logits: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return T²·KL(p_teacher ‖ p_student) of the softened distributions, the mean over the batch (Hinton et al. 2015, section 2).

    The factor T² keeps the gradient, T·(p_s − p_t), of one size as T grows. The teacher's side gets no gradient.
    """
    if temperature <= 0:
        raise UserError(f"temperature={temperature} must be greater than 0; 1 leaves the logits as they are")
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hidden_loss(
    student_hidden: Float[Tensor, "B T C"], teacher_hidden: Float[Tensor, "B T C"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference over real tokens and width (eq. 8, the student's side projected already).

    ``mask`` (B, T): True or 1 = real token; None: all are.
    """
    return _state_loss("hidden_loss", student_hidden, teacher_hidden, mask)


def embedding_loss(
    student_embedding: Float[Tensor, "B T C"], teacher_embedding: Float[Tensor, "B T C"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the embedding outputs over real tokens and width (eq. 9)."""
    return _state_loss("embedding_loss", student_embedding, teacher_embedding, mask)


def attention_loss(
    student_scores: Float[Tensor, "B H T S"], teacher_scores: Float[Tensor, "B H T S"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the scores before softmax over heads and pairs of real tokens (eq. 7).

    ``mask`` (B, T): True or 1 = real token; None: all are.
    """
    _same_shape("attention_loss", student_scores, teacher_scores, "give the student as many heads as the teacher")
    difference = (student_scores - teacher_scores.detach()).movedim(1, -1)
    _check_mask("attention_loss", mask, difference)
    pairs = None if mask is None else mask.bool()[:, :, None] & mask.bool()[:, None, :]
    return _masked_mean_square(difference, pairs)


def _state_loss(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    _same_shape(name, student, teacher, "project the student's states first (Projections)")
    difference = student - teacher.detach()
    _check_mask(name, mask, difference)
    return _masked_mean_square(difference, None if mask is None else mask.bool())


def _masked_mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    """Average the squares over the places that the mask keeps and over the last axis, which the mask does not have."""
    if mask is None:
        return difference.square().mean()
    # Filled before squaring, not multiplied after: the padding may hold NaN or inf, whose gradient would be NaN too.
    kept = difference.masked_fill(~mask[..., None], 0.0)
    return kept.square().sum() / (mask.sum().clamp(min=1) * difference.shape[-1])


def _check_mask(name: str, mask: Tensor | None, difference: Tensor) -> None:
    B, T = difference.shape[:2]
    if mask is not None and mask.shape != (B, T):
        raise UserError(f"{name}: mask has shape {tuple(mask.shape)}, not (B, T) = {(B, T)}; pass one entry a token")


def _same_shape(name: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    if student.shape != teacher.shape:
        raise UserError(f"{name}: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; {remedy}")


class LayerMap(tuple):
    """g(1), …, g(M): the teacher layer that each student layer learns from; call it for g(m), with g(0) = 0 (section 3.1)."""

    def __new__(cls, layers: Sequence[int]) -> "LayerMap":
        layers = tuple(int(n) for n in layers)
        if not layers or min(layers) < 1:
            raise UserError(
                f"layer map {layers} must name a teacher layer ≥ 1 for each student layer, such as (2, 3, 5, 6)"
            )
        return super().__new__(cls, layers)

    def __call__(self, m: int) -> int:
        """Return g(m) for 0 ≤ m ≤ M; the embeddings (0) learn from the embeddings."""
        if not 0 <= m <= len(self):
            raise UserError(f"m={m} is no layer of this student; its layers are 0 (the embeddings) to {len(self)}")
        return 0 if m == 0 else self[m - 1]

    @classmethod
    def uniform(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = ⌈m·N/M⌉: evenly spread; 3m for 12 → 4, the paper's choice."""
        cls._check(teacher_layers, student_layers)
        return cls([math.ceil(m * teacher_layers / student_layers) for m in range(1, student_layers + 1)])

    @classmethod
    def top(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = m + N − M: the last layers."""
        cls._check(teacher_layers, student_layers)
        return cls([m + teacher_layers - student_layers for m in range(1, student_layers + 1)])

    @classmethod
    def bottom(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = m: the first layers."""
        cls._check(teacher_layers, student_layers)
        return cls(range(1, student_layers + 1))

    @staticmethod
    def _check(teacher_layers: int, student_layers: int) -> None:
        if not 1 <= student_layers <= teacher_layers:
            raise UserError(f"student_layers={student_layers} must be between 1 and the teacher's {teacher_layers}")


class Projections(nn.Module):
    """Learnt maps from the student's width to the teacher's: W_e for the embeddings and a W_h for each layer (eqs. 8, 9).

    They serve the training only and are thrown away after it.
    """

    def __init__(
        self, student_width: int, teacher_width: int, layers: int, basis: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(layers + 1))
        for linear in self.maps:
            if basis is None:
                linear.weight.data.normal_(0.0, student_width**-0.5, generator=generator)  # keeps the size of its input
            else:  # a student that starts in the basis V reaches the teacher's space by Vᵀ
                linear.weight.data.copy_(basis)

    def forward(self, m: int, hidden: Float[Tensor, "B T Cs"]) -> Float[Tensor, "B T Ct"]:
        """Project the output of student layer m; 0 is the embedding."""
        return self.maps[m](hidden)


class Distiller(nn.Module):
    """A student with its projections: what the intermediate step trains."""

    def __init__(self, student: Bert, projections: Projections):
        super().__init__()
        self.student, self.projections = student, projections


def teacher_forward(teacher: Bert, batch: Batch, hidden: Sequence[int] = (), scores: Sequence[int] = ()) -> BertOutput:
    """Run the teacher as a teacher must run: in evaluation mode (no dropout) and without a graph."""
    if teacher.training:
        raise UserError(
            "the teacher is in training mode, so its dropout would blur what it teaches; call teacher.eval()"
        )
    with torch.inference_mode():
        return teacher(batch["ids"], batch["mask"], batch["segments"], keep_hidden=hidden, keep_scores=scores)


@dataclass(frozen=True)
class Weights:
    """λ of each loss; 0 leaves it out, and nothing is computed for it. The paper sets every one to 1 (section 4.2)."""

    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0


def intermediate_losses(
    student: BertOutput,
    teacher: BertOutput,
    mask: Bool[Tensor, "B T"],
    layer_map: LayerMap,
    project: Callable,
    weights: Weights,
) -> dict[str, Tensor]:
    """Return the weighted embedding, hidden and attention losses, each summed over the mapped layers (eq. 11, 0 ≤ m ≤ M)."""
    losses = {}
    if weights.embedding:
        losses["embedding"] = weights.embedding * embedding_loss(
            project(0, student.hidden_states[0]), teacher.hidden_states[0], mask
        )
    layers = range(1, len(layer_map) + 1)
    if weights.hidden:
        losses["hidden"] = weights.hidden * sum(
            hidden_loss(project(m, student.hidden_states[m]), teacher.hidden_states[layer_map(m)], mask) for m in layers
        )
    if weights.attention:
        losses["attention"] = weights.attention * sum(
            attention_loss(student.scores[m], teacher.scores[layer_map(m)], mask) for m in layers
        )
    return losses


@dataclass(frozen=True)
class Settings:
    """How a student is distilled; the defaults are those of the laptop tier."""

    student: str = "4x312"
    start: str = "teacher"  # see student.new_student
    layer_map: tuple[int, ...] | None = None  # None: LayerMap.uniform
    weights: Weights = Weights()
    temperature: float = 1.0  # "t = 1 works well" (section 4.2)
    epochs_intermediate: int = 3
    lr_intermediate: float = 5e-4
    epochs_prediction: int = 2
    lr_prediction: float = 1e-4
    batch_size: int = 32
    cache_gb: float = 3.0  # teacher outputs are kept in memory up to this size, else computed anew each epoch
    seed: int = 0

    def replace(self, **changes) -> "Settings":
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class TeacherOutputs:
    """A teacher's hidden states and scores for every text, computed once and kept in float16.

    ``batch(rows)`` pads them like the texts. Sentences differ in length, so each row is kept at its own.
    """

    def __init__(self, teacher: Bert, examples: Examples, hidden: Sequence[int], scores: Sequence[int]):
        self.hidden_layers, self.score_layers = tuple(hidden), tuple(scores)
        self.hidden: list[Tensor] = [torch.empty(0)] * len(examples)
        self.scores: list[Tensor] = [torch.empty(0)] * len(examples)
        device = next(teacher.parameters()).device
        for batch in tqdm(loader(examples, 64, shuffle=False), desc="teacher outputs", unit="batch", leave=False):
            out = teacher_forward(
                teacher, {k: v.to(device) for k, v in batch.items()}, self.hidden_layers, self.score_layers
            )
            for i, (row, mask) in enumerate(zip(batch["rows"].tolist(), batch["mask"], strict=True)):
                n = int(mask.sum())
                if hidden:
                    self.hidden[row] = (
                        torch.stack([out.hidden_states[m][i, :n] for m in self.hidden_layers]).half().cpu()
                    )
                if scores:
                    self.scores[row] = (
                        torch.stack([out.scores[m][i, :, :n, :n] for m in self.score_layers]).half().cpu()
                    )

    @staticmethod
    def bytes_needed(teacher: Bert, examples: Examples, hidden: Sequence[int], scores: Sequence[int]) -> int:
        """Return the memory that the outputs would take: 2 bytes a number."""
        n = examples.encoded.lengths
        states = n.sum() * teacher.config.hidden_size * len(hidden)
        return 2 * int(states + n.square().sum() * teacher.config.num_attention_heads * len(scores))

    def batch(self, rows: Sequence[int], length: int, device: torch.device) -> BertOutput:
        """Return the outputs of some rows, padded with zeros to ``length`` tokens."""
        hidden = (
            [F.pad(self.hidden[r], (0, 0, 0, length - self.hidden[r].shape[1])) for r in rows]
            if self.hidden_layers
            else []
        )
        scores = []
        if self.score_layers:
            scores = [
                F.pad(s, (0, length - s.shape[-1], 0, length - s.shape[-1])) for s in (self.scores[r] for r in rows)
            ]
        stack = lambda parts, layers: (  # noqa: E731
            dict(zip(layers, torch.stack(parts, dim=1).to(device).float(), strict=True)) if layers else {}
        )
        return BertOutput(torch.empty(0), None, stack(hidden, self.hidden_layers), stack(scores, self.score_layers))


@dataclass(frozen=True)
class Result:
    """A distilled student and the histories of its two steps."""

    student: Bert
    projections: Projections
    intermediate: History
    prediction: History


def distill_intermediate(
    teacher: Bert,
    student: Bert,
    examples: Examples,
    settings: Settings,
    checkpoint: Path | None = None,
    after_epoch=None,
) -> tuple[Projections, History]:
    """Train the student's inside to look like the teacher's: embedding, hidden and attention losses (section 3.2, step 1)."""
    layer_map = _layer_map(teacher.config, student.config, settings)
    weights = settings.weights
    layers = range(1, len(layer_map) + 1)
    own_hidden = ([0] if weights.embedding else []) + (list(layers) if weights.hidden else [])
    own_scores = list(layers) if weights.attention else []
    their_hidden = sorted({layer_map(m) for m in own_hidden})
    their_scores = sorted({layer_map(m) for m in own_scores})
    basis = None
    if settings.start != "random":
        basis = start_basis(teacher, student.config.hidden_size)
    random = torch.Generator().manual_seed(settings.seed + 1)  # the student itself drew from settings.seed
    projections = Projections(student.config.hidden_size, teacher.config.hidden_size, len(layer_map), basis, random)
    cached = None
    if TeacherOutputs.bytes_needed(teacher, examples, their_hidden, their_scores) <= settings.cache_gb * 1e9:
        cached = TeacherOutputs(teacher, examples, their_hidden, their_scores)

    def losses(pair: Distiller, batch: Batch) -> dict[str, Tensor]:
        if cached:
            told = cached.batch(batch["rows"].tolist(), batch["ids"].shape[1], batch["ids"].device)
        else:
            told = teacher_forward(teacher, batch, their_hidden, their_scores)
        said = pair.student(
            batch["ids"], batch["mask"], batch["segments"], keep_hidden=own_hidden, keep_scores=own_scores
        )
        return intermediate_losses(said, told, batch["mask"], layer_map, pair.projections, weights)

    history = fit(
        Distiller(student, projections), loader(examples, settings.batch_size, seed=settings.seed), losses,
        epochs=settings.epochs_intermediate, lr=settings.lr_intermediate, seed=settings.seed, label="intermediate step",
        checkpoint=checkpoint, after_epoch=after_epoch and (lambda pair, epoch: after_epoch(pair.student, epoch)),
    )  # fmt: skip
    return projections, history


def distill_prediction(
    teacher: Bert, student: Bert, examples: Examples, settings: Settings, checkpoint: Path | None = None,
    after_epoch=None, after_step=None,
) -> History:  # fmt: skip
    """Train the student's logits on the teacher's, soft targets only (eq. 10; section 3.2, step 2)."""
    targets = predict(teacher, examples.encoded, label="teacher logits").clone()  # once a sentence

    def losses(model: Bert, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["ids"], batch["mask"], batch["segments"]).logits
        return {
            "prediction": soft_target_loss(logits, targets[batch["rows"].cpu()].to(logits.device), settings.temperature)
        }

    return fit(
        student, loader(examples, settings.batch_size, seed=settings.seed + 1), losses,
        epochs=settings.epochs_prediction, lr=settings.lr_prediction, seed=settings.seed + 1, label="prediction step",
        checkpoint=checkpoint, after_epoch=after_epoch, after_step=after_step,
    )  # fmt: skip


def distill(
    teacher: Bert, examples: Examples, settings: Settings | None = None, student: Bert | None = None,
    folder: Path | None = None, after_epoch=None,
) -> Result:  # fmt: skip
    """Run TinyBERT's task distillation: intermediate step, then prediction step.

    ``student`` starts from ``settings.start`` unless one is given (a student of general distillation, say). With ``folder``
    each step checkpoints there and a second call goes on where the first one stopped.
    """
    settings = settings or Settings()
    if student is None:
        config = student_config(teacher, settings.student)
        layer_map = _layer_map(teacher.config, config, settings)
        student = new_student(teacher, config, layer_map, settings.start, torch.Generator().manual_seed(settings.seed))
    student.to(next(teacher.parameters()).device)
    steps = [folder / f"{name}.safetensors" if folder else None for name in ("intermediate", "prediction")]
    projections, intermediate = distill_intermediate(teacher, student, examples, settings, steps[0], after_epoch)
    prediction = distill_prediction(teacher, student, examples, settings, steps[1], after_epoch)
    return Result(student, projections, intermediate, prediction)


def student_config(teacher: Bert, shape: str) -> BertConfig:
    """Read a shape such as "4x312" and give it the teacher's number of heads, which the attention loss compares one by one."""
    config, heads = BertConfig.parse(shape), teacher.config.num_attention_heads
    if config.hidden_size % heads:
        width = max(heads, heads * round(config.hidden_size / heads))
        raise UserError(
            f"student {shape}: its width must be a multiple of the teacher's {heads} heads; try {config.num_hidden_layers}x{width}"
        )
    return config.replace(num_attention_heads=heads)


def _layer_map(teacher: BertConfig, student: BertConfig, settings: Settings) -> LayerMap:
    N, M = teacher.num_hidden_layers, student.num_hidden_layers
    layer_map = LayerMap(settings.layer_map or LayerMap.uniform(N, M))
    if len(layer_map) != M or max(layer_map) > N:
        raise UserError(f"layer map {tuple(layer_map)} must name {M} teacher layers between 1 and {N}")
    return layer_map
