"""What a model costs: parameters, multiply-adds, bytes on disk, milliseconds, memory.

Counts (parameters, FLOPs, bytes) are the same on every machine; latency and memory hold for the machine
that measured them, so compare only figures taken on one machine in one session.
"""

import gc
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinylib.bert import Bert, BertConfig
from tinylib.encoders import Teacher
from tinylib.errors import UserError
from tinylib.paging import release_freed_memory

PIECE = 1 << 20  # bytes read at a time
# The last words of ``process_memory``'s process: its peak, in bytes. Linux' ru_maxrss would begin at the parent's size.
REPORT = """
import sys
if sys.platform == "win32":
    import psutil
    print(psutil.Process().memory_info().peak_wset)
elif sys.platform == "darwin":
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:
    print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; a tensor that two layers share (tied) counts once."""
    return sum(p.numel() for p in model.parameters())


def flops(config: BertConfig, length: int, batch: int = 1) -> int:
    """Return the floating-point operations of one forward pass over (batch, length) tokens.

    Matrix products only, a multiply-add as 2 operations, as torch's FlopCounterMode counts;
    normalisations, GELU, softmax and the embeddings' look-up come to a few per cent more in time but
    hold no matrix product. Raises UserError if ``length`` or ``batch`` is below 1.
    """
    T, C, F = length, config.hidden_size, config.intermediate_size
    if T < 1 or batch < 1:
        raise UserError(f"length={length} and batch={batch} must both be at least 1")
    inner = config.num_attention_heads * config.head_width  # C, unless heads were removed
    projections = 4 * T * C * inner  # query, key, value, output
    attention = 2 * T * T * inner  # q·kᵀ and weights·v
    ffn = 2 * T * C * F
    multiply_adds = config.num_hidden_layers * (projections + attention + ffn)
    if config.outputs:
        multiply_adds += C * C + C * config.outputs  # pooler and classifier see [CLS] only
    if config.head == "masked_lm":
        multiply_adds += T * C * C + T * C * config.vocab_size
    return 2 * multiply_adds * batch

def flops_per_token(teacher: BertConfig, student: BertConfig, length: int) -> tuple[float, float]:
    """Return the forward FLOPs of matching layers, a token of a text of ``length``: the teacher's; the student's with projections.

    Both run without a masked-LM head (``layers.layer_outputs``) and the student without any; it has a projection to the teacher's
    width for its embeddings and each layer (Jiao et al. 2020, eq. 8). A step takes the first once and the second three times, as
    a backward pass costs two forward ones.
    """
    encoder = student.replace(head=None, labels=())
    told = teacher.replace(head=None) if teacher.head == "masked_lm" else teacher
    projections = 2 * (student.num_hidden_layers + 1) * student.hidden_size * teacher.hidden_size
    return flops(told, length) / length, flops(encoder, length) / length + projections


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's parameters and buffers take in memory; tied ones count once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def file_size(path: str | os.PathLike) -> int:
    """Return the bytes of a file, or of all files in a folder; raise UserError if there is no such path."""
    return sum(file.stat().st_size for file in _files(path))


def compressed_size(path: str | os.PathLike, level: int = 6) -> int:
    """Return the bytes that a file, or all files of a folder, would take after gzip.

    Zeros in a dense file take as much room as other numbers; here they show, since a run of equal bytes
    packs small. Raises UserError if there is no such path.
    """
    total = 0
    for file in _files(path):
        packer = zlib.compressobj(level, wbits=31)  # 31: gzip's header and checksum around deflate
        total += sum(len(packer.compress(piece)) for piece in _pieces(file)) + len(packer.flush())
    return total


