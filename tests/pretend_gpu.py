"""A GPU played on the CPU: PyTorch says "cuda" of tensors that were put there, and refuses what a real one would refuse.

Whoever has no GPU can so find where a program forgets to move something: tensors of two devices in one operation, NumPy on
the GPU's memory, a CPU's generator for a GPU's draw. Values are the CPU's own, so results are those of a run without it. Speed,
memory and what kernels round differently are not played.

    with pretend_gpu.present():
        torch.ones(3, device="cuda") + torch.ones(3)  # RuntimeError

It marks storages, so views, parameters and gradients follow; two modes of PyTorch's see every call: one the functions that
name a device (``.to``, ``.device``, factories), the other every operation, also those of the backward pass.
"""

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
# What copies between devices, or takes indices from the CPU, on a real GPU too.
CROSSING = {"aten::_has_compatible_shallow_copy_type", "aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
THERE = {  # what a tensor on the GPU says of itself
    torch.Tensor.device.__get__: CUDA, torch.Tensor.is_cuda.__get__: True, torch.Tensor.is_cpu.__get__: False,
    torch.Tensor.get_device: 0,
}  # fmt: skip
TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class Marks:
    """Which storages lie on the GPU. A mark holds its storage weakly, and no address is used again while it does."""

    def __init__(self):
        self.refs: dict[int, StorageWeakRef] = {}
        self.many = 5000  # then those of dropped storages are taken out

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies on the GPU."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self.refs

    def put(self, tensor: Tensor) -> None:
        """Mark a tensor's storage."""
        if len(self.refs) >= self.many:
            self.refs = {place: ref for place, ref in self.refs.items() if not ref.expired()}
            self.many = max(self.many, 2 * len(self.refs))
        if (storage := _storage(tensor)) is not None:
            self.refs[storage._cdata] = StorageWeakRef(storage)


def _storage(tensor: Tensor):
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return None


class Functions(TorchFunctionMode):
    """What names a device."""

    def __init__(self, marks: Marks):
        self.marks = marks
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in THERE and self.marks.has(args[0]):
            return THERE[func]
        if func in TO_NUMPY and self.marks.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        there = bool(args) and isinstance(args[0], Tensor) and self.marks.has(args[0])
        args, kwargs, target = self._without_device(func, args, kwargs)
        on_gpu = there if target is None else target.type == "cuda"
        drawn_by = kwargs.get("generator")
        if drawn_by is not None and on_gpu:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        result = func(*args, **kwargs)
        if target is None or not isinstance(result, Tensor):
            return result
        if not (args and isinstance(args[0], Tensor)):  # a factory's own new tensor
            if on_gpu:
                self.marks.put(result)
        elif self.marks.has(result) != on_gpu:
            result = Moved.apply(result, on_gpu, self.marks)
        return result

    def _without_device(self, func, args, kwargs):
        """Return the call with its device taken out, and that device (None: none was named)."""
        if func is torch.Tensor.cuda:
            return (args[0],), {}, CUDA
        if func is torch.Tensor.cpu:
            return args, kwargs, torch.device("cpu")
        target = None
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type in ("cuda", "cpu"):
            target = torch.device(kwargs.pop("device"))
            if func is not torch.Tensor.to:
                kwargs["device"] = "cpu"
        if func is torch.Tensor.to and len(args) > 1:
            where = args[1]
            if isinstance(where, Tensor):
                target = CUDA if self.marks.has(where) else torch.device("cpu")
                args = (args[0], where.dtype, *args[2:])
            elif isinstance(where, str | int | torch.device) and torch.device(where).type in ("cuda", "cpu"):
                target = torch.device(where)
                args = (args[0], *args[2:])
                if len(args) > 1 and not isinstance(args[1], torch.dtype):  # .to(device, non_blocking)
                    args = args[:1]
            elif where is None:
                args = (args[0], *args[2:])
        if func is torch.Tensor.to:
            kwargs.pop("non_blocking", None)
            if len(args) == 1 and not ({"dtype", "other"} & kwargs.keys()):
                args = (args[0], args[0].dtype)
        return args, kwargs, target


class Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back to where the tensor came from."""

    @staticmethod
    def forward(ctx, tensor: Tensor, to_gpu: bool, marks: Marks) -> Tensor:
        """Return the copy."""
        ctx.to_gpu, ctx.marks = to_gpu, marks
        with _disable_current_modes():  # else a copy of what lies on the GPU would lie there, too
            copy = tensor.detach().clone()
        if to_gpu:
            marks.put(copy)
        return copy

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """Return the gradient on the first device."""
        return Moved.apply(gradient, not ctx.to_gpu, ctx.marks), None, None


class Operations(TorchDispatchMode):
    """Every operation: its tensors must lie together, and its results lie with them."""

    def __init__(self, marks: Marks):
        self.marks = marks
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.marks.has(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        if not any(there):
            return result
        name = func.name().split(".")[0]
        if name in CROSSING:
            on_gpu = there[0]
        else:
            on_gpu = True
            strays = [t for t, gpu in zip(tensors, there, strict=True) if not gpu and t.dim() > 0]
            if strays and not (name in INDEXED and there[0]):
                sizes = ", ".join(str(tuple(t.shape)) for t in strays)
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found two, cuda:0 and cpu ({name}: {sizes} on the cpu)"
                )
        if on_gpu:
            tree_map_only(Tensor, self.marks.put, result)
        return result


def forget_device() -> None:
    """Let Accelerate look for the device anew: it does so once a process, and its Accelerators share the answer."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def present() -> Iterator[Marks]:
    """Let PyTorch believe that there is one GPU."""
    card = types.SimpleNamespace(name="pretended", total_memory=16 * 10**9, major=8, minor=0, multi_processor_count=1)
    told = {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda *_: None,
        "get_device_properties": lambda *_: card, "get_device_name": lambda *_: card.name,
        "get_device_capability": lambda *_: (8, 0), "synchronize": lambda *_: None, "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda state, *_: None,
        "get_rng_state_all": lambda: [torch.get_rng_state()], "set_rng_state_all": lambda _: None,
        "manual_seed": lambda _: None, "manual_seed_all": lambda _: None, "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False, "mem_get_info": lambda *_: (15 * 10**9, 16 * 10**9),
    }  # fmt: skip
    marks = Marks()
    with contextlib.ExitStack() as stack:
        for name, value in told.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        forget_device()
        stack.callback(forget_device)
        stack.enter_context(Functions(marks))
        stack.enter_context(Operations(marks))
        yield marks
