"""Run lessons in place, top to bottom in a fresh kernel, and save them as committed (`make notebooks`).

    python notebooks/tools/run.py                                  # every lesson
    python notebooks/tools/run.py notebooks/04_distillation_loss.ipynb

What varies from run to run without meaning anything (time stamps, widget models, versions) is left out of the
file, and cells get stable ids, so that a diff shows what changed. A lesson that ends in an error, writes to
stderr or shows a path of this machine is not saved: the faults are printed and the exit code is 1.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lessons import STRICT, WIDGET_VIEW, code_cells, faults, lessons, read, tags  # noqa: E402

CELL_TIMEOUT = 1500  # seconds, as under nbval
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
CELL_METADATA = ("tags", "exercise", "jupyter", "collapsed")  # what a cell keeps; editors add much else


def execute(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """Run every cell in a fresh kernel of this environment; return what went wrong."""
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=True,  # without it, output inside a widget (interact) is an error of nbclient
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"{path.name}: {error}"]
    return []


def clean(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """Leave out what varies without meaning; return the cells that nbval could not compare afterwards."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02d}"
        kept_metadata = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept_metadata)
        if cell.cell_type != "code":
            continue
        # GitHub and the site show the static figure beside a widget; of the widget's own view, nothing.
        kept = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
        compared = path.name.startswith(STRICT) or "nbval-check-output" in tags(cell)
        if len(kept) < len(cell.outputs) and compared and "nbval-ignore-output" not in tags(cell):
            found.append(f"{path.name}: cell {number} shows a widget or a bar: tag it nbval-ignore-output")
        cell.outputs = kept
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    notebook.nbformat_minor = 5
    return found


def run(path: Path) -> bool:
    """Run one lesson and save it; say how long it took and how large it is."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    found = execute(path, notebook)
    seconds = time.perf_counter() - start
    if not found:
        found = clean(path, notebook) + faults(path, notebook)
    if found:
        print(f"{path.name}: NOT saved after {seconds:.0f} s\n  " + "\n  ".join(found), flush=True)
        return False
    # Written beside the lesson and renamed, so that an interruption leaves the old file whole.
    text = nbformat.writes(notebook)
    fresh = path.with_suffix(".ipynb.new")
    fresh.write_text(text + "\n", encoding="utf-8", newline="\n")
    os.replace(fresh, path)
    cells = len(code_cells(notebook))
    print(f"{path.name}: {cells} code cells, {seconds:.0f} s, {len(text) / 1000:.0f} kB", flush=True)
    return True


def main() -> int:
    """Run the lessons named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", type=Path, help="notebook files (default: all lessons)")
    paths = [path.resolve() for path in parser.parse_args().lessons] or lessons()
    # The committed outputs are the laptop tier's, whatever this machine has.
    os.environ["TINYLIB_TIER"] = "laptop"
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    start = time.perf_counter()
    results = [run(path) for path in paths]
    minutes = (time.perf_counter() - start) / 60
    print(f"{sum(results)} of {len(results)} lessons saved in {minutes:.1f} minutes")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
