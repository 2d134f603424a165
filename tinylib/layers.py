"""Matching a student's layers with a teacher's: the layer map, the projections, the teacher's outputs, the losses by layer.

Both stages of TinyBERT train on these (Jiao et al. 2020, section 3): general distillation on unlabelled text, and the
intermediate step of task distillation. Layers are numbered as in the paper: 0 is the embedding output.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylib.bert import Bert, BertConfig, BertOutput
from tinylib.errors import UserError
from tinylib.losses import ATTENTION, embedding_loss, hidden_loss
from tinylib.student import start_basis
from tinylib.train import Batch, Examples, LossFn, loader


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


def teacher_forward(
    teacher: Bert, batch: Batch, hidden: Sequence[int] = (), scores: Sequence[int] = (), relations: Sequence[int] = ()
) -> BertOutput:
    """Run the teacher as a teacher must run: in evaluation mode (no dropout) and without a graph."""
    if teacher.training:
        raise UserError(
            "the teacher is in training mode, so its dropout would blur what it teaches; call teacher.eval()"
        )
    with torch.inference_mode():
        return teacher(
            batch["ids"], batch["mask"], batch["segments"], keep_hidden=hidden, keep_scores=scores, keep_relations=relations
        )


@dataclass(frozen=True)
class Weights:
    """λ of each loss; 0 leaves it out, and nothing is computed for it. The paper sets every one to 1 (section 4.2)."""

    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    # "scores" before the softmax, as the paper does, "probabilities" after it, or "values": MiniLM's value relations
    attention_on: str = "scores"

    def __post_init__(self):
        if self.attention_on not in ATTENTION:
            raise UserError(f"attention_on={self.attention_on!r} is not one of {', '.join(ATTENTION)}")


def losses_by_layer(
    student: BertOutput, teacher: BertOutput, mask: Bool[Tensor, "B T"], layer_map: LayerMap, project: Callable,
    weights: Weights,
) -> dict[tuple[str, int], Tensor]:  # fmt: skip
    """Return each loss whose λ is not 0, unweighted, under its name and the student's layer (0 ≤ m ≤ M)."""
    found: dict[tuple[str, int], Tensor] = {}
    if weights.embedding:
        projected = project(0, student.hidden_states[0])
        found["embedding", 0] = embedding_loss(projected, teacher.hidden_states[0], mask)
    for m in range(1, len(layer_map) + 1):
        n = layer_map(m)
        if weights.hidden:
            found["hidden", m] = hidden_loss(project(m, student.hidden_states[m]), teacher.hidden_states[n], mask)
        if weights.attention:
            said, told = (out.relations if weights.attention_on == "values" else out.scores for out in (student, teacher))
            found["attention", m] = ATTENTION[weights.attention_on](said[m], told[n], mask)
    return found


