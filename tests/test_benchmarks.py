"""The measurements' small parts: results that can be added to, runs of equal length, and the speed benchmark at tiny shapes."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations
import runs
import speed
import speed_report
import structured
import torch
import unseen

from tinylib import train
from tinylib.bert import Bert, BertConfig
from tinylib.text import Encoded

RECIPE = {"data": "abc", "settings": {"layer_map": (2, 3)}}


def test_a_results_file_holds_a_row_a_seed_and_remembers_them(tmp_path):
    results = runs.Results(tmp_path / "r.json", "reviews", RECIPE)
    assert not results.has("full", 1)
    results.add("full", {"seed": 1, "kl": 0.2}, machine="a CPU")
    results.add("full", {"seed": 0, "kl": 0.3}, machine="a CPU")
    results.add("full", {"seed": 1, "kl": 0.1}, machine="a CPU")
    again = runs.Results(tmp_path / "r.json", "reviews", RECIPE)
    assert again.has("full", 0)
    assert again.has("full", 1)
    assert not again.has("full", 2)
    part = json.loads((tmp_path / "r.json").read_text())["reviews"]
    assert part["runs"] == {"full": [{"seed": 0, "kl": 0.3}, {"seed": 1, "kl": 0.1}]}
    assert part["machine"] == "a CPU"


def test_another_recipe_begins_its_own_part_anew_and_no_other(tmp_path):
    file = tmp_path / "r.json"
    for part in ("reviews", "questions"):
        runs.Results(file, part, RECIPE).add("full", {"seed": 0})
    changed = runs.Results(file, "reviews", RECIPE | {"data": "xyz"})
    assert not changed.has("full", 0)
    changed.add("full", {"seed": 1})
    assert not runs.Results(file, "reviews", RECIPE).has("full", 1)
    assert runs.Results(file, "questions", RECIPE).has("full", 0)


def test_the_rows_of_an_older_recipe_are_kept_aside_for_every_part(tmp_path):
    file, kept = tmp_path / "r.json", tmp_path / "r.old.json"
    for seed, part in enumerate(("reviews", "questions")):
        runs.Results(file, part, RECIPE).add("full", {"seed": seed})
    assert not kept.exists(), "there was nothing older"
    for part in ("reviews", "questions"):
        runs.Results(file, part, RECIPE | {"data": "xyz"}).add("full", {"seed": 7})
    old = json.loads(kept.read_text(encoding="utf-8"))
    assert {part: told["runs"] for part, told in old.items()} == {
        "reviews": {"full": [{"seed": 0}]}, "questions": {"full": [{"seed": 1}]},
    }  # fmt: skip
    assert all(told["recipe"]["data"] == "abc" for told in old.values())


def test_a_sweep_makes_what_is_missing_seed_by_seed(tmp_path):
    results, made = runs.Results(tmp_path / "r.json", "reviews", RECIPE), []

    def make(name, seed):
        assert train.precision() == "bfloat16"
        made.append((name, seed))
        return {"seed": seed}

    args = runs.options("about", ("full", "half"), seeds=[0, 1]).parse_args([])
    assert args.precision == "bfloat16"
    results.add("full", {"seed": 0})
    try:
        runs.sweep(results, ("full", "half"), args, make, command="make it")
        assert made == [("half", 0), ("full", 1), ("half", 1)]
        made.clear()
        only = runs.options("about", ("full", "half"), seeds=[0]).parse_args(["--only", "half", "--seeds", "1", "2"])
        runs.sweep(results, ("full", "half"), only, make)
    finally:
        train.set_precision("highest")
    assert made == [("half", 2)]
    part = json.loads((tmp_path / "r.json").read_text())["reviews"]
    assert part["command"] == "make it"
    assert "bfloat16" in part["machine"]


@pytest.mark.parametrize("name", list(ablations.variants(ablations.FULL)))
def test_every_ablation_takes_as_many_steps_as_the_full_recipe(name):
    full, variant = ablations.FULL, ablations.variants(ablations.FULL)[name]
    chosen = ablations.equal_steps(full.replace(**variant.changes), full)

    def texts(s):  # read in all epochs, in units of the data
        return (1 + s.augment) * (s.epochs_intermediate + s.epochs_prediction)

    assert texts(chosen) == texts(full)
    differing = {f for f in vars(full) if getattr(full.replace(**variant.changes), f) != getattr(full, f)}
    assert differing == set(variant.changes), "a row that changes nothing would be the full recipe under another name"


@pytest.mark.parametrize("name", structured.RUNS)
def test_each_structured_run_removes_what_its_name_says_and_leaves_the_student_alone(name, monkeypatch):
    monkeypatch.setattr(structured, "RECOVERY", {"epochs": 1, "lr": 1e-3})
    config = BertConfig.parse("4x24", intermediate_size=30, num_attention_heads=4, vocab_size=60)
    student = Bert(config.replace(head="classification", labels=("a", "b")), torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in student.state_dict().items()}
    ids = tuple(torch.randint(1, 60, (5,), generator=torch.Generator().manual_seed(n)) for n in range(16))
    examples = train.Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)), torch.arange(16) % 2)
    made = structured.RUNS[name](student, examples, train.classification_loss, 1)
    assert made.config.num_attention_heads == (2 if "half the heads" in name else 4)
    assert made.config.num_hidden_layers == (3 if "layers 1 2 4" in name else 4)
    neurons = 10 if "⅔" in name else 15 if "half the neurons" in name else 30
    assert made.config.intermediate_size == neurons
    assert structured.costs(made)["parameters"] <= structured.costs(student)["parameters"]
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())


def test_the_structured_results_tell_their_costs_and_seeds():
    part = json.loads((structured.FILE).read_text(encoding="utf-8"))["movie_reviews"]
    assert set(part["runs"]) <= set(structured.RUNS)
    for name, rows in part["runs"].items():
        assert [row["seed"] for row in rows] == list(range(len(rows))), name
        assert all(row["megabytes"] <= part["runs"]["dense"][0]["megabytes"] for row in rows)


def between_marks(readme: str) -> str:
    return readme.split(speed_report.MARKS[0] + "\n")[1].split("\n" + speed_report.MARKS[1])[0]


@pytest.mark.slow
@pytest.mark.alone
def test_the_speed_benchmark_gives_every_ratio_and_writes_the_table_of_its_file(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "README.md", tmp_path)
    needed = {name for race, *pair in speed_report.RATIOS.values() for name in pair} - set(speed_report.IN_SERIES)
    names = sorted(needed | {"floor_teacher", "floor_matching", "hf_trainer", "augmentation"})
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--threads", "1", "--out", tmp_path / "results.json"]
    done = subprocess.run([*command, "--only", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    store = json.loads((tmp_path / "results.json").read_text())
    expected = set(speed_report.RATIOS) | {speed_report.AUGMENTATION}
    if not store["versions"]["textbrewer"]:  # its environment is made by the full benchmark alone
        expected -= {"intermediate_vs_textbrewer_dynamic"}
    assert set(store["ratios"]) == expected
    for key, value in store["ratios"].items():
        low, high = store["spread"][key]
        assert math.isfinite(value)
        assert 0 < low <= value <= high
    assert between_marks((tmp_path / "README.md").read_text()) == speed_report.table(store)


def test_readme_shows_what_the_speed_benchmark_measured():
    readme, file = ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "results.json"
    assert all(readme.read_text(encoding="utf-8").count(mark) == 1 for mark in speed_report.MARKS)
    if not file.exists():
        pytest.skip("benchmarks/results.json is not there: make bench")
    assert between_marks(readme.read_text(encoding="utf-8")) == speed_report.table(json.loads(file.read_text(encoding="utf-8")))


def test_every_turn_gets_short_and_long_batches_and_all_of_them_once():
    lengths = torch.arange(640) // 10
    made = [list(range(n, n + 10)) for n in range(0, 640, 10)]
    turns = speed.deal(made, lengths, rounds=5, per_turn=4)
    assert len({tuple(rows) for rows in turns}) == 20
    means = [sum(int(lengths[rows[0]]) for rows in turns[n : n + 4]) / 4 for n in range(0, 20, 4)]
    assert max(means) - min(means) < 2
    assert all(max(turns[n : n + 4])[0] - min(turns[n : n + 4])[0] > 300 for n in range(0, 20, 4))


def test_two_floors_in_series_are_slower_than_either():
    row = {"seconds": 1.0, "cpu": 1.0, "times": [1.0]}
    found = {"intermediate": {
        "floor_teacher": {"rounds": [row | {"tokens": 30}]}, "floor_student": {"rounds": [row | {"tokens": 60}]},
    }}  # fmt: skip
    pace = speed_report.paces(found, mean=10.0, by="seconds")["intermediate"]
    assert pace == {"floor_teacher": [3.0], "floor_student": [6.0], "floor_both": [2.0]}


def packed(files: dict[str, bytes]) -> bytes:
    """Return a .tar.gz of files in memory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_unseen_data_are_labelled_by_the_sign_of_their_rating_and_split_once(tmp_path):
    lines = [f"{n}\t{rating}\tsentence, number {n} &amp; more" for n, rating in enumerate([1.5, -0.5] * 20)]
    lines += ["40\t0\tneither", "41\t2.0\tsentence, number 0 &amp; more"]  # no sign; a text that was there before
    inner = packed({"hutto_ICWSM_2014/a.txt": "\r\n".join(lines).encode()})
    rows = unseen.write_data(packed({unseen.build.INNER: inner}), "a.txt", tmp_path / "data")
    assert rows == {"train": 32, "validation": 4, "test": 4}
    seen = {}
    for part in rows:
        with open(tmp_path / "data" / f"{part}.csv", encoding="utf-8", newline="") as file:
            seen |= {row["text"]: row["label"] for row in csv.DictReader(file)}
    assert len(seen) == 40
    assert seen["sentence, number 0 & more"] == "positive"
    assert seen["sentence, number 1 & more"] == "negative"
