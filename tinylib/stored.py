"""Files of a model as a disk gives them: JSON and safetensors are read whole, or refused in one sentence.

A checkpoint may come from anybody, so what its config.json claims is held against what its weights' file holds before any
memory is taken for it: a vocabulary of 10¹² words is a sentence, not a full memory. Nothing is unpickled.
"""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinylib.errors import UserError, is_full_memory

NEW_HEAD = 1 << 26  # numbers that a checkpoint may lack though it holds fewer itself: a head of 8192 × 8192


def first_line(error: BaseException) -> str:
    """Return what an error says, its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_json(path: Path, remedy: str = "copy it again") -> dict:
    """Return a file's JSON object; raise UserError for a file that is none. A missing one stays a FileNotFoundError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (IsADirectoryError, ValueError, RecursionError) as error:  # a folder; no JSON or no UTF-8; nested without end
        raise UserError(f"{path} is not JSON ({first_line(error)}); {remedy}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} instead of names and values; {remedy}")
    return found


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}); check the file and its permissions")


def _open(path: Path, remedy: str) -> None:
    """Raise UserError for a file that is missing or may not be read: safetensors tells neither from a damaged one."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def read_tensors(path: Path, remedy: str = "copy or download it again") -> dict[str, Tensor]:
    """Return a safetensors file's tensors; raise UserError for a damaged one and for numbers that are not finite."""
    _open(path, remedy)
    try:
        found = load_file(path)
    except (SafetensorError, ValueError, OSError, RuntimeError, AttributeError, KeyError) as error:
        if is_full_memory(error):
            full = f"the memory is full: {path} needs {path.stat().st_size / 1e6:,.0f} MB of it"
            raise UserError(f"{full}; close what else runs, or take a smaller model") from None
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from None
    for name, tensor in found.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()):
            what = "complex numbers" if tensor.is_complex() else "NaN or infinite numbers"
            raise UserError(f"{path}: {name!r} holds {what}, with which no model can compute; {remedy}")
    return found


def tensor_names(path: Path, remedy: str = "copy or download it again") -> set[str]:
    """Return the names of a safetensors file's tensors, which its header holds; UserError for a damaged one."""
    _open(path, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from None


def check_depth(where: str, layers: int, found: Collection) -> None:
    """Raise UserError for a number of layers that the tensors of a file cannot fill: each layer has several of its own."""
    if layers > len(found):
        raise UserError(
            f"{where} asks for num_hidden_layers={layers}, but the weights' file holds {len(found)} tensors in all; "
            "the two files are not of one model, copy both again"
        )


def check_new(where: str, new: int, held: int) -> None:
    """Raise UserError for a model that its file hardly holds: ``new`` numbers would be drawn anew, where it holds ``held``."""
    if new > max(held, NEW_HEAD):
        raise UserError(
            f"{where} asks for {new:,} numbers that the weights' file, with {held:,}, does not hold; "
            "the two files are not of one model, copy both again"
        )
