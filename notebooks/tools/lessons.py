"""List the lessons, and the rules that a committed lesson keeps (run.py and tests/test_notebooks.py)."""

import re
import tempfile
from pathlib import Path

import nbformat
from prose import nameless_pictures

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"

SIZE_LIMIT = 700_000  # bytes; GitHub gives up on showing notebooks much larger than this
LINE_LIMIT = 25  # lines in a code cell: one screen
STRICT = ("00_", "01_", "02_")  # derivations: nbval compares every output

# Every tag that a cell may carry; tests/test_notebooks.py explains those of the exercises.
TAGS = {
    "setup", "needed", "proof", "exercise", "check", "hint", "solution", "predict",
    "nbval-ignore-output", "nbval-check-output",
}  # fmt: skip

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def lessons() -> list[Path]:
    """List the lessons in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook in the newest minor version of format 4, which has cell ids."""
    return nbformat.read(path, as_version=4)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """Give a cell's tags."""
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Give the code cells that hold anything: those that Jupyter counts."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def machine_paths() -> list[str]:
    """List the absolute paths that would give this machine away in an output."""
    paths = {str(ROOT), str(ROOT.parent), str(Path.home()), tempfile.gettempdir()}
    return sorted(path.rstrip("/") + "/" for path in paths if len(path) > 1)


def faults(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """Say what keeps an executed lesson from being committed; an empty list means nothing does."""
    found = []
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not run top to bottom in one go: the execution counts are not 1 to {len(cells)}")
    for number, cell in enumerate(notebook.cells, start=1):
        found += [f"cell {number}: {fault}" for fault in _cell_faults(cell)]
    ids = [cell.id for cell in notebook.cells]
    if len(set(ids)) < len(ids):
        found.append("two cells have the same id")
    if any("state" not in value for value in notebook.metadata.get("widgets", {}).values()):
        found.append("metadata.widgets has no state, and GitHub would show 'Invalid Notebook'")
    size = len(nbformat.writes(notebook).encode())
    if size > SIZE_LIMIT:
        found.append(f"{size / 1000:.0f} kB is more than {SIZE_LIMIT // 1000}: fewer or smaller figures")
    return [f"{path.name}: {fault}" for fault in found]


def _cell_faults(cell: nbformat.NotebookNode) -> list[str]:
    """Say what is wrong with one cell."""
    found = [f"unknown tag {tag!r}; known are {sorted(TAGS)}" for tag in tags(cell) if tag not in TAGS]
    if cell.cell_type != "code":
        return found
    lines = len(cell.source.splitlines())
    if lines > LINE_LIMIT:
        found.append(f"{lines} lines of code are more than {LINE_LIMIT}: split the cell")
    if cell.source.rstrip().endswith(";"):
        found.append("the trailing ';' fails under nbval: end with plt.show()")
    for output in cell.outputs:
        found += _output_faults(output)
        if output.get("execution_count", cell.execution_count) != cell.execution_count:
            found.append(f"its result says Out[{output.execution_count}] beside In[{cell.execution_count}]: run it again")
    return found


def _output_faults(output: nbformat.NotebookNode) -> list[str]:
    """Say what is wrong with one output."""
    found = []
    if output.output_type == "error":
        found.append(f"the output is an error: {output.ename}: {output.evalue[:200]}")
    if output.output_type == "stream" and output.name == "stderr":
        found.append(f"stderr on the page: {output.text.strip()[:200]}")
    data = output.get("data", {})
    shown = [output.get("text", ""), *(value for mime, value in data.items() if mime.startswith("text/"))]
    text = "".join(map(str, shown))
    if path := next((path for path in machine_paths() if path in text), None):
        found.append(f"the output shows a path of this machine, {path}")
    if re.search(r"\bat 0x[0-9a-f]{6,}", text):
        found.append("the output shows an object's address: end with plt.show(), or print what matters")
    if WIDGET_VIEW in data:
        found.append("a live widget is in the outputs, where GitHub shows nothing")
    if "image/png" in data and not output.metadata.get("image/png", {}).get("alt", "").strip():
        found.append("the picture has no alt text: show it with tinylib.plots.show(fig, alt=...)")
    for nameless in nameless_pictures("".join(str(data.get(mime, "")) for mime in ("text/html", "image/svg+xml", "text/markdown"))):
        found.append(f"a screen reader has nothing to say for {nameless[:80]}: give it alt text, or aria-label")
    return found
