"""One's own data: scores instead of classes all the way, what is told of the data, extra texts, teachers that cannot teach.

A random BERT of 2 layers, 32 wide (``test_cli``), stands in for the pretrained model.
"""

import csv
import json
import shutil
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from test_cli import LABELS, TEXTS, make_checkpoint, metrics, write_csv

from tinylib import cli, course, datasets, encoders, files, losses, owndata, tasks, text, train
from tinylib import distill as kd
from tinylib import prune as pruning
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError, UserNote

# 4 for the good, 1 for the bad, and a little more the later the word stands: from 1.0 to 5.375
SCORES = [(4 if label == "positive" else 1) + (i % 12) / 8 for i, label in enumerate(LABELS)]
SCORED = list(zip(TEXTS, SCORES, strict=True))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refusal(source) -> str:
    with pytest.raises(UserError) as caught:
        datasets.load(source)
    return str(caught.value)


# Classes or scores


def labelled(path, labels):
    return write_csv(path, [(f"text number {i}", label) for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    "labels",
    [
        [i / 4 for i in range(40)],
        [0.5, 1.5, *range(18)],  # two of twenty: a tenth
        [f"{i}.0" if i % 3 else f"{i}.25" for i in range(40)],
        ["-1e-3", "2.5e-02", ".5", *range(10)],
        [f"{i / 8:.18e}" for i in range(40)],  # as numpy.savetxt writes them
    ],
)
def test_numbers_with_fractions_are_scores(tmp_path, labels):
    data = datasets.load(labelled(tmp_path / "a.csv", labels))
    assert datasets.has_scores(data)
    assert datasets.label_names(data) == ["score"]
    found = sorted(label for part in data.values() for label in part["label"][:])
    assert found == sorted(map(float, labels))
    with pytest.raises(UserError, match="scores, not classes"):
        datasets.class_balance(data)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1] * 20, ["0", "1"]),
        (["1.0", "2.0"] * 20, ["1", "2"]),
        (range(5, 45), [str(i) for i in range(5, 45)]),
        (["a", "b"] * 20, ["a", "b"]),
        (["0.000000000000000000e+00", "1.000000000000000000e+00", "-2e2"] * 10, ["-200", "0", "1"]),  # numpy.savetxt's
        (["12e4", "12f4", "1.0"] * 10, ["1", "12e4", "12f4"]),  # among names a name
    ],
)
def test_whole_numbers_and_names_stay_classes(tmp_path, labels, names):
    rows = [(f"text {i} {j}", label) for i, label in enumerate(labels) for j in range(3)]
    data = datasets.load(write_csv(tmp_path / "a.csv", rows))
    assert not datasets.has_scores(data)
    assert datasets.label_names(data) == names


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1] * 10 + [0.5], "a.csv, line 22: label 0.5 is a fraction, no class (1 of 21 labels): use whole numbers or names"),
        ([0.5, 1, 0, 1, 0], "line 2: label 0.5 is a fraction, no class (1 of 5 labels)"),  # a fifth, but a single one
        ([0, 1] * 15 + [0.5, 2.5], "line 32: label 0.5 is a fraction, no class (2 of 32 labels)"),
        ([0.5, "good"] * 10, "line 2: label 0.5 is a fraction, no class, and line 3 has 'good'"),
        (["a", "b"] * 10 + ["1e-05"], "line 22: label 1e-05 is a fraction, no class, and line 2 has 'a'"),
        ([0.5, 1.5] * 10 + [1e7], "line 22: label 10000000 is larger than 1,000,000: rescale the scores"),
        ([0.5, 1.5] * 10 + [-1e7], "line 22: label -10000000 is larger than 1,000,000: rescale the scores"),
        ([0.5] * 20, "has one score only, 0.5: there is nothing to learn from it"),
        ([0.5, 1.5], "a.csv has 2 different texts, too few to split 80/10/10"),
    ],
)
def test_what_is_neither_classes_nor_scores_is_refused(tmp_path, labels, says):
    assert says in refusal(labelled(tmp_path / "a.csv", labels))


def test_an_infinite_score_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0.5}\n{"text": "b", "label": Infinity}\n')
    assert "a.jsonl, line 2: label inf is no finite number" in refusal(tmp_path / "a.jsonl")


