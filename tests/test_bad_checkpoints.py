"""Checkpoints that are damaged, of another model, or made to do harm: one sentence, exit code 2, nothing written, nothing lost.

And what the fuzzers (tests/test_fuzz.py) found, each as a plain test.
"""

import json
import shutil

import mutate
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import LABELS, TEXTS, contents, make_checkpoint, write_csv

from tinylib import checkpoint, cli, general, masks, text
from tinylib import corpus as corpora
from tinylib import datasets as data_sets
from tinylib.augment import WordVectors
from tinylib.bert import Bert
from tinylib.checkpoint import Checkpoint
from tinylib.config import ARCHITECTURES, BertConfig, check_own_head
from tinylib.errors import LONGEST, UserError, UserNote, plain
from tinylib.history import History

TABLE = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a small classifier, its compressed form, and a table; nobody writes into it."""
    folder = tmp_path_factory.mktemp("place")
    make_checkpoint(folder / "base", TEXTS)
    vocabulary = len(text.load_tokenizer(folder / "base"))
    config = BertConfig(vocabulary, 16, 2, 2, 32, 40, head="classification", labels=("negative", "positive"))
    model = Bert(config, torch.Generator().manual_seed(0))
    model.tokenizer_folder = folder / "base"
    model.save_pretrained(folder / "model")
    masks.layer_masks(model, 0.5).apply(model)
    masks.save_compressed(model, folder / "small")
    write_csv(folder / "films.csv", zip(TEXTS, LABELS, strict=True))
    return folder


def in_parts(folder) -> dict:
    """Cut a checkpoint's weights into two files with an index, as the hub has large ones; return the index."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    placed = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_checkpoint_in_parts_is_the_same_model(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    in_parts(tmp_path / "model")
    one, two = Bert.from_pretrained(place / "model"), Bert.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda index: index["weight_map"].update({QUERY: "../model.safetensors"}), "does not name the .safetensors files of"),
        (lambda index: index["weight_map"].update({QUERY: "/etc/passwd"}), "does not name the .safetensors files of"),
        (lambda index: index["weight_map"].update({QUERY: 7}), "does not name the .safetensors files of"),
        (lambda index: index.update(weight_map=[]), "does not name the .safetensors files of"),
        (lambda index: index.pop("weight_map"), "does not name the .safetensors files of"),
        (lambda index: index["weight_map"].update({QUERY: "model-9.safetensors"}), "model-9.safetensors is missing, though"),
    ],
)
def test_an_index_that_names_no_parts_of_its_folder_is_a_sentence(place, tmp_path, changed, says):
    shutil.copytree(place / "model", tmp_path / "model")
    index = in_parts(tmp_path / "model")
    changed(index)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=says) as error:
        Bert.from_pretrained(tmp_path / "model")
    assert str(error.value).endswith("copy the checkpoint again")


def test_weights_that_the_memory_is_too_small_for_are_not_called_damaged(place, monkeypatch):
    def full(path):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("tinylib.stored.load_file", full)
    with pytest.raises(UserError, match="the memory is full: .* needs 0 MB of it; close what else runs, or take a smaller model"):
        Bert.from_pretrained(place / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def config(**changes):
    """Return a function that changes config.json; a value of ``...`` takes the name out."""

    def edit(folder):
        stored = json.loads((folder / "config.json").read_text()) | changes
        stored = {name: value for name, value in stored.items() if value is not ...}
        (folder / "config.json").write_bytes(mutate.dumped(stored))

    return edit


def written(name, content):
    """Return a function that writes a file of the folder anew."""
    return lambda folder: (folder / name).write_bytes(content)


def tensors(**changes):
    """Return a function that changes tensors of the weights' file, whichever it is: TABLE and QUERY by their roles."""

    def edit(folder):
        file = next(folder.glob("*.safetensors"))
        stored = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written anew
        for role, change in changes.items():
            name = {"table": TABLE, "query": QUERY}[role]
            stored[name] = change(stored[name]).contiguous()
        save_file(stored, file)

    return edit


def header(edit):
    """Return a function that edits the header of model.safetensors."""

    def change(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        told = mutate.header_of(content)
        edit(told)
        file.write_bytes(mutate.with_header(content, json.dumps(told).encode()))

    return change


def cut(name, share):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: int(share * (folder / name).stat().st_size)])


