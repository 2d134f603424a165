"""Where a student starts: random, with the teacher's embeddings, or cut out of the teacher's own matrices.

A narrower student lives in a subspace of the teacher's hidden space: V (C_t, C_s) has orthonormal columns, and the student's
hidden states stand for h·V. ``svd_basis`` takes V from the word embeddings by truncated SVD (Eckart and Young 1936: no
other rank-C_s table is closer in squared error), ``states_basis`` from the hidden states of texts. ``fitted.fit_to_states`` mends
with such texts what a cut breaks.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tinylib.bert import Bert, BertConfig
from tinylib.encoders import Encoder, Teacher
from tinylib.errors import UserError, UserNote
from tinylib.fitted import evaluating, fit_to_states, keep_neurons
from tinylib.losses import fine
from tinylib.text import Encoded, LengthBuckets, pad

STARTS = ("random", "embeddings", "teacher", "states", "fitted")
SEEN = ("states", "fitted")  # of these, those that texts are needed for
FEW = 1024  # texts that a basis is taken from


def unseeing(start: str) -> str:
    """Return a start for a student whose weights a checkpoint replaces at once: the same, but one that looks at no texts."""
    return "general" if start in SEEN else start


def svd_basis(table: Float[Tensor, "V C"], width: int) -> Float[Tensor, "C Cs"]:
    """Return the ``width`` leading right singular vectors of an embedding table, as columns.

    Raises UserError if the table has fewer columns.
    """
    if width > table.shape[1]:
        raise UserError(f"student width={width} is greater than the teacher's {table.shape[1]}; choose start='random'")
    # eigenvectors of the (C, C) Gram matrix: the same vectors as of the SVD of (V, C), at a hundredth of the work
    return _leading((table.T @ table).double(), width).to(table.dtype)


def _leading(gram: Float[Tensor, "C C"], width: int) -> Float[Tensor, "C Cs"]:
    return torch.linalg.eigh(gram)[1].flip(1)[:, :width]


@torch.inference_mode()
def _gram(teacher: Teacher, encoded: Encoded, layers: Sequence[int]) -> Float[Tensor, "C C"]:
    """Return the sum of hᵀh over all real tokens of the texts and the teacher's layers, in float64."""
    device, C = next(teacher.parameters()).device, teacher.config.hidden_size
    total = torch.zeros(C, C, dtype=torch.float64, device=device)
    with evaluating(teacher):
        for rows in LengthBuckets(encoded.lengths, 32, shuffle=False):
            batch = {name: value.to(device) for name, value in pad(encoded, rows).items()}
            states = teacher(batch["ids"], batch["mask"], batch["segments"], keep_hidden=layers).hidden_states
            for n in layers:
                h = states[n][batch["mask"]].double()
                total += h.T @ h
    return total


def states_basis(teacher: Teacher, encoded: Encoded, layers: Sequence[int], width: int) -> Float[Tensor, "C Cs"]:
    """Return the ``width`` directions that keep most of the hidden states of the teacher's ``layers`` (0: the embeddings).

    They are the leading principal components, the mean not taken off, of the states of all tokens of the first ``FEW`` texts:
    one basis for all layers, as a student has one. The identity if the student is as wide as the teacher. Raises UserError if it
    is wider, and for no texts.
    """
    C = teacher.config.hidden_size
    if width > C:
        raise UserError(f"student width={width} is greater than the teacher's {C}; choose start='random'")
    if not len(encoded):
        raise UserError("there are no texts whose hidden states could be seen; give some, or start from 'teacher'")
    device = next(teacher.parameters()).device
    if width == C:
        return torch.eye(width, device=device)
    some = encoded.select(range(min(FEW, len(encoded))))
    return _leading(_gram(teacher, some, tuple(dict.fromkeys(layers))), width).float().clone()


def start_basis(teacher: Teacher, width: int) -> Float[Tensor, "C Cs"]:
    """Return the basis that a student of this width starts in: the identity if it is as wide as the teacher.

    Raises UserError if it is wider.
    """
    table = fine(_tables(teacher)[0]["word"])
    return torch.eye(width, device=table.device) if width == table.shape[1] else svd_basis(table, width)


def _tables(teacher: Teacher) -> tuple[dict[str, Tensor], nn.LayerNorm | None]:
    """Return the teacher's embedding tables, each as wide as its layers, and their norm, as far as it has them."""
    if isinstance(teacher, Encoder):
        return teacher.embedding_tables()
    own = teacher.embeddings
    return {name: getattr(own, name).weight.detach() for name in ("word", "position", "segment")}, own.norm