def intermediate_losses(
    student: BertOutput, teacher: BertOutput, mask: Bool[Tensor, "B T"], layer_map: LayerMap, project: Callable,
    weights: Weights,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the weighted embedding, hidden and attention losses, each summed over the mapped layers (eq. 11, 0 ≤ m ≤ M)."""
    losses: dict[str, Tensor] = {}
    for (name, _), value in losses_by_layer(student, teacher, mask, layer_map, project, weights).items():
        losses[name] = losses.get(name, 0.0) + getattr(weights, name) * value
    return losses


class TeacherOutputs:
    """A teacher's hidden states, scores and value relations for every text, computed once and kept in float16.

    ``batch(rows)`` pads them like the texts. Sentences differ in length, so each row is kept at its own.
    """

    def __init__(
        self, teacher: Bert, examples: Examples, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = ()
    ):
        self.hidden_layers, self.score_layers, self.relation_layers = tuple(hidden), tuple(scores), tuple(relations)
        self.hidden: list[Tensor] = [torch.empty(0)] * len(examples)
        self.scores: list[Tensor] = [torch.empty(0)] * len(examples)  # and the relations, which have the same shape
        device = next(teacher.parameters()).device
        for batch in tqdm(loader(examples, 64, shuffle=False), desc="teacher outputs", unit="batch", leave=False):
            out = teacher_forward(teacher, {k: v.to(device) for k, v in batch.items()}, hidden, scores, relations)
            square = [out.scores[m] for m in self.score_layers] + [out.relations[m] for m in self.relation_layers]
            for i, (row, mask) in enumerate(zip(batch["rows"].tolist(), batch["mask"], strict=True)):
                n = int(mask.sum())
                if hidden:
                    self.hidden[row] = (
                        torch.stack([out.hidden_states[m][i, :n] for m in self.hidden_layers]).half().cpu()
                    )
                if square:
                    self.scores[row] = torch.stack([pairs[i, :, :n, :n] for pairs in square]).half().cpu()

    @staticmethod
    def bytes_needed(
        teacher: Bert, examples: Examples, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = ()
    ) -> int:
        """Return the memory that the outputs would take: 2 bytes a number."""
        n = examples.lengths
        states = n.sum() * teacher.config.hidden_size * len(hidden)
        pairs = n.square().sum() * teacher.config.num_attention_heads * (len(scores) + len(relations))
        return 2 * int(states + pairs)

    @torch.autocast("cpu", enabled=False)  # it cannot stack float16, and nothing is computed here
    def batch(self, rows: Sequence[int], length: int, device: torch.device) -> BertOutput:
        """Return the outputs of some rows, padded with zeros to ``length`` tokens."""
        hidden = (
            [F.pad(self.hidden[r], (0, 0, 0, length - self.hidden[r].shape[1])) for r in rows]
            if self.hidden_layers
            else []
        )
        square = []
        if self.score_layers or self.relation_layers:
            square = [
                F.pad(s, (0, length - s.shape[-1], 0, length - s.shape[-1])) for s in (self.scores[r] for r in rows)
            ]
        by_layer = lambda parts: torch.stack(parts, dim=1).to(device).float() if parts else ()  # noqa: E731
        states, square, S = by_layer(hidden), by_layer(square), len(self.score_layers)
        return BertOutput(
            torch.empty(0), None, dict(zip(self.hidden_layers, states, strict=True)),
            dict(zip(self.score_layers, square[:S], strict=True)), dict(zip(self.relation_layers, square[S:], strict=True)),
        )  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """The layers whose outputs a set of losses needs: the student's own and the teacher's that they are mapped to."""

    hidden: tuple[int, ...]
    scores: tuple[int, ...]
    relations: tuple[int, ...]
    teacher_hidden: tuple[int, ...]
    teacher_scores: tuple[int, ...]
    teacher_relations: tuple[int, ...]

    @classmethod
    def by(cls, layer_map: LayerMap, weights: Weights) -> "Wanted":
        """Read them off the weights: nothing is kept for a loss that is left out."""
        layers = tuple(range(1, len(layer_map) + 1))
        hidden = ((0,) if weights.embedding else ()) + (layers if weights.hidden else ())
        attention = layers if weights.attention else ()
        scores, relations = ((), attention) if weights.attention_on == "values" else (attention, ())
        own = hidden, scores, relations
        return cls(*own, *(tuple(sorted({layer_map(m) for m in layers})) for layers in own))


def matching_loss(
    teacher: Bert, layer_map: LayerMap, weights: Weights, cached: TeacherOutputs | None = None, by_layer: bool = False
) -> LossFn:
    """Return the loss function of a ``Distiller`` that ``train.fit`` minimises; ``by_layer`` gives ``losses_by_layer``."""
    wanted = Wanted.by(layer_map, weights)
    measure = losses_by_layer if by_layer else intermediate_losses

    def losses(pair: Distiller, batch: Batch) -> dict:
        if cached:
            told = cached.batch(batch["rows"].tolist(), batch["ids"].shape[1], batch["ids"].device)
        else:
            told = teacher_forward(
                teacher, batch, wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations
            )
        said = pair.student(
            batch["ids"], batch["mask"], batch["segments"],
            keep_hidden=wanted.hidden, keep_scores=wanted.scores, keep_relations=wanted.relations,
        )  # fmt: skip
        return measure(said, told, batch["mask"], layer_map, pair.projections, weights)

    return losses


def first_projections(teacher: Bert, student: BertConfig, start: str, seed: int) -> Projections:
    """Return projections to begin with: the transposed basis that the student was cut in, or random ones."""
    basis = None if start == "random" else start_basis(teacher, student.hidden_size)
    random = torch.Generator().manual_seed(seed + 1)  # the student itself drew from the seed
    return Projections(
        student.hidden_size, teacher.config.hidden_size, student.num_hidden_layers, basis, random
    )


def student_config(teacher: Bert, shape: str) -> BertConfig:
    """Read a shape such as "4x312" and give it the teacher's number of heads, which the attention loss compares one by one."""
    config, heads = BertConfig.parse(shape), teacher.config.num_attention_heads
    if config.hidden_size % heads:
        width = max(heads, heads * round(config.hidden_size / heads))
        raise UserError(
            f"student {shape}: its width must be a multiple of the teacher's {heads} heads; try {config.num_hidden_layers}x{width}"
        )
    return config.replace(num_attention_heads=heads)


def choose_map(teacher: BertConfig, student: BertConfig, layers: Sequence[int] | None) -> LayerMap:
    """Return the layer map that was asked for, or the uniform one, checked against both models."""
    N, M = teacher.num_hidden_layers, student.num_hidden_layers
    layer_map = LayerMap(layers or LayerMap.uniform(N, M))
    if len(layer_map) != M or max(layer_map) > N:
        raise UserError(f"layer map {tuple(layer_map)} must name {M} teacher layers between 1 and {N}")
    return layer_map
