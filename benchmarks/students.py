"""Measure the course's students over three seeds and write data/results/students.json (`make results`).

Runs take minutes each and are resumable: a run that the file already holds (same settings, same data) is not repeated.
Lessons 05, 06 and 09 draw the file. Options: --seeds 0 1 2, --only NAME.
"""

import argparse
import copy
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tinylib import course, datasets, distill, models, train
from tinylib import prune as pruning
from tinylib.bert import Bert
from tinylib.student import new_student

FILE = datasets.data_folder() / "results" / "students.json"
SPARSITIES = (0.5,)


def measured(model: Bert, prepared: course.Prepared, seed: int) -> dict:
    """Return one run's row."""
    scores = {split: round(course.score(model, prepared, split), 4) for split in ("validation", "test")}
    return {"seed": seed, **scores}


def fresh(teacher: Bert, settings: distill.Settings) -> Bert:
    """Return the student that a run starts from."""
    shape = distill.student_config(teacher, settings.student)
    layers = distill.LayerMap.uniform(teacher.config.num_hidden_layers, shape.num_hidden_layers)
    return new_student(teacher, shape, layers, settings.start, torch.Generator().manual_seed(settings.seed))


def from_labels(teacher: Bert, prepared: course.Prepared, settings: distill.Settings) -> Bert:
    """Train the same student for as many epochs on the labels alone."""
    student = fresh(teacher, settings)
    batches = train.loader(prepared.examples("train"), settings.batch_size, seed=settings.seed)
    epochs = settings.epochs_intermediate + settings.epochs_prediction
    train.fit(
        student,
        batches,
        train.classification_loss,
        epochs=epochs,
        lr=settings.lr_prediction,
        seed=settings.seed,
        label="labels",
    )
    return student


def distilled(teacher: Bert, prepared: course.Prepared, settings: distill.Settings) -> Bert:
    """Run both steps of the distillation."""
    return distill.distill(teacher, prepared.examples("train"), settings).student


def pruned(teacher: Bert, prepared: course.Prepared, student: Bert, sparsity: float, seed: int) -> Bert:
    """Prune gradually and recover for one epoch on the teacher's soft targets."""
    examples = prepared.examples("train")
    loss = pruning.teacher_loss(teacher, examples)
    return pruning.prune_and_recover(
        student, examples, sparsity, loss, epochs=1, lr=1e-4, seed=seed, gradual=True
    ).model


def variants(base: distill.Settings) -> dict:
    """Name the runs: (settings, function)."""
    prediction_only = {"epochs_intermediate": 0, "epochs_prediction": base.epochs_intermediate + base.epochs_prediction}
    return {
        "both steps": (base, distilled),
        "labels only, same start": (base, from_labels),
        "labels only, random start": (replace(base, start="random"), from_labels),
        "soft targets only, same start": (replace(base, **prediction_only), distilled),
        "both steps, SVD embeddings only": (replace(base, start="embeddings"), distilled),
        "both steps, random start": (replace(base, start="random"), distilled),
    }


def main() -> None:
    """Run what is missing, seed by seed, and save after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    args = parser.parse_args()
    prepared = course.prepare("movie_reviews", base="minilm-l6")
    teacher = course.teacher(prepared)
    store = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    base = course.LAPTOP.settings
    head = {"data": prepared.fingerprint, "settings": json.loads(json.dumps(asdict(base)))}
    if {k: store.get(k) for k in head} != head:
        store = head | {"runs": {}, "pruned": {}}
    threads = torch.get_num_threads()
    store["machine"] = (
        f"{platform.machine()} CPU, {threads} threads, torch {torch.__version__.split('+')[0]}, laptop tier"
    )
    store["command"] = "python benchmarks/students.py"
    store["teacher"] = measured(teacher, prepared, 0)
    for seed in args.seeds:
        for name, (settings, make) in variants(base).items():
            if (args.only and name not in args.only) or any(r["seed"] == seed for r in store["runs"].get(name, [])):
                continue
            done = store["runs"].setdefault(name, [])
            student = make(teacher, prepared, replace(settings, seed=seed))
            done.append(measured(student, prepared, seed))
            print(f"{name}: {done[-1]}", flush=True)
            student.save_pretrained(models.cache_folder() / "runs" / f"students-{name.replace(' ', '-')}-{seed}")
            save(store)
            if name == "both steps":
                prune_all(teacher, prepared, student, seed, store)
            save(store)


def prune_all(teacher: Bert, prepared: course.Prepared, student: Bert, seed: int, store: dict) -> None:
    """Prune one distilled student to each sparsity; its own row among the runs is the comparison."""
    for sparsity in SPARSITIES:
        model = pruned(teacher, prepared, copy.deepcopy(student), sparsity, seed)
        rows = store["pruned"].setdefault(f"{sparsity:.0%}", [])
        rows.append(measured(model, prepared, seed))
        print(f"pruned {sparsity:.0%}: {rows[-1]}", flush=True)


def save(store: dict, file: Path = FILE) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{file}.tmp")
    aside.write_text(json.dumps(store, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


if __name__ == "__main__":
    main()
