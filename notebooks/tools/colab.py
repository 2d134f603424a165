"""Put the set-up cell and the Colab badge into the lessons; the one definition of both.

    python notebooks/tools/colab.py stamp                             # with the address in pyproject.toml
    python notebooks/tools/colab.py stamp --repo owner/name --tag v1  # write it there first (`make colab`)

The address lives in [project.urls] of pyproject.toml and nowhere else. Until there is one the lessons carry
no badge, and their set-up cell installs from a zip of the course that the learner uploads to Colab.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lessons import ROOT, lessons, read, tags  # noqa: E402

SETUP = """\
# Set-up, safe to run twice: in Colab it installs the course's package, elsewhere it is there already.
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

# The course's repository; while this is empty, a zip of the course that you upload to Colab is used.
ADDRESS = "{address}"
sys.path.append("..")  # the package lies beside the folder of the lessons
if "google.colab" in sys.modules and not importlib.util.find_spec("tinylib"):
    zips = [str(p.resolve()) for p in Path().glob("*.zip") if zipfile.is_zipfile(p)]
    zips = [p for p in zips if any(f.endswith("tinylib/__init__.py") for f in zipfile.ZipFile(p).namelist())]
    if not ADDRESS and not zips:
        raise SystemExit("Upload the course as a .zip (the Files panel, left) and run this cell again.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", ADDRESS or zips[0]]
    if (done := subprocess.run(pip, capture_output=True, text=True)).returncode:
        raise SystemExit(f"{ADDRESS or zips[0]} could not be installed: {done.stderr.strip()[-300:]}")
    importlib.invalidate_caches()
try:
    from tinylib import course
except ModuleNotFoundError as error:
    remedy = "start JupyterLab with `make lab`, or choose the kernel of .venv"
    raise SystemExit(f"This kernel has no {error.name}: {remedy}.") from None
print(course.describe())
"""
SETUP_TAGS = ["setup", "nbval-ignore-output"]  # its line names this machine's device and threads

COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
URLS = re.compile(r"(?m)^\[project\.urls\]\n(?:(?!\[).*\n)*")


class Address(NamedTuple):
    """Where the course's repository is, and which tag of it the lessons install."""

    repository: str  # https://github.com/owner/name, or any other address that git can clone
    tag: str

    @property
    def pip(self) -> str:
        """Give what pip installs from."""
        return f"git+{self.repository}@{self.tag}"

    def badge(self, lesson: str) -> str | None:
        """Give the badge's line for a lesson's file name; Colab opens notebooks from GitHub only."""
        owner = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", self.repository)
        return owner and f"{BADGE}({COLAB}/github/{owner[1]}/blob/{self.tag}/notebooks/{lesson})"


def make_address(repo: str, tag: str) -> Address:
    """Turn owner/name (on GitHub) or a full URL into an address."""
    repository = repo.rstrip("/") if "://" in repo else f"https://github.com/{repo}"
    if "github.com" in repository:
        repository = repository.removesuffix(".git")
    if not re.fullmatch(r"\w+://[\w./:~-]*/[\w.-]+/[\w.-]+", repository) or not re.fullmatch(
        r"[\w./-]+", tag
    ):
        raise SystemExit(f"REPO={repo} TAG={tag} is no address: say make colab REPO=owner/name TAG=v1")
    return Address(repository, tag)


def read_address(pyproject: Path) -> Address | None:
    """Read the address from [project.urls]; None when none is stamped yet."""
    section = URLS.search(pyproject.read_text(encoding="utf-8"))
    urls = dict(re.findall(r'(?m)^(\w+) = "(.*)"$', section[0])) if section else {}
    if "Repository" not in urls:
        return None
    tag = urls["Lessons"].removeprefix(urls["Repository"] + "/tree/").removesuffix("/notebooks")
    return Address(urls["Repository"], tag)


def write_address(pyproject: Path, address: Address) -> None:
    """Write the address into [project.urls]."""
    text = pyproject.read_text(encoding="utf-8")
    repository, tag = address
    section = (
        f'[project.urls]\nRepository = "{repository}"\nLessons = "{repository}/tree/{tag}/notebooks"\n\n'
    )
    pyproject.write_text(URLS.sub(lambda _: section, text, count=1), encoding="utf-8", newline="\n")


def setup_cell(address: Address | None) -> str:
    """Give the source of the set-up cell."""
    return SETUP.replace("{address}", address.pip if address else "").rstrip("\n")


def stamp_title(source: str, badge: str | None) -> str:
    """Give the title cell's text with the badge below the title, and no other badge."""
    lines = source.split("\n")
    while (at := next((i for i, line in enumerate(lines) if line.startswith(BADGE)), None)) is not None:
        del lines[at : at + 2]  # the badge and the empty line below it
    if badge:
        lines[1:1] = ["", badge] if len(lines) > 1 and not lines[1] else ["", badge, ""]
    return "\n".join(lines)


def stamp(path: Path, address: Address | None) -> bool:
    """Stamp one lesson; tell whether the file changed."""
    old = path.read_text(encoding="utf-8")
    notebook = read(path)
    title = notebook.cells[0]
    if title.cell_type != "markdown" or not title.source.startswith("# "):
        raise SystemExit(f"{path.name}: the first cell must be markdown and start with the title, '# ...'")
    title.source = stamp_title(title.source, address and address.badge(path.name))
    found = [cell for cell in notebook.cells if "setup" in tags(cell)]
    if not found:
        found = [nbformat.v4.new_code_cell()]
        notebook.cells.insert(1, found[0])
    found[0].source = setup_cell(address)
    found[0].metadata["tags"] = SETUP_TAGS
    new = nbformat.writes(notebook) + "\n"
    if new != old:
        path.write_text(new, encoding="utf-8", newline="\n")
    return new != old


def main() -> None:
    """Stamp all lessons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["stamp"])
    parser.add_argument("--repo", help="owner/name on GitHub, or the URL of a git repository")
    parser.add_argument("--tag", help="the tag or branch that the lessons install")
    args = parser.parse_args()
    if args.repo or args.tag:
        write_address(ROOT / "pyproject.toml", make_address(args.repo or "", args.tag or ""))
    address = read_address(ROOT / "pyproject.toml")
    changed = [path.name for path in lessons() if stamp(path, address)]
    print(f"address: {address.pip if address else 'none yet'}; {len(changed)} lessons changed: {changed}")


if __name__ == "__main__":
    main()
