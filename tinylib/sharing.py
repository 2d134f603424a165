"""Numbers that several processes share: sums, the main one's values, tables that each has rows of. With one process, nothing
happens.

Everything goes as tensors: an object would be pickled on the way.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinylib import processes


def share(length: int) -> Bool[Tensor, " N"] | None:
    """Return which of the rows 0 … length−1 this process owns (bool), or None where it owns all."""
    return torch.arange(length) % processes.count() == processes.index() if processes.count() > 1 else None


def total(numbers: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, for all of them."""
    if processes.count() == 1:
        return numbers
    from accelerate.utils import reduce

    return reduce(_placed(numbers), reduction="sum").to(numbers.device)


def same(numbers: Tensor) -> Tensor:
    """Return the main process's tensor to all of them; each gives one of its shape and type."""
    if processes.count() == 1:
        return numbers
    from accelerate.utils import broadcast

    return broadcast(_placed(numbers), from_process=0).to(numbers.device)


def _placed(numbers: Tensor) -> Tensor:
    """Return a copy on the device that the processes talk over: NCCL moves what lies on a GPU only."""
    from accelerate.state import PartialState

    processes.start()
    return numbers.detach().clone().contiguous().to(PartialState().device)


def same_text(text: str) -> str:
    """Return the main process's text to all of them."""
    if processes.count() == 1:
        return text
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = same(torch.tensor(len(raw)))  # as tensors: a pickled object would have to be unpickled
    return bytes(same(raw if processes.is_main() else torch.zeros(int(size), dtype=torch.uint8)).tolist()).decode()


def collect(rows: Int[Tensor, " n"], values: Float[Tensor, "n K"], length: int) -> Float[Tensor, "N K"]:
    """Return a table of ``length`` rows that each process has some rows of: ``values`` (n, K) are its rows ``rows`` (n,).

    Each row must come from one process; so none counts twice, however unevenly they are shared.
    """
    table = torch.zeros(length, *values.shape[1:], dtype=values.dtype)
    table[rows] = values
    return total(table)
