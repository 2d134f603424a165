"""What every test relies on: shapes are checked, no window opens, and the lessons' tools can be imported."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Both must be set before tinylib and matplotlib are imported.
os.environ.setdefault("TINYLIB_TYPECHECK", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(ROOT / "notebooks" / "tools"))


def shaken(model):
    """Return a model after giving its biases and LayerNorms, which are drawn as zeros and ones, numbers of their own."""
    import torch  # here: what the variables above switch on must come first

    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=source)
    return model


def _teacher_logits() -> set[Path]:
    from tinylib import models  # here: what the variables above switch on must come first

    return set(models.cache_folder().glob("products/teacher-logits/[!.]*"))


def pytest_sessionstart(session) -> None:
    """Note which logits of teachers lie in the user's cache."""
    session.config.own_logits = _teacher_logits()


def pytest_sessionfinish(session) -> None:
    """Take those of the tests' own small teachers away; processes of pytest-xdist leave it to the one that began them."""
    if not hasattr(session.config, "workerinput"):
        from tinylib import models

        for folder in _teacher_logits() - session.config.own_logits:
            models.take_away(folder)


@pytest.fixture(scope="session")
def root() -> Path:
    """Give the course's folder."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Give the path of a Chromium-like browser, or skip and say how to get one."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "no Chromium on this machine: apt-get install chromium, or set CHROMIUM to a browser's path"
        )
    return found


@pytest.fixture(scope="session")
def course_copy(tmp_path_factory) -> Path:
    """Copy what the package is built from, as a download of the course holds it; do not write into it."""
    copy = tmp_path_factory.mktemp("download") / "course-v1"
    copy.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "tinylib", copy / "tinylib", ignore=shutil.ignore_patterns("__pycache__"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r'(?m)^"data/(\w+)" = "tinylib/_data/', project):
        shutil.copytree(ROOT / "data" / name, copy / "data" / name)
    for name in ("README.md", "NOTICES.md"):
        shutil.copy(ROOT / "data" / name, copy / "data")
    return copy


@pytest.fixture
def tmpfs(tmp_path):
    """Give a function that mounts a real small disk, or skip where that needs another user."""
    mounted = []

    def mount(*options: str, size: str = "1m") -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root: the same trouble is tested with stand-ins above")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
