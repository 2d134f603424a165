"""What every test relies on: shapes are checked, no window opens, and the lessons' tools can be imported."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Both must be set before tinylib and matplotlib are imported.
os.environ.setdefault("TINYLIB_TYPECHECK", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(ROOT / "notebooks" / "tools"))


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
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "tinylib", copy / "tinylib", ignore=shutil.ignore_patterns("__pycache__"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r'(?m)^"data/(\w+)" = "tinylib/_data/', project):
        shutil.copytree(ROOT / "data" / name, copy / "data" / name)
    shutil.copy(ROOT / "data" / "README.md", copy / "data")
    return copy