def renamed(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def spoil(tensor, at, value):
    tensor = tensor.clone()
    tensor.view(-1)[at] = value
    return tensor


def unpadded(folder):
    """Give the tokenizer a padding token whose number the model does not have."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    last = max(words.values())
    words |= {"[PAD]": last + 1}
    for token in stored["added_tokens"]:
        if token["content"] == "[PAD]":
            token["id"] = last + 1
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "vocab.txt").unlink(missing_ok=True)


EVALUATE = "evaluate --model {m} --data {p}/films.csv"
COMMANDS = {
    "evaluate": EVALUATE,
    "teach": "teach --base {m} --data {p}/films.csv --out {o}",
    "distill": "distill --teacher {m} --data {p}/films.csv --student 2x8 --out {o}",
    "prune": "prune --model {m} --data {p}/films.csv --out {o}",
    "export": "export --model {m} --format onnx --out {o}",
    "general": "general --teacher {m} --student 2x8 --out {o}",
}
BAD_CHECKPOINTS = {
    # what is wrong: how it is made, and what the sentence says
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; name the folder"),
    "an empty config": (written("config.json", b""), "config.json is not JSON"),
    "half a config": (cut("config.json", 0.5), "config.json is not JSON"),
    "a config in UTF-16": (written("config.json", '{"a": 1}'.encode("utf-16")), "config.json is not JSON"),
    "a config that is a list": (written("config.json", b"[1]"), "config.json holds a list instead of names and values"),
    "a bottomless config": (written("config.json", mutate.NESTED.encode()), "config.json is not JSON"),
    "a vocabulary of 10^12 words": (config(vocab_size=10**12), "vocab_size=1000000000000 must be at most 100,000,000"),
    "a vocabulary of 10^8 words": (config(vocab_size=10**8), "config.json asks for (100000000, 16); the two files"),
    "10^8 layers": (config(num_hidden_layers=10**8), "asks for num_hidden_layers=100000000, but the weights' file holds"),
    "a width of 10^8": (config(hidden_size=10**8), "but config.json asks for"),
    "heads without end": (config(num_attention_heads=10**5, head_dim=10**5), "must be at most 100,000,000"),
    "an FFN of 10^8": (config(intermediate_size=10**8), "but config.json asks for (100000000"),
    "endless positions": (config(max_position_embeddings=10**8), "but config.json asks for (100000000"),
    "a width below zero": (config(hidden_size=-16), "hidden_size=-16 must be at least 1"),
    "a width of NaN": (config(hidden_size=float("nan")), "hidden_size=nan must be a whole number"),
    "an infinite width": (config(hidden_size=float("inf")), "hidden_size=inf must be a whole number"),
    "a width as text": (config(hidden_size="16"), "hidden_size='16' must be a whole number"),
    "a width in a list": (config(hidden_size=[16]), "hidden_size=[16] must be a whole number"),
    "a LayerNorm of NaN": (config(layer_norm_eps=float("nan")), "layer_norm_eps=nan must be at least 0 and at most 1"),
    "an infinite spread": (config(initializer_range=float("inf")), "initializer_range=inf must be at least 0"),
    "a dropout of 10^400": (config(hidden_dropout_prob=10**400), "hidden_dropout_prob=1000"),
    "an architecture that is a number": (config(architectures=7), "architectures=7 must be a list of names"),
    "an architecture in two lists": (config(architectures=[["Bert"]]), "must be a list of names"),
    "labels in a list": (config(id2label=["a", "b"]), "id2label=['a', 'b'] must number the labels from 0"),
    "labels without numbers": (config(id2label={"a": "b", "c": "d"}), "must number the labels from 0"),
    "a gap in the labels": (config(id2label={"0": "a", "2": "b"}), "must number the labels from 0"),
    "a label twice": (config(id2label={"0": "a", "1": "a"}), "holds a name twice"),
    "a thousand labels": (config(id2label={str(i): str(i) for i in range(1000)}), "but config.json asks for (1000"),
    "10^12 labels": (config(id2label=..., num_labels=10**12), "num_labels=1000000000000 must be a whole number from 1 to 10,000"),
    "labels in words": (config(id2label=..., num_labels="two"), "num_labels='two' must be a whole number"),
    "a decoder": (config(is_decoder=True), "asks for relative positions or a decoder"),
    "code of its own": (config(model_type="mine", auto_map={"AutoModel": "code.Model"}), "needs no code of its"),
    "a padding token beyond the vocabulary": (config(pad_token_id=10**6), "pad_token_id=1000000 must be a token"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; copy the checkpoint again"),
    "pickled weights": (
        renamed("model.safetensors", "pytorch_model.bin"), "pytorch_model.bin is a pickle, which can run code; convert it"
    ),
    "empty weights": (written("model.safetensors", b""), "model.safetensors is damaged"),
    "weights cut in the header": (cut("model.safetensors", 0.02), "model.safetensors is damaged"),
    "weights cut in the data": (cut("model.safetensors", 0.9), "model.safetensors is damaged"),
    "a header without end": (written("model.safetensors", b"\xff" * 64), "model.safetensors is damaged"),
    "a header that is no JSON": (written("model.safetensors", b"\x08" + bytes(7) + b"nonsense"), "model.safetensors is damaged"),
    "weights that overlap": (
        header(lambda told: told[QUERY].update(data_offsets=told[TABLE]["data_offsets"])), "model.safetensors is damaged"
    ),
    "weights beyond the file": (header(lambda told: told[TABLE].update(data_offsets=[0, 2**60])), "model.safetensors is damaged"),
    "a shape that its bytes do not fill": (
        header(lambda told: told[TABLE].update(shape=[10**6, 10**6])), "model.safetensors is damaged"
    ),
    "an unknown type of number": (header(lambda told: told[TABLE].update(dtype="F99")), "model.safetensors is damaged"),
    "whole numbers for weights": (tensors(query=lambda t: t.int()), "holds torch.int32 numbers instead of weights"),
    "a weight of NaN": (tensors(query=lambda t: spoil(t, 3, float("nan"))), "holds NaN or infinite numbers"),
    "an infinite weight": (tensors(table=lambda t: spoil(t, 0, float("inf"))), "holds NaN or infinite numbers"),
    "a narrower table": (tensors(table=lambda t: t[:, :8]), "has shape"),
    "a vector for a matrix": (tensors(query=lambda t: t.flatten()), "has shape (256,), but config.json asks for (16, 16)"),
    "a number for a matrix": (tensors(query=lambda t: t.sum()), "has shape (), but config.json asks for (16, 16)"),
    "a tensor missing": (header(lambda told: told.update({"mine": told.pop(QUERY)})), f"has no {QUERY!r}"),
    "no tokenizer": (lambda f: [p.unlink() for p in (*f.glob("*token*"), *f.glob("vocab*"))], "has no tokenizer"),
    "an empty tokenizer": (written("tokenizer.json", b""), "holds a damaged tokenizer"),
    "half a tokenizer": (cut("tokenizer.json", 0.5), "holds a damaged tokenizer"),
    "a tokenizer of nothing": (written("tokenizer.json", b"{}"), "holds a damaged tokenizer"),
    "a bottomless tokenizer": (written("tokenizer.json", mutate.NESTED.encode()), "holds a damaged tokenizer"),
    "a padding token that the model lacks": (unpadded, "the two are not of one model, copy both again"),
    "a folder for a file": (lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], "config.json is not JSON"),
}  # fmt: skip
# one way each through every command that takes a model
EVERYWHERE = [
    "a bottomless config", "a vocabulary of 10^12 words", "10^8 layers", "pickled weights", "weights cut in the data",
    "a weight of NaN",
]  # fmt: skip
CASES = [(case, "evaluate") for case in BAD_CHECKPOINTS]
CASES += [(case, name) for case in EVERYWHERE for name in COMMANDS if name != "evaluate"]
CASES += [("a padding token that the model lacks", name) for name in ("teach", "distill", "prune", "general")]


def refused(typed: list[str], capsys) -> str:
    """Run a command that must be refused, and give its one sentence."""
    assert cli.main(typed) == 2
    shown = capsys.readouterr()
    sentence = shown.err.rpartition("\r")[2]
    assert sentence.startswith("tinylib")
    assert sentence.count("\n") == shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    return sentence


@pytest.mark.parametrize(("case", "command"), CASES, ids=[f"{case}, {command}" for case, command in CASES])
def test_a_bad_checkpoint_is_one_sentence_and_nothing_is_lost(place, tmp_path, monkeypatch, capsys, case, command):
    spoil_it, says = BAD_CHECKPOINTS[case]
    model = tmp_path / "bad"
    shutil.copytree(place / "model", model)
    spoil_it(model)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before, mine = contents(place), contents(model)
    typed = COMMANDS[command].format(m=model, p=place, o=tmp_path / "deep" / "out").split()
    sentence = refused(typed, capsys)
    assert says in sentence
    assert str(model) in sentence
    assert contents(place) == before
    assert contents(model) == mine
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "work"}
    assert list((tmp_path / "work").iterdir()) == []


def test_the_good_one_is_taken(place, capsys):
    """Else every refusal above could have another reason."""
    assert cli.main(EVALUATE.format(m=place / "model", p=place).split()) == 0
    assert cli.main(EVALUATE.format(m=place / "small", p=place).split()) == 0


SMALL = {
    "no weights": (written(masks.COMPRESSED, b""), "holds no whole model"),
    "10^12 words": (config(vocab_size=10**12), "vocab_size=1000000000000 must be at most"),
    "10^8 words": (config(vocab_size=10**8), "and config.json asks for (100000000, 16)"),
    "10^8 layers": (config(num_hidden_layers=10**8), "asks for num_hidden_layers=100000000"),
    "a bottomless config": (written("config.json", mutate.NESTED.encode()), "config.json is not JSON"),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_bad_compressed_model_is_one_sentence(place, tmp_path, capsys, case):
    spoil_it, says = SMALL[case]
    shutil.copytree(place / "small", tmp_path / "small")
    spoil_it(tmp_path / "small")
    sentence = refused(EVALUATE.format(m=tmp_path / "small", p=place).split(), capsys)
    assert str(tmp_path / "small") in sentence
    assert says in sentence


# What the fuzzers found


def refusal(act, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        act(*arguments, **options)
    return str(caught.value)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_a_sentence_stays_one_printable_line():
    assert str(UserError("two\n  lines\tand \x1b[31mred \ud800")) == "two lines\\tand \\x1b[31mred \\ud800"
    assert str(UserNote("a\u2028b")) == "a b"
    assert plain("über ½ → 中文 “quoted”") == "über ½ → 中文 “quoted”"
    long = str(UserError("begins " + "x" * 100_000 + " ends: do this"))
    assert len(long) <= LONGEST + 3
    assert long.startswith("begins ")
    assert long.endswith(" ends: do this")


def test_a_cell_cannot_command_the_terminal(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(f"text {i}", "\x1b[2J" if i % 2 else "0.5") for i in range(12)])
    said = refusal(data_sets.load, file)
    assert "\x1b" not in said


@pytest.mark.parametrize("description", [mutate.NESTED.encode(), b'{"info": {"features": "x"}}', b"nonsense",
                                         b'{"info": {"features": {"label": 3}}}'])  # fmt: skip
def test_a_parquet_file_with_a_made_up_description_is_refused(tmp_path, description):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata({"huggingface": description})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet is not a readable Parquet file" in refusal(data_sets.load, tmp_path / "a.parquet")


@pytest.mark.parametrize("names", [["a", None], ["a", 7], ["a", " "], ["a", "\ud800"]])
def test_class_names_that_are_no_texts_are_refused(tmp_path, names):
    label = {"names": names, "_type": "ClassLabel"}
    told = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": label}}}
    table = pa.table({"text": TEXTS[:12], "label": [0, 1] * 6}).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet names its classes" in refusal(data_sets.load, tmp_path / "a.parquet")


def test_dates_beyond_the_calendar_are_a_sentence(tmp_path):
    far = pa.array([2**31 - 1] * 12, pa.date32())
    assert "is not a readable Parquet file" in refusal(data_sets.load, parquet(tmp_path / "a.parquet", text=TEXTS[:12], label=far))
    path = parquet(tmp_path / "b.parquet", document=far, text=TEXTS[:12])
    assert "b.parquet cannot be read" in refusal(list, corpora.documents([path]))


def test_a_corpus_of_numbers_is_a_sentence(tmp_path):
    path = parquet(tmp_path / "a.parquet", document=[1, 1], text=[3, 4])
    assert "a row of the column text is 3, not a text" in refusal(list, corpora.documents([path]))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("twice", ["text", "label"])
def test_two_columns_of_one_name_are_refused(tmp_path, name, twice):
    head, path = ["text", "label", twice], tmp_path / name
    if name == "a.parquet":
        arrays = [pa.array(TEXTS[:12]), pa.array([0, 1] * 6), pa.array(TEXTS[:12])]
        pq.write_table(pa.Table.from_arrays(arrays, names=head), path)
    else:
        separator = {"a.csv": ";", "a.tsv": "\t"}[name].replace(";", ",")
        path.write_text("\n".join(separator.join(row) for row in [head, *[["a film", "1", "b"]] * 12]))
    assert f"has 2 columns called {twice}: rename all but one" in refusal(data_sets.load, path)


def test_two_columns_of_no_interest_may_be_called_alike(tmp_path):
    rows = [f"{text},{i % 2},," for i, text in enumerate(stem.replace(",", "") for stem in TEXTS[:20])]
    (tmp_path / "a.csv").write_text("\n".join(["text,label,,", *rows]))
    assert len(data_sets.load(tmp_path / "a.csv")["train"]) > 10


def test_a_parquet_file_that_claims_more_rows_than_bytes_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=pa.nulls(10**6, pa.string()), label=pa.nulls(10**6, pa.int64()))
    assert path.stat().st_size < 20_000
    assert "it claims 1,000,000 rows in" in refusal(data_sets.load, path)


@pytest.mark.parametrize("vectors", [torch.ones(3), torch.tensor(1.0), torch.ones(3, 2, 2), torch.ones(3, 2).int(),
                                     torch.full((3, 2), float("nan")), torch.ones(3, 2, dtype=torch.complex64)])  # fmt: skip
def test_word_vectors_of_another_kind_are_refused(tmp_path, vectors):
    (tmp_path / "words.txt").write_text("a\nb\nc\n")
    try:
        save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    except KeyError:
        pytest.skip("this safetensors writes no complex numbers")
    assert "holds no usable word vectors" in refusal(WordVectors.load, tmp_path)


@pytest.mark.parametrize("card", [b"[]", b"{}", b'{"teacher": 3}', mutate.NESTED.encode(), b"\xff"])
def test_a_general_student_with_a_made_up_card_is_refused(place, tmp_path, card):
    (tmp_path / general.CARD).write_bytes(card)
    assert "holds no general student" in refusal(general.load, tmp_path, Bert.from_pretrained(place / "model"))


def test_a_tokenizer_without_a_word_for_the_unknown_is_refused(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(stored | {"unk_token": "zzz"}))
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "nowhere"
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "holds a damaged tokenizer" in refusal(text.load_tokenizer, tmp_path / "model")


@pytest.mark.parametrize("option", ["--data", "--model"])
def test_the_home_of_nobody_is_a_sentence(place, capsys, option):
    typed = EVALUATE.format(m=place / "model", p=place).split()
    typed[typed.index(option) + 1] = "~nobody-of-that-name/x"
    assert "~nobody-of-that-name/x" in refused(typed, capsys)


@pytest.mark.parametrize("step", [-1, 2**31, "7", True, None])
def test_a_run_s_checkpoint_with_a_step_that_cannot_be_is_refused(tmp_path, step):
    kept = run_of(tmp_path / "run.safetensors")
    kept.save(7)
    assert kept.load() == 7
    content = kept.path.read_bytes()
    told = mutate.header_of(content)
    told["__metadata__"]["run"] = json.dumps(json.loads(told["__metadata__"]["run"]) | {"step": step})
    kept.path.write_bytes(mutate.with_header(content, json.dumps(told).encode()))
    assert "run.safetensors is damaged or of another model (its content is not what was written)" in refusal(kept.load)
    del told["__metadata__"]["sha256_run"]  # as a file has it that is older than this sum
    kept.path.write_bytes(mutate.with_header(content, json.dumps(told).encode()))
    assert "(it has no step)" in refusal(kept.load)


def run_of(path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Checkpoint(path, model, optimizer, schedule, History())


def test_a_run_s_checkpoint_may_be_of_any_step_that_can_be(tmp_path):
    kept = run_of(tmp_path / "run.safetensors")
    for step in (0, 1, 100):
        kept.save(step)
        assert kept.load() == step
    kept.save(2**31 - 1)
    assert checkpoint._read(kept.path)[1]["step"] == 2**31 - 1


def test_the_note_of_a_run_s_damaged_checkpoint_says_why_and_where_it_goes_on(tmp_path):
    kept = run_of(tmp_path / "run.safetensors")
    kept.save(3)
    kept.save(5)
    kept.path.write_bytes(kept.path.read_bytes()[:-1])
    with pytest.warns(UserNote, match=r"run.safetensors is damaged \(.*header.*\): going on from the one before it, of step 3"):
        assert kept.load() == 3


def test_a_head_larger_than_its_model_is_refused(tmp_path):
    """Let one row of words claim a pooler of 10¹⁰ numbers that the file need not hold."""
    thin = BertConfig(1, 10**5, 1, 1, 1, 1, 1, head_dim=1)
    stored = {name: tensor for name, tensor in thin_tensors(thin).items() if not name.startswith("pooler")}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(thin.to_dict()))
    assert "asks for 10,000,100,000 numbers that the weights' file" in refusal(Bert.from_pretrained, tmp_path)


@pytest.mark.parametrize("count", [None, 1, 2, 3, 12])
def test_labels_that_are_only_counted_have_transformers_names(count):
    stored = {"architectures": ["BertForSequenceClassification"]} | ({} if count is None else {"num_labels": count})
    assert BertConfig.from_dict(stored).labels == tuple(transformers.BertConfig.from_dict(stored).id2label.values())


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "c.json describes a BertForTokenClassification, whose head"),
        ({"architectures": ["BertForQuestionAnswering"]}, "describes a BertForQuestionAnswering, whose head is not known here"),
        (
            {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"},
            "c.json describes a classifier that gives a text several labels, and here it gets one",
        ),
    ],
)
def test_a_head_that_would_be_lost_is_refused(stored, says):
    said = refusal(check_own_head, stored, "c.json")
    assert says in said
    assert said.endswith("; teach it a task (tinylib teach), or load its encoder alone")


def test_heads_that_are_kept_are_not_refused():
    for name in (*ARCHITECTURES.values(), "BertForPreTraining"):
        check_own_head({"architectures": [name], "problem_type": "single_label_classification"})
    check_own_head({})


def test_a_shape_of_thousands_of_digits_is_a_sentence():
    for shape in ("9" * 5000 + "x312", "4x" + "9" * 5000):
        assert "is not LAYERSxWIDTH" in refusal(BertConfig.parse, shape)
    assert "num_hidden_layers=1000000000000 must be at most" in refusal(BertConfig.parse, f"{10**12}x312")


def thin_tensors(config: BertConfig) -> dict[str, torch.Tensor]:
    from tinylib.bert import to_hf

    with torch.device("meta"):
        shapes = {to_hf(name).removeprefix("bert."): t.shape for name, t in Bert(config).state_dict().items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if not name.startswith("pooler")}
