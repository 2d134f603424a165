"""Products of linear layers by oneDNN, for a forward pass that no gradient is wanted of, where PyTorch's own choice is slower.

PyTorch gives float32 products on x86 to Intel's MKL, which uses AVX-512 on Intel's processors only. oneDNN uses it on all; both are
part of PyTorch. On a processor of AMD's with AVX-512 a teacher of BERT-base's size answers 1.12 to 1.18 times as fast (one thread,
16 to 64 tokens, eight rounds in turn, beside other work). The results differ by rounding alone.
"""

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula


@functools.cache
def is_faster() -> bool:
    """Tell whether this is a processor on which oneDNN's float32 products are the faster ones."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    return table.read_text(errors="replace")[:2000] if table.exists() else platform.processor()  # Windows says it there


class OneDNN(TorchFunctionMode):
    """While this is entered, linear layers on float32 tensors of the CPU are computed by oneDNN; it keeps no graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compute ``F.linear`` by oneDNN; leave every other function alone."""
        if func is F.linear and not kwargs and _fits(*args):
            x, weight, *bias = args
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    return plain and exact and not torch.is_grad_enabled() and x.dim() > 1 and x.numel() > 0


def _flops(x: torch.Size, weight: torch.Size, *_: object, out_val: object = None, **__: object) -> int:
    """Count a product's operations, a multiply-add as 2, from shapes: FlopCounterMode knows PyTorch's own products only."""
    return 2 * x.numel() * weight[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def products() -> AbstractContextManager:
    """Return what to run a forward pass without a graph in: oneDNN's products where they are faster, else PyTorch's choice."""
    return OneDNN() if is_faster() else nullcontext()
