"""The training loop: optimiser, schedule, progress, checkpoints; on Hugging Face Accelerate, so that the launcher decides
how many processes there are. The loop knows nothing of distillation: it minimises whatever ``loss_fn`` returns."""

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tinylib.errors import UserError
from tinylib.text import Encoded, LengthBuckets, pad

PRECISIONS = ("highest", "high", "medium", "bfloat16")

Batch = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], dict[str, Tensor]]


class Examples(Dataset):
    """Encoded texts and their labels; an item is its row number, since batches are padded whole (``loader``)."""

    def __init__(self, encoded: Encoded, labels=None):
        if labels is not None and len(labels) != len(encoded):
            raise UserError(f"{len(encoded)} texts but {len(labels)} labels; pass one label a text")
        self.encoded = encoded
        self.labels = torch.zeros(len(encoded), dtype=torch.long) if labels is None else torch.as_tensor(labels)

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
    return {"bf16": "bfloat16", "fp16": "float16"}.get(mixed) or torch.get_float32_matmul_precision()


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


@dataclass
class History:
    """What a run did: each step's losses by name, the seconds it took, and what was measured after each epoch."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def smooth(self, name: str = "loss", window: int = 50) -> list[float]:
        """Return the running mean of a loss over ``window`` steps."""
        values = torch.tensor(self.losses[name])
        window = min(window, len(values))
        return values.unfold(0, window, 1).mean(-1).tolist()


def fit(
    model: nn.Module,
    batches: DataLoader,
    loss_fn: LossFn,
    *,
    epochs: int,
    lr: float,
    steps: int | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    label: str = "training",
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
    ``measure_every`` it is called as ``after_epoch(model, step)`` every so many steps and at the end instead. With
    ``checkpoint`` (a file name) the run saves itself every ``checkpoint_every`` steps and after each epoch and, called again,
    goes on from there to the same weights. Raises UserError when a loss is not finite, with the step and the usual cause.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    buckets = batches.batch_sampler
    optimizer = adamw(model, lr, weight_decay)
    total = steps or epochs * len(buckets)
    epochs = -(-total // len(buckets))
    schedule = linear_schedule(optimizer, total, warmup)
    history, started = History(), time.perf_counter()
    device_ids = [accelerator.device] if accelerator.device.type == "cuda" else []
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    # Accelerate would leave its autocast on the model for good; here it is around the losses only, and what is measured
    # or used later is computed in the model's own precision.
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    state = Checkpoint(checkpoint, plain, optimizer, schedule, history)

    def measure(when: int) -> None:
        model.eval()
        history.measured.append(after_epoch(plain, when))
        model.train()

    def save(step: int) -> None:
        history.seconds = before + time.perf_counter() - started
        state.save(step, finished=step == total)  # a finished run needs AdamW's moments no more

    with torch.random.fork_rng(devices=device_ids):
        torch.manual_seed(seed)
        step = state.load() if checkpoint and checkpoint.exists() else 0
        before = history.seconds
        bar = tqdm(total=total, initial=step, desc=label, unit="step", leave=False)
        # a finished run may have stopped inside an epoch: nothing of it is left to do
        for epoch in range(step // len(buckets), epochs if step < total else 0):
            model.train()
            # Accelerate sets the sampler's epoch from a count of its own, which begins at 0 in a resumed run too
            buckets.set_epoch(epoch)
            batches.set_epoch(epoch)
            batches.skip_batches = step % len(buckets)
            for batch in batches:
                with accelerator.autocast():
                    losses = loss_fn(model, batch)
                    loss = sum(losses.values())
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{label}: the loss is {loss.item()} at step {step} of epoch {epoch}; lower lr={lr:g}, or look for "
                        "empty texts in the data"
                    )
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                _record(history, losses | {"loss": loss})
                if after_step:
                    after_step(plain, step)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
                if after_epoch and measure_every and (step % measure_every == 0 or step == total):
                    measure(step)
                if step == total:
                    break
                if checkpoint and step % checkpoint_every == 0 and step % len(buckets):
                    save(step)
            if after_epoch and not measure_every:
                measure(epoch)
            if checkpoint:  # after measuring, so that a run resumed here lacks no epoch's figures
                save(step)
        bar.close()
    model.eval()
    history.seconds = before + time.perf_counter() - started
    return history


def _record(history: History, losses: dict[str, Tensor]) -> None:
    for name, value in losses.items():
        history.losses.setdefault(name, []).append(value.item())


@dataclass
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped, in one safetensors file, replaced atomically.

    Model, AdamW's moments, the torch random state and, as JSON in the header, step, schedule and history.
    """

    path: Path | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: History

    def save(self, step: int, finished: bool = False) -> None:
        """Write the state aside, then put it in the old one's place: a kill leaves one or the other, whole."""
        tensors = {f"model.{n}": t.detach().clone() for n, t in self.model.state_dict().items()}
        moments_of = {} if finished else self.optimizer.state_dict()["state"]
        for index, moments in moments_of.items():
            tensors |= {f"optimizer.{index}.{n}": t.clone() for n, t in moments.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():  # on a GPU the dropout is drawn from its own state
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        said = {"step": step} | asdict(self.history)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, aside, metadata={"run": json.dumps(said)})
            os.replace(aside, self.path)
        except OSError as error:
            raise UserError(f"the checkpoint {self.path} cannot be written ({error}); free some space there") from None
        finally:
            aside.unlink(missing_ok=True)

    def load(self) -> int:
        """Restore the state and return the step to go on from."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                said = json.loads(file.metadata()["run"])
            steps, told = said["step"], {name: said[name] for name in ("losses", "measured", "seconds")}
            self.model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint {self.path} is damaged or of another model ({str(error).splitlines()[0]}); "
                "delete it and start again"
            ) from None
        stored = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                stored["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's steps, which were taken before
            for _ in range(steps):
                self.schedule.step()
        torch.set_rng_state(tensors["random"])
        if torch.cuda.is_available() and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"])
        for name, value in told.items():
            setattr(self.history, name, value)
        return steps


@torch.inference_mode()
def predict(model: nn.Module, encoded: Encoded, batch_size: int = 64, label: str | None = None) -> Float[Tensor, "N K"]:
    """Return the logits of every text, in the order given, computed in evaluation mode in batches of like length.

    With ``label`` a progress bar shows under that name.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = loader(Examples(encoded), batch_size, shuffle=False)
    logits: list[Tensor] = [torch.empty(0)] * len(encoded)
    for batch in tqdm(batches, desc=label, disable=label is None, leave=False):
        out = model(batch["ids"].to(device), batch["mask"].to(device), batch["segments"].to(device)).logits.cpu()
        for row, value in zip(batch["rows"].tolist(), out, strict=True):
            logits[row] = value
    model.train(training)
    return torch.stack(logits)


def classification_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the cross-entropy with the labels, the loss that fine-tuning minimises."""
    logits = model(batch["ids"], batch["mask"], batch["segments"]).logits
    return {"labels": nn.functional.cross_entropy(logits, batch["labels"])}