def test_the_train_split_decides_and_the_others_must_agree(tmp_path):
    labelled(tmp_path / "train.csv", [i / 4 for i in range(40)])
    write_csv(tmp_path / "validation.csv", [("v1", 1), ("v2", 2)])  # whole scores only, as a small split may have
    write_csv(tmp_path / "test.csv", [("t1", 1.5), ("t2", 2)])
    assert datasets.load(tmp_path)["validation"]["label"][:] == [1.0, 2.0]
    write_csv(tmp_path / "test.csv", [("t1", 1.5), ("t2", 2), ("t3", "bad")])
    assert "test.csv, line 2: label 1.5 is a fraction, no class, and line 4 has 'bad'" in refusal(tmp_path)
    write_csv(tmp_path / "test.csv", [("t1", "good"), ("t2", "bad")])
    assert "test.csv, line 2: label good is no number, but" in refusal(tmp_path)
    write_csv(tmp_path / "test.csv", [("t1", 1), ("t2", 0.5)])
    labelled(tmp_path / "train.csv", [0, 1] * 20)
    assert "test.csv, line 3: label 0.5 is a fraction, no class (1 of 2 labels)" in refusal(tmp_path)


def test_a_parquet_file_that_calls_itself_floating_point_has_scores(tmp_path):
    columns = {"text": [f"text {i}" for i in range(40)], "label": [float(i % 5) for i in range(40)]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "declared.parquet")
    pd.DataFrame(columns).to_parquet(tmp_path / "plain.parquet")  # to pandas a column with a gap is one of floats
    assert datasets.has_scores(datasets.load(tmp_path / "declared.parquet"))
    assert not datasets.has_scores(datasets.load(tmp_path / "plain.parquet"))


