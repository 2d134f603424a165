"""The lessons as a GPU's owner runs them, on a machine without one: the gpu tier, beside a GPU played on the CPU (``pretend_gpu``).

    make gpu-lessons                                              # all, hours
    make gpu-lessons LESSONS=notebooks/06_tinybert_losses.ipynb

BERT-base and GLUE need the hub. In their place stand a model of twelve layers (MiniLM's, each twice, with the course's masked-LM
head) and a folder in GLUE's shape (movie_reviews, its column named ``sentence``); the teacher trains for two epochs, a student for
one a step. Lessons are not saved; every cell that fails is named, and the exit code is 1. An AssertionError may be this teacher's
fault, which is weaker than BERT-base on GLUE; any other error is the lesson's or the package's.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import transformers
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks" / "tools"))
from lessons import lessons, read, tags  # noqa: E402

from tinylib import course, datasets, mlm, models  # noqa: E402

CELL_TIMEOUT = 3600  # seconds: every operation is seen by Python
STARTUP = """
import sys
sys.path.insert(0, {tests!r})
import lessons_on_gpu, pretend_gpu
lessons_on_gpu.put_tier({place!r})
played = pretend_gpu.present()
played.__enter__()
"""


def make_base(folder: Path) -> None:
    """Write a masked LM of twelve layers, each of MiniLM's twice."""
    six = mlm.shipped("minilm-l6")
    with tempfile.TemporaryDirectory() as passing:
        stored = transformers.BertForMaskedLM.from_pretrained(six.save_pretrained(passing))
    deep = transformers.BertForMaskedLM(transformers.BertConfig(**stored.config.to_dict() | {"num_hidden_layers": 12}))
    weights = {}
    for name, tensor in stored.state_dict().items():
        before, layer, after = name.partition(".layer.")
        number, _, rest = after.partition(".")
        twice = [f"{before}{layer}{2 * int(number) + n}.{rest}" for n in (0, 1)] if layer else [name]
        weights |= dict.fromkeys(twice, tensor)
    deep.load_state_dict(weights)
    deep.save_pretrained(folder)
    for file in models.resolve("minilm-l6").iterdir():
        if file.name.startswith(("tokenizer", "vocab")):
            shutil.copy(file, folder)


def make_data(folder: Path) -> None:
    """Write movie_reviews as GLUE's single-sentence tasks are shaped."""
    folder.mkdir()
    for split, rows in datasets.load("movie_reviews").items():
        rows.rename_column("text", "sentence").to_parquet(folder / f"{split}.parquet")


def put_tier(place: str) -> None:
    """Let the gpu tier learn from this folder's model and texts, for fewer epochs than a GPU would."""
    settings = course.GPU.settings.replace(epochs_intermediate=1, epochs_prediction=1, augment=1)
    base = f"{place}/base"
    course.TIERS["gpu"] = replace(
        course.GPU, base=base, data=f"{place}/glue", teacher_epochs=2, teacher_lr=1e-4, masked_lm=base, settings=settings
    )


def run(path: Path, place: Path) -> list[str]:
    """Run a lesson to its end and write what came out into the folder; return what failed, by cell."""
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, allow_errors=True, kernel_name="python3", store_widget_state=True,
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    client.execute()
    nbformat.write(notebook, place / path.name)
    found = []
    for number, cell in enumerate(notebook.cells):
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if errors and "raises-exception" not in tags(cell):
            found += [f"{path.name}: cell {number}: {error.ename}: {error.evalue}" for error in errors]
    return found


def main() -> int:
    """Run the lessons named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", type=Path, help="notebook files (default: all lessons)")
    parser.add_argument("--keep", type=Path, help="folder of model, texts, cache and lessons as run, for the next run")
    args = parser.parse_args()
    place = (args.keep or Path(tempfile.mkdtemp(prefix="gpu-lessons-"))).resolve()
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "base").exists():
        make_base(place / "base")
    if not (place / "glue").exists():
        make_data(place / "glue")
    startup = place / "ipython" / "profile_default" / "startup" / "00_gpu.py"
    startup.parent.mkdir(parents=True, exist_ok=True)
    startup.write_text(STARTUP.format(tests=str(ROOT / "tests"), place=str(place)), encoding="utf-8")
    os.environ |= {
        "IPYTHONDIR": str(place / "ipython"), "TINYLIB_TIER": "gpu", "TINYLIB_HOME": str(place / "cache"),
        "JUPYTER_PREFER_ENV_PATH": "1", "TQDM_MININTERVAL": "60",
    }  # fmt: skip
    found = []
    for path in [path.resolve() for path in args.lessons] or lessons():
        started = time.perf_counter()
        faults = run(path, place)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {len(faults) or 'no'} cells failed", flush=True)
        print(*(f"  {fault}\n" for fault in faults), sep="", end="", flush=True)
        found += faults
    if not args.keep:
        shutil.rmtree(place)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