def automatic_start(teacher: Teacher, width: int) -> str:
    """Return the start that takes most from this teacher: its layers, else its embeddings, else nothing (a wider student)."""
    if width > teacher.config.hidden_size:
        return "random"
    return "teacher" if isinstance(teacher, Bert) or teacher.has_scores else "embeddings"


def explained(table: Float[Tensor, "V C"], basis: Float[Tensor, "C Cs"]) -> float:
    """Return the share of the table's squared norm that the basis keeps."""
    return float((table @ basis).square().sum() / table.square().sum())


@torch.no_grad()
def new_student(
    teacher: Teacher,
    config: BertConfig,
    layers: tuple[int, ...],
    start: str = "embeddings",
    generator: torch.Generator | None = None,
    basis: Float[Tensor, "C Cs"] | None = None,
    texts: Encoded | None = None,
) -> Bert:
    """Return a student of the given sizes, in training mode, with the teacher's head, labels and tokenizer.

    start: "random"; "embeddings": the embedding tables are the teacher's in the SVD basis, as far as it has them; "teacher":
    the attention and feed-forward matrices of the teacher's ``layers`` (1…N, one a student layer) are cut to size as well
    (not MPNet's position bias, for which a BERT has no place); "states": as "teacher", in the ``basis`` of ``states_basis``;
    "fitted": as "states", and then fitted to the first ``FEW`` of the ``texts`` (``fit_to_states``; with a note, "states" where
    they are too few).
    Raises UserError for another ``start``, for ``layers`` that are not one a student layer or not the teacher's, for a student
    wider than the teacher that does not start at "random", for "teacher", "states" and "fitted" where the layers are of another
    make, for "states" and "fitted" without a basis, and for "fitted" without texts.
    """
    if start not in STARTS:
        raise UserError(f"start={start!r} is not one of {', '.join(STARTS)}")
    if start in SEEN and basis is None or start == "fitted" and texts is None:
        raise UserError(f"start={start!r} needs texts whose hidden states the teacher shows; hand over examples")
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"{len(layers)} teacher layers for {config.num_hidden_layers} student layers; name one each")
    N = teacher.config.num_hidden_layers
    if odd := [n for n in layers if not 1 <= n <= N]:
        raise UserError(f"layers={tuple(layers)} names layer {odd[0]}, but the teacher has layers 1 to {N}")
    config = config.replace(
        head=teacher.config.head, labels=teacher.config.labels, vocab_size=teacher.config.vocab_size,
        max_position_embeddings=teacher.config.max_position_embeddings, type_vocab_size=teacher.config.type_vocab_size,
        pad_token_id=teacher.config.pad_token_id, layer_norm_eps=teacher.config.layer_norm_eps,
    )  # fmt: skip
    student = Bert(config, generator)
    student.tokenizer_folder = teacher.tokenizer_folder
    if start != "random":
        if next(teacher.parameters()).dtype.itemsize < 4:  # there are no decompositions in half precision
            teacher = copy.deepcopy(teacher).float()
        basis = start_basis(teacher, config.hidden_size) if basis is None else basis
        basis = basis.to(next(teacher.parameters()).dtype)
        tables, norm = _tables(teacher)
        for name, table in tables.items():
            getattr(student.embeddings, name).weight[: len(table)].copy_(table @ basis)
        if norm is not None:
            _cut_norm(student.embeddings.norm, norm, basis)
        if start in ("teacher", *SEEN):
            sources = teacher.layers
            for layer, source in zip(student.layers, layers, strict=True):
                _cut_layer(layer, sources[source - 1], basis)
            cut_head(student, teacher, basis)
        if start == "fitted":
            student.to(basis.device)
            if not fit_to_states(student, teacher, texts.select(range(min(FEW, len(texts)))), layers, basis.float()):
                why = "the texts have too few tokens to fit a student of this width to its teacher's states"
                warnings.warn(f"{why}, so it starts where 'states' does", UserNote, stacklevel=2)
    return student.train()


def _cut_norm(norm: nn.LayerNorm, source: nn.LayerNorm, basis: Tensor) -> None:
    # In the new basis γ is a full matrix Vᵀ diag(γ) V; its diagonal is the closest that a LayerNorm can hold.
    norm.weight.copy_((basis.square() * source.weight[:, None]).sum(0))
    norm.bias.copy_(source.bias @ basis)