def test_scores_are_split_so_that_each_part_ranges_over_all_of_them(tmp_path):
    path = labelled(tmp_path / "a.csv", [i / 4 for i in range(103)])
    data = datasets.load(path)
    assert {name: len(part) for name, part in data.items()} == {"train": 83, "validation": 10, "test": 10}
    for part in ("validation", "test"):
        tenths = sorted(int(label * 4) // 10 for label in data[part]["label"][:])
        assert [min(tenth, 9) for tenth in tenths] == list(range(10)), "one of each ten neighbours"
    shuffled = labelled(tmp_path / "b.csv", [i / 4 for i in range(103)])
    lines = shuffled.read_text().splitlines()
    shuffled.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    prints = [datasets.fingerprint(datasets.load(p, seed=s)) for p, s in ((path, 0), (shuffled, 0), (path, 1))]
    assert prints[0] == prints[1] != prints[2]


def test_scores_come_back_from_a_folder_bit_by_bit(tmp_path):
    # few fractions, and fewer still in train: the saved file must say what they are
    odd = [0.1, 1 / 3, 3.799999952316284, -2.5, 7.25, *(float(i) for i in range(40))]
    data = datasets.load(labelled(tmp_path / "a.csv", odd))
    datasets.save(data, tmp_path / "one")
    again = datasets.load(tmp_path / "one")
    datasets.save(again, tmp_path / "two")
    assert datasets.fingerprint(again) == datasets.fingerprint(data)
    assert sorted(label for part in again.values() for label in part["label"][:]) == sorted(odd)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    moved = labelled(tmp_path / "b.csv", [0.1000000001, *odd[1:]])
    assert datasets.fingerprint(datasets.load(moved)) != datasets.fingerprint(data)


def test_glue_s_regression_task_loads_with_its_hidden_test_labels(monkeypatch):
    data = datasets.DatasetDict()
    for name, size in (("train", 40), ("validation", 8), ("test", 6)):
        columns = {c: [f"{name} {c} {i}" for i in range(size)] for c in ("sentence1", "sentence2")}
        columns["label"] = [-1.0 if name == "test" else (i % 11) / 2 for i in range(size)]
        types = {**dict.fromkeys(("sentence1", "sentence2"), "string"), "label": "float32"}
        features = datasets.hf.Features({column: datasets.hf.Value(kind) for column, kind in types.items()})
        data[name] = datasets.Dataset.from_dict(columns, features)
    monkeypatch.setattr(datasets.hf, "load_dataset", lambda *args, **more: data)
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    loaded = datasets.load("glue/stsb")
    assert datasets.has_scores(loaded)
    assert {name: len(part) for name, part in loaded.items()} == {"train": 36, "validation": 4, "test": 8}
    assert min(loaded["test"]["label"][:]) == 0.0, "validation, whose labels are known"


# The model and its losses

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def test_transformers_reads_our_regression_and_we_read_theirs(tmp_path):
    ours = Bert(BertConfig(**SMALL, head="regression", labels=("stars",)), torch.Generator().manual_seed(0)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert (theirs.config.problem_type, theirs.config.num_labels, theirs.config.id2label) == ("regression", 1, {0: "stars"})
    ids, wanted = torch.randint(50, (3, 7)), torch.tensor([0.5, 2.0, -1.0])
    with torch.no_grad():
        out = theirs(input_ids=ids, labels=wanted)
        torch.testing.assert_close(ours(ids).logits, out.logits, atol=1e-5, rtol=1e-5)
        batch = {"ids": ids, "mask": torch.ones_like(ids).bool(), "segments": torch.zeros_like(ids), "labels": wanted}
        torch.testing.assert_close(tasks.regression_loss(ours, batch)["labels"], out.loss)
    theirs.config.problem_type = None  # as a checkpoint of one label that nobody described
    theirs.save_pretrained(tmp_path / "theirs")
    again = Bert.from_pretrained(tmp_path / "theirs")
    assert (again.config.head, again.config.labels) == ("regression", ("stars",))
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_one_name_asks_for_a_regression_of_any_architecture(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    small = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    transformers.DistilBertModel(transformers.DistilBertConfig(**small)).save_pretrained(tmp_path / "distilbert")
    for name in ("bert", "distilbert"):
        model = encoders.load(tmp_path / name, labels=("score",))
        model.save_pretrained(tmp_path / "again" / name)
        assert encoders.load(tmp_path / "again" / name).config.head == "regression"
        assert model(torch.randint(50, (2, 5))).logits.shape == (2, 1)


def test_a_row_without_a_score_counts_for_nothing():
    class Fixed(torch.nn.Module):
        def forward(self, ids, mask, segments):
            return SimpleNamespace(logits=torch.tensor([[1.0], [5.0], [2.0]]))

    nothing = dict.fromkeys(("ids", "mask", "segments"), torch.zeros(3, 1))
    batch = nothing | {"labels": torch.tensor([3.0, float("nan"), 1.0])}
    assert tasks.regression_loss(Fixed(), batch)["labels"] == pytest.approx((4 + 1) / 2)


def test_scores_are_learnt_by_their_difference_where_kl_would_teach_nothing():
    student, teacher = torch.tensor([[1.0], [2.0]], requires_grad=True), torch.tensor([[3.0], [2.5]])
    assert losses.soft_target_loss(student, teacher) == 0
    loss = losses.prediction_loss(student, teacher, temperature=4.0)
    assert loss.item() == pytest.approx((4 + 0.25) / 2)
    loss.backward()
    assert student.grad.flatten().tolist() == [-2.0, -0.5]
    two = torch.randn(5, 3), torch.randn(5, 3)
    assert losses.prediction_loss(*two, 2.0) == losses.soft_target_loss(*two, 2.0)


# Scores all the way


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a base model, a table of classes and one of scores, and a teacher of each, by the command itself."""
    folder = tmp_path_factory.mktemp("own")
    make_checkpoint(folder / "base", TEXTS)
    write_csv(folder / "films.csv", zip(TEXTS, LABELS, strict=True))
    write_csv(folder / "scores.csv", SCORED)
    for data, name in (("films", "teacher"), ("scores", "scorer")):
        out = ["--data", f"{folder}/{data}.csv", "--out", f"{folder}/{name}"]
        command = ["teach", "--base", f"{folder}/base", *out, "--epochs", "6", "--lr", "5e-3", "--batch-size", "16"]
        assert cli.main(command) == 0
    return folder


def told_by(folder, split="test"):
    """Give the labels of the saved split and what transformers' pipeline says of its texts, beside our own scores."""
    rows = datasets.load(folder / "data")[split]
    said = transformers.pipeline("text-classification", str(folder))(rows["text"][:], function_to_apply="none")
    prepared = course.prepare(folder / "data", base=folder)
    logits = train.predict(Bert.from_pretrained(folder), prepared.encoded[split])
    torch.testing.assert_close(torch.tensor([answer["score"] for answer in said]), logits[:, 0], atol=1e-4, rtol=1e-4)
    return rows["label"][:], logits[:, 0].tolist()


def test_teach_learns_scores_and_measures_them_as_scipy_does(place):
    report = metrics(place / "scorer")
    labels, said = told_by(place / "scorer")
    assert report["pearson"] == pytest.approx(pearsonr(labels, said).statistic, abs=1e-6)
    assert report["spearman"] == pytest.approx(spearmanr(labels, said).statistic, abs=1e-6)
    assert report["rmse"] == pytest.approx((sum((a - b) ** 2 for a, b in zip(labels, said, strict=True)) / len(said)) ** 0.5)
    assert report["pearson"] > 0.8, "most of the score follows from one word"
    for name in ("pearson", "spearman", "rmse"):
        low, high = report[f"{name}_interval_95"]
        assert low <= report[name] <= high
        assert low < high
    assert not {"accuracy", "f1", "precision", "recall"} & set(report)
    assert (report["metric"], report["labels"]) == ("pearson", ["score"])
    assert report["data"]["scores"]["train"]["lowest"] == 1.0
    assert report["epochs"][-1]["validation"] > 0.8


def test_scores_far_from_zero_and_widely_spread_are_learnt_as_well(place):
    prepared = course.prepare(place / "scores.csv", base=place / "base")
    assert prepared.labels["train"].dtype == torch.float32
    far = course.replace(prepared, labels={split: 500 + 100 * labels for split, labels in prepared.labels.items()})
    for data in (prepared, far):
        model, history = course.fine_tune(data, place / "base", epochs=4, lr=5e-3, batch_size=16)
        found = tasks.figures(data.labels["test"], train.predict(model, data.encoded["test"]))
        assert history.losses["labels"][0] == pytest.approx(1.0, abs=0.6), "in units of the labels' own spread"
        assert found["pearson"] > 0.6
        assert found["rmse"] < 0.8 * data.labels["test"].std()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_student_learns_its_teacher_s_scores_in_any_units(place, scale):
    prepared, teacher = course.prepare(place / "scores.csv", base=place / "base"), Bert.from_pretrained(place / "scorer")
    with torch.no_grad():
        teacher.classifier.weight *= scale
        teacher.classifier.bias.copy_(scale * teacher.classifier.bias + 500)
    settings = kd.Settings(student="2x16", start="random", epochs_prediction=8, lr_prediction=5e-3, batch_size=16)
    student = kd.first_student(teacher, settings)[0]
    kd.distill_prediction(teacher, student, prepared.examples("train"), settings)
    said, wanted = (train.predict(model, prepared.encoded["test"]) for model in (student, teacher))
    assert pearsonr(said[:, 0], wanted[:, 0]).statistic > 0.8
    assert (said - wanted).square().mean() < 0.5 * wanted.var(), "in the teacher's own units"


@pytest.mark.parametrize("unit", [1e-5, 1e-9, 1e5])
def test_scores_in_any_unit_are_learnt_as_well(place, unit):
    prepared, said = course.prepare(place / "scores.csv", base=place / "base"), []
    for scale in (1.0, unit):
        data = course.replace(prepared, labels={split: scale * labels for split, labels in prepared.labels.items()})
        model, _ = course.fine_tune(data, place / "base", epochs=4, lr=5e-3, batch_size=16)
        said.append(tasks.figures(data.labels["test"], train.predict(model, data.encoded["test"]))["pearson"])
    assert min(said) > 0.6


def test_standard_units_leave_the_function_as_it_is_and_classes_alone(place):
    prepared, model = course.prepare(place / "scores.csv", base=place / "base"), Bert.from_pretrained(place / "scorer")
    encoded, labels = prepared.encoded["train"], prepared.labels["train"]
    before = train.predict(model, encoded)
    with tasks.standard_units(model, encoded, labels, texts=len(labels)) as standard:
        assert standard.mean().abs() < 1e-5
        assert standard.std() == pytest.approx(1.0)
        inside = train.predict(model, encoded)
        assert inside.mean().item() == pytest.approx(0.0, abs=1e-5), "the first guesses lie around the mean"
    moved = train.predict(model, encoded) - before
    assert torch.allclose(moved, moved.mean().expand_as(moved), atol=1e-5), "a bias and nothing else"
    torch.testing.assert_close(train.predict(model, encoded), inside * labels.std() + labels.mean(), atol=1e-4, rtol=1e-4)
    numbers, logits = torch.tensor([0, 1]), torch.randn(2, 3)
    for untouched in (numbers, logits):
        with tasks.standard_units(model, encoded, untouched) as same:
            assert same is untouched
    with tasks.standard_units(model, encoded, torch.full((len(labels), 1), 2.5)) as flat:
        assert flat.abs().max() == 0, "one score for all divides by no zero"
    with tasks.standard_units(model, encoded, torch.full((len(labels), 1), 50.1)) as flat:
        assert flat.abs().max() < 1e-4, "nor by the roundings of one that float32 cannot hold"


def distill(place, out, *more, teacher="scorer", data="scores.csv") -> list[str]:
    return ["distill", "--teacher", f"{place}/{teacher}", "--data", f"{place}/{data}", "--student", "2x16", "--out", str(out),
            "--epochs-intermediate", "3", "--epochs-prediction", "3", *more]  # fmt: skip


def test_distill_learns_the_teacher_s_scores(place, tmp_path, capsys):
    assert cli.main(distill(place, tmp_path / "student")) == 0
    report, shown = metrics(tmp_path / "student"), capsys.readouterr().out
    assert report["teacher_pearson"] == pytest.approx(metrics(place / "scorer")["pearson"])
    assert report["retention"] == report["pearson"] / report["teacher_pearson"]
    assert {"teacher_spearman", "teacher_rmse", "pearson_interval_95"} <= set(report)
    assert not {"accuracy", "teacher_accuracy", "f1"} & set(report)
    assert all(name in shown for name in ("pearson", "spearman", "rmse", "teacher pearson", "retention"))
    assert "accuracy" not in shown
    assert report["teacher_on_validation"]["pearson"] > 0.8
    shutil.copytree(place / "scorer" / "data", tmp_path / "student" / "data", dirs_exist_ok=True)
    _, said = told_by(tmp_path / "student")
    _, wanted = told_by(place / "scorer")
    assert pearsonr(said, wanted).statistic > 0.5, "it learns from the teacher"
    assert metrics(tmp_path / "student")["pearson"] > 0.5


@pytest.mark.parametrize(("method", "teacher"), [("magnitude", True), ("neurons", False)])
def test_prune_keeps_a_regression(place, tmp_path, method, teacher, capsys):
    options = ["--method", method, "--sparsity", "0.5", *(["--teacher", f"{place}/scorer"] if teacher else [])]
    data = ["--data", f"{place}/scorer/data", "--out", f"{tmp_path}/out", "--epochs", "2", "--lr", "1e-3"]
    assert cli.main(["prune", "--model", f"{place}/scorer", *data, *options]) == 0
    report = metrics(tmp_path / "out")
    assert report["dense_pearson"] == pytest.approx(metrics(place / "scorer")["pearson"])
    assert report["pearson"] > 0.5
    assert "dense pearson" in capsys.readouterr().out
    small = ["evaluate", "--model", f"{tmp_path}/out/compressed", "--data", f"{place}/scorer/data", "--json"]
    assert cli.main(small) == 0
    assert json.loads(capsys.readouterr().out)["pearson"] == pytest.approx(report["pearson"], abs=0.01)


@pytest.mark.parametrize("layout", ["hf", "onnx", "onnx-int8"])
def test_export_keeps_a_regression(place, tmp_path, layout):
    if layout != "hf":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    data = ["--data", f"{place}/scorer/data", "--format", layout, "--out", f"{tmp_path}/out"]
    assert cli.main(["export", "--model", f"{place}/scorer", *data]) == 0
    report = metrics(tmp_path / "out")
    assert report["model_pearson"] == pytest.approx(metrics(place / "scorer")["pearson"])
    assert report["pearson"] == pytest.approx(report["model_pearson"], abs=0.05)
    assert "accuracy" not in report
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "regression"


# What is told of the data


def prepared_of(folder, base, rows, max_length=64):
    parts = {"train": rows, "validation": [("one more", rows[0][1]), ("two", rows[-1][1])], "test": [("fine", rows[0][1])]}
    folder.mkdir()
    for name, part in parts.items():
        write_csv(folder / f"{name}.csv", part)
    return course.prepare(folder, base=base, max_length=max_length)


def said(prepared, max_length=64, positions=512) -> list[str]:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        owndata.note(owndata.examine(prepared), max_length, positions)
    assert all(note.category is UserNote for note in notes)
    return [str(note.message) for note in notes]


@pytest.mark.parametrize(("rare", "says"), [(20, 0), (19, 1), (9, 2)])
def test_classes_of_unequal_size_are_told(place, tmp_path, rare, says):
    rows = [(f"fine film {i}", "yes") for i in range(80)] + [(f"dull film {i}", "no") for i in range(rare)]
    prepared = prepared_of(tmp_path / "data", place / "base", rows)
    found = said(prepared)
    assert len(found) == says
    if says:
        assert found[0].startswith(f"80 of {80 + rare} texts of train ({80 / (80 + rare):.0%}) are of class 'yes': judge by f1")
    if says == 2:
        assert found[1] == "class 'no' has 9 texts in train, fewer than 10: add some, or leave the class out"
    assert owndata.examine(prepared)["classes"]["train"] == {"no": rare, "yes": 80}


def test_cut_texts_are_counted_and_told_above_a_share(place, tmp_path):
    rows = [("film " * (9 if i < 4 else 8), i % 2) for i in range(60)]  # nine words and two signs are eleven tokens
    rows = [(f"{text}{TEXTS[i].split()[-1]}", label) for i, (text, label) in enumerate(rows)]
    prepared = prepared_of(tmp_path / "data", place / "base", rows, max_length=11)
    exact = sum(len(ids) > 11 for ids in text.load_tokenizer(place / "base")(prepared.texts["train"])["input_ids"])
    found = owndata.examine(prepared)
    assert found["truncated"] == {"train": exact, "validation": 0, "test": 0}
    assert exact == 4
    (sentence,) = said(prepared, 11, 40)
    assert sentence.startswith(f"texts longer than --max-length 11 were cut: {exact} of 60 of train ({exact / 60:.0%}), 0 of 2")
    assert sentence.endswith("give a greater --max-length (this model takes 40)")
    assert said(prepared, 40, 40)[0].endswith("shorten them")
    few = course.replace(prepared, encoded={s: course.replace(e, truncated=3) for s, e in prepared.encoded.items()})
    few.encoded["validation"] = few.encoded["test"] = course.replace(few.encoded["test"], truncated=0)
    assert said(few) == [], "3 of 60 are not above a twentieth"


def test_the_command_tells_and_writes_what_it_counted(place, tmp_path, capsys):
    rows = [(f"{stem} {word}", "good") for stem in TEXTS[:45] for word in ("slow", "quick")]
    rows += [(f"a dull mess {word} {n}", "bad") for n in ("new", "old", "late") for word in ("slow", "quick")]
    write_csv(tmp_path / "uneven.csv", [*rows, (rows[-1][0], "good")])
    data = ["--data", f"{tmp_path}/uneven.csv", "--out", f"{tmp_path}/out", "--max-length", "6"]
    assert cli.main(["teach", "--base", f"{place}/base", *data, "--epochs", "1"]) == 0
    notes = [line for line in capsys.readouterr().err.split("\n") if "note:" in line]
    assert len(notes) == 4
    assert sum("this text stands above with another label" in note for note in notes) == 1
    report = metrics(tmp_path / "out")["data"]
    assert report["classes"]["train"] == {"bad": 4, "good": 72}
    assert report["rows"] == {"train": 76, "validation": 10, "test": 10}
    assert report["truncated"]["train"] > 60
    assert report["repeated_in_train"] == {"validation": 0, "test": 0}


# Extra texts


def test_unlabelled_texts_are_read_cleaned_of_the_data_and_counted(place, tmp_path):
    prepared = course.prepare(place / "films.csv", base=place / "base")
    test, validation, own = (prepared.texts[split] for split in ("test", "validation", "train"))
    lines = ["a new film", "", test[0].upper(), "  " + test[1], validation[0], own[0], "a new  film", "another one"]
    (tmp_path / "more.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.warns(UserNote, match=r"3 of 7 texts are in validation or test \(2 in test\); they were left out"):
        more = owndata.unlabelled(tmp_path / "more.txt", prepared)
    assert more.texts == ["a new film", "another one"]
    counts = {name: more.found[name] for name in more.found if name != "sha256"}
    assert counts == {"rows": 7, "used": 2, "repeated": 1, "in_train": 1, "in_validation": 1, "in_test": 2}


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_unlabelled_lines_end_as_any_editor_ends_them(place, tmp_path, end):
    lines = ["a new film", "", "an old one", "\u200b", " \x07", "a third"]
    (tmp_path / "more.TXT").write_bytes(end.join(lines).encode())
    rows = files.read_texts(tmp_path / "more.TXT")
    assert (rows.texts, rows.numbers) == (["a new film", "an old one", "a third"], [1, 3, 6])
    (tmp_path / "more.TXT").write_bytes(end.join(lines).encode() + end.encode() + b"\xff")
    with pytest.raises(UserError, match="more.TXT, line 7 is not UTF-8"):
        files.read_texts(tmp_path / "more.TXT")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_unlabelled_tables_need_no_label_and_theirs_is_not_read(place, tmp_path, suffix):
    prepared = course.prepare(place / "films.csv", base=place / "base")
    table, path = pd.DataFrame({"text": ["a new film", "another"], "label": ["?", None]}), tmp_path / f"more{suffix}"
    writers = {".jsonl": lambda: table.to_json(path, orient="records", lines=True), ".parquet": lambda: table.to_parquet(path)}
    writers.get(suffix, lambda: table.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False))()
    assert owndata.unlabelled(path, prepared).texts == ["a new film", "another"]
    table[["text"]].to_csv(tmp_path / "bare.csv", index=False)
    assert owndata.unlabelled(tmp_path / "bare.csv", prepared).texts == ["a new film", "another"]


def test_no_texts_are_a_sentence(place):
    model, none = Bert.from_pretrained(place / "teacher"), text.Encoded((), ())
    with pytest.raises(UserError, match="there are no texts to predict from"):
        train.predict(model, none)
    empty = train.loader(train.Examples(none, torch.zeros(0, dtype=torch.long)))
    with pytest.raises(UserError, match="training: there are no texts to learn from"):
        train.fit(model, empty, train.classification_loss, epochs=1, lr=1e-3)


@pytest.mark.parametrize(("data", "kind"), [("films.csv", "teacher"), ("scores.csv", "scorer")])
def test_no_loss_with_labels_counts_an_unlabelled_text(place, data, kind):
    prepared = course.prepare(place / data, base=place / "base")
    own = prepared.examples("train")
    more = owndata.Unlabelled(["a new film", "another one"], None, {})
    both = owndata.with_unlabelled(own, more, place / "base", 64)
    assert len(both) == len(own) + 2
    assert both.labels.dtype == own.labels.dtype
    model, loss = Bert.from_pretrained(place / kind), tasks.label_loss(Bert.from_pretrained(place / kind).config)
    rows = [0, 1, 2]
    with torch.no_grad():
        alone, mixed = loss(model, own.collate(rows)), loss(model, both.collate([*rows, len(own), len(own) + 1]))
    torch.testing.assert_close(alone["labels"], mixed["labels"])


def test_distill_learns_from_unlabelled_texts_in_both_steps(place, tmp_path, monkeypatch, capsys):
    extra = [f"{word} {text}" for word in ("new", "old") for text in TEXTS[:40]]
    prepared = course.prepare(place / "films.csv", base=place / "base")
    (tmp_path / "more.txt").write_text("\n".join([*extra, *prepared.texts["test"]]), encoding="utf-8")
    seen = []
    whole = kd.distill
    monkeypatch.setattr(kd, "distill", lambda *given, **more: seen.append(given[1]) or whole(*given, **more))
    more = ["--unlabelled", f"{tmp_path}/more.txt", "--sparsity", "0.3"]
    command = distill(place, tmp_path / "out", *more, teacher="teacher", data="films.csv")
    assert cli.main(command) == 0
    assert len(seen[0]) == len(prepared.labels["train"]) + 80
    assert seen[0].labels[-80:].eq(-100).all()
    report = metrics(tmp_path / "out")
    found = report["data"]["unlabelled"]
    assert (found["rows"], found["used"], found["in_test"]) == (80 + 20, 80, 20)
    assert report["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert report["settings"]["unlabelled"] == f"{tmp_path}/more.txt"
    assert "20 of 100 texts are in validation or test (20 in test)" in capsys.readouterr().err
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "80 texts of" in page


def test_a_run_resumed_with_other_unlabelled_texts_is_refused(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "more.txt").write_text("a new film\nanother", encoding="utf-8")
    command = distill(place, tmp_path / "out", "--unlabelled", f"{tmp_path}/more.txt", teacher="teacher", data="films.csv")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kd, "distill_prediction", stop)
        assert cli.main(command) == 130
    (tmp_path / "more.txt").write_text("a new film\nyet another", encoding="utf-8")
    assert cli.main([*command, "--resume"]) == 2
    assert "had other settings (unlabelled_sha256 was" in capsys.readouterr().err


# Teachers that cannot teach


def check(labels, told, classes=2, allow=False):
    logits = torch.nn.functional.one_hot(torch.tensor(told), classes).float()
    names = ("bad", "good", "so so")[:classes]
    return owndata.check_teacher("T", torch.tensor(labels), logits, names, allow=allow)


def test_a_teacher_that_names_the_largest_class_only_is_refused():
    labels = [0] * 90 + [1] * 10
    with pytest.raises(UserError) as caught:
        check(labels, [0] * 100)
    said = str(caught.value)
    assert "its accuracy is 90.0%, not above the largest class's share 90.0%" in said
    assert "on the 100 texts of validation" in said
    assert "(tinylib teach), or go on with --allow-weak-teacher" in said
    assert "another order" not in said
    with pytest.warns(UserNote, match="nothing to teach.*going on, as --allow-weak-teacher asks"):
        figures = check(labels, [0] * 100, allow=True)
    assert figures["accuracy"] == figures["majority_share"] == 0.9


@pytest.mark.parametrize(
    ("labels", "said"),
    [([1] * 40, "one label only"), ([0], "one text only"), ([2.5] * 40, "one score only"), ([2.5], "one text only")],
)
def test_a_validation_split_that_decides_nothing_is_a_note(labels, said):
    told = scores if isinstance(labels[0], float) else check
    with pytest.warns(UserNote, match=f"split has {said}, so it does not decide whether the teacher T has anything to teach"):
        figures = told(labels, labels)
    assert figures["p_value"] == 1


def test_a_teacher_that_finds_some_of_a_rare_class_may_teach():
    figures = check([0] * 90 + [1] * 10, [0] * 89 + [1] * 1 + [1] * 6 + [0] * 4)
    assert figures["accuracy"] == 0.95
    assert figures["p_value"] < 0.01, "chance agreement is 84 %, not the 90 % of the largest class"


def test_luck_is_no_knowledge_where_there_are_texts_enough_to_tell():
    right = [0, 1] * 50
    lucky = [0, 1] * 27 + [1, 0] * 23  # 54 of 100
    with pytest.raises(UserError, match=r"54.0% is no more than luck \(p = 0.24\), beside the largest class's share 50.0%"):
        check(right, lucky)
    assert check([0, 1] * 2, [0, 1, 0, 0])["p_value"] > 0.05, "four texts say nothing: the plain comparison decides"


@pytest.mark.parametrize(
    ("turned", "order"), [((1, 0), "good, bad"), ((1, 2, 0), "so so, bad, good"), ((2, 0, 1), "good, so so, bad")]
)
def test_labels_in_another_order_are_named(turned, order):
    """``turned[k]`` is what the teacher calls class k."""
    K = len(turned)
    labels = list(range(K)) * 20
    with pytest.raises(UserError) as caught:
        check(labels, [turned[k] for k in labels], classes=K)
    assert f"below chance: are its labels in another order? as {order} it would reach 100.0%" in str(caught.value)


def scores(labels, told, allow=False):
    return owndata.check_teacher("T", torch.tensor(labels), torch.tensor(told)[:, None], ("score",), allow=allow)


def test_a_regression_must_be_above_zero():
    labels = [i / 7 for i in range(40)]
    assert scores(labels, labels)["pearson"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="correlation with the labels is -1.00, not above 0; its scores run the other way"):
        scores(labels, [-x for x in labels])
    with pytest.raises(UserError, match="is 0.00, not above 0;"):
        scores(labels, [2.5] * 40)
    noise = [x + 10 * (-1) ** i for i, x in enumerate(labels)]
    found = pearsonr(labels, noise, alternative="greater")
    assert 0 < found.statistic < 0.2
    with pytest.raises(UserError, match=f"correlation of {found.statistic:.2f} with the labels is no more above 0 than luck"):
        scores(labels, noise)


@pytest.mark.filterwarnings("ignore:the validation split has")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_the_check_answers_for_any_labels_and_predictions(rows):
    labels, told = map(list, zip(*rows, strict=True))
    right = sum(a == b for a, b in rows) / len(rows)
    most = max(labels.count(k) for k in range(3)) / len(rows)
    try:
        figures = check(labels, told, classes=3)
    except UserError:
        assert right <= most or len(rows) >= owndata.FEW
        assert most < 1
    else:
        assert right > most or most == 1
        assert figures["accuracy"] == pytest.approx(right)


def turned_teacher(place, folder):
    """Copy the teacher with its classifier's rows, and so its answers, the other way round; its labels stay as they were."""
    model = Bert.from_pretrained(place / "teacher")
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.save_pretrained(folder)
    return folder


def test_distill_refuses_a_weak_teacher_before_any_training(place, tmp_path, capsys, monkeypatch):
    turned_teacher(place, tmp_path / "turned")
    command = distill(place, tmp_path / "out", teacher=str(tmp_path / "turned"), data="films.csv")
    command[command.index("--teacher") + 1] = str(tmp_path / "turned")
    with monkeypatch.context() as patched:
        patched.setattr(kd, "distill", lambda *a, **k: pytest.fail("trained"))
        assert cli.main(command) == 2
    shown = capsys.readouterr().err
    assert "below chance: are its labels in another order? as positive, negative it would reach" in shown
    assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["turned"]
    assert cli.main([*command, "--allow-weak-teacher"]) == 0
    report = metrics(tmp_path / "out")
    assert report["teacher_accuracy"] < 0.2
    assert report["teacher_on_validation"]["accuracy"] < report["teacher_on_validation"]["majority_share"]
    assert "going on, as --allow-weak-teacher asks" in capsys.readouterr().err


# The order of labels


def test_a_student_and_a_teacher_of_other_labels_are_refused(place, tmp_path, capsys):
    general = shutil.copytree(place / "teacher", tmp_path / "general")
    config = json.loads((general / "config.json").read_text())
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (general / "config.json").write_text(json.dumps(config))
    command = distill(place, tmp_path / "out", "--general", str(general), teacher="teacher", data="films.csv")
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "knows the labels positive, negative, its teacher negative, positive (in this order); start from an encoder" in said
    rows = [(text, int(label == "positive")) for text, label in zip(TEXTS, LABELS, strict=True)]
    write_csv(tmp_path / "numbers.csv", rows)  # numbers fit either order, so only the two models can be compared
    data = ["--data", f"{tmp_path}/numbers.csv", "--out", f"{tmp_path}/out"]
    assert cli.main(["prune", "--model", str(general), "--teacher", f"{place}/teacher", *data]) == 2
    said = capsys.readouterr().err
    assert "its teacher negative, positive (in this order); give a teacher of the same labels in the same order" in said


def test_the_student_of_a_teacher_without_names_gets_the_data_s(place, tmp_path):
    teacher = shutil.copytree(place / "teacher", tmp_path / "unnamed")
    config = json.loads((teacher / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (teacher / "config.json").write_text(json.dumps(config))
    command = distill(place, tmp_path / "out", data="films.csv")
    command[command.index("--teacher") + 1] = str(teacher)
    assert cli.main(command) == 0
    assert Bert.from_pretrained(tmp_path / "out").config.labels == ("negative", "positive")


def test_csv_rows_of_pairs_with_scores(tmp_path, place):
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        rows = [(t, w, s) for (t, s), w in zip(SCORED, ["a film", "fun"] * 96, strict=True)]
        csv.writer(file).writerows([("text", "text_pair", "label"), *rows])
    prepared = course.prepare(tmp_path / "pairs.csv", base=place / "base")
    assert prepared.names == ("score",)
    assert prepared.labels["test"].dtype == torch.float32
    model, examples = Bert.from_pretrained(place / "scorer"), prepared.examples("train")
    recovered = pruning.prune_by("layers", model, examples, 0.5, epochs=1, lr=1e-4)
    assert recovered.config.head == "regression"
