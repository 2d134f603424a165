"""Products of linear layers by oneDNN, forward and backward, on processors where PyTorch's own choice is slower.

PyTorch gives float32 products on x86 to Intel's MKL, which uses AVX-512 on Intel's processors only. oneDNN uses it on all; both are
part of PyTorch. On processors of AMD's with AVX-512 (Zen 5) it takes half the time for each of a layer's three products: the
forward one, and those with which the gradient goes on to the input and to the weight (800 tokens, widths 312 to 3072, two threads).
On another of AMD's with AVX-512 a teacher of BERT-base's size answered 1.12 to 1.18 times as fast (one thread, beside other work).
The results differ by rounding alone.
"""

import functools
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula

from tinylib.attention import float32_precision

# oneDNN keeps the programs that it compiled for the last 1024 shapes, half a megabyte each or more; batches of changing lengths
# filled 10 GB with them. 32 are about those of one training step. It reads this when it compiles its first one.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

LEAST = 1 << 22  # multiply-adds of a product with a gradient; what a smaller one would win, its way through Python costs


@functools.cache
def is_faster() -> bool:
    """Tell whether this is a processor on which oneDNN's float32 products are the faster ones."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    return table.read_text(errors="replace")[:2000] if table.exists() else platform.processor()  # Windows says it there


class OneDNN(TorchFunctionMode):
    """While this is entered, linear layers on float32 tensors of the CPU are computed by oneDNN, and so are their gradients."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compute ``F.linear`` by oneDNN; leave every other function alone."""
        if func is F.linear and not kwargs and _fits(*args):
            x, weight, *bias = args
            if not torch.is_grad_enabled():
                return _product(x, weight, *bias)
            if x.numel() * weight.shape[0] >= LEAST:
                return _Linear.apply(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b with its gradients: dx = dy·W, dW = dyᵀ·x, db = Σ dy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (to_x, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            _product(dy, weight.T) if to_x else None,
            _sum_over_rows(rows, x.flatten(0, -2)) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b. What is left over of ``_whole`` rows is padded or computed by PyTorch, whichever copies less."""
    rows = x.flatten(0, -2)
    n, (out, width) = len(rows), weight.shape
    whole, unit = _whole(n)
    if whole == n:
        y = _onednn(rows, weight, bias)
    elif width <= out:
        y = _onednn(F.pad(rows, (0, 0, 0, whole + unit - n)), weight, bias)[:n]
    else:
        rest = rows[whole:] @ weight.T
        y = torch.cat((_onednn(rows[:whole], weight, bias), rest if bias is None else rest.add_(bias)))
    return y.unflatten(0, x.shape[:-1])


def _sum_over_rows(dy: Tensor, x: Tensor) -> Tensor:
    """Return dyᵀ·x."""
    whole, _ = _whole(len(x))
    total = _onednn(dy[:whole].T, x[:whole].T)
    return total if whole == len(x) else total.addmm_(dy[whole:].T, x[whole:])


def _whole(n: int) -> tuple[int, int]:
    """Return the greatest multiple of ``unit`` that n holds, and the unit: the power of two that is an eighth of n or less.

    oneDNN compiles a program for each shape that it meets, which takes up to a millisecond, and keeps the last ones. Batches come
    in hundreds of shapes; so rounded, in eight between any number and its double.
    """
    unit = 1 << max(n.bit_length() - 4, 0)
    return n - n % unit, unit


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    exact = float32_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    return plain and exact and x.dim() > 1 and x.numel() > 0


def _flops(x: torch.Size, weight: torch.Size, *_: object, out_val: object = None, **__: object) -> int:
    """Count a product's operations, a multiply-add as 2, from shapes: FlopCounterMode knows PyTorch's own products only."""
    return 2 * x.numel() * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def products(device: torch.device) -> AbstractContextManager:
    """Return what to compute a model on this device in: oneDNN's products on a CPU where they are faster, else PyTorch's choice.

    Gradients may be taken outside of it. There are first ones only: a gradient of a gradient raises RuntimeError.
    """
    return OneDNN() if device.type == "cpu" and is_faster() else nullcontext()
