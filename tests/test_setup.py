"""Setting the course up: the pins, the two environments, the Makefile, and what `pip install .` gives."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tinylib

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINNED_HERE = {canonicalize_name(p.name): p for p in PINS if not p.marker or p.marker.evaluate()}


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run a command and keep what it prints."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def loose_bounds() -> list[Requirement]:
    """Read the dependencies of the package and of its extras from pyproject.toml."""
    lists = re.findall(r"(?ms)^(?:dependencies|lab|export|logs|test) = \[\n(.*?)^\]", PYPROJECT)
    return [Requirement(text) for block in lists for text in re.findall(r'(?m)^    "(.*?)",', block)]


# -- pins ----------------------------------------------------------------------


def test_every_pin_is_exact():
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in PINS)
    assert not [pin.name for pin in PINS if pin.url]


def test_requirements_hold_no_address_and_no_cuda():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    assert not [pin.name for pin in PINS if re.match(r"nvidia-|cuda-|triton", pin.name)]


def test_torch_is_the_version_with_a_local_wheel():
    assert str(PINNED_HERE["torch"].specifier) == "==2.13.0"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_pins_meet_the_loose_bounds_everywhere(python, platform):
    systems = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    where = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform}
    where |= {"platform_system": systems[platform], "os_name": "nt" if platform == "win32" else "posix"}
    pins = [pin for pin in PINS if not pin.marker or pin.marker.evaluate(where)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins), "two pins of one package hold at once"
    bounds = [bound for bound in loose_bounds() if not bound.marker or bound.marker.evaluate(where)]
    assert len(bounds) > 20
    for bound in bounds:
        assert versions[canonicalize_name(bound.name)] in bound.specifier, f"say `make pins`: {bound}"


def test_this_environment_is_the_pinned_one():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINNED_HERE}
    pinned = {name: str(pin.specifier).removeprefix("==") for name, pin in PINNED_HERE.items()}
    assert installed == pinned, "say `make setup`"


def test_pip_sees_no_conflict():
    done = run(sys.executable, "-m", "pip", "check", "--disable-pip-version-check")
    # Only our own packages count: an environment may hold a maintainer's tools too.
    complaints = [
        line for line in done.stdout.splitlines() if canonicalize_name(line.split()[0]) in PINNED_HERE
    ]
    assert not complaints


def test_conda_gets_the_same_versions_as_pip():
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()]
    assert "- -r requirements.txt" in lines, "one list of versions serves both"
    packages = [line[2:] for line in lines if re.match(r"- [a-z]", line)]
    assert {re.split("[=<>:]", p)[0] for p in packages} - {"conda-forge"} == {"python", "pip", "make"}
    version = next(p for p in packages if p.startswith("python=")).removeprefix("python=")
    required = re.search(r'requires-python = "(.*)"', PYPROJECT)[1]
    assert f"{version}.0" in Requirement(f"python{required}").specifier


# -- package ----------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    version = re.search(r'(?m)^version = "(.*)"', PYPROJECT)[1]
    citation = re.search(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))[1]
    assert tinylib.__version__ == citation == version


def test_pip_install_gives_the_package_its_data_and_the_command(course_copy, tmp_path):
    build = (
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
        ".",
    )
    done = run(sys.executable, *build, cwd=course_copy)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("tinylib-*.whl"))) as wheel:
        names = wheel.namelist()
        commands = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "tinylib = tinylib.cli:main" in commands
    assert {f"tinylib/{path.name}" for path in (ROOT / "tinylib").glob("*.py")} <= set(names)
    assert "tinylib/_data/README.md" in names  # the licences ask that credit travels with the data
    assert "tinylib/_data/requirements.txt" in names  # the tested versions, for tinylib doctor
    for folder in ("movie_reviews", "questions", "inference", "word_vectors", "corpus", "models", "results"):
        files = (path for path in (ROOT / "data" / folder).rglob("*") if path.is_file() and path.suffix != ".lock")
        data = {path.relative_to(ROOT / "data").as_posix() for path in files}
        assert data
        assert {f"tinylib/_data/{name}" for name in data} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "tinylib",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }


# -- Makefile ----------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """Copy just enough of the course to call make in."""
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, script: str) -> str:
    """Write a stand-in for a Python interpreter that the Makefile should refuse."""
    path = folder / "python-stand-in"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_command():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"(?m)^\.PHONY: (.*)$", text)[1].split()
    assert {"setup", "lab", "test", "distill", "help"} <= set(targets)
    shown = run("make", "help").stdout
    assert all(f"make {target}" in shown for target in targets)
    assert run("make").stdout == shown, "make alone shows the help"


@pytest.mark.parametrize("target", ["lab", "test", "distill"])
def test_each_command_sets_up_first(tree, target):
    done = run("make", "-n", target, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("-r requirements.txt") < done.stdout.rindex(".venv/bin/")


def test_an_old_python_ends_in_a_sentence(tree):
    python = fake_python(tree, 'case "$1" in --version) echo "Python 3.8.10";; *) exit 1;; esac\n')
    done = run("make", "setup", f"PYTHON={python}", cwd=tree)
    assert done.returncode == 2
    assert "needs Python 3.10 or newer" in done.stderr
    assert "is Python 3.8.10" in done.stderr
    assert "make setup PYTHON=" in done.stderr
    assert not (tree / ".venv").exists()


def test_a_python_without_venv_ends_in_a_sentence(tree):
    python = fake_python(tree, 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac\n')
    done = run("make", "setup", f"PYTHON={python}", cwd=tree)
    assert done.returncode == 2
    assert "sudo apt-get install python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_the_index_with_torchs_cpu_build_is_handed_to_pip(tree):
    assert (
        '--extra-index-url "file:///wheels"'
        in run("make", "-n", "setup", "TORCH_INDEX=file:///wheels", cwd=tree).stdout
    )
    assert "--extra-index-url" not in run("make", "-n", "setup", cwd=tree).stdout


def test_colab_hands_the_address_on(tree):
    shown = run("make", "-n", "colab", "REPO=owner/name", "TAG=v1", cwd=tree).stdout
    assert 'stamp --repo "owner/name" --tag "v1"' in shown


needs_setup = pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="this copy has no .venv: say `make setup` first"
)


@needs_setup
def test_a_second_setup_does_nothing():
    assert run("make", "setup").returncode == 0
    done = run("make", "setup")
    assert done.returncode == 0, done.stderr
    assert "nstalling" not in done.stdout


@pytest.mark.slow
@needs_setup
def test_lab_answers_and_prints_its_address(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = f"--no-browser --port={port} --IdentityProvider.token=course"
    log = (tmp_path / "log").open("w+")
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    server = subprocess.Popen(
        ["make", "lab", f"LAB_ARGS={options}"],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env=env,
        start_new_session=True,
    )
    try:
        lesson = wait_for(
            f"http://127.0.0.1:{port}/api/contents/notebooks/00_start_here.ipynb?token=course&content=0"
        )
        assert json.loads(lesson)["type"] == "notebook"
        printed = Path(log.name).read_text()
        assert re.search(rf"http://\S+:{port}/lab/tree/notebooks/00_start_here.ipynb", printed), printed
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
        log.close()


def wait_for(url: str, seconds: float = 60) -> str:
    """Ask again until the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_the_conda_environment_is_called_what_the_pages_say():
    name = re.search(r"(?m)^name: (.+)$", (ROOT / "environment.yml").read_text(encoding="utf-8"))[1]
    pages = [ROOT / "environment.yml", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    said = [word for page in pages for word in re.findall(r"conda activate ([\w-]+)", page.read_text(encoding="utf-8"))]
    assert len(said) >= 2
    assert set(said) == {name}
