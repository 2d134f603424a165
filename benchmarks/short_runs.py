"""Lesson 06's short runs over three seeds: each loss taken away, and three starts (`python benchmarks/short_runs.py`).

Runs the lesson's own cells with three seeds in the place of one, so that nothing is defined twice, and writes
data/results/short_runs.json, which the lesson prints: per run the three distances to the teacher on new sentences and the
correlation of the verdicts. About five minutes on one thread, once the teacher is in the cache.
"""

import argparse
import json
import os

import matplotlib
from runs import FOLDER, machine, save

from tinylib import datasets

FILE = FOLDER / "short_runs.json"
LESSON = datasets.data_folder().parent / "notebooks" / "06_tinybert_losses.ipynb"
ONE, THREE, LAST = "SEEDS = (0,)", "SEEDS = (0, 1, 2)", "show_table(starts)"


def sources() -> list[str]:
    """Return the lesson's code up to its last short run: without exercises, their checks and the reading of this very file."""
    found = []
    for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        left_out = {"exercise", "check"} & set(cell["metadata"].get("tags", ())) or FILE.name in source
        if cell["cell_type"] == "code" and not left_out:
            found.append(source.replace(ONE, THREE))
        if cell["cell_type"] == "code" and LAST in source:
            return found
    raise SystemExit(f"{LESSON.name} has no cell with {LAST!r} any more: say in {__file__} where the short runs end")


def main() -> None:
    """Run the cells and save what they found."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    matplotlib.use("Agg")
    cells = sources()
    if sum(THREE in cell for cell in cells) != 1:
        raise SystemExit(f"{LESSON.name} has not one cell with {ONE!r}")
    os.chdir(LESSON.parent)
    lesson = {"__name__": "__main__"}
    for source in cells:
        exec(compile(source, LESSON.name, "exec"), lesson)
    groups = {"losses": lesson["found"], "starts": lesson["starts"]}
    rounded = {
        group: {name: [{what: round(value, 4) for what, value in run.items()} for run in runs] for name, runs in rows.items()}
        for group, rows in groups.items()
    }
    save({"machine": machine("float32"), "command": "python benchmarks/short_runs.py", "seeds": [0, 1, 2], **rounded}, FILE)


if __name__ == "__main__":
    main()
