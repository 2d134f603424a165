"""What nobody reads for a while lies on the disk: a teacher whose outputs are cached, and the outputs that were just read."""

import contextlib
import ctypes
import functools
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tinylib import models

LEAST = 50_000_000  # bytes; below, the file is not worth its trouble
SPARE = 4  # the file is not necessary, and checkpoints are: it must not take their room
ALIGNED = 64  # bytes: where a tensor may begin in the file
LARGE = 4 << 20  # bytes of a block that is mapped by itself; at 1 MB a step took half as long again, for all its page faults
KEPT = 64 << 20  # bytes that may stay free at the heap's end: where glibc's own rule would end
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
RELEASE_EVERY = 50  # batches: as they differ in size, the memory that is freed comes to lie in pieces too small for the next
FEWEST = 10  # batches between two times: to come by memory anew costs a third of a step
LARGEST = 0.8  # of the most tokens that a batch can have: from there on it would stand beside those pieces, and make the peak


@contextlib.contextmanager
def aside(model: nn.Module, least: int = LEAST) -> Iterator[None]:
    """While this is entered, the parameters of a model of ``least`` bytes or more are mapped from a file in the cache folder.

    The model works as before, to the bit: what is read comes back page by page. On leaving it lies in memory again. For a model
    that is not on the CPU, and where the disk has not ``SPARE`` times the room, nothing happens.
    """
    parameters = [p for p in model.parameters() if p.device.type == "cpu" and p.is_contiguous()]
    size = sum(p.numel() * p.element_size() for p in parameters)
    with contextlib.ExitStack() as stack:
        if size >= max(least, 1):
            try:
                if shutil.disk_usage(models.cache_folder()).free >= SPARE * size:
                    _replace(parameters, _file(stack))
                    stack.callback(_bring_back, parameters)
            except OSError:
                stack.close()  # what was written goes at once, not after the training
        yield


def _file(stack: contextlib.ExitStack) -> Path:
    """Make an empty file in the cache folder that is gone at the end of ``stack`` at the latest."""
    handle, name = tempfile.mkstemp(prefix="weights-", dir=models.cache_folder())
    os.close(handle)
    stack.callback(_remove, Path(name))
    return Path(name)


def _replace(parameters: list[nn.Parameter], path: Path) -> None:
    """Write the parameters' numbers into the file and let them read from there; all of them or none."""
    starts, at = [], 0
    with open(path, "wb") as file:
        for parameter in parameters:
            at = -(-at // ALIGNED) * ALIGNED
            starts.append(at)
            file.seek(at)
            at += file.write(parameter.detach().view(-1).view(torch.uint8).numpy())
    # Private pages (mode "c"): a write would not reach the file. One map a tensor, so that each goes with its own.
    sizes = [p.numel() * p.element_size() for p in parameters]
    maps = [np.memmap(path, np.uint8, "c", start, size) for start, size in zip(starts, sizes, strict=True)]
    _remove(path)  # what is mapped stays until nobody reads from it; a run that is killed leaves nothing
    for parameter, mapped in zip(parameters, maps, strict=True):
        parameter.data = torch.from_numpy(mapped).view(parameter.dtype).view(parameter.shape)


def _bring_back(parameters: list[nn.Parameter]) -> None:
    release_freed_memory()  # what was done meanwhile left its own behind
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows removes no file that is mapped, so it is tried again at the end
        path.unlink()


def forget_pages(*arrays: np.ndarray) -> None:
    """Take the pages of memory-mapped arrays off this process, where the system can: they stay in the file and its cache.

    What was read or written counts as the process's memory until then, so a file read from end to end would count whole.
    """
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array.base.madvise(mmap.MADV_DONTNEED)  # of shared pages: what was written is kept


def release_freed_memory() -> None:
    """Give the memory of dropped tensors and tables back to the system, as far as this platform's C library lets one.

    From the first call on, large blocks go back by themselves (``map_large_blocks``).
    """
    map_large_blocks()
    if (arrow := sys.modules.get("pyarrow")) is not None:  # data sets were read by it, into a heap of its own
        arrow.default_memory_pool().release_unused()
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Releases:
    """When batches of changing size give memory back: every ``RELEASE_EVERY``, and before one of the largest after smaller ones.

    ``most``: the tokens of the largest batch there can be. Where all are large, what one freed fits the next.
    """

    def __init__(self, most: int):
        self.most, self.large = most, False
        self.passed, self.seen = RELEASE_EVERY, 0  # batches since memory went back, and the largest of them; the first one asks

    def before(self, tokens: int) -> None:
        """Give back what earlier batches freed, if a batch of so many tokens asks for it."""
        earlier, self.large = self.large, tokens >= LARGEST * self.most
        after_smaller = tokens > self.seen or (self.passed >= FEWEST and not earlier)
        if self.passed >= RELEASE_EVERY or (self.large and after_smaller):
            release_freed_memory()
            self.passed = self.seen = 0
        self.passed, self.seen = self.passed + 1, max(self.seen, tokens)


@functools.cache
def map_large_blocks() -> None:
    """Let the C library map each large block by itself from here on, so that it goes back as soon as it is dropped.

    glibc does so at first, and raises the limit up to 32 MB as blocks are freed. Batches differ in length, so their tensors differ
    in size; out of one heap, what is freed comes to lie in pieces that the next batch's tensors do not fit, and the heap grows.
    """
    library = _c_library()
    if hasattr(library, "malloc_trim") and hasattr(library, "mallopt"):  # glibc's: another library's numbers may mean other things
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None
