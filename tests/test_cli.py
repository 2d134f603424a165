"""The command line: what each command makes, and that a mistake ends in one sentence and leaves nothing behind.

A random BERT of 2 layers, 32 wide, with a real WordPiece vocabulary, stands in for the pretrained model.
"""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

from tinylib import cli, course, datasets, output, rowwise, text, train
from tinylib.bert import TOKENIZER_FILES, Bert
from tinylib.errors import UserError, UserNote, is_full_memory
from tinylib.prune import restore_heads

GOOD = ("a warm and clever film", "great fun", "a fine story")
BAD = ("a dull mess", "boring and cold", "a bad story")
WORDS = ("slow", "quick", "long", "short", "new", "old", "french", "silent", "early", "late", "big", "small")
TEXTS = [f"{stem} , {word} and {other}" for stem in GOOD + BAD for word in WORDS[:8] for other in WORDS[8:]]
LABELS = ["positive" if any(text.startswith(stem) for stem in GOOD) else "negative" for text in TEXTS]
# as the command line of a child runs: one thread, so that sums are added in one order
CHILD = {**os.environ, "OMP_NUM_THREADS": "1", "TINYLIB_TYPECHECK": "0", "HF_HUB_OFFLINE": "1"}


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tokenizer(folder, pieces, kind=transformers.BertTokenizerFast):
    """Write a tokenizer of these word pieces, in their order, in the way that transformers 4 and 5 both know; return it."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    fast = kind.from_pretrained(folder)
    fast.save_pretrained(folder)
    return fast


def make_checkpoint(folder, texts, heads=4, positions=40):
    """Write a random BERT and a WordPiece tokenizer of these texts' words, by Hugging Face's own classes."""
    folder.mkdir()
    words = sorted({word for text in texts for word in text.split()})
    letters = sorted(set("".join(words)))  # so that every word can be cut into known pieces
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + words))}
    fast = write_tokenizer(folder, vocabulary)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": 64}
    sizes["initializer_range"] = 0.2  # so large that so narrow a model learns within a few steps
    config = transformers.BertConfig(vocab_size=len(fast), max_position_embeddings=positions, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a base model, a table, and a teacher fine-tuned on it by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "base", TEXTS)
    write_csv(folder / "films.csv", zip(TEXTS, LABELS, strict=True))
    rows = [(text, word, label) for text, word, label in zip(TEXTS, WORDS * 16, LABELS, strict=True)]
    write_csv(folder / "pairs.csv", rows, ("text", "text_pair", "label"))
    code = cli.main(
        ["teach", "--base", f"{folder}/base", "--data", f"{folder}/films.csv", "--out", f"{folder}/teacher"]
        + ["--epochs", "5", "--lr", "5e-3", "--batch-size", "16"]
    )
    assert code == 0
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def tiny_distillation(place, out, *more) -> list[str]:
    return ["distill", "--teacher", f"{place}/teacher", "--data", f"{place}/films.csv", "--student", "2x16",
            "--out", str(out), "--epochs-intermediate", "2", "--epochs-prediction", "1", *more]  # fmt: skip


# Help and usage


@pytest.mark.alone
def test_help_answers_at_once_and_without_torch():
    code = "import sys; from tinylib import cli; cli.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert done.stdout == "False\n"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "tinylib", "--help"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=CHILD)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


@pytest.mark.parametrize("command", ["doctor", "fetch", "teach", "general", "distill", "prune", "evaluate", "export"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: tinylib {command}" in capsys.readouterr().out


# What the commands make


def logits_of(folder, sentence: str):
    """Give what transformers makes of a sentence with the model in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(sentence, return_tensors="pt")).logits[0]


def our_logits(folder, sentence: str):
    batch = text.pad(text.encode(text.load_tokenizer(folder), [sentence]), [0])
    with torch.no_grad():
        return Bert.from_pretrained(folder)(batch["ids"], batch["mask"], batch["segments"]).logits[0]


def check_in_transformers(folder):
    """Load what a command wrote with transformers, and compare."""
    torch.testing.assert_close(
        logits_of(folder, TEXTS[0]), our_logits(folder, TEXTS[0]), atol=1e-5, rtol=1e-5
    )
    said = transformers.pipeline("text-classification", str(folder))(TEXTS[:2])
    assert {answer["label"] for answer in said} <= {"positive", "negative"}


