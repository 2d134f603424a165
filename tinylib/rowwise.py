"""Rows of numbers as a cache keeps them: in float16, or in int8 with a scale for each row, which takes half the room.

In int8 a row x is round(127·x / max|x|), so that no number is off by more than half a step, max|x| / 254, up to the rounding of
the scale to float16: 2⁻¹¹ of that half step more or, where max|x| is below 0.0078, 3.8e-6 (127·2⁻²⁵). A row is a token's hidden
state, or its scores with all keys: a scale of its own keeps a large one from making its neighbours coarse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinylib.errors import UserError

SCALE = 2  # bytes: a float16 before the row's numbers
LARGEST = 127


@dataclass(frozen=True)
class Format:
    """How a row is stored: ``extra`` more items of ``dtype`` than it has numbers, by ``pack`` and back by ``unpack``."""

    suffix: str
    dtype: type
    extra: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]

    @property
    def bytes(self) -> int:
        """Return the bytes of an item."""
        return np.dtype(self.dtype).itemsize


def pack_int8(rows: Tensor) -> Tensor:
    """Round rows (..., W) of real numbers to int8 and put each one's scale before it: (..., 2 + W)."""
    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True) / LARGEST).half()
    steps = scale.float().masked_fill(scale == 0, torch.inf)  # a row of zeros, or of what float16 rounds to zero
    codes = (rows / steps).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat([scale.view(torch.int8), codes], -1)


def unpack_int8(packed: Tensor) -> Tensor:
    """Return the rows (..., W) in float32 of what ``pack_int8`` gave."""
    scale = packed[..., :SCALE].clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of single rows
    return packed[..., SCALE:] * scale.view(torch.float16).float()


def unchanged(rows: Tensor) -> Tensor:
    """Return the rows as they are."""
    return rows


FORMATS = {
    "float16": Format("f16", np.float16, 0, torch.Tensor.half, unchanged),
    "int8": Format("i8", np.int8, SCALE, pack_int8, unpack_int8),
}


def format_of(name: str) -> Format:
    """Return a format by its name; raise UserError for one that there is not."""
    if name not in FORMATS:
        raise UserError(f"a cache cannot be kept in {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
