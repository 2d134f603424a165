"""The training loop: optimiser, schedule, progress, checkpoints; on Hugging Face Accelerate, so that the launcher decides
how many processes there are. The loop knows nothing of distillation: it minimises whatever ``loss_fn`` returns."""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from tinylib import interrupt, onednn, processes, sharing
from tinylib.attention import float32_precision
from tinylib.checkpoint import Checkpoint, draw_from
from tinylib.errors import UserError, UserNote, is_full_memory
from tinylib.history import History
from tinylib.paging import Releases, map_large_blocks
from tinylib.rows import row_gradients
from tinylib.text import Encoded, LengthBuckets, pad

PRECISIONS = ("highest", "high", "medium", "bfloat16")

Batch = dict[str, Tensor]
T = TypeVar("T")
LossFn = Callable[[nn.Module, Batch], dict[str, Tensor]]
# Over how many things of a batch the loss of a name is a mean: what makes the parts of a batch add up to the whole.
Counts = Callable[[str, Batch], int]


class Examples(Dataset):
    """Encoded texts and their labels; an item is its row number, since batches are padded whole (``loader``).

    Raises UserError unless there is one label a text.
    """

    def __init__(self, encoded: Encoded, labels=None):
        if labels is not None and len(labels) != len(encoded):
            raise UserError(f"{len(encoded)} texts but {len(labels)} labels; pass one label a text")
        self.encoded = encoded
        labels = torch.zeros(len(encoded)).long() if labels is None else torch.as_tensor(labels)
        self.labels = labels if labels.is_floating_point() else labels.long()  # the numbers of classes may come as int32 or bool

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each text, [CLS] and [SEP] counted."""
        return self.encoded.lengths

    def collate(self, rows: list[int]) -> Batch:
        """Return ids, mask, segments (B, T), labels (B,) and rows (B,), the places in the data."""
        return pad(self.encoded, rows) | {"labels": self.labels[rows], "rows": torch.tensor(rows)}


@runtime_checkable
class Batchable(Protocol):
    """What ``loader`` needs of a data set: ``Examples`` in memory, or ``corpus.Corpus`` on disk."""

    lengths: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> int: ...

    def collate(self, rows: list[int]) -> Batch: ...


def loader(examples: Batchable, batch_size: int = 32, shuffle: bool = True, seed: int = 0) -> DataLoader:
    """Return batches of like length (``text.LengthBuckets``), padded to their own longest text."""
    buckets = LengthBuckets(examples.lengths, batch_size, seed=seed, shuffle=shuffle)
    own = torch.Generator()  # a DataLoader draws a seed for workers; from the global state that would shift the dropout
    return DataLoader(examples, batch_sampler=buckets, collate_fn=examples.collate, generator=own)


def set_precision(name: str) -> None:
    """Choose how precisely training computes from here on; without a call, as the launcher says, else "highest".

    "highest", "high", "medium": how far PyTorch may round the factors of float32 products
    (torch.set_float32_matmul_precision). "bfloat16": training runs under autocast (Micikevicius et al. 2018), its products
    and much of what lies between them in bfloat16, weights in float32; as ``accelerate launch --mixed_precision bf16``.
    On processors with bfloat16 instructions (AVX512_BF16, AMX) a step takes about two thirds of the time, on others far more.
    Raises UserError for another name.
    """
    from accelerate.state import AcceleratorState

    if name not in PRECISIONS:
        raise UserError(f"precision={name!r} is not one of {', '.join(PRECISIONS)}")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if name == "bfloat16" else "no"
    AcceleratorState._reset_state()  # it is read once a process, by the first Accelerator
    torch.set_float32_matmul_precision("highest" if name == "bfloat16" else name)


def precision() -> str:
    """Return the precision that training computes in now: one of ``PRECISIONS``, or "float16" if the launcher says so."""
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed == "fp16" and not torch.cuda.is_available():  # Accelerate computes in float16 on GPUs only
        mixed = "no"
    return {"bf16": "bfloat16", "fp16": "float16"}.get(mixed) or float32_precision()


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """Return AdamW over the parameters that train; matrices decay, biases and LayerNorm do not (Devlin et al. 2019)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Raise the rate from zero over the first ``warmup`` share of the steps, then lower it to zero (Devlin et al. 2019)."""
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, int(warmup * steps), steps)


def texts(name: str, batch: Batch) -> int:
    """Count the texts of a batch, over which losses of logits are means."""
    return len(batch["rows"])


def fit(
    model: nn.Module,
    batches: DataLoader,
    loss_fn: LossFn,
    *,
    epochs: int = 1,
    lr: float,
    steps: int | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    label: str = "training",
    counts: Counts = texts,
    after_epoch: Callable[[nn.Module, int], dict[str, float]] | None = None,
    measure_every: int | None = None,
    after_step: Callable[[nn.Module, int], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
) -> History:
    """Minimise the sum of the losses that ``loss_fn(model, batch)`` returns by name.

    ``steps``, if given, ends the run (and its schedule) there instead of after ``epochs``. ``warmup`` is a share of all steps,
    ``clip`` the largest norm of the gradient. ``seed`` decides the dropout (the order of the data is the loader's), and the
    caller's random state is left as it was. What ``after_epoch(model, epoch)`` returns goes into the history; with
    ``measure_every`` it is called as ``after_epoch(model, step)`` every so many steps and at the end instead.

    With ``checkpoint`` (a file name) the run saves itself every ``checkpoint_every`` steps, after each epoch and on SIGTERM and,
    called again, goes on from there to the same weights. In several processes (``processes``) a batch of the loader is the
    whole run's: each process takes the rows that it owns, and ``counts`` says over how many things each loss is a mean, so that
    the step is the one that a single process would take. A batch for which the memory is too small is halved until it fits,
    gradients summed, with a note. Raises UserError for no texts, and when a loss or a gradient is not finite, with the step and
    the usual cause.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    if not len(batches.batch_sampler):
        raise UserError(f"{label}: there are no texts to learn from; give at least one")
    processes.start()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # on Apple's GPU losses could not be summed in float64; the lessons leave it alone too
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever a launcher's environment says
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    buckets, batches = batches.batch_sampler, _own_part(batches)
    total = epochs * len(buckets) if steps is None else steps
    epochs = -(-total // len(buckets))
    optimizer = adamw(model, lr, weight_decay)
    schedule = linear_schedule(optimizer, total, warmup)
    # before the first batch, too: what loading and measuring left behind would stand beside it
    releases = Releases(buckets.batch_size * int(buckets.lengths.max()) // processes.count())
    history, started = History(), time.perf_counter()
    plan = {"steps": total, "steps an epoch": len(buckets)}
    state = Checkpoint(checkpoint, model, optimizer, schedule, history, plan=plan, scaler=accelerator.scaler)
    losses, optimizer = accelerator.prepare(Losses(model, loss_fn), optimizer)
    take = Step(accelerator, losses, optimizer, counts, clip, label, getattr(after_step, "discard", None))

    def measure(when: int) -> None:
        model.eval()
        history.measured.append(after_epoch(model, when))
        model.train()

    def save(step: int) -> None:
        history.seconds = before + time.perf_counter() - started
        state.save(step, finished=step == total)  # a finished run needs AdamW's moments no more

    # data parallelism exchanges dense gradients
    rows = row_gradients(model) if processes.count() == 1 else contextlib.nullcontext()
    with _own_randomness(accelerator.device, seed), interrupt.deferred(), _left_in_evaluation(model), rows:
        model.zero_grad(set_to_none=True)  # a lesson may have called backward before
        step = state.load() if state.exists() else 0
        if step and hasattr(after_step, "resume"):
            after_step.resume(model, step)
        before = history.seconds
        bar = tqdm(total=total, initial=step, desc=label, unit="step", leave=False, disable=not processes.is_main())
        # a finished run may have stopped inside an epoch: nothing of it is left to do
        for epoch in range(step // len(buckets), epochs if step < total else 0):
            model.train()
            buckets.set_epoch(epoch, start=step % len(buckets))
            for batch in batches:
                releases.before(batch["ids"].numel())
                done = take({name: value.to(accelerator.device) for name, value in batch.items()}, step, epoch)
                schedule.step()
                step += 1
                history.record(done)
                if after_step:
                    after_step(model, step)
                bar.set_postfix(loss=f"{done['loss']:.3f}", refresh=False)
                bar.update()
                if after_epoch and measure_every and (step % measure_every == 0 or step == total):
                    measure(step)
                if step == total:
                    break
                if take.stopped and step % len(buckets):  # an epoch that is whole is measured first, since no other run would
                    if checkpoint:
                        save(step)
                    raise interrupt.Stopped
                if checkpoint and step % checkpoint_every == 0 and step % len(buckets):
                    save(step)
            if after_epoch and not measure_every:
                measure(epoch)
            if checkpoint:  # after measuring, so that a run resumed here lacks no epoch's figures
                save(step)
            if take.stopped:
                raise interrupt.Stopped
        bar.close()
    history.seconds = before + time.perf_counter() - started
    return history


class Losses(nn.Module):
    """A model and its losses as one module: data parallelism averages the gradients of what went through a ``forward``."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch by name."""
        with onednn.products(batch["ids"].device):
            return self.loss_fn(self.model, batch)


class Step:
    """One step of the optimiser on a batch, of which other processes may have a part, and which memory may force into parts.

    A mean over the whole batch is the sum over its parts of (things in the part / things in all) · (mean over the part).
    ``discard`` is called before a step is begun anew, for gradients that are not the optimiser's.
    """

    def __init__(
        self, accelerator, losses: nn.Module, optimizer, counts: Counts, clip: float, label: str,
        discard: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.accelerator, self.losses, self.optimizer, self.discard = accelerator, losses, optimizer, discard
        self.counts, self.clip, self.label = counts, clip, label
        self.parts, self.stopped = 1, False

    def __call__(self, batch: Batch, step: int, epoch: int) -> dict[str, float]:
        """Take the step; return the losses over the whole batch, of all processes, and their sum as "loss"."""
        while True:
            random = torch.get_rng_state()
            try:
                return self._take(batch, step, epoch)
            except (RuntimeError, MemoryError) as error:
                # one process cannot step back alone: the others wait for its gradients
                if not is_full_memory(error) or processes.count() > 1 or self.parts >= len(batch["rows"]):
                    raise
            # only here, after the except clause, has the error let go of what the step had computed
            self.optimizer.zero_grad()
            if self.discard:
                self.discard()
            torch.set_rng_state(random)
            self.parts *= 2
            fits = -(-len(batch["rows"]) // self.parts)
            warnings.warn(
                f"{self.label}: the memory is full at {len(batch['rows'])} texts of {batch['ids'].shape[1]} tokens; going on with "
                f"{fits} at a time and their gradients summed, which is the same step; --batch-size {fits} would fit as it is",
                UserNote, stacklevel=3,
            )  # fmt: skip

    def _take(self, batch: Batch, step: int, epoch: int) -> dict[str, float]:
        parts = _split(batch, self.parts)
        alone = len(parts) == 1 and processes.count() == 1
        done: dict[str, float] = {}
        for part in parts:
            losses = self.losses(part)  # under Accelerate's autocast, if there is one; the model itself is left as it is
            shares = None if alone else self._shares(losses, part, batch)
            for name, value in self._told(losses, shares).items():
                done[name] = done.get(name, 0.0) + value
            total = sum(done.values())
            if not math.isfinite(total):
                self._refuse("loss", total, step, epoch)
            # data parallelism averages over the processes, and the parts that they hold add up
            weights = {name: processes.count() * part for name, part in shares.items()} if shares else dict.fromkeys(losses, 1)
            self.accelerator.backward(sum(weights[name] * value for name, value in losses.items()))
        norm = self.accelerator.clip_grad_norm_(self.losses.parameters(), self.clip)
        scaler = self.accelerator.scaler  # float16's: it skips a step whose gradients overflow, and scales less from there on
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            self._refuse("gradient's norm", float(norm), step, epoch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return done | {"loss": sum(done.values())}

    def _shares(self, losses: dict[str, Tensor], part: Batch, batch: Batch) -> dict[str, float]:
        """Return, for each loss, how much of the whole batch's things this part holds."""
        mine = bool(processes.owned(part["rows"].tolist()))  # else a row of another's stands in, that there be a batch
        held = torch.tensor([float(self.counts(name, part)) if mine else 0.0 for name in losses], dtype=torch.float64)
        whole = held if processes.count() > 1 else torch.tensor([float(self.counts(name, batch)) for name in losses])
        whole = sharing.total(whole.to(self.accelerator.device)).cpu()
        return dict(zip(losses, (held / whole.clamp(min=1)).tolist(), strict=True))

    def _told(self, losses: dict[str, Tensor], shares: dict[str, float] | None) -> dict[str, float]:
        """Return what each loss adds to the whole batch's, over all processes; learn on the way whether one was told to stop."""
        values = torch.stack([value.detach().double() for value in losses.values()])
        if shares:
            values = values * torch.tensor([*shares.values()], dtype=torch.float64, device=values.device)
        asked = torch.tensor([float(interrupt.asked())], dtype=torch.float64, device=values.device)
        *values, asked = sharing.total(torch.cat([values, asked])).tolist()
        self.stopped = asked > 0
        return dict(zip(losses, values, strict=True))

    def _refuse(self, what: str, value: float, step: int, epoch: int) -> None:
        lr = self.optimizer.param_groups[0]["initial_lr"]
        raise UserError(
            f"{self.label}: the {what} is {value} at step {step} of epoch {epoch}; lower lr={lr:g}, or look for empty texts in the "
            "data"
        )


def _split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into parts by rows, each trimmed to its own longest text."""
    if parts == 1:
        return [batch]
    pieces = [dict(zip(batch, values, strict=True)) for values in zip(*(v.chunk(parts) for v in batch.values()), strict=True)]
    longest = [int(piece["mask"].sum(1).max()) for piece in pieces]
    return [
        {name: value[:, :T] if value.ndim > 1 else value for name, value in piece.items()}
        for piece, T in zip(pieces, longest, strict=True)
    ]


def in_parts(batch: Batch, compute: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
    """Give the batch with what ``compute`` makes of it; where the memory is too small for that, its halves with theirs, and so on.

    For what is computed text by text. A single text that does not fit raises its error.
    """
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        try:
            done = compute(part)
        except (RuntimeError, MemoryError) as error:
            if not is_full_memory(error) or len(part["rows"]) == 1:
                raise
        else:
            yield part, done
            continue
        waiting += reversed(_split(part, 2))  # only here has the error let go of what had been computed


class _OwnPart(Sampler):
    """The rows of each batch that this process owns; where it owns none, one that stands in and counts for nothing."""

    def __init__(self, buckets: LengthBuckets):
        self.buckets = buckets

    def __len__(self) -> int:
        return len(self.buckets)

    def __iter__(self) -> Iterator[list[int]]:
        return (processes.owned(rows) or rows[:1] for rows in self.buckets)


def _own_part(batches: DataLoader) -> DataLoader:
    if processes.count() == 1:
        return batches
    return DataLoader(
        batches.dataset, batch_sampler=_OwnPart(batches.batch_sampler), collate_fn=batches.collate_fn, generator=torch.Generator()
    )


@contextlib.contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, a stream for each process, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        draw_from(seed + 1_000_003 * processes.index(), device.type == "cuda")
        yield


@contextlib.contextmanager
def _left_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode at the end, however that comes: a lesson's stop button leaves a model that can be used."""
    try:
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)


@torch.inference_mode()
def predict(
    model: nn.Module, encoded: Encoded, batch_size: int = 64, label: str | None = None, shared: bool = False
) -> Float[Tensor, "N K"]:
    """Return the logits of every text, in the order given, computed in evaluation mode in batches of like length.

    With ``label`` a progress bar shows under that name. ``shared``: several processes, which must all call this, compute a part
    each and get the whole; otherwise each computes everything. Raises UserError for no texts.
    """
    if not len(encoded):
        raise UserError("there are no texts to predict from; give at least one")
    map_large_blocks()
    shared = shared and len(encoded) >= processes.count() > 1
    own = processes.owned(range(len(encoded))) if shared else list(range(len(encoded)))
    training, device = model.training, next(model.parameters()).device
    logits: list[Tensor] = [torch.empty(0)] * len(own)

    def answer(batch: Batch) -> Tensor:
        with onednn.products(device):
            return model(batch["ids"].to(device), batch["mask"].to(device), batch["segments"].to(device)).logits.cpu()

    try:
        model.eval()
        batches = loader(Examples(encoded.select(own)), batch_size, shuffle=False)
        for batch in tqdm(batches, desc=label, disable=label is None, leave=False):
            for part, out in in_parts(batch, answer):
                for row, value in zip(part["rows"].tolist(), out, strict=True):
                    logits[row] = value
    finally:
        model.train(training)
    if shared:
        return sharing.collect(torch.tensor(own), torch.stack(logits), len(encoded))
    return torch.stack(logits)


def classification_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the cross-entropy with the labels, the loss that fine-tuning minimises."""
    logits = model(batch["ids"], batch["mask"], batch["segments"]).logits
    return {"labels": nn.functional.cross_entropy(logits, batch["labels"])}
