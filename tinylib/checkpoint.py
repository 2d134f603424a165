"""Checkpoints: everything that a run needs to go on as if it had not stopped, safe from a kill at any moment and checked when read.

A file is written aside, synced to the disk and renamed, so a kill or a power cut leaves the old one or the new one, whole. The
one before it stays beside it (``run.safetensors``, ``run.1.safetensors``, …): should the newest be damaged, the run goes on
from the last good one, and says so. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinylib import processes, sharing
from tinylib.errors import UserError, UserNote, is_full_memory
from tinylib.history import History
from tinylib.models import sync
from tinylib.stored import first_line

KEEP = 2  # checkpoints of a run: the newest, and those before it
STALE = 3600  # seconds after which a half-written file is taken for one that a killed process has left


class Checkpoint:
    """The state of a run: model, AdamW's moments, random states, each step's losses and, as JSON in the header, step,
    schedule, what was measured and, of a run in float16, the scale of its loss.

    In a run of several processes the main one reads and writes for all of them; a run may go on with another number of
    processes, whose dropout is then drawn anew.
    """

    def __init__(
        self, path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler, history: History, keep: int = KEEP, plan: dict | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):  # fmt: skip
        self.path, self.model, self.optimizer, self.schedule, self.history = path, model, optimizer, schedule, history
        self.keep, self.plan, self.scaler = keep, plan, scaler
        self.damaged: set[Path] = set()  # found as they were read: the next save writes over them

    def files(self) -> list[Path]:
        """Return the places of this run's checkpoints, the newest first, whether they are there or not."""
        older = [self.path.with_suffix(f".{n}{self.path.suffix}") for n in range(1, self.keep)]
        return [self.path, *older]

    def exists(self) -> bool:
        """Tell whether there is anything to go on from; all processes get the main one's answer."""
        found = self.path is not None and any(path.exists() for path in self.files())
        return bool(sharing.same(torch.tensor(int(found))))

    # Writing

    def save(self, step: int, finished: bool = False) -> None:
        """Write the state; of a finished run without AdamW's moments, which it needs no more, and without older ones.

        Raises UserError if the file cannot be written.
        """
        random = self._random_states()  # of all processes, so all must come here
        if processes.is_main():
            tensors = _unshared({f"model.{n}": t.detach() for n, t in self.model.state_dict().items()})
            moments_of = {} if finished else self.optimizer.state_dict()["state"]
            for index, moments in moments_of.items():
                tensors |= {f"optimizer.{index}.{n}": t for n, t in moments.items()}
            said = {"step": step, "plan": self.plan} | asdict(self.history)
            # a header may be 100 MB long, which the losses of a million steps would fill
            tensors |= {f"losses.{n}": torch.tensor(some, dtype=torch.float64) for n, some in said.pop("losses").items()}
            if self.scaler:  # float16's: by how much it scales the loss, and since when
                said["scaler"] = self.scaler.state_dict()
            self._write(tensors | random, said, finished)
        processes.wait()

    def _write(self, tensors: dict[str, Tensor], said: dict, finished: bool) -> None:
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        for left in self.path.parent.glob(f"{self.path.stem}.*.tmp"):  # of a process that was killed as it wrote
            with contextlib.suppress(OSError):  # another one may be at work, or have been quicker
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            run = json.dumps(said)
            sums = {"sha256": _digest(tensors), "sha256_run": hashlib.sha256(run.encode()).hexdigest()}
            save_file(tensors, aside, metadata={"run": run} | sums)
            sync(aside)
            self._age(finished)
            os.replace(aside, self.path)
            with contextlib.suppress(OSError):  # Windows opens no folders, and some network file systems sync none
                sync(self.path.parent)
        except (OSError, SafetensorError) as error:  # safetensors passes a full disk on as its own error
            remedy = "free some space there, and go on from the last one"
            raise UserError(f"the checkpoint {self.path} cannot be written ({error}); {remedy}") from None
        finally:
            with contextlib.suppress(OSError):  # a disk that can only be read refuses this as well
                aside.unlink(missing_ok=True)

    def _age(self, finished: bool) -> None:
        """Make room for the newest: each older one moves on by a place, the oldest goes."""
        files = self.files()
        if finished:
            for older in files[1:]:
                older.unlink(missing_ok=True)
            return
        for newer, older in reversed(list(zip(files, files[1:], strict=False))):
            if newer.exists() and newer not in self.damaged:  # a damaged one must not take a good one's place
                os.replace(newer, older)
        self.damaged.clear()

    def _random_states(self) -> dict[str, Tensor]:
        own = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():  # on a GPU the dropout is drawn from its own state
            own["random_cuda"] = torch.cuda.get_rng_state()
        if processes.count() == 1:
            return own
        stacked = {}
        for name, state in own.items():
            mine = torch.zeros(processes.count(), len(state), dtype=torch.int32)
            mine[processes.index()] = state.int()
            stacked[name] = sharing.total(mine).to(torch.uint8)
        return stacked

    # Reading

    def load(self) -> int:
        """Restore the state and return the step to go on from; raise UserError if no checkpoint is whole and of this model."""
        tensors, said = self._newest_whole() if processes.is_main() else ({}, {})
        if processes.count() > 1:
            tensors, said = _to_all(tensors, said)
        self._restore(tensors, said)
        return said["step"]

    def _newest_whole(self) -> tuple[dict[str, Tensor], dict]:
        trouble = None
        for path in self.files():
            if not path.exists():
                continue
            try:
                tensors, said = _read(path)
                own = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
                _check_fit(own, self.model.state_dict())
            except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
                if is_full_memory(error):  # the file may be good
                    raise
                lost = isinstance(error, OSError)
                trouble = trouble or (path, "cannot be read" if lost else "is damaged", first_line(error))
                self.damaged.add(path)
                continue
            if trouble:
                what = f"the checkpoint {trouble[0]} {trouble[1]} ({trouble[2]})"
                warnings.warn(f"{what}: going on from the one before it, of step {said['step']}", UserNote, stacklevel=2)
            if self.plan and said["plan"] not in (None, self.plan):
                was, now = (", ".join(f"{n} {name}" for name, n in plan.items()) for plan in (said["plan"], self.plan))
                remedy = "repeat its settings and data, or delete it"
                raise UserError(f"the checkpoint {path} is of a run of {was}, not of {now}; {remedy}")
            return tensors, said
        if not trouble:
            raise UserError(f"there is no checkpoint {self.path} to go on from")
        path, how, why = trouble
        if how == "is damaged":
            raise UserError(f"the checkpoint {path} is damaged or of another model ({why}); delete it and start again")
        raise UserError(f"the checkpoint {path} {how} ({why}); mend that first, or delete it and start again")

    def _restore(self, tensors: dict[str, Tensor], said: dict) -> None:
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        stored = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                stored["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's steps, which were taken before
            for _ in range(said["step"]):
                self.schedule.step()
        if self.scaler and said.get("scaler"):
            self.scaler.load_state_dict(said["scaler"])
        self._restore_random(tensors, said["step"])
        losses = {n.removeprefix("losses."): t.tolist() for n, t in tensors.items() if n.startswith("losses.")}
        self.history.losses = losses or said["losses"] or {}
        self.history.measured, self.history.seconds = said["measured"], said["seconds"]

    def _restore_random(self, tensors: dict[str, Tensor], step: int) -> None:
        states = {name: tensors[name] for name in ("random", "random_cuda") if name in tensors}
        held = {name: len(state) if state.ndim == 2 else 1 for name, state in states.items()}
        if any(number != processes.count() for number in held.values()):  # saved by another number of processes
            draw_from(torch.initial_seed() + 1_000_003 * (step + 1), torch.cuda.is_available())
            return
        for name, state in states.items():
            own = state[processes.index()].clone() if state.ndim == 2 else state  # torch reads past a view's beginning
            if name == "random":
                torch.set_rng_state(own)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(own)


def draw_from(seed: int, gpu: bool) -> None:
    """Begin the CPU's random numbers anew from ``seed``, and the current GPU's if there is one, but no other GPU's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs
    if gpu:
        torch.cuda.manual_seed(seed)


def steps_done(path: Path | None) -> int:
    """Return the step that a run would go on from, by its newest checkpoint's header alone; 0 without one."""
    found = 0
    if path is not None and processes.is_main():
        with contextlib.suppress(OSError, SafetensorError, LookupError, TypeError, ValueError), safe_open(path, "pt") as file:
            found = int(json.loads(file.metadata()["run"])["step"])
    return int(sharing.same(torch.tensor(found)))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the JSON of a checkpoint; raise what its readers raise, ValueError if the content has changed."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        told = file.metadata() or {}
    said, run = json.loads(told["run"]), hashlib.sha256(told["run"].encode()).hexdigest()
    if told["sha256"] != _digest(tensors) or told.get("sha256_run", run) != run:
        raise ValueError("its content is not what was written")
    if type(said["step"]) is not int or not 0 <= said["step"] < 2**31 or not isinstance(tensors["random"], Tensor):
        raise ValueError("it has no step")
    kept = {name: said.get(name) for name in ("plan", "scaler", "losses")}  # not in every file; older ones hold the losses here
    return tensors, {name: said[name] for name in ("step", "measured", "seconds")} | kept


def _check_fit(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in (stored, own)]
    if shapes[0] != shapes[1]:
        odd = sorted(n for n in {*stored, *own} if shapes[0].get(n) != shapes[1].get(n))[0]
        raise ValueError(f"{odd} is {shapes[0].get(odd, 'missing')}, and {shapes[1].get(odd, 'unknown')} in this model")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy only what shares its memory with another (tied weights), which safetensors refuses; a copy of all is a model more."""
    seen: set[int] = set()
    return {name: t.clone() if (at := t.untyped_storage().data_ptr()) in seen or seen.add(at) else t for name, t in tensors.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of tensors by name: safetensors checks its header and sizes, not the content."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _to_all(tensors: dict[str, Tensor], said: dict) -> tuple[dict[str, Tensor], dict]:
    """Give every process what the main one has read; the others' disks may not hold it."""
    shapes = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    shapes, said = json.loads(sharing.same_text(json.dumps([shapes, said])))
    shared = {}
    for name, (shape, dtype) in shapes.items():
        own = tensors.get(name)
        shared[name] = sharing.same(torch.zeros(shape, dtype=getattr(torch, dtype)) if own is None else own)
    return shared, said
