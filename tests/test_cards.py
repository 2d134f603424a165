"""Results that travel: the model card beside every model, what a user's text can do to it (nothing), TensorBoard's logs."""

import ast
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_cli import LABELS, TEXTS, make_checkpoint, metrics, write_csv

from tinylib import cards, cli, datasets, logs, models
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.history import History

NASTY = ["</script><script>alert(1)</script>", "a | b", "`` ` ``", "---", "a\n---\nlicense: mit", "[x](javascript:alert(1))",
         "<!-- ", "**bold** _it_", "\u202eevil\u202c", "![i](http://x/y.png)", "$\\frac{1}{2}$", "'\"&amp;", "# h", "- item",
         "{{ x }}", "!!python/object:os.system", "www.example.org https://example.org", "\r\n\t", "ünï 电影 🎬", "\\", "~~x~~",
         "a: b", "x" * 500]  # fmt: skip
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})


def page_of(text: str):
    """Split a card into its front matter, parsed, and its Markdown, as tokens; check that neither was broken."""
    _, front, page = re.split(r"(?m)^---\n", text, maxsplit=2)
    tokens = MARKDOWN.parse(page)
    kinds = {token.type for token in walk(tokens)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "s_open", "hr", "fence"}
    return yaml.safe_load(front), tokens


def walk(tokens):
    for token in tokens:
        yield token
        yield from walk(token.children or [])


def tables(tokens) -> list[list[list[str]]]:
    """Give the cells of each table as they are shown."""
    found = []
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in tokens[i + 1].children))
    return found


@given(st.text(max_size=60) | st.sampled_from(NASTY))
def test_a_text_is_shown_as_it_is_whatever_it_holds(text):
    shown = "".join(child.content for child in MARKDOWN.parseInline(f"the {cards.plain(text)} end")[0].children)
    assert shown == f"the {cards.one_line(text)} end"
    told = MARKDOWN.render(f"the {cards.plain(text)} end")
    assert re.sub(r"&\w+;", "", told).count("<") == 2, "the paragraph's own tags and no others"