def _cut_layer(layer: nn.Module, source: nn.Module | SimpleNamespace, basis: Tensor) -> None:
    _cut_attention(layer.attention, source.attention, basis)
    _cut_norm(layer.attention_norm, source.attention_norm, basis)
    _cut_norm(layer.ffn_norm, source.ffn_norm, basis)
    # keep the neurons whose input and output weights are largest
    weight = source.up.weight.norm(dim=1) * source.down.weight.norm(dim=0)
    keep_neurons(layer, source, weight, basis)


def _cut_attention(attention: nn.Module, source: nn.Module | SimpleNamespace, basis: Tensor) -> None:
    """Cut attention to size, group by group of heads where the two head counts differ (``losses.match_heads``)."""
    D, Dt = attention.query.out_features // attention.heads, source.query.out_features // source.heads
    groups = math.gcd(attention.heads, source.heads)
    each, told = attention.heads // groups, source.heads // groups  # heads of a group, the student's and the teacher's
    for g in range(groups):
        theirs = slice(g * told * Dt, (g + 1) * told * Dt)
        # The scores of a head depend on Wqᵀ·Wk alone, biases as one more column: keep its best rank-D part. Several heads side
        # by side have the sum of their scores.
        query = torch.cat([source.query.weight[theirs] @ basis, source.query.bias[theirs, None]], dim=1)
        key = torch.cat([source.key.weight[theirs] @ basis, source.key.bias[theirs, None]], dim=1)
        left, right = _low_rank(query.T, key, D)
        scale = (D / Dt) ** 0.25 / told**0.5  # scores are divided by √D, the teacher's by √Dt, and of a sum we want the mean
        # What a head adds depends on Wo·Wv alone.
        mixed, values = _low_rank(
            basis.T @ source.output.weight[:, theirs], source.value.weight[theirs] @ basis, each * D
        )
        for i in range(each):  # all look where the group looks; each carries its part of the values
            ours = slice((g * each + i) * D, (g * each + i + 1) * D)
            attention.query.weight[ours], attention.query.bias[ours] = left.T[:, :-1] * scale, left.T[:, -1] * scale
            attention.key.weight[ours], attention.key.bias[ours] = right[:, :-1] * scale, right[:, -1] * scale
            attention.output.weight[:, ours], attention.value.weight[ours] = mixed[:, i::each], values[i::each]
    # attention weights sum to 1, so the values' bias reaches the output as a constant
    attention.value.bias.zero_()
    attention.output.bias.copy_((source.output.bias + source.output.weight @ source.value.bias) @ basis)


def _low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of left·right of the given rank (zero-padded if it has less)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    pad = torch.nn.functional.pad
    return pad(q_left @ u[:, :kept] * root, (0, rank - kept)), pad(
        root[:, None] * (vh[:kept] @ q_right.T), (0, 0, 0, rank - kept)
    )


@torch.no_grad()
def cut_head(student: Bert, teacher: Teacher, basis: Float[Tensor, "Ct Cs"]) -> None:
    """Give the student the teacher's pooler and classifier, read through the map from its states to the teacher's.

    Of a wider student's pooler the outputs beyond the teacher's stay as they were drawn, and its classifier begins without them.
    A head that is none of BERT's kind (``Encoder.tanh_head``) is left: the student's stays as it was drawn.
    """
    if not teacher.config.outputs:
        return
    if isinstance(teacher, Encoder):
        head = teacher.tanh_head()
        if head is None:
            return
        pooler, classifier = head
    else:
        pooler, classifier = teacher.pooler, teacher.classifier
    # The pooler's tanh acts on each coordinate, so its outputs must be chosen, not rotated: those the classifier reads most.
    basis = basis.to(pooler.weight.device)
    norms = fine(classifier.weight).norm(dim=0)
    keep = norms.topk(min(student.config.hidden_size, len(norms))).indices.sort().values
    n = len(keep)
    student.pooler.weight[:n].copy_(fine(pooler.weight[keep]) @ basis)
    student.pooler.bias[:n].copy_(pooler.bias[keep])
    student.classifier.weight[:, :n].copy_(classifier.weight[:, keep])
    student.classifier.weight[:, n:].zero_()
    student.classifier.bias.copy_(classifier.bias)
