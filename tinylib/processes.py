"""Several processes as one run (Hugging Face Accelerate): which one this is, what it owns, who writes, how numbers are shared.

``accelerate launch`` and torchrun start a process for each GPU, or for each share of the CPU cores, and tell it so in the
environment. Without them there is one process, and nothing here costs anything.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

PATIENCE = timedelta(hours=12)  # that one process may wait for another: making a cache can take hours


def count() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return index() == 0


def start() -> None:
    """Join the run's other processes (PyTorch's process group: NCCL on GPUs, gloo on CPUs); a second call does nothing."""
    if count() > 1:
        from accelerate.state import PartialState

        PartialState(timeout=PATIENCE)


def stop() -> None:
    """Leave the run: without it PyTorch complains at the end of the process."""
    if count() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        from accelerate.state import PartialState

        start()
        PartialState().wait_for_everyone()


def owned(rows: Sequence[int]) -> list[int]:
    """Return those of the rows that this process works on: row r belongs to process r mod P, in every epoch and on every step.

    So a process reads the same share of the data all along and keeps the teacher's outputs of that share only.
    """
    return [row for row in rows if row % count() == index()] if count() > 1 else list(rows)


def share(length: int) -> Tensor | None:
    """Return which of the rows 0 … length−1 this process owns (bool), or None where it owns all."""
    return torch.arange(length) % count() == index() if count() > 1 else None


def total(numbers: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, for all of them."""
    if count() == 1:
        return numbers
    from accelerate.utils import reduce

    start()
    return reduce(numbers, reduction="sum")


def same(numbers: Tensor) -> Tensor:
    """Return the main process's tensor to all of them; each gives one of its shape and type."""
    if count() == 1:
        return numbers
    from accelerate.utils import broadcast

    start()
    return broadcast(numbers.contiguous(), from_process=0)


def same_text(text: str) -> str:
    """Return the main process's text to all of them."""
    if count() == 1:
        return text
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = same(torch.tensor(len(raw)))  # as tensors: a pickled object would have to be unpickled
    return bytes(same(raw if is_main() else torch.zeros(int(size), dtype=torch.uint8)).tolist()).decode()


def collect(rows: Tensor, values: Tensor, length: int) -> Tensor:
    """Return a table of ``length`` rows that each process has some rows of: ``values`` (n, K) are its rows ``rows`` (n,).

    Each row must come from one process; so none counts twice, however unevenly they are shared.
    """
    table = torch.zeros(length, *values.shape[1:], dtype=values.dtype)
    table[rows] = values
    return total(table)