def _files(path: str | os.PathLike) -> list[Path]:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file, or the folder that save_pretrained wrote")
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _pieces(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        while piece := opened.read(PIECE):
            yield piece


@dataclass(frozen=True)
class Latency:
    """How long one call takes, in milliseconds, over ``repeats`` calls."""

    median: float
    p95: float  # 95 calls of a hundred are faster
    repeats: int
    cpu: float = 0.0  # milliseconds that this process' threads were busy, together, per call: what the energy goes with
    times: tuple[float, ...] = field(default=(), repr=False)  # of each call, in the order of the calls

    def __str__(self) -> str:
        return f"{self.median:.3g} ms (95 % under {self.p95:.3g} ms, {self.repeats} calls)"


def latency(function: Callable[[], object], repeats: int = 30, warmup: int = 5) -> Latency:
    """Time ``function()``: ``warmup`` calls that do not count, then ``repeats`` that do, one by one.

    The median is not moved by the one call in which the machine did something else; the 95th percentile
    is what a waiting user notices. On a GPU each call is waited for, since kernels run after their call
    has returned. Raises UserError for ``repeats`` below 1 and ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise UserError(f"repeats={repeats} must be at least 1 and warmup={warmup} at least 0")
    for _ in range(warmup):
        function()
    times, busy = [], time.process_time()
    for _ in range(repeats):
        _wait()
        started = time.perf_counter_ns()
        function()
        _wait()
        times.append((time.perf_counter_ns() - started) / 1e6)
    busy = 1000 * (time.process_time() - busy) / repeats
    return Latency(statistics.median(times), percentile(times, 0.95), repeats, busy, tuple(times))


def percentile(times: Sequence[float], share: float) -> float:
    """Return the smallest of the times that at least a share (0 < share ≤ 1) of them do not exceed: the nearest rank."""
    rank = math.ceil(round(share * len(times), 9))  # rounded: 0.07 · 100 is a little more than 7
    return sorted(times)[rank - 1]


def _has_gpu() -> bool:
    """Tell whether a GPU is in use; to ask it for anything would begin to use it."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _wait() -> None:
    if _has_gpu():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], object]) -> int:
    """Return by how many bytes memory rose, at most, while ``function()`` ran.

    On a GPU: what PyTorch allocated there, exactly. Of a function that allocates nothing there: the resident memory of
    this process, sampled every millisecond, so a shorter peak is missed. What earlier calls freed is given back to the
    system first, where the C library can (glibc): pages that the allocator had kept resident would serve
    the function without a trace. For a figure to publish, measure in a fresh process.
    """
    import psutil

    gc.collect()
    release_freed_memory()
    process, done, gpu = psutil.Process(), threading.Event(), _has_gpu()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        function()
        highest = max(highest, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    on_gpu = torch.cuda.max_memory_allocated() - held if gpu else 0
    return on_gpu or highest - before


def process_memory(code: str) -> int:
    """Return the most memory, in bytes, that a fresh Python process held while it ran ``code``: resident, interpreter included.

    So nothing that this process has loaded or freed counts. Raises UserError with the last line of what the process said if it
    fails.
    """
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the process whose memory was to be measured failed: {last}")
    return int(done.stdout.split()[-1])


@dataclass(frozen=True)
class Measured:
    """What one model costs, at one sequence length and batch size."""

    parameters: int
    megabytes: float  # of its weights, 10^6 bytes
    gigaflops: float  # 10^9 operations of one forward pass over the batch
    latency: Latency  # of that forward pass
    length: int
    batch: int
    device: str = "cpu"  # "cuda" on a GPU
    threads: int = 1  # of the CPU

    def report(self) -> dict:
        """Return the latency in milliseconds, and of what and where, as metrics.json and model cards tell it."""
        taken = self.latency
        told = {"median_ms": taken.median, "p95_ms": taken.p95, "repeats": taken.repeats, "tokens": self.length}
        return told | {"device": self.device, "threads": self.threads}

    def row(self, **more) -> dict:
        """Return a table's row: what is given (``model="teacher", accuracy=0.87``), then the costs."""
        return more | {
            "parameters (M)": round(self.parameters / 1e6, 1),
            "size (MB)": round(self.megabytes, 1),
            "GFLOPs": round(self.gigaflops, 3),
            "latency (ms)": round(self.latency.median, 1),
        }


@torch.inference_mode()
def summary(model: Teacher, length: int = 32, batch: int = 1, repeats: int = 30, warmup: int = 5) -> Measured:
    """Measure a model on random token ids (batch, length), in evaluation mode, on the model's device.

    A Bert's operations are those of ``flops``; other encoders', whose attention may be another, torch counts while they run.
    Raises UserError if ``length``, ``batch`` or ``repeats`` is below 1, or ``warmup`` below 0.
    """
    training, device = model.training, next(model.parameters()).device
    flops(model.config, length, batch)  # refuses sizes that cannot be
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=source).to(device)
    model.eval()
    try:
        count = flops(model.config, length, batch) if isinstance(model, Bert) else _counted(model, ids)
        taken = latency(lambda: model(ids), repeats, warmup)
    finally:
        model.train(training)
    sizes = parameters(model), weight_bytes(model) / 1e6, count / 1e9
    return Measured(*sizes, taken, length, batch, device.type, torch.get_num_threads())


def _counted(model: nn.Module, ids: Tensor) -> int:
    """Return the operations of ``model(ids)`` as torch counts them; of fused attention it counts none on a CPU."""
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(False), torch.enable_grad(), plain, FlopCounterMode(display=False) as counter:  # it reads the graph
        model(ids.clone())
    return counter.get_total_flops()