def test_teach_writes_model_metrics_and_the_split(place):
    report, folder = metrics(place / "teacher"), place / "teacher"
    assert {"accuracy", "f1", "parameters", "seconds"} <= set(report)
    assert report["accuracy"] > 0.9, "the labels follow from one word"
    low, high = report["accuracy_interval_95"]
    assert 0 <= low <= report["accuracy"] <= high <= 1
    assert report["parameters"] == sum(p.numel() for p in Bert.from_pretrained(folder).parameters())
    assert report["labels"] == ["negative", "positive"]
    saved = datasets.load(folder / "data")
    assert datasets.fingerprint(saved) == datasets.fingerprint(datasets.load(place / "films.csv"))
    assert report["data_fingerprint"] == datasets.fingerprint(saved)
    assert {path.name for path in folder.iterdir()} <= output.OURS
    check_in_transformers(folder)


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering", "NextSentencePrediction", "SequenceClassification"])
def test_teach_takes_the_encoder_of_a_model_whose_head_it_does_not_know(place, tmp_path, kind):
    shutil.copytree(place / "base", tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(place / "base", problem_type="multi_label_classification")
    with torch.random.fork_rng():
        getattr(transformers, f"BertFor{kind}")(config).save_pretrained(tmp_path / "base")
    options = ["--data", f"{place}/films.csv", "--epochs", "1", "--out", f"{tmp_path}/out"]
    assert cli.main(["teach", "--base", f"{tmp_path}/base", *options]) == 0
    assert Bert.from_pretrained(tmp_path / "out").config.outputs == 2


def test_distill_reports_the_teacher_and_the_retention(place, capsys):
    out = place / "student"
    assert cli.main(tiny_distillation(place, out)) == 0
    report, shown = metrics(out), capsys.readouterr()
    assert report["teacher_accuracy"] == metrics(place / "teacher")["accuracy"]
    assert report["retention"] == report["accuracy"] / report["teacher_accuracy"]
    assert report["parameters"] < metrics(place / "teacher")["parameters"]
    assert Bert.from_pretrained(out).config.num_hidden_layers == 2
    assert all(name in shown.out for name in ("accuracy", "teacher accuracy", "retention", "seconds"))
    assert "intermediate step" in shown.err, "progress is shown"
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
    check_in_transformers(out)
    applied, defaults = report["settings"], course.LAPTOP.settings
    assert applied["lr_intermediate"] == defaults.lr_intermediate, "what was not asked for is told too"
    assert (applied["augment"], applied["student"], applied["precision"]) == (0, "2x16", "highest")


def test_the_command_line_offers_the_precisions_that_training_knows():
    assert cli.PRECISIONS == train.PRECISIONS
    assert tuple(rowwise.FORMATS) == cli.CACHE_DTYPES


def test_the_teachers_outputs_may_be_kept_in_int8_or_not_at_all(place, tmp_path):
    losses = {}
    for options in (["--cache-dtype", "int8"], ["--cache-dtype", "float16"], ["--cache-gb", "0"]):
        out = tmp_path / options[-1]
        assert cli.main(tiny_distillation(place, out, *options)) == 0
        assert str(metrics(out)["settings"][options[0][2:].replace("-", "_")]).removesuffix(".0") == options[1]
        losses[options[-1]] = Bert.from_pretrained(out).embeddings.word.weight.detach()
    for name in ("int8", "float16"):
        difference = (losses[name] - losses["0"]).norm() / losses["0"].norm()
        assert 0 < difference < 0.02, name


def test_distill_starts_from_a_general_student(place, tmp_path):
    general = make_checkpoint(tmp_path / "general", TEXTS)
    options = ["--general", str(general), "--layer-map", "1,2", "--temperature", "2"]
    options += ["--epochs-intermediate", "0"]
    command = tiny_distillation(place, tmp_path / "out", *options)
    where = command.index("--student")
    assert cli.main(command[:where] + command[where + 2 :]) == 0
    report, card = metrics(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert report["settings"]["student"] == "2x32", "its own shape, and not the default one"
    assert "--student 2x32" in card
    assert "4x312" not in card
    assert report["settings"]["general"] == str(general)
    assert report["settings"]["layer_map"] == [1, 2]
    assert Bert.from_pretrained(tmp_path / "out").config.hidden_size == 32


@pytest.mark.parametrize("method", ["magnitude", "heads", "neurons", "layers"])
def test_prune_reports_the_sparsity_that_it_reached(place, tmp_path, method, capsys):
    out = tmp_path / "pruned"
    options = ["--sparsity", "0.5", "--method", method, "--epochs", "1", "--teacher", f"{place}/teacher"]
    data = ["--data", f"{place}/teacher/data", "--out", str(out)]
    assert cli.main(["prune", "--model", f"{place}/teacher", *data, *options]) == 0
    report, config = metrics(out), Bert.from_pretrained(out).config
    # of a layer's 4·C² + 2·C·I weights, at C = 32 and I = 64, half are the heads' and half the neurons'
    wanted = {"magnitude": 0.5, "heads": 0.25, "neurons": 0.25, "layers": 0.5}[method]
    assert report["sparsity"] == pytest.approx(wanted, abs=0.001)
    assert config.num_hidden_layers == (1 if method == "layers" else 2)
    assert config.intermediate_size == (32 if method == "neurons" else 64)
    assert report["dense_accuracy"] == metrics(place / "teacher")["accuracy"]
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["bytes_compressed"] < 0.6 * report["bytes"]
    assert not (out / "data").exists(), "a folder's own split is not copied"
    assert config.num_attention_heads == (2 if method == "heads" else 4)
    if method == "magnitude":
        assert report["bytes"] == (place / "teacher" / "model.safetensors").stat().st_size
    else:
        assert report["bytes"] < (place / "teacher" / "model.safetensors").stat().st_size
    assert "sparsity" in capsys.readouterr().out
    if method == "heads":  # its BERT knows no such heads; with zeros in their place it does
        restore_heads(Bert.from_pretrained(out)).save_pretrained(out)
    check_in_transformers(out)


def test_pruning_without_recovery_is_the_masked_model(place, tmp_path):
    data = ["--data", f"{place}/teacher/data", "--out", f"{tmp_path}/out", "--epochs", "0"]
    assert cli.main(["prune", "--model", f"{place}/teacher", *data, "--sparsity", "0.3"]) == 0
    dense = load_file(place / "teacher" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0]), name


def test_a_compressed_model_is_evaluated_and_exported(place, tmp_path, capsys):
    data = ["--data", f"{place}/teacher/data"]
    prune = ["prune", "--model", f"{place}/teacher", *data, "--out", f"{tmp_path}/pruned", "--epochs", "1"]
    assert cli.main(prune) == 0
    small = tmp_path / "pruned" / "compressed"
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(small), *data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == metrics(tmp_path / "pruned")["accuracy"]
    assert cli.main(["export", "--model", str(small), "--format", "hf", "--out", f"{tmp_path}/dense"]) == 0
    check_in_transformers(tmp_path / "dense")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evaluate_prints_json_and_nothing_else(place, capsys, split):
    data = ["--data", f"{place}/films.csv", "--split", split]
    command = ["evaluate", "--model", f"{place}/teacher", *data]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["examples"] == len(datasets.load(place / "teacher" / "data")[split])
    if split == "test":
        told, same = metrics(place / "teacher"), ("accuracy", "f1", "parameters", "data_fingerprint")
        assert [report[name] for name in same] == [told[name] for name in same]
    assert cli.main(command) == 0
    assert "accuracy" in capsys.readouterr().out


def test_export_writes_what_transformers_loads(place, tmp_path):
    options = ["--format", "hf", "--out", f"{tmp_path}/hf"]
    assert cli.main(["export", "--model", f"{place}/teacher", *options]) == 0
    exported = logits_of(tmp_path / "hf", TEXTS[3])
    torch.testing.assert_close(exported, our_logits(place / "teacher", TEXTS[3]), atol=1e-5, rtol=1e-5)
    assert metrics(tmp_path / "hf")["parameters"] == metrics(place / "teacher")["parameters"]
    check_in_transformers(tmp_path / "hf")


def test_pairs_of_texts_go_all_the_way(place, tmp_path):
    data = ["--data", f"{place}/pairs.csv", "--max-length", "24", "--batch-size", "64"]
    teach = ["teach", "--base", f"{place}/base", *data, "--out", f"{tmp_path}/pairs", "--epochs", "1"]
    assert cli.main(teach) == 0
    assert datasets.load(tmp_path / "pairs" / "data")["test"].column_names == ["text", "text_pair", "label"]
    assert cli.main(["evaluate", "--model", f"{tmp_path}/pairs", *data[:-2]]) == 0


# Labels


def with_labels(place, folder, labels):
    """Copy the teacher and rename its classes."""
    shutil.copytree(place / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(labels)}
    config["label2id"] = {name: i for i, name in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_order_of_labels_is_refused_and_numbers_help(place, tmp_path, capsys):
    turned = with_labels(place, tmp_path / "turned", ["positive", "negative"])
    assert cli.main(["evaluate", "--model", str(turned), "--data", f"{place}/films.csv"]) == 2
    said = capsys.readouterr().err
    assert "knows the labels positive, negative, but the data has negative, positive (in this order)" in said
    assert "number the data's labels 0 to 1 in the model's order" in said
    numbered = [(text, int(label == "negative")) for text, label in zip(TEXTS, LABELS, strict=True)]
    write_csv(tmp_path / "numbered.csv", numbered)
    assert cli.main(["evaluate", "--model", str(turned), "--data", f"{tmp_path}/numbered.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] < 0.2, "the classes were renamed, not the weights"


def test_a_model_without_names_takes_the_data_s_order(place, tmp_path, capsys):
    unnamed = with_labels(place, tmp_path / "unnamed", ["LABEL_0", "LABEL_1"])
    command = ["evaluate", "--model", str(unnamed), "--data", f"{place}/teacher/data", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == metrics(place / "teacher")["accuracy"]


# Mistakes


def broken(place, folder):
    """Make the wrong inputs that a user brings."""
    folder.mkdir()
    write_csv(folder / "gap.csv", [*zip(TEXTS, LABELS, strict=True), ("", "negative")])
    write_csv(folder / "columns.csv", [("a", "b")], ("review", "stars"))
    write_csv(folder / "three.csv", [(text, str(i % 3)) for i, text in enumerate(TEXTS)])
    write_csv(folder / "one.csv", [(text, "same") for text in TEXTS])
    write_csv(folder / "few.csv", [("a", "x"), ("b", "y")])
    fractions = [0.5, *(i % 2 for i in range(len(TEXTS) - 1))]
    write_csv(folder / "stray.csv", zip(TEXTS, fractions, strict=True))
    write_csv(folder / "mixed.csv", [(text, "good" if i % 2 else 0.5) for i, text in enumerate(TEXTS)])
    write_csv(folder / "scores.csv", [(text, i / 8) for i, text in enumerate(TEXTS)])
    write_csv(folder / "same_score.csv", [(text, 2.5) for text in TEXTS])
    write_csv(folder / "huge.csv", [(text, 1e7 * i + 0.5) for i, text in enumerate(TEXTS)])
    (folder / "infinite.jsonl").write_text('{"text": "a", "label": -Infinity}\n')
    (folder / "repeats").mkdir()
    for name, rows in (("train", slice(0, 160)), ("validation", slice(160, 176)), ("test", slice(140, 192))):
        write_csv(folder / "repeats" / f"{name}.csv", list(zip(TEXTS[rows], LABELS[rows], strict=True)))
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "known.txt").write_text("\n".join(TEXTS[:5]))
    (folder / "latin.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    write_csv(folder / "unlabelled_pairs.csv", [("a", "b")], ("text", "text_pair"))
    write_csv(folder / "unlabelled_gap.csv", [("a", "1"), (" ", "2")], ("text", "note"))
    weak = Bert.from_pretrained(place / "teacher")
    with torch.no_grad():
        weak.classifier.weight.zero_()  # the bias decides alone: one class for every text
    weak.save_pretrained(folder / "weak")
    (folder / "latin.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    (folder / "empty.csv").write_text("")
    (folder / "sheet.xlsx").write_text("x")
    (folder / "nothing").mkdir()
    (folder / "file").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("mine")
    for name in ("cut", "pickled", "shapes", "words", "garbled", "gpt", "mute", "foreign", "torn"):
        shutil.copytree(place / "teacher", folder / name)
    whole = (place / "teacher" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    tensors = load_file(place / "teacher" / "model.safetensors")
    table = "bert.embeddings.word_embeddings.weight"
    save_file(tensors | {table: tensors[table][:, :8].contiguous()}, folder / "shapes" / "model.safetensors")
    config = json.loads((place / "teacher" / "config.json").read_text())
    (folder / "gpt" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    (folder / "words" / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    save_file(tensors | {table: tensors[table][:20].contiguous()}, folder / "words" / "model.safetensors")
    (folder / "garbled" / "config.json").write_text("{")
    for name in TOKENIZER_FILES:
        (folder / "mute" / name).unlink(missing_ok=True)
    told = (folder / "torn" / "tokenizer.json").read_bytes()
    (folder / "torn" / "tokenizer.json").write_bytes(told[: len(told) // 2])
    (folder / "loop").symlink_to(folder / "loop")
    shutil.rmtree(folder / "foreign")
    other = make_checkpoint(folder / "other", [text[::-1] for text in TEXTS])
    shutil.copytree(place / "teacher", folder / "foreign")
    for name in TOKENIZER_FILES:
        if (other / name).exists():
            shutil.copy(other / name, folder / "foreign" / name)
    return folder


TEACH = "teach --base {p}/base --data {p}/films.csv --out {o}"
DISTILL = "distill --teacher {p}/teacher --data {p}/films.csv --student 2x16 --out {o}"
PRUNE = "prune --model {p}/teacher --data {p}/films.csv --out {o}"
EVALUATE = "evaluate --model {p}/teacher --data {p}/films.csv"
GENERAL = "general --teacher {p}/base --student 2x16 --max-length 16 --out {o}"

BAD_INPUTS = [
    # what was typed, and what the sentence says
    ("", "required: COMMAND"),
    ("paint", "invalid choice: 'paint'"),
    ("teach --base {p}/base --data {p}/films.csv", "required: --out; tinylib teach --help"),
    (TEACH + " --colour red", "unrecognized arguments: --colour red"),
    (GENERAL + " --corpus {b}/gone", "gone does not exist: give a folder with .txt"),
    (GENERAL + " --corpus {p}/films.csv", "holds no .txt or .parquet files"),
    (GENERAL + " --max-length 2 --corpus {p}/films.csv", "max_length=2 leaves no room"),
    (GENERAL + " --max-length 200 --corpus {b}/gone", "base takes 40 tokens; give --max-length 40 or less"),
    # an empty value: of a variable of the shell that was never set
    (TEACH.replace("{p}/base", "{e}"), "argument --base: its value is empty"),
    (TEACH.replace("{p}/films.csv", "{e}"), "argument --data: its value is empty; name something"),
    (TEACH.replace("{o}", "{e}"), "argument --out: its value is empty"),
    (GENERAL + " --corpus {e}", "argument --corpus: its value is empty"),
    (GENERAL + " --start {e}", "argument --start: its value is empty"),
    (DISTILL + " --general {e}", "argument --general: its value is empty"),
    (DISTILL + " --unlabelled {e}", "argument --unlabelled: its value is empty"),
    (DISTILL + " --tensorboard {e}", "argument --tensorboard: its value is empty"),
    (PRUNE + " --teacher {e}", "argument --teacher: its value is empty"),
    (EVALUATE.replace("{p}/teacher", "{e}"), "argument --model: its value is empty"),
    ("export --model {p}/teacher --out {o} --data {e}", "argument --data: its value is empty"),
    # links that lead in a circle, and names that no file of UTF-8 can tell
    (TEACH.replace("{p}/base", "{b}/loop"), "loop' is a symbolic link that leads in a circle; name another place"),
    (TEACH.replace("{p}/films.csv", "{b}/loop"), "argument --data: '{b}/loop' is a symbolic link"),
    (TEACH.replace("{o}", "{b}/loop"), "argument --out: '{b}/loop' is a symbolic link"),
    (TEACH.replace("{o}", "{b}/loop/out"), "argument --out: '{b}/loop/out' is a symbolic link"),
    (GENERAL + " --corpus {b}/loop", "argument --corpus: '{b}/loop' is a symbolic link"),
    (DISTILL + " --general {b}/loop", "argument --general: '{b}/loop' is a symbolic link"),
    (DISTILL + " --unlabelled {b}/loop", "argument --unlabelled: '{b}/loop' is a symbolic link"),
    (DISTILL + " --tensorboard {b}/loop", "argument --tensorboard: '{b}/loop' is a symbolic link"),
    (TEACH.replace("{o}", "{o}{x}"), "out\\udcff' is not UTF-8 text; rename the file or folder, or name another place"),
    ("export --model {p}/teacher --out {o}{x}", "out\\udcff' is not UTF-8 text"),
    (EVALUATE.replace("{p}/teacher", "a{n}b"), "'a\\x00b' holds a NUL character"),
    (GENERAL + " --layer-map 1,9", "must name 2 teacher layers between 1 and 2"),
    (GENERAL + " --start nowhere", "start='nowhere' is not one of"),
    (GENERAL + " --precision low", "invalid choice: 'low'"),
    (TEACH + " --epochs 0", "--epochs: '0' is not a whole number from 1 to 2147483647"),
    (TEACH + " --epochs three", "'three' is not a whole number"),
    (TEACH + " --lr -1", "--lr: '-1' is not a number greater than 0"),
    (TEACH + " --lr nan", "'nan' is not a number greater than 0"),
    (TEACH + " --seed -1", "'-1' is not a whole number from 0"),
    (TEACH + " --batch-size 0", "'0' is not a whole number from 1 to 2147483647"),
    (TEACH + " --max-length 2", "max_length=2 leaves no room"),
    (TEACH.replace("base --data", "nowhere --data"), "nowhere does not exist: give a model folder"),
    (TEACH.replace("{p}/base", "nobody/nothing"), "nobody/nothing is no folder here"),
    (TEACH.replace("{p}/base", "minilm-l7"), "did you mean minilm-l6?"),
    (TEACH.replace("{p}/base", "{b}/nothing"), "nothing"),
    (TEACH.replace("{p}/base", "{b}/file"), "is a file: give the folder"),
    (TEACH.replace("{p}/base", "{b}/cut"), "model.safetensors is damaged"),
    (TEACH.replace("{p}/base", "{b}/pickled"), "is a pickle, which can run code"),
    (TEACH.replace("{p}/base", "{b}/shapes"), "but config.json asks for"),
    (TEACH.replace("{p}/base", "{b}/words"), "the two are not of one model"),
    (TEACH.replace("{p}/base", "{b}/garbled"), "garbled"),
    (TEACH.replace("{p}/base", "{b}/gpt"), "gpt"),
    (TEACH.replace("{p}/base", "{b}/mute"), "mute has no tokenizer"),
    (TEACH.replace("{p}/films.csv", "movie_review"), "did you mean movie_reviews?"),
    (TEACH.replace("{p}/films.csv", "{b}/gone.csv"), "no data set, file or folder is called"),
    (TEACH.replace("{p}/films.csv", "{b}/gap.csv"), "gap.csv, line 194: text is empty"),
    (TEACH.replace("{p}/films.csv", "{b}/columns.csv"), "columns.csv has no column text"),
    (TEACH.replace("{p}/films.csv", "{b}/one.csv"), "one.csv has one label only, same"),
    (TEACH.replace("{p}/films.csv", "{b}/few.csv"), "too few to split 80/10/10"),
    (TEACH.replace("{p}/films.csv", "{b}/latin.csv"), "latin.csv, line 2 is not UTF-8"),
    (TEACH.replace("{p}/films.csv", "{b}/empty.csv"), "empty.csv is empty"),
    (TEACH.replace("{p}/films.csv", "{b}/sheet.xlsx"), "is of an unknown format"),
    (TEACH.replace("{p}/films.csv", "{b}/nothing"), "has no file for train"),
    (TEACH.replace("{o}", "{b}/file"), "file is a file; name a folder"),
    (TEACH.replace("{o}", "{b}/mine"), "holds other files (thesis.txt)"),
    (TEACH.replace("{o}", "{b}/file/out"), "cannot be written"),
    (TEACH.replace("{o}", "{p}"), "which this command reads"),
    (TEACH.replace("{o}", "."), "cannot be replaced as a whole"),
    (DISTILL.replace("{o}", "{p}/teacher"), "which this command reads; name another folder"),
    (DISTILL.replace("{p}/teacher", "{p}/base"), "has no classification head; fine-tune it first"),
    (DISTILL.replace("{p}/films.csv", "{b}/three.csv"), "but the data has 0, 1, 2"),
    (DISTILL.replace("2x16", "big"), "'big' is not LAYERSxWIDTH"),
    (DISTILL.replace("2x16", "0x16"), "num_hidden_layers=0 must be at least 1"),
    (DISTILL.replace("2x16", "2x64") + " --start teacher", "student width=64 is greater than the teacher's 32"),
    (DISTILL.replace("2x16", "3x16"), "student_layers=3 must be between 1 and the teacher's 2"),
    (DISTILL + " --layer-map 1,two", "is not a list of layers"),
    (DISTILL + " --layer-map 1", "layer map (1,) must name 2 teacher layers"),
    (DISTILL + " --layer-map 1,9", "between 1 and 2"),
    (DISTILL + " --layer-map 0,1", "must name a teacher layer ≥ 1"),
    (DISTILL + " --start fresh", "start='fresh' is not one of"),
    (DISTILL + " --temperature 0", "'0' is not a number greater than 0"),
    (DISTILL + " --cache-gb -1", "'-1' is not a number of at least 0"),
    (DISTILL + " --cache-dtype int4", "invalid choice: 'int4'"),
    (DISTILL + " --general {b}/other", "number their tokens differently"),
    (DISTILL.replace("2x16", "1x8") + " --general {p}/base", "--student 1x8 is not the shape of --general {p}/base, which is 2x32"),
    (DISTILL + " --general {p}/base --start random", "--start random and --general {p}/base are two starts; give one of them"),
    (DISTILL.replace("{p}/teacher", "{b}/weak"), "%, not above the largest class's share 50.0%"),
    (DISTILL + " --unlabelled {b}/gone.txt", "gone.txt is no file: give a .txt file of one text a line"),
    (DISTILL + " --unlabelled {b}/mine", "mine is no file"),
    (DISTILL + " --unlabelled {b}/sheet.xlsx", "is of an unknown format: give a .txt file of one text a line"),
    (DISTILL + " --unlabelled {b}/blank.txt", "blank.txt has no rows"),
    (DISTILL + " --unlabelled {b}/known.txt", "all of its 5 texts are in the data already: give others"),
    (DISTILL + " --unlabelled {b}/latin.txt", "latin.txt, line 2 is not UTF-8 text"),
    (DISTILL + " --unlabelled {b}/unlabelled_pairs.csv", "has a column text_pair, which the data lacks"),
    (DISTILL.replace("films", "pairs") + " --unlabelled {b}/known.txt", "has no column text_pair, which the data has"),
    (DISTILL + " --unlabelled {b}/columns.csv", "columns.csv has no column text, only 'review', 'stars'"),
    (DISTILL + " --unlabelled {b}/unlabelled_gap.csv", "unlabelled_gap.csv, line 3: text is empty"),
    (DISTILL.replace("{p}/films.csv", "{b}/scores.csv"), "the classes negative, positive, but the labels of the data are scores"),
    (DISTILL.replace("{p}/films.csv", "{b}/repeats"), "test.csv: 20 texts of test are in train too (38% of them; the first"),
    (TEACH.replace("{p}/films.csv", "{b}/stray.csv"), "stray.csv, line 2: label 0.5 is a fraction, no class (1 of 192 labels)"),
    (TEACH.replace("{p}/films.csv", "{b}/mixed.csv"), "line 2: label 0.5 is a fraction, no class, and line 3 has 'good'"),
    (TEACH.replace("{p}/films.csv", "{b}/same_score.csv"), "same_score.csv has one score only, 2.5"),
    (TEACH.replace("{p}/films.csv", "{b}/huge.csv"), "huge.csv, line 3: label 10000000.5 is larger than 1,000,000"),
    (TEACH.replace("{p}/films.csv", "{b}/infinite.jsonl"), "infinite.jsonl, line 1: label -inf is no finite number"),
    (EVALUATE.replace("{p}/films.csv", "{b}/repeats"), "and above 20% a test says nothing: delete them from one of the two"),
    (PRUNE + " --sparsity 1", "'1' is not a share of at least 0 and less than 1"),
    (PRUNE + " --method hope", "invalid choice: 'hope'"),
    (PRUNE + " --method layers --sparsity 0.9", "would remove all 2 layers"),
    (PRUNE + " --teacher {b}/foreign", "number their tokens differently"),
    (PRUNE + " --resume", "unrecognized arguments: --resume"),
    (EVALUATE + " --split dev", "invalid choice: 'dev'"),
    (EVALUATE.replace("{p}/teacher", "{p}/base"), "has no classification head"),
    ("export --model {b}/mute --format hf --out {o}", "has no tokenizer"),
    ("export --model {b}/torn --format hf --out {o}", "torn holds a damaged tokenizer"),
    ("export --model {b}/torn --format onnx --out {o}", "torn holds a damaged tokenizer"),
    ("export --model {p}/teacher --format onxx --out {o}", "invalid choice: 'onxx'"),
    ("fetch minilm", "no shipped weights are called 'minilm': choose minilm-l6"),
]  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(place):
    return broken(place, place / "mistakes")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder) -> dict:
    """List every file below a folder with its size."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("typed", "says"), BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_a_mistake_is_one_sentence_and_leaves_nothing(place, mistakes, elsewhere, capsys, typed, says):
    tmp_path = elsewhere.parent
    before = contents(place)
    out = tmp_path / "deep" / "out"
    given = {"p": place, "b": mistakes, "o": out, "e": "", "n": "\0", "x": "\udcff"}
    assert cli.main([word.format(**given) for word in typed.split()]) == 2
    shown = capsys.readouterr()
    # what a progress bar wrote before the mistake was found is no second line
    sentence = shown.err.rpartition("\r")[2]
    assert says.replace("{p}", str(place)).replace("{b}", str(mistakes)) in sentence
    assert sentence.startswith("tinylib")
    assert sentence.count("\n") == 1
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert contents(place) == before


def test_a_run_that_diverges_is_a_sentence_and_leaves_nothing(place, elsewhere, capsys):
    out = elsewhere / "out"
    command = ["teach", "--base", f"{place}/base", "--data", f"{place}/films.csv", "--out", str(out)]
    assert cli.main([*command, "--lr", "1e30", "--epochs", "1"]) == 2
    assert "lower lr=1e+30" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_a_missing_package_is_a_sentence():
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from tinylib.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "evaluate", "--model", "m", "--data", "movie_reviews"]
    done = subprocess.run(command, capture_output=True, text=True, env=CHILD, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tinylib evaluate: the package torch is missing; tinylib doctor says")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "the memory is full; close other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is full"),
        (RuntimeError("could not create a primitive"), "the memory is full"),
        (OSError(12, "Cannot allocate memory"), "the memory is full"),
        (OSError("Cannot allocate memory (os error 12)"), "the memory is full"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device; check"),
        (OSError(13, "Permission denied", "/x/out of memory"), "/x/out of memory: Permission denied; check"),
        (OSError(21, "Is a directory", "a\x1b[31mRED.txt"), "a\\x1b[31mRED.txt: Is a directory; check"),
    ],
)
def test_the_machine_s_limits_are_sentences(monkeypatch, capsys, error, says):
    def fail(args):
        raise error

    monkeypatch.setattr("tinylib.commands.fetch", fail)
    assert cli.main(["fetch"]) == 2
    said = capsys.readouterr().err
    assert f"tinylib fetch: {says}" in said
    assert said[:-1].isprintable()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("fetch", "is full; close"),
        ("evaluate --model m --data d", "is full; try a smaller --max-length, or close"),
        ("general --out o", "is full; try a smaller --batch-size or --max-length, or close"),
    ],
)
def test_a_full_memory_s_remedy_is_an_option_that_the_command_has(monkeypatch, capsys, typed, says):
    def fail(args):
        raise MemoryError

    monkeypatch.setattr(f"tinylib.commands.{typed.split()[0]}", fail)
    assert cli.main(typed.split()) == 2
    assert says in capsys.readouterr().err


def test_a_missing_implementation_is_no_full_memory():
    assert not is_full_memory(RuntimeError("could not create a primitive descriptor for a matmul primitive"))


def test_another_s_note_cannot_command_the_terminal(monkeypatch, capsys):
    note = UserNote("plain")
    note.args = ("a\x1b[31mRED",)
    monkeypatch.setattr("tinylib.commands.fetch", lambda args: warnings.warn(note, stacklevel=1) or 0)
    assert cli.main(["fetch"]) == 0
    assert capsys.readouterr().err == "tinylib fetch: note: a\\x1b[31mRED\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_reader_that_has_enough_is_no_fault(place):
    typed = [sys.executable, "-m", "tinylib", "evaluate", "--model", f"{place}/teacher", "--data", f"{place}/films.csv", "--json"]
    process = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CHILD, cwd=ROOT)
    process.stdout.close()  # as head does
    assert "pipe" not in process.stderr.read().lower()
    assert process.wait() == 141


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_the_terminal_s_encoding_lacks(place, tmp_path, encoding, monkeypatch):
    named = with_labels(place, tmp_path / "named", ["\u574f \xe9", "\u6b63\u9762 \U0001f600"])
    chinese = {"negative": "\u574f \xe9", "positive": "\u6b63\u9762 \U0001f600"}
    write_csv(tmp_path / "films.csv", [(text, chinese[label]) for text, label in zip(TEXTS, LABELS, strict=True)])
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    assert cli.main(["evaluate", "--model", str(named), "--data", f"{tmp_path}/films.csv", "--json"]) == 0
    assert json.loads(raw.getvalue().decode(encoding))["labels"] == list(chinese.values())
    assert cli.main(["export", "--model", str(named), "--out", f"{tmp_path}/\u9762/out"]) == 0
    assert b"\\u9762/out" in raw.getvalue()


def test_our_own_faults_stay_tracebacks(monkeypatch):
    monkeypatch.setattr("tinylib.commands.fetch", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fetch"])


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinylib.commands.fetch", stop)
    assert cli.main(["fetch"]) == 130
    assert capsys.readouterr().err == "tinylib fetch: stopped; teach, general and distill go on with --resume\n"


def test_a_test_split_that_repeats_a_little_of_train_is_a_note(place, tmp_path, capsys):
    parts = datasets.load(place / "teacher" / "data")
    repeated = parts["train"].select([3, 5])
    parts["test"] = datasets.hf.concatenate_datasets([parts["test"], repeated])
    datasets.save(parts, tmp_path / "data")
    assert cli.main(["evaluate", "--model", f"{place}/teacher", "--data", f"{tmp_path}/data", "--json"]) == 0
    shown = capsys.readouterr()
    notes = [line for line in shown.err.split("\n") if "note:" in line]
    assert len(notes) == 1
    assert notes[0].startswith("tinylib evaluate: note:")
    assert f"2 texts of test are in train too ({2 / len(parts['test']):.0%} of them; the first is row" in notes[0]
    assert json.loads(shown.out)["data"]["repeated_in_train"] == {"validation": 0, "test": 2}


def test_a_test_split_that_is_train_again_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "teacher" / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train.parquet", tmp_path / "data" / "test.parquet")
    assert cli.main(["evaluate", "--model", f"{place}/teacher", "--data", f"{tmp_path}/data"]) == 2
    said = capsys.readouterr().err
    assert "test.parquet: 152 texts of test are in train too (100% of them; the first is row 1" in said
    assert said.count("\n") == 1


# The output folder


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refusal(folder, **options) -> str:
    """Open an output folder that must not be opened and give the sentence."""
    with pytest.raises(UserError) as caught:
        output.output(folder, **options).__enter__()
    return str(caught.value)


def fill(work, content="new"):
    (work / "metrics.json").write_text(json.dumps({"is": content}))


def test_the_tokenizer_s_files_count_as_ours():
    assert set(TOKENIZER_FILES) <= output.OURS


def test_output_appears_whole(tmp_path):
    with output.output(tmp_path / "deep" / "out") as work:
        fill(work)
        assert not (tmp_path / "deep" / "out").exists()
    assert files(tmp_path / "deep") == {"out"}
    assert files(tmp_path / "deep" / "out") == {"metrics.json"}


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), RuntimeError("x"), SystemExit()])
def test_after_a_failure_the_old_output_stands(tmp_path, error):
    with output.output(tmp_path / "out") as work:
        fill(work, "old")
    context = output.output(tmp_path / "out")
    fill(context.__enter__())
    assert not context.__exit__(type(error), error, None), "the error goes on"
    assert metrics(tmp_path / "out") == {"is": "old"}
    assert files(tmp_path) == {"out"}
    with output.output(tmp_path / "out") as work:
        fill(work)
    assert metrics(tmp_path / "out") == {"is": "new"}
    assert files(tmp_path) == {"out"}


def test_a_failure_removes_the_parents_that_it_made(tmp_path):
    with pytest.raises(RuntimeError), output.output(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert files(tmp_path) == set()


def interrupted(folder, run, resume=False):
    context = output.output(folder, run=run, resume=resume)
    work = context.__enter__()
    (work / output.CHECKPOINTS / "step.safetensors").write_text("kept")
    (work / "config.json").write_text("half")
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_checkpoints_survive_for_resume_and_nothing_else_does(tmp_path):
    interrupted(tmp_path / "out", {"lr": 0.1, "layers": (1, 2)})
    assert files(tmp_path) == {".out.unfinished"}
    with output.output(tmp_path / "out", run={"lr": 0.1, "layers": (1, 2)}, resume=True) as work:
        assert (work / output.CHECKPOINTS / "step.safetensors").read_text() == "kept"
        assert not (work / "config.json").exists()
        fill(work)
    assert files(tmp_path) == {"out"}
    assert files(tmp_path / "out") == {"metrics.json"}


def test_resuming_with_other_settings_is_refused_and_keeps_the_checkpoints(tmp_path):
    interrupted(tmp_path / "out", {"lr": 0.1})
    for _ in range(2):
        said = refusal(tmp_path / "out", run={"lr": 0.2}, resume=True)
        assert "had other settings (lr was 0.1, is 0.2); repeat the old ones" in said
    assert "go on with --resume, or delete" in refusal(tmp_path / "out", run={"lr": 0.1})
    interrupted(tmp_path / "out", {"lr": 0.1}, resume=True)


def test_a_command_that_cannot_resume_keeps_the_checkpoints_of_another(tmp_path):
    interrupted(tmp_path / "out", {"lr": 0.1})
    said = refusal(tmp_path / "out")
    assert "an interrupted run into" in said
    assert "go on with --resume, or delete" in said
    assert files(tmp_path) == {".out.unfinished"}
    with output.output(tmp_path / "out", run={"lr": 0.1}, resume=True) as work:
        assert (work / output.CHECKPOINTS / "step.safetensors").read_text() == "kept"
        fill(work)
    assert files(tmp_path) == {"out"}


@pytest.mark.parametrize("command", ["prune --model {p}/teacher --data {p}/films.csv", "export --model {p}/teacher --format hf"])
def test_prune_and_export_refuse_a_folder_with_an_interrupted_run(place, tmp_path, capsys, command):
    interrupted(tmp_path / "out", {"lr": 0.1})
    assert cli.main([*command.format(p=place).split(), "--out", f"{tmp_path}/out"]) == 2
    said = capsys.readouterr().err.rpartition("\r")[2]
    assert "an interrupted run into" in said
    assert said.count("\n") == 1
    assert (tmp_path / ".out.unfinished" / output.CHECKPOINTS / "step.safetensors").read_text() == "kept"
    assert files(tmp_path) == {".out.unfinished"}


def test_once_the_output_is_there_the_working_folder_is_the_next_process_s(tmp_path, monkeypatch):
    replace, work = output._replace, tmp_path / ".out.unfinished"

    def replace_and_let_another_begin(*args):
        replace(*args)
        work.mkdir()
        (work / "config.json").write_text("another's")

    monkeypatch.setattr(output, "_replace", replace_and_let_another_begin)
    with output.output(tmp_path / "out") as own:
        fill(own)
    assert metrics(tmp_path / "out") == {"is": "new"}
    assert work.is_dir()
    assert (work / "config.json").read_text() == "another's"


def test_resume_with_nothing_to_resume_starts(tmp_path):
    with output.output(tmp_path / "out", run={"lr": 1}, resume=True) as work:
        fill(work)
    assert files(tmp_path) == {"out"}


def test_two_runs_into_one_folder_do_not_mix(tmp_path):
    code = f"import sys\nfrom tinylib import output\nwith output.output({str(tmp_path / 'out')!r}) as work:\n"
    code += "    (work / 'metrics.json').write_text('{}')\n    print('in', flush=True)\n    sys.stdin.read()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=CHILD, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "in\n"
        assert "is being written by another process; wait" in refusal(tmp_path / "out")
        other.communicate("")
    assert other.returncode == 0
    assert files(tmp_path) == {"out"}


def test_a_kill_between_the_two_steps_of_a_replacement_loses_nothing(tmp_path):
    with output.output(tmp_path / "out") as work:
        fill(work, "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(RuntimeError), output.output(tmp_path / "out"):
        raise RuntimeError
    assert metrics(tmp_path / "out") == {"is": "old"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with output.output(tmp_path / "out") as work:
        fill(work)
    assert (tmp_path / "out").is_symlink()
    assert metrics(tmp_path / "disk") == {"is": "new"}


# Kill and resume


def wait_until(there, process, seconds=240):
    end = time.monotonic() + seconds
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert there(), "the process ended before it could be killed"


@pytest.mark.parametrize("command", ["general", "distill"])
def test_a_run_goes_on_with_the_files_that_it_began_with_only(place, tmp_path, monkeypatch, capsys, command):
    """A teacher or a corpus put in another's place would mix two runs."""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "home"))
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n\n".join(TEXTS), encoding="utf-8")
    often = ["--checkpoint-every"] if command == "general" else []
    reads = ["--corpus", str(corpus), "--steps", "9", "--max-length", "24"] if often else ["--data", f"{place}/films.csv"]
    typed = [command, "--teacher", f"{tmp_path}/teacher", "--student", "2x16", *reads, "--out", f"{tmp_path}/out"]
    inner = train.Step._take

    def stopping(self, batch, step, epoch):
        if step == 5:
            raise KeyboardInterrupt
        return inner(self, batch, step, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Step, "_take", stopping)
        assert cli.main([*typed, *often, *["2"] * len(often)]) == 130
    kept = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "teacher" / "model.safetensors")
    assert cli.main([*typed, "--resume"]) == 2
    assert "had other settings (teacher_sha256 was" in capsys.readouterr().err
    (tmp_path / "teacher" / "model.safetensors").write_bytes(kept)
    if command == "general":
        whole = corpus.read_text(encoding="utf-8")
        corpus.write_text(whole.replace("film", "book"), encoding="utf-8")
        assert cli.main([*typed, "--resume"]) == 2
        assert "had other settings (corpus_sha256 was" in capsys.readouterr().err
        corpus.write_text(whole, encoding="utf-8")
    assert cli.main([*typed, "--resume", *often, *["3"] * len(often)]) == 0, "how often it saves is no part of the result"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["teach", "distill"])
def test_a_killed_run_resumes_to_the_same_weights(place, tmp_path, capsys, command):
    options = {
        "teach": ["--base", f"{place}/base", "--epochs", "12"],
        "distill": ["--teacher", f"{place}/teacher", "--student", "2x16", "--epochs-intermediate", "3",
                    "--epochs-prediction", "12"],
    }  # fmt: skip
    typed = [command, *options[command], "--data", f"{place}/films.csv", "--batch-size", "8", "--out"]
    base = [sys.executable, "-m", "tinylib", *typed]
    start = {"cwd": ROOT, "env": CHILD, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    whole = subprocess.Popen([*base, f"{tmp_path}/whole"], **start)
    killed = subprocess.Popen([*base, f"{tmp_path}/out"], **start)
    last = {"teach": "teach.safetensors", "distill": "prediction.safetensors"}[command]
    wait_until((tmp_path / ".out.unfinished" / output.CHECKPOINTS / last).exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it had ended by itself"
    assert not (tmp_path / "out").exists()
    assert cli.main([*typed, f"{tmp_path}/out"]) == 2
    assert "go on with --resume, or delete" in capsys.readouterr().err
    done = subprocess.run([*base, f"{tmp_path}/out", "--resume"], **start)
    assert done.returncode == 0, done.stdout
    whole.communicate()
    assert whole.returncode == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics(tmp_path / "whole")["accuracy"] == metrics(tmp_path / "out")["accuracy"]
    assert files(tmp_path) == {"whole", "out"}
