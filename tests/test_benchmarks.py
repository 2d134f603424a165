"""The long measurements' small parts: a results file that can be added to, and runs of as many steps as the full recipe's."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations
import runs
import structured
import torch

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
