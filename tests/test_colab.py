"""The set-up cell, run as in Colab: a bare environment, and a stand-in for the google.colab module.

The bare environment sees the installed packages (Colab has torch and the like too) but not tinylib, and pip
may ask no index: what passes here needs nothing but the course itself.
"""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import colab
import nbformat
import pytest
from conftest import ROOT
from lessons import LINE_LIMIT

STAND_IN = """
import sys, types
sys.modules["google"] = types.ModuleType("google")
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""


@pytest.fixture
def bare(tmp_path) -> Path:
    """Make an environment with everything but tinylib; give its Python."""
    here = Path(sysconfig.get_path("purelib"))
    view = tmp_path / "packages"
    view.mkdir()
    for entry in here.iterdir():
        if "tinylib" not in entry.name:
            (view / entry.name).symlink_to(entry)
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(
        sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, variables)
    )
    (packages / "packages.pth").write_text(f"{view}\n")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture
def colab_folder(tmp_path) -> Path:
    """Make the folder that a lesson in Colab works in."""
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


def run_cell(python: Path, folder: Path, source: str, before: str = STAND_IN) -> subprocess.CompletedProcess:
    """Run the set-up cell's source in a fresh process."""
    # "0" is how pip's environment variables say --no-build-isolation; hatchling is there already.
    env = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    env.pop("PYTHONPATH", None)
    program = before + source + "\nimport tinylib; print(tinylib.__file__)\n"
    return subprocess.run(
        [str(python), "-I", "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def make_zip(course: Path, folder: Path) -> Path:
    """Zip the course as GitHub does: one folder at the top."""
    return Path(shutil.make_archive(str(folder / "course-v1"), "zip", course.parent, course.name))


def make_repository(course: Path, folder: Path) -> str:
    """Commit the course and tag it; give the address."""
    repository = folder / "owner" / "name"
    shutil.copytree(course, repository)
    git = [
        "git",
        "-C",
        str(repository),
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "course"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return f"file://{repository}"


def described(done: subprocess.CompletedProcess, lines: int = 2) -> str:
    """Check that the cell ended well; give the file that tinylib was imported from."""
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert len(out) == lines, done.stdout
    assert out[0].startswith("tinylib ")
    return out[-1]


@pytest.mark.slow
def test_the_cell_installs_from_the_stamped_address(bare, colab_folder, course_copy, tmp_path):
    address = colab.make_address(make_repository(course_copy, tmp_path), "v1")
    source = colab.setup_cell(address)
    installed = described(run_cell(bare, colab_folder, source))
    assert installed.startswith(str(bare.parents[1]))
    for name in ("movie_reviews", "questions", "inference", "word_vectors"):
        data = Path(installed).parent / "_data" / name
        assert {p.name for p in data.iterdir()} == {p.name for p in (ROOT / "data" / name).iterdir()}


@pytest.mark.slow
def test_the_cell_installs_from_an_uploaded_zip_and_may_run_twice(bare, colab_folder, course_copy):
    (colab_folder / "holiday.zip").write_bytes(b"not a zip at all")
    make_zip(course_copy, colab_folder)
    source = colab.setup_cell(None)
    installed = described(run_cell(bare, colab_folder, source + "\n" + source), lines=3)
    assert installed.startswith(str(bare.parents[1]))
    # The heavy packages stayed where they were: torch is never installed again.
    assert [p.name for p in Path(installed).parents[1].glob("torch*")] == []


def test_without_address_and_zip_the_cell_says_what_to_do(bare, colab_folder):
    done = run_cell(bare, colab_folder, colab.setup_cell(None))
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "Upload the course as a .zip (the Files panel, left) and run this cell again."
    )


def test_an_address_that_does_not_answer_is_named(bare, colab_folder, tmp_path):
    address = colab.make_address(f"file://{tmp_path}/owner/nowhere", "v1")
    done = run_cell(bare, colab_folder, colab.setup_cell(address))
    assert done.returncode == 1
    assert done.stderr.startswith(f"{address.pip} could not be installed: ")
    assert "Traceback" not in done.stderr


def test_outside_colab_the_kernel_of_another_environment_is_told_the_remedy(bare, colab_folder):
    done = run_cell(bare, colab_folder, colab.setup_cell(None), before="")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "This kernel has no tinylib: start JupyterLab with `make lab`, or choose the kernel of .venv."
    )


def test_in_the_courses_own_folder_the_package_beside_the_lessons_is_used(bare):
    source = colab.setup_cell(None)
    installed = described(run_cell(bare, ROOT / "notebooks", source, before=""))
    assert Path(installed).resolve() == ROOT / "tinylib" / "__init__.py"


def test_the_cell_is_one_screen():
    long = colab.Address("https://github.com/some-university/tinybert-course", "v1.0.0")
    lines = colab.setup_cell(long).splitlines()
    assert len(lines) <= LINE_LIMIT
    assert max(map(len, lines)) <= 110


# -- stamping ----------------------------------------------------------------


@pytest.fixture
def pyproject(tmp_path) -> Path:
    return Path(shutil.copy(ROOT / "pyproject.toml", tmp_path))


@pytest.mark.parametrize(
    "repo", ["owner/name", "https://github.com/owner/name.git", "https://github.com/owner/name/"]
)
def test_the_address_is_written_once_and_read_back(pyproject, repo):
    address = colab.make_address(repo, "v1")
    colab.write_address(pyproject, colab.make_address("someone/else", "v0"))
    colab.write_address(pyproject, address)
    assert colab.read_address(pyproject) == address == ("https://github.com/owner/name", "v1")
    text = pyproject.read_text()
    assert text.count("[project.urls]") == 1
    assert "someone" not in text
    assert "\n\n[tool.hatch" in text
    assert "dev-mode-dirs" in text


@pytest.mark.parametrize(
    ("repo", "tag"), [("", "v1"), ("owner/name", ""), ("owner", "v1"), ("owner/na me", "v1")]
)
def test_half_an_address_is_refused(repo, tag):
    with pytest.raises(SystemExit, match="make colab REPO=owner/name TAG=v1"):
        colab.make_address(repo, tag)


def test_stamping_adds_the_cell_and_the_badge_and_changes_nothing_the_second_time(tmp_path):
    path = tmp_path / "01_self_attention.ipynb"
    cells = [
        nbformat.v4.new_markdown_cell("# Self-attention\n\nWhat is it?"),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert colab.stamp(path, None)
    plain = path.read_text()
    assert "colab-badge" not in plain
    address = colab.make_address("owner/name", "v1")
    assert colab.stamp(path, address)
    assert not colab.stamp(path, address)
    title, setup, rest = json.loads(path.read_text())["cells"]
    link = "https://colab.research.google.com/github/owner/name/blob/v1/notebooks/01_self_attention.ipynb"
    assert f"]({link})" in "".join(title["source"])
    assert "".join(title["source"]).startswith("# Self-attention\n\n[![Open in Colab]")
    assert "".join(setup["source"]) == colab.setup_cell(address)
    assert setup["metadata"]["tags"] == colab.SETUP_TAGS
    assert "".join(rest["source"]) == "1 + 1"
    assert colab.stamp(path, None)
    assert path.read_text() == plain


def test_an_address_off_github_gets_no_badge():
    assert colab.make_address("https://git.example.org/owner/name", "v1").badge("00_start_here.ipynb") is None