@given(st.lists(st.text(max_size=30) | st.sampled_from(NASTY), min_size=2, max_size=2))
def test_a_table_keeps_its_columns_whatever_its_cells_hold(cells):
    (rows,) = tables(MARKDOWN.parse(cards.table(["one", "two"], [cells, ["last", "row"]])))
    assert rows == [["one", "two"], [cards.one_line(cell) for cell in cells], ["last", "row"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a base model under the MIT licence, data with nasty names, and a teacher of them by the command."""
    folder = tmp_path_factory.mktemp("cards")
    make_checkpoint(folder / "base", TEXTS)
    (folder / "base" / "LICENSE").write_text("MIT License\n\nCopyright (c) somebody\n")
    names = {"positive": "</td></script>|`good`\n---", "negative": "*bad*"}
    data = folder / "films | <b>`x` --- $1$.csv"
    write_csv(data, [(text, names[label]) for text, label in zip(TEXTS, LABELS, strict=True)])
    command = ["teach", "--base", f"{folder}/base", "--data", str(data), "--out", f"{folder}/teacher"]
    assert cli.main([*command, "--epochs", "4", "--lr", "5e-3", "--batch-size", "16"]) == 0
    return folder


def distill(place, out, *more) -> list[str]:
    return ["distill", "--teacher", f"{place}/teacher", "--data", str(next(place.glob("films*"))), "--student", "2x16",
            "--out", str(out), "--epochs-intermediate", "1", "--epochs-prediction", "1", *more]  # fmt: skip


@pytest.mark.parametrize("kind", ["teach", "distill", "prune"])
def test_every_model_has_a_card_that_says_what_it_is(place, tmp_path, kind):
    out = tmp_path / "out <i>|"
    if kind == "distill":
        assert cli.main(distill(place, out)) == 0
    elif kind == "prune":
        data = ["--data", f"{place}/teacher/data", "--out", str(out), "--epochs", "0"]
        assert cli.main(["prune", "--model", f"{place}/teacher", *data]) == 0
    else:
        out = place / "teacher"
    text, report = (out / "README.md").read_text(encoding="utf-8"), metrics(out)
    front, tokens = page_of(text)
    assert "<" not in text
    assert "…" not in text, "the command is whole"
    assert front["license"] == "mit", "from the base's LICENSE, through the teacher's card"
    assert front["library_name"] == "transformers"
    assert "base_model" not in front, "a folder is nothing on the hub"
    result = front["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "value": report["accuracy"]}]
    assert ModelCard(text).data.license == "mit", "the hub's own reader"
    measured, size, data, settings = tables(tokens)
    low, high = report["accuracy_interval_95"]
    assert measured[1] == ["accuracy", f"{report['accuracy']:.4f}", f"{low:.4f} to {high:.4f}"]
    assert [row[0] for row in measured if "teacher" in row[0]] == (
        ["the teacher's accuracy", "retention (share of the teacher's)"] if kind == "distill" else []
    )
    assert size[1][1] == f"{report['parameters']:,}"
    assert size[2][1] == f"{(out / 'model.safetensors').stat().st_size:,} bytes"
    assert size[-1][1].startswith(f"{report['latency']['median_ms']:.2f} ms")
    assert data[0] == ["", "train", "validation", "test"]
    assert data[1] == ["texts", *(f"{report['data']['rows'][s]}" for s in data[0][1:])]
    classes = {row[0]: row[1] for row in data[2:4]}
    assert classes == {"of class *bad*": "76", "of class </td></script>|`good` ---": "76"}
    assert ["seed", "0"] in settings
    shown = " ".join(child.content for token in tokens for child in token.children or [])
    assert report["data_fingerprint"] in shown
    assert f"tinylib {kind} --" in shown
    assert {"teach": "fine-tuned from", "distill": "distilled from", "prune": "pruned from"}[kind] in shown


@pytest.mark.parametrize("method", ["heads", "neurons"])
def test_a_card_says_how_its_model_is_loaded(place, tmp_path, method):
    """The command in it is run, and the folder in its Python is loaded."""
    out = tmp_path / "out"
    command = ["prune", "--model", f"{place}/teacher", "--data", f"{place}/teacher/data", "--out", str(out), "--epochs", "0"]
    assert cli.main([*command, "--method", method]) == 0
    use = (out / "README.md").read_text(encoding="utf-8").split("## How to use it")[1].split("## Licence")[0]
    use = use.replace("THIS FOLDER", str(out)).replace("ANOTHER FOLDER", f"{tmp_path}/whole")
    lines = [line.strip() for line in use.splitlines() if line.startswith("    ")]
    exports = [line for line in lines if line.startswith("tinylib export")]
    assert len(exports) == (method == "heads")
    for line in exports:
        assert cli.main(shlex.split(line)[1:]) == 0
    folder = re.fullmatch(r'pipeline\("text-classification", model="(.+)"\)\("a text"\)', lines[-1])[1]
    assert set(transformers.pipeline("text-classification", model=folder)("a text")[0]) == {"label", "score"}


def test_the_card_of_a_model_of_pairs_gives_it_both_texts(place, tmp_path):
    out = tmp_path / "out"
    rows = zip(TEXTS, reversed(TEXTS), LABELS, strict=True)
    data = write_csv(tmp_path / "pairs.csv", rows, ("text", "text_pair", "label"))
    command = ["teach", "--base", f"{place}/base", "--data", str(data), "--out", str(out), "--epochs", "1"]
    assert cli.main(command) == 0
    *_, line = [line.strip() for line in (out / "README.md").read_text(encoding="utf-8").splitlines() if "pipeline(" in line]
    call = re.fullmatch(r'pipeline\("text-classification", model="THIS FOLDER"\)\((.+)\)', line)[1]
    told = ast.literal_eval(call)
    assert set(told) == {"text", "text_pair"}
    said = transformers.pipeline("text-classification", model=str(out))(told)
    assert set(said) == {"label", "score"}


def test_a_plain_command_is_shown_as_code_and_runs_again(tmp_path, place):
    line = cards.command("distill", {"teacher": "t", "layer_map": (1, 2), "seed": 0, "resume": False, "general": None, "x": True})
    assert line == "tinylib distill --teacher t --layer-map 1,2 --seed 0 --x"
    assert cards.shown(line) == f"    {line}"
    assert not cards.shown(cards.command("teach", {"data": "a b`c"})).startswith(" ")


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "unknown"),
        ({"LICENSE": "   Apache License\n Version 2.0"}, "apache-2.0"),
        ({"LICENSE": "All rights reserved"}, "unknown"),
        ({"NOTICE": "Weights: x\nLicense: Apache-2.0\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: cc-by-4.0\n---\n# x\n", "LICENSE": "MIT License"}, "cc-by-4.0"),
        ({"README.md": "---\nlicense: '</script>'\n---\n# x\n"}, "unknown"),
        ({"README.md": "---\nlicense: [mit, x]\n---\n# x\n"}, "unknown"),
        ({"README.md": "---\n{ : broken\n---\n# x\n"}, "unknown"),
        ({"README.md": "no front matter"}, "unknown"),
    ],
)
def test_the_licence_is_the_source_s(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert cards.licence_of(tmp_path) == licence


def test_an_unknown_licence_sends_to_the_source(place, tmp_path):
    base = make_checkpoint(tmp_path / "base", TEXTS)
    data = ["--data", f"{place}/teacher/data", "--out", f"{tmp_path}/out", "--epochs", "1"]
    assert cli.main(["teach", "--base", str(base), *data]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert page_of(text)[0]["license"] == "unknown"
    assert "unknown: see the model that it was made of" in text


def test_a_shipped_model_is_called_by_its_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "resolve", lambda source: tmp_path)
    report = {
        "labels": ["a", "b"], "tinylib": "0", "split": "test", "examples": 1, "accuracy": 1.0, "parameters": 1, "bytes": 1,
        "latency": {"median_ms": 1.0, "p95_ms": 1.0, "repeats": 1, "tokens": 32, "device": "cpu", "threads": 1},
        "data": {"rows": {"train": 1}, "classes": {"train": {"a": 1}}, "truncated": {"train": 0}, "repeated_in_train": {}},
        "data_fingerprint": "f", "settings": {},
    }  # fmt: skip
    given = {"data": "glue/sst2", "max_length": 64}
    front, _ = page_of(cards.card("out", "teach", "minilm-l6", report, given))
    assert front["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert page_of(cards.card("out", "teach", "someone/model", report, given))[0]["base_model"] == "someone/model"


def test_a_regression_s_card_says_how_to_get_the_score(place, tmp_path):
    rows = [(text, 1.25 + i % 7 / 2) for i, text in enumerate(TEXTS)]
    data = ["--data", str(write_csv(tmp_path / "scores.csv", rows)), "--out", f"{tmp_path}/out", "--epochs", "1"]
    assert cli.main(["teach", "--base", f"{place}/base", *data]) == 0
    text, report = (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), metrics(tmp_path / "out")
    front, tokens = page_of(text)
    assert front["metrics"] == ["pearsonr"]
    assert 'function_to_apply="none"' in text
    assert [row[0] for row in tables(tokens)[0][1:]] == [cards.FIGURES[name] for name in ("pearson", "spearman", "rmse")]
    assert tables(tokens)[2][2][1].startswith("1.25 to 4.25, mean")
    assert report["pearson"] == pytest.approx(float(tables(tokens)[0][1][1]), abs=1e-4)


def test_an_output_with_a_card_is_replaced_by_the_next_run(place, tmp_path):
    for seed in ("0", "1"):
        assert cli.main([*distill(place, tmp_path / "out"), "--seed", seed]) == 0
    assert metrics(tmp_path / "out")["settings"]["seed"] == 1


# TensorBoard


def test_without_tensorboard_one_sentence_says_how_to_get_it_before_any_work(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for command in (
        distill(place, tmp_path / "out"),
        ["teach", "--base", f"{place}/base", "--data", "movie_reviews", "--out", f"{tmp_path}/out"],
        ["general", "--teacher", f"{place}/base", "--out", f"{tmp_path}/out"],
    ):
        assert cli.main([*command, "--tensorboard", f"{tmp_path}/logs"]) == 2
        said = capsys.readouterr().err
        assert "the package tensorboard is missing, which --tensorboard needs; python -m pip install tensorboard" in said
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


class Writer:
    """Stand in for torch's SummaryWriter and keep what it is told."""

    told: dict = {}  # noqa: RUF012 (one for all, cleared by the test)

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.told.setdefault(name, {})[step] = value


def test_the_logs_hold_each_step_s_losses_and_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(logs, "_writer", lambda: Writer)
    Writer.told.clear()
    by_epochs = History({"labels": [3.0, 2.0, 1.0, 0.5], "loss": [3.0, 2.0, 1.0, 0.5]}, [{"validation": 0.6}, {"validation": 0.8}])
    by_steps = History({"hidden": [1.0] * 6}, [{"step": 5, "hidden 1": 0.25}])
    report = {"accuracy": 0.9, "split": "test", "labels": ["a"], "parameters": 5, "data": {}, "flag": True}
    logs.write(tmp_path, {"teach": by_epochs, "general": by_steps}, report)
    assert Writer.told["teach/labels"] == {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.5}
    assert Writer.told["teach/validation"] == {2: 0.6, 4: 0.8}
    assert Writer.told["general/hidden 1"] == {5: 0.25}
    assert {name: steps for name, steps in Writer.told.items() if name.startswith("result/")} == {
        "result/accuracy": {0: 0.9}, "result/parameters": {0: 5},
    }  # fmt: skip


def test_a_folder_that_cannot_hold_logs_is_refused_before_the_run(place, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_writer", lambda: Writer)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        logs.check(tmp_path / "file", tmp_path / "out")
    for inside in ("out", "out/logs"):
        with pytest.raises(UserError, match="lies inside --out, which is replaced as a whole"):
            logs.check(tmp_path / inside, tmp_path / "out")
    assert logs.check(tmp_path / "logs", tmp_path / "out") == tmp_path / "logs"


def test_logs_that_cannot_be_written_do_not_cost_the_model(place, tmp_path, monkeypatch, capsys):
    class Full(Writer):
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs, "_writer", lambda: Full)
    assert cli.main([*distill(place, tmp_path / "out"), "--tensorboard", f"{tmp_path}/logs"]) == 0
    assert "logs cannot be written (No space left on device)" in capsys.readouterr().err
    assert Bert.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_a_resumed_run_s_log_is_whole(place, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_writer", lambda: Writer)
    from tinylib import distill as kd

    command = [*distill(place, tmp_path / "out"), "--tensorboard", f"{tmp_path}/logs"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kd, "distill_prediction", stop)
        assert cli.main(command) == 130
    Writer.told.clear()
    assert cli.main([*command, "--resume"]) == 0
    assert len(Writer.told["intermediate/loss"]) == len(Writer.told["prediction/loss"]) == 5


def test_tensorboard_reads_what_was_written(place, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.main([*distill(place, tmp_path / "out"), "--tensorboard", f"{tmp_path}/logs"]) == 0
    read = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [event.step for event in read.Scalars("prediction/prediction")] == [1, 2, 3, 4, 5]
    assert read.Scalars("result/accuracy")[0].value == pytest.approx(metrics(tmp_path / "out")["accuracy"])


def test_the_data_beside_the_model_is_the_card_s(place):
    assert metrics(place / "teacher")["data_fingerprint"] == datasets.fingerprint(datasets.load(place / "teacher" / "data"))
    shutil.rmtree(place / "teacher" / "compressed", ignore_errors=True)
    assert json.loads((place / "teacher" / "config.json").read_text())["id2label"]["1"].startswith("</td>")
    assert torch.isfinite(Bert.from_pretrained(place / "teacher").classifier.weight).all()
