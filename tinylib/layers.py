"""Matching a student's layers with a teacher's: the layer map, the projections, the teacher's outputs, the losses by layer.

Both stages of TinyBERT train on these (Jiao et al. 2020, section 3): general distillation on unlabelled text, and the
intermediate step of task distillation. Layers are numbered as in the paper: 0 is the embedding output.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylib import models, onednn, processes, sharing, train
from tinylib.attention import float32_precision
from tinylib.bert import Bert, BertConfig, BertOutput
from tinylib.encoders import Encoder, Teacher
from tinylib.errors import UserError, UserNote
from tinylib.losses import ATTENTION, MEANS_OVER_PAIRS, embedding_loss, group_heads, hidden_loss, match_heads
from tinylib.paging import RELEASE_EVERY, forget_pages, release_freed_memory
from tinylib.rowwise import Format, format_of
from tinylib.stored import read_json, read_tensors
from tinylib.student import SEEN, automatic_start, start_basis
from tinylib.text import Encoded, LengthBuckets
from tinylib.train import Batch, Batchable, Counts, Examples, LossFn

# of transformers' configs, besides its private notes: the version that wrote it, and in what the weights were stored
UNIMPORTANT = ("transformers_version", "architectures", "dtype", "torch_dtype")
BATCH = 32  # texts of which the teacher's outputs are computed at a time


class LayerMap(tuple):
    """g(1), …, g(M): the teacher layer that each student layer learns from; call it for g(m), with g(0) = 0 (section 3.1).

    Raises UserError for no layers and for one below 1.
    """

    def __new__(cls, layers: Sequence[int]) -> "LayerMap":
        layers = tuple(int(n) for n in layers)
        if not layers or min(layers) < 1:
            raise UserError(
                f"layer map {layers} must name a teacher layer ≥ 1 for each student layer, such as (2, 3, 5, 6)"
            )
        return super().__new__(cls, layers)

    def __call__(self, m: int) -> int:
        """Return g(m) for 0 ≤ m ≤ M, else raise UserError; the embeddings (0) learn from the embeddings."""
        if not 0 <= m <= len(self):
            raise UserError(f"m={m} is no layer of this student; its layers are 0 (the embeddings) to {len(self)}")
        return 0 if m == 0 else self[m - 1]

    @classmethod
    def uniform(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = ⌈m·N/M⌉: evenly spread; 3m for 12 → 4, the paper's choice. Raises UserError unless 1 ≤ M ≤ N."""
        cls._check(teacher_layers, student_layers)
        return cls([math.ceil(m * teacher_layers / student_layers) for m in range(1, student_layers + 1)])

    @classmethod
    def top(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = m + N − M: the last layers. Raises UserError unless 1 ≤ M ≤ N."""
        cls._check(teacher_layers, student_layers)
        return cls([m + teacher_layers - student_layers for m in range(1, student_layers + 1)])

    @classmethod
    def bottom(cls, teacher_layers: int, student_layers: int) -> "LayerMap":
        """g(m) = m: the first layers. Raises UserError unless 1 ≤ M ≤ N."""
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
    teacher: Teacher, batch: Batch, hidden: Sequence[int] = (), scores: Sequence[int] = (), relations: Sequence[int] = ()
) -> BertOutput:
    """Run the teacher as a teacher must run: in evaluation mode (no dropout) and without a graph.

    Raises UserError if it is in training mode.
    """
    if teacher.training:
        raise UserError(
            "the teacher is in training mode, so its dropout would blur what it teaches; call teacher.eval()"
        )
    with torch.inference_mode(), onednn.products(batch["ids"].device):
        return layer_outputs(teacher, batch, hidden, scores, relations)


def layer_outputs(
    model: Teacher, batch: Batch, hidden: Sequence[int] = (), scores: Sequence[int] = (), relations: Sequence[int] = ()
) -> BertOutput:
    """Run a model for what losses compare: these layers' outputs, and the logits of its classes if it has any.

    A masked-LM head is left out: over a whole vocabulary it costs as much as three of BERT-base's layers, and no loss reads it.
    """
    run = model.encode if model.config.head == "masked_lm" else model
    return run(batch["ids"], batch["mask"], batch["segments"], keep_hidden=hidden, keep_scores=scores, keep_relations=relations)


@dataclass(frozen=True)
class Weights:
    """λ of each loss; 0 leaves it out, and nothing is computed for it. The paper sets every one to 1 (section 4.2).

    Raises UserError for an ``attention_on`` that there is not.
    """

    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    # "scores" before the softmax, as the paper does, "probabilities" after it, "divergence" of those (MiniLM's), or "values":
    # MiniLM's value relations
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
            found["attention", m] = ATTENTION[weights.attention_on](*match_heads(said[m], told[n]), mask)
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
    """A teacher's hidden states, scores and value relations for every text, computed once and kept on disk.

    The files are memory-mapped: a batch reads its own rows, and memory stays flat however many texts there are. ``batch(rows)``
    pads them like the texts; sentences differ in length, so each row is stored at its own. Of several processes each keeps those of
    its own texts (``processes.owned``); of others it gives zeros, which count for nothing. With ``folder`` the files are made
    there, or found there whole (``teacher_outputs`` keeps them in the cache under a key); without, they lie in the system's folder
    for temporary files and go with the object; UserError is raised if its disk is full. ``heads``: keep the means of so many groups
    of heads (``losses.match_heads``) instead of every head. ``dtype``: float16, or int8 with a scale for each token's state and for
    each query's scores, half the room (``rowwise``).
    """

    KINDS = "hidden", "square"  # numbers a token, and a pair of tokens
    LOGITS = "logits.safetensors"  # what the same pass over the texts says besides (``teacher_logits``)

    def __init__(
        self, teacher: Teacher, examples: Batchable, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = (),
        folder: Path | None = None, heads: int | None = None, dtype: str = "float16",
    ):  # fmt: skip
        self.hidden_layers, self.score_layers, self.relation_layers = tuple(hidden), tuple(scores), tuple(relations)
        self.width, self.heads = teacher.config.hidden_size, heads or teacher.config.num_attention_heads
        self.format = format_of(dtype)
        n = _owned_lengths(examples)
        self.lengths = n.tolist()
        parts = self._items(teacher, n, hidden, scores, relations, heads, self.format)
        self.offsets = [F.pad(part.cumsum(0), (1, 0)).tolist() for part in parts]
        temporary = folder is None
        if temporary:
            folder = Path(tempfile.mkdtemp(prefix="teacher-outputs-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files = [folder / f"{kind}.{self.format.suffix}" for kind in self.KINDS]
        sizes = [offsets[-1] for offsets in self.offsets]
        if not all(file.exists() for file in files):
            try:
                for file, size in zip(files, sizes, strict=True):
                    _reserve(file, size * self.format.bytes)
            except OSError as error:
                if not (temporary and models.is_full_disk(error)):  # of the cache's disk ``models.product`` says it
                    raise
                needed = f"the {sum(sizes) * self.format.bytes / 1e6:,.0f} MB of the teacher's outputs"
                remedy = "free some space, or set TMPDIR to a folder on another disk"
                raise UserError(f"the disk of {folder.parent} has no room for {needed}; {remedy}") from None
            logits = self._fill([self._mapped(f, size, "r+") for f, size in zip(files, sizes, strict=True)], teacher, examples)
            if logits is not None:
                save_file({"logits": logits}, folder / self.LOGITS)
        # mode "c": pages that nobody writes are the file's own, and torch wants memory that could be written
        self.hidden, self.square = (self._mapped(file, size, "c") for file, size in zip(files, sizes, strict=True))

    @staticmethod
    def _answers(
        teacher: Teacher, layers: tuple, heads: int, batch: Batch
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Return a batch's states and squares, (B, layers, …) in float16, and its texts' logits, None where there are none."""
        device, (_, scores, relations) = next(teacher.parameters()).device, layers
        out = teacher_forward(teacher, {k: v.to(device) for k, v in batch.items()}, *layers)
        square = [group_heads(one, heads) for one in [*(out.scores[m] for m in scores), *(out.relations[m] for m in relations)]]
        parts = [out.hidden_states[m] for m in layers[0]], square
        kinds = [torch.stack(part, 1).half().cpu() if part else None for part in parts]
        return kinds, [*out.logits.cpu()] if out.logits is not None and out.logits.ndim == 2 else [None] * len(batch["rows"])

    def _fill(self, files: list[np.ndarray], teacher: Teacher, examples: Batchable) -> Tensor | None:
        """Write the files; return the logits (N, K) of a teacher that has one for each class, if this process has every text.

        Raises UserError for outputs that float16 cannot hold.
        """
        layers = self.hidden_layers, self.score_layers, self.relation_layers
        buckets = [processes.owned(rows) for rows in LengthBuckets(examples.lengths, BATCH, shuffle=False)]
        logits: list[Tensor | None] = [None] * len(self.lengths)
        label = f"teacher outputs, {sum(file.nbytes for file in files) / 1e6:,.0f} MB"
        answer = functools.partial(self._answers, teacher, layers, self.heads)
        for done, rows in enumerate(tqdm([rows for rows in buckets if rows], desc=label, unit="batch", leave=False)):
            if done % RELEASE_EVERY == 0:  # before the first one, too
                release_freed_memory()
            for part, (kinds, whole) in train.in_parts(examples.collate(rows), answer):
                for i, row in enumerate(part["rows"].tolist()):
                    n, logits[row] = self.lengths[row], whole[i]
                    cuts = (slice(n),), (slice(None), slice(n), slice(n))
                    for file, offsets, kind, cut in zip(files, self.offsets, kinds, cuts, strict=True):
                        if kind is not None:
                            own = kind[(i, slice(None), *cut)]
                            _check_range(own)
                            packed = self.format.pack(own)
                            file[offsets[row] : offsets[row + 1]] = packed.flatten().numpy()
            forget_pages(*files)
        for file in files:
            if isinstance(file, np.memmap):
                file.flush()
        return None if not logits or any(row is None for row in logits) else torch.stack(logits)

    @staticmethod
    def _items(
        teacher: Teacher, lengths: Tensor, hidden, scores, relations=(), heads=None, stored: Format | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return how many items of the format each text takes in the two files."""
        extra = (stored or format_of("float16")).extra
        states = lengths * (teacher.config.hidden_size + extra) * len(hidden)
        heads = heads or teacher.config.num_attention_heads
        return states, lengths * (lengths + extra) * heads * (len(scores) + len(relations))

    @classmethod
    def bytes_needed(
        cls, teacher: Teacher, examples: Batchable, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = (),
        heads: int | None = None, dtype: str = "float16",
    ) -> int:  # fmt: skip
        """Return the room on disk that the outputs would take: 2 bytes a number, or 1 and 2 for each row's scale."""
        stored = format_of(dtype)
        parts = cls._items(teacher, _owned_lengths(examples), hidden, scores, relations, heads, stored)
        return stored.bytes * int(sum(part.sum() for part in parts))

    def batch(self, rows: Sequence[int], length: int, device: torch.device) -> BertOutput:
        """Return the outputs of some rows, padded with zeros to ``length`` tokens, in float32."""
        K, S = len(self.hidden_layers), len(self.score_layers) + len(self.relation_layers)
        extra, unpack = self.format.extra, self.format.unpack
        states = torch.empty(K, len(rows), length, self.width)
        square = torch.empty(S, len(rows), self.heads, length, length)
        for i, row in enumerate(rows):
            n = self.lengths[row]
            own, pairs = (
                torch.from_numpy(file[offsets[row] : offsets[row + 1]])
                for file, offsets in zip((self.hidden, self.square), self.offsets, strict=True)
            )
            states[:, i, n:] = square[:, i, :, n:] = square[:, i, :, :n, n:] = 0.0
            if K:
                states[:, i, :n] = unpack(own.view(K, n, self.width + extra))
            if S:
                square[:, i, :, :n, :n] = unpack(pairs.view(S, self.heads, n, n + extra))
        forget_pages(self.hidden, self.square)
        states, square, first = states.to(device), square.to(device), len(self.score_layers)
        return BertOutput(
            torch.empty(0), None, dict(zip(self.hidden_layers, states, strict=True)),
            dict(zip(self.score_layers, square[:first], strict=True)), dict(zip(self.relation_layers, square[first:], strict=True)),
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the files, which Windows deletes only then; there are no batches after it."""
        del self.hidden, self.square

    def _mapped(self, file: Path, size: int, mode: str) -> np.ndarray:
        """Map a file of ``size`` items; of none, which cannot be mapped, an empty array stands in."""
        if not size:
            return np.empty(0, self.format.dtype)
        return np.memmap(file, self.format.dtype, mode, shape=(size,))


def _reserve(file: Path, size: int) -> None:
    """Make a file of ``size`` bytes, all of them the disk's by now; raise OSError where it has no room.

    A file that is only mapped takes its room as its pages are written, and a disk that is full by then ends the process (SIGBUS).
    """
    with open(file, "wb") as made:
        try:
            if size:
                os.posix_fallocate(made.fileno(), 0, size)
            return
        except AttributeError:  # Windows and macOS have none
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # what file systems say that have none
                raise
        zeros = bytes(min(size, 1 << 20))
        while size:
            size -= made.write(zeros[:size])


def _check_range(values: Float16[Tensor, "..."]) -> None:
    # a sum in float32 shows what is not finite at the cost of one look
    if not math.isfinite(values.sum(dtype=torch.float32)) and values.isinf().any():
        raise UserError(
            f"the teacher's outputs are beyond {torch.finfo(torch.float16).max:,.0f}, the most that float16 holds, in which they "
            "are kept on disk; set cache_gb=0 (--cache-gb 0), and they are computed anew in each epoch"
        )


def _owned_lengths(examples: Batchable) -> Int[Tensor, " N"]:
    """Return the tokens of each text, 0 for one that belongs to another process."""
    own = sharing.share(len(examples))
    return examples.lengths if own is None else examples.lengths * own


@contextlib.contextmanager
def teacher_outputs(
    teacher: Teacher, examples: Examples, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = (),
    keep: bool = False, heads: int | None = None, dtype: str = "float16",
) -> Iterator[TeacherOutputs]:  # fmt: skip
    """Give a teacher's outputs from the cache, made first if they are not there, and delete them at the end unless ``keep``.

    The key is made of the teacher's weights, the texts, the layers and the precision, so a run that was killed finds what it
    had made. ``heads``, ``dtype``: see ``TeacherOutputs``. Raises UserError, before anything is computed, if the disk has no
    room for them.
    """
    layers = tuple(hidden), tuple(scores), tuple(relations)
    size = TeacherOutputs.bytes_needed(teacher, examples, *layers, heads, dtype)
    recipe = _outputs_recipe(teacher, examples, layers, heads, dtype)
    for again in (True, False):
        folder = models.product(
            "teacher-outputs", recipe, lambda made: TeacherOutputs(teacher, examples, *layers, made, heads, dtype), size
        )
        try:
            outputs = TeacherOutputs(teacher, examples, *layers, folder, heads, dtype)
            break  # what is mapped stays, whoever deletes it
        except FileNotFoundError:  # another run of this key has just ended and taken it away
            if not again:
                raise
        except ValueError:  # cut off, and made when the cache had no lists of its files
            models.take_away(folder)
            if not again:
                raise
    if (said := folder / TeacherOutputs.LOGITS).is_file():  # small, and wanted when the rest is gone
        with contextlib.suppress(UserError, FileNotFoundError):  # nor needed: they can be computed again
            _keep_logits(teacher, examples.encoded, lambda made: shutil.copyfile(said, made / said.name))
    yield outputs
    if not keep:  # not in a finally: a run that stopped may go on, and what it made waits for it
        outputs.close()
        _drop(recipe)


def drop_outputs(
    teacher: Teacher, examples: Examples, hidden: Sequence[int], scores: Sequence[int], relations: Sequence[int] = (),
    heads: int | None = None, dtype: str = "float16",
) -> None:  # fmt: skip
    """Delete what ``teacher_outputs`` has left in the cache for a run that stopped, and that needs it no more.

    What it left when the run had another number of processes goes too.
    """
    _drop(_outputs_recipe(teacher, examples, (tuple(hidden), tuple(scores), tuple(relations)), heads, dtype))


def _drop(recipe: dict) -> None:
    """Delete the outputs of this recipe, and the shares of them that another number of processes has left; none is an error."""
    cache = models.cache_folder() / "products" / "teacher-outputs"
    models.take_away(cache / models.product_key(recipe))
    own = json.loads(json.dumps(recipe))  # as it reads after having been stored
    _, count = own.pop("process", (0, 1))
    for file in cache.glob("[!.]*/recipe.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # taken away meanwhile, or damaged: nothing to compare
            other = read_json(file)
            _, others = other.pop("process", (0, 1))  # of this number, each process deletes its own
            if other == own and others != count:
                models.take_away(file.parent)


def _outputs_recipe(teacher: Teacher, examples: Examples, layers: tuple, heads: int | None, dtype: str) -> dict:
    recipe = {"teacher": weights_hash(teacher), "texts": texts_hash(examples.encoded), "layers": layers, "format": 2}
    recipe |= {"precision": float32_precision(), "device": next(teacher.parameters()).device.type}
    if processes.count() > 1:
        recipe |= {"process": [processes.index(), processes.count()]}
    if heads not in (None, teacher.config.num_attention_heads):
        recipe |= {"heads": heads}
    if dtype != "float16":
        recipe |= {"dtype": dtype}
    return recipe


def teacher_logits(teacher: Teacher, encoded: Encoded) -> Float[Tensor, "N K"]:
    """Return a teacher's logits for every text: from the cache, where ``teacher_outputs`` leaves them too, else computed.

    So one pass of the teacher over the data serves both steps of task distillation, and a run that is resumed.
    """
    if processes.count() > 1:  # each has its share only
        return train.predict(teacher, encoded, label="teacher logits", shared=True).clone()

    computed: list[Tensor] = []

    def make(folder: Path) -> None:
        # in the batches of TeacherOutputs, that it be the same numbers to the bit, whoever computes them
        computed.append(train.predict(teacher, encoded, BATCH, label="teacher logits").clone())
        save_file({"logits": computed[0]}, folder / TeacherOutputs.LOGITS)

    for _ in range(2):
        try:
            folder = _keep_logits(teacher, encoded, make)
        except UserError:  # a cache folder that cannot be written to: nothing that this run needs
            break
        try:
            return read_tensors(folder / TeacherOutputs.LOGITS)["logits"]
        except (UserError, LookupError):  # damaged: once more
            models.take_away(folder)
    return computed[0] if computed else train.predict(teacher, encoded, BATCH, label="teacher logits").clone()


def _keep_logits(teacher: Teacher, encoded: Encoded, make: Callable[[Path], object]) -> Path:
    recipe = {"teacher": weights_hash(teacher), "texts": texts_hash(encoded), "device": next(teacher.parameters()).device.type}
    return models.product("teacher-logits", recipe | {"precision": float32_precision()}, make)


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 of what decides a model's answers: its config and its weights."""
    told = model.model.config.to_dict() if isinstance(model, Encoder) else asdict(model.config)
    told = {name: value for name, value in told.items() if name[0] != "_" and name not in UNIMPORTANT}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy knows no bfloat16
    return digest.hexdigest()


def texts_hash(encoded: Encoded) -> str:
    """Return the sha256 of the token ids and segments of texts."""
    digest = hashlib.sha256()
    for part in (encoded.lengths, *encoded.ids, *encoded.segments):
        digest.update(part.numpy())
    return digest.hexdigest()


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
    teacher: Teacher, layer_map: LayerMap, weights: Weights, cached: TeacherOutputs | None = None, by_layer: bool = False
) -> LossFn:
    """Return the loss function of a ``Distiller`` that ``train.fit`` minimises; ``by_layer`` gives ``losses_by_layer``."""
    weights = fitting(teacher, weights)
    wanted = Wanted.by(layer_map, weights)
    measure = losses_by_layer if by_layer else intermediate_losses

    def losses(pair: Distiller, batch: Batch) -> dict:
        if cached:
            told = cached.batch(batch["rows"].tolist(), batch["ids"].shape[1], batch["ids"].device)
        else:
            told = teacher_forward(
                teacher, batch, wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations
            )
        said = layer_outputs(pair.student, batch, wanted.hidden, wanted.scores, wanted.relations)
        return measure(said, told, batch["mask"], layer_map, pair.projections, weights)

    return losses


def fitting(teacher: Teacher, weights: Weights, say: bool = False) -> Weights:
    """Return weights whose attention loss this teacher can teach: the divergence of the probabilities where it gives no scores.

    Their squared difference is no substitute: its gradient is all but inert (``attention_probability_loss``). ``say`` tells the
    user of the change in a note.
    """
    if not (isinstance(teacher, Encoder) and not teacher.has_scores and weights.attention and weights.attention_on == "scores"):
        return weights
    if say:
        why = f"a {teacher.kind!r} model gives its attention weights after the softmax only"
        told = "the attention loss is the divergence of these probabilities (attention_on='divergence') instead of the scores'"
        warnings.warn(f"{why}, so {told}", UserNote, stacklevel=3)
    return replace(weights, attention_on="divergence")


def counts_of(weights: Weights) -> Counts:
    """Return over how many things each loss of ``matching_loss`` is a mean: pairs of real tokens of a text, or real tokens."""

    def count(name: str, batch: Batch) -> int:
        real = batch["mask"].sum(1)
        pairs = name == "attention" and weights.attention_on in MEANS_OVER_PAIRS
        return int(real.square().sum() if pairs else real.sum())

    return count


def first_projections(
    teacher: Teacher, student: BertConfig, start: str, seed: int, basis: Float[Tensor, "C Cs"] | None = None
) -> Projections:
    """Return projections to begin with: the transposed basis that the student was cut in, or random ones.

    basis: that of ``student.states_basis``, where the student starts so. Raises UserError for "states" and "fitted" without it.
    """
    if start in SEEN and basis is None:
        raise UserError(f"start={start!r} needs the states_basis that the student was cut in; hand it over")
    start = automatic_start(teacher, student.hidden_size) if start == "general" else start
    if basis is None and start != "random":
        basis = start_basis(teacher, student.hidden_size)
    random = torch.Generator().manual_seed(seed + 1)  # the student itself drew from the seed
    return Projections(
        student.hidden_size, teacher.config.hidden_size, student.num_hidden_layers, basis, random
    )


def student_config(teacher: Teacher, shape: str) -> BertConfig:
    """Read a shape such as "4x312" and give it the teacher's number of heads, which the attention loss compares one by one.

    Where that does not divide the width, ``BertConfig.parse`` chooses, and groups of heads are compared (``match_heads``).
    """
    config, heads = BertConfig.parse(shape), teacher.config.num_attention_heads
    return config if config.hidden_size % heads else config.replace(num_attention_heads=heads)


def choose_map(teacher: BertConfig, student: BertConfig, layers: Sequence[int] | None) -> LayerMap:
    """Return the layer map that was asked for, or the uniform one, checked against both models.

    Raises UserError if it does not fit them.
    """
    N, M = teacher.num_hidden_layers, student.num_hidden_layers
    layer_map = LayerMap(layers or LayerMap.uniform(N, M))
    if len(layer_map) != M or max(layer_map) > N:
        raise UserError(f"layer map {tuple(layer_map)} must name {M} teacher layers between 1 and {N}")
    return layer_map
