"""Fuzzing: whatever a file or a command line holds, it is read, or refused in one sentence that says what is wrong.

In CI about a minute, the same examples each time. `make fuzz` draws new ones for ten minutes; TINYLIB_FUZZ_MINUTES says how
many. Everything runs under a limit on memory: a file that asks for more than it holds must not get it.
"""

import json
import math
import os
import random
import time
from pathlib import Path

import hypothesis
import mutate
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_cli import GOOD, LABELS, TEXTS, make_checkpoint, write_csv

from tinylib import cli, course, encoders, general, masks, text
from tinylib import corpus as corpora
from tinylib import datasets as data_sets
from tinylib.augment import WordVectors
from tinylib.bert import TOKENIZER_FILES, Bert
from tinylib.checkpoint import Checkpoint
from tinylib.config import BertConfig
from tinylib.errors import UserError
from tinylib.history import History
from tinylib.layers import Projections

MINUTES = float(os.environ.get("TINYLIB_FUZZ_MINUTES", "0"))
IN_CI = 4.0  # seconds a fuzzer, at the most: a minute in all
ROOM = 3 << 30  # bytes of address space above what the process has: none of the files here needs a hundredth of it
TARGETS = []
SENTENCE = 1500  # characters; longer is no sentence


def fuzzer(examples: int):
    """Mark a function that makes, of a folder, a strategy and what to do with an example."""

    def mark(function):
        TARGETS.append((function.__name__.removeprefix("fuzz_"), function, examples))
        return function

    return mark


@pytest.fixture(autouse=True)
def little_memory():
    """Let no file take more memory than is reasonable, where the system can keep that."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Work in an empty folder, with a cache of its own and without a network."""
    for name, value in {"TINYLIB_HOME": tmp_path / "cache", "TINYLIB_HUB": 0, "PIP_NO_INDEX": 1, "HF_HUB_OFFLINE": 1}.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def one_sentence(error: UserError, *names: str) -> None:
    """Check that a refusal is one printable line of bearable length that names what it speaks of."""
    said = str(error)
    assert said
    assert len(said) < SENTENCE, said[:300]
    assert said.isprintable(), said[:300]
    assert any(name in said for name in names), said


def hammer(name: str, strategy, act, examples: int) -> int:
    """Call ``act`` on a fixed number of examples, or on new ones until this fuzzer's share of the time is over."""
    ends = time.monotonic() + (60 * MINUTES / len(TARGETS) if MINUTES else IN_CI)
    count, number = 0, random.SystemRandom().randrange(2**32) if MINUTES else 0

    def once(example):
        nonlocal count, ends
        if time.monotonic() < ends:
            count += 1
            try:
                act(example)
            except Exception:
                ends = math.inf  # what failed is made as small as it can be, however long that takes
                raise

    limits = settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    while True:
        hypothesis.seed(number)(limits(given(strategy)(once)))()
        number += 1
        if not MINUTES or time.monotonic() > ends:
            return count


# Tables


def table_rows(path: Path) -> None:
    """Load a table: a data set whose every cell has been checked, or a sentence."""
    try:
        data = data_sets.load(path)
    except UserError as error:
        one_sentence(error, path.name, path.parent.name)
        return
    names = data_sets.label_names(data)
    scores = data_sets.has_scores(data)
    for part in data.values():
        columns = [column for column in ("text", "text_pair") if column in part.column_names]
        assert all(isinstance(value, str) and value.strip() for column in columns for value in part[column])
        assert all(math.isfinite(label) if scores else 0 <= label < len(names) for label in part["label"])
    data_sets.fingerprint(data)


def valid_table(folder: Path, suffix: str) -> bytes:
    rows, path = [(t, i % 2) for i, t in enumerate(TEXTS[:40])], folder / f"valid{suffix}"
    if suffix == ".parquet":
        table = pa.table({"text": [t for t, _ in rows], "label": [y for _, y in rows]})
        pq.write_table(table, path)
        return path.read_bytes()
    if suffix == ".jsonl":
        return "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows).encode()
    separator = "," if suffix == ".csv" else "\t"
    return "".join(f'"{t}"{separator}{y}\n' for t, y in [("text", "label"), *rows]).encode()


SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
ENCODINGS = ("utf-16", "utf-32", "latin-1", "utf-7", "cp037", "utf-8-sig")


@fuzzer(150)
def fuzz_table_bytes(folder):
    valid = {suffix: valid_table(folder, suffix) for suffix in SUFFIXES}

    def act(example):
        suffix, edits, loose, encoding = example
        content = loose if loose is not None else mutate.edited(valid[suffix], edits)
        if encoding and suffix != ".parquet":
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
        path = folder / f"table{suffix}"
        path.write_bytes(content)
        table_rows(path)

    loose = st.none() | st.none() | st.none() | st.binary(max_size=200)
    return st.tuples(st.sampled_from(SUFFIXES), mutate.byte_edits, loose, st.none() | st.sampled_from(ENCODINGS)), act


CELLS = st.sampled_from(
    ["", " ", "good", "bad", "0", "1", "-1", "1.0", "0.5", "nan", '"', '""', "a\nb", "a,b", "a\tb", "\0", "\ufeff", "x" * 200_000,
     "\u2028", "\x1b[2J", "é", "9" * 400, "text", "label"]
) | st.text(max_size=12)  # fmt: skip
HEADS = st.sampled_from(
    [["text", "label"], ["text", "text_pair", "label"], ["text", "text", "label"], ["text", "label", "label"], ["Text", "label"],
     ["sentence", "label"], ["sentence1", "sentence2", "label"], [" text ", "label"], ["text", "", "label"]]
) | st.lists(st.text(max_size=6), max_size=4)  # fmt: skip


@fuzzer(120)
def fuzz_cells(folder):
    def act(example):
        suffix, header, body, separator = example
        lines = [separator.join(fields) for fields in [header, *body]]
        path = folder / f"cells{suffix}"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        table_rows(path)

    body = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=12)
    even = body | HEADS.flatmap(lambda head: st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=8, max_size=12))
    return st.tuples(st.sampled_from((".csv", ".tsv")), HEADS, even, st.sampled_from((",", "\t", ";"))), act


@fuzzer(120)
def fuzz_jsonl(folder):
    def act(example):
        rows, edits = example
        whole = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS[:12])]
        lines = [mutate.dumped(row) for row in [*mutate.grown(whole, edits), *rows]]
        path = folder / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        table_rows(path)

    row = st.fixed_dictionaries({}, optional=dict.fromkeys(("text", "label", "text_pair"), mutate.json_values))
    return st.tuples(st.lists(row | mutate.json_values, max_size=3), mutate.tree_edits), act


COLUMNS = {
    "texts": pa.array(TEXTS[:12]), "large": pa.array(TEXTS[:12], pa.large_string()), "bytes": pa.array([b"\xff"] * 12),
    "view": pa.array(TEXTS[:12]).dictionary_encode(), "numbers": pa.array([i % 2 for i in range(12)]),
    "unsigned": pa.array([i % 2 for i in range(12)], pa.uint64()), "floats": pa.array([0.0, 1.0] * 6),
    "fractions": pa.array([0.5, float("nan")] * 6), "bool": pa.array([True, False] * 6), "none": pa.nulls(12),
    "gaps": pa.array(["a", None] * 6), "lists": pa.array([["a"], []] * 6), "structs": pa.array([{"a": 1}] * 12),
    "days": pa.array([0] * 12, pa.timestamp("s")), "far": pa.array([2**62] * 12, pa.timestamp("s")),
    "zone": pa.array([0] * 12, pa.timestamp("us", "Nowhere/Atall")), "span": pa.array([2**62] * 12, pa.duration("s")),
    "decimal": pa.array([1] * 12, pa.decimal128(38)), "date": pa.array([2**31 - 1] * 12, pa.date32()),
    "map": pa.array([[("a", 1)]] * 12, pa.map_(pa.string(), pa.int32())), "time": pa.array([1] * 12, pa.time64("ns")),
}  # fmt: skip
FEATURES = [
    {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}, {"label": {"names": ["a", "a"], "_type": "ClassLabel"}},
    {"label": {"names": 7, "_type": "ClassLabel"}}, {"label": {"num_classes": 10**12, "_type": "ClassLabel"}},
    {"label": {"_type": "Nonsense"}}, {"label": {"_type": ["x"]}}, {"label": 3}, [], {"text": {"_type": "Image"}},
]  # fmt: skip


@fuzzer(120)
def fuzz_parquet_columns(folder):
    def act(example):
        names, kinds, told, edits = example
        arrays = [COLUMNS[kind] for kind in kinds][: len(names)]
        table = pa.Table.from_arrays(arrays, names=names[: len(arrays)])
        if told is not None:
            described = {"text": {"dtype": "string", "_type": "Value"}} | told if isinstance(told, dict) else told
            metadata = mutate.grown({"info": {"features": described}}, edits or [])
            table = table.replace_schema_metadata({"huggingface": mutate.dumped(metadata)})
        path = folder / "columns.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowException:  # what cannot be written need not be read
            return
        table_rows(path)

    names = st.sampled_from([["text", "label"], ["text", "text"], ["text", "label", "label"], ["text", "label", "text_pair"],
                             ["sentence", "label"], ["text", "label", "idx"], ["label", "te\0xt"]])  # fmt: skip
    kinds = st.lists(st.sampled_from(sorted(COLUMNS)), min_size=3, max_size=3)
    usual = st.just(["texts", "numbers", "texts"])
    return st.tuples(names, usual | kinds, st.none() | st.sampled_from(FEATURES), st.none() | mutate.tree_edits), act


@fuzzer(60)
def fuzz_folder(folder):
    valid = {suffix: valid_table(folder, suffix) for suffix in SUFFIXES}

    def act(example):
        place = folder / "folder"
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for stem, (suffix, edits) in zip(("train", "validation", "test", "dev"), example, strict=False):
            if suffix:
                (place / f"{stem}{suffix}").write_bytes(mutate.edited(valid[suffix], edits))
        table_rows(place)

    part = st.tuples(st.sampled_from((*SUFFIXES, "")), st.just([]) | mutate.byte_edits)
    return st.lists(part, min_size=2, max_size=4), act


# Text


@fuzzer(120)
def fuzz_corpus(folder):
    table = pa.table({"document": [i // 3 for i in range(60)], "text": TEXTS[:60]})
    pq.write_table(table, folder / "valid.parquet")
    valid = {".parquet": (folder / "valid.parquet").read_bytes(), ".txt": "\n\n".join(TEXTS[:60]).encode()}

    def act(example):
        suffix, edits, loose, columns = example
        path = folder / f"corpus{suffix}"
        path.write_bytes(loose if loose is not None else mutate.edited(valid[suffix], edits))
        if columns and "far" not in columns:  # a date that Parquet cannot hold
            pq.write_table(pa.table({"document": COLUMNS[columns[0]], "text": COLUMNS[columns[1]]}), path)
        try:
            for document in corpora.documents(corpora.files(path)):
                assert document
                assert all(isinstance(sentence, str) and sentence for sentence in document)
        except UserError as error:
            one_sentence(error, path.name)

    kinds = st.sampled_from(sorted(COLUMNS))
    loose = st.none() | st.none() | st.binary(max_size=200)
    return st.tuples(st.sampled_from(sorted(valid)), mutate.byte_edits, loose, st.none() | st.none() | st.tuples(kinds, kinds)), act


@fuzzer(120)
def fuzz_word_vectors(folder):
    save_file({"vectors": torch.eye(6)}, folder / "valid.safetensors")
    valid = (folder / "valid.safetensors").read_bytes()
    odd = [torch.ones(6), torch.tensor(1.0), torch.ones(6, 2, 2), torch.ones(6, 0), torch.ones(6, 3, dtype=torch.int64),
           torch.full((6, 3), float("nan")), torch.zeros(6, 3), torch.ones(6, 3, dtype=torch.complex64), torch.ones(5, 3),
           torch.ones(6, 3, dtype=torch.bool)]  # fmt: skip

    def act(example):
        words, edits, header, tensor = example
        (folder / "words.txt").write_bytes(mutate.edited(b"a\nb\nc\nd\ne\nf\n", words) if words else b"a\nb\nc\nd\ne\nf\n")
        content = mutate.with_edits(valid, header) if header else mutate.edited(valid, edits) if edits else valid
        (folder / "vectors.safetensors").write_bytes(content)
        if tensor is not None:
            save_file({"vectors": tensor}, folder / "vectors.safetensors")
        try:
            found = WordVectors.load(folder)
            for word in found.words[:3]:
                assert word not in found.nearest(word, 2)
        except UserError as error:
            one_sentence(error, folder.name)

    some = st.none() | mutate.byte_edits
    return st.tuples(some, some, st.none() | mutate.tree_edits, st.none() | st.sampled_from(odd)), act


# Models


def tiny_classifier(folder: Path) -> Path:
    """Write a random classifier of 2 layers, 16 wide, with its tokenizer."""
    make_checkpoint(folder / "base", TEXTS)
    model = Bert(BertConfig(120, 16, 2, 2, 32, 40, head="classification", labels=("negative", "positive")),
                 torch.Generator().manual_seed(0))  # fmt: skip
    model.tokenizer_folder = folder / "base"
    return model.save_pretrained(folder / "model")


def works(model: Bert) -> None:
    """Check that a model that was accepted is as small as its file, made of numbers, and runs."""
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    T, last = min(3, model.config.max_position_embeddings), model.config.vocab_size - 1
    with torch.no_grad():
        model(torch.full((1, T), min(1, last)))


checkpoint_edits = st.tuples(st.none() | mutate.tree_edits, st.none() | mutate.byte_edits, st.none() | mutate.tree_edits,
                             st.none() | mutate.byte_edits)  # fmt: skip


def spoil(folder: Path, config: bytes, weights: bytes, file: str, example: tuple) -> None:
    """Write config.json and a safetensors file, each changed as a tree or as bytes."""
    tree, raw, header, content = example
    told = mutate.dumped(mutate.grown(json.loads(config), tree)) if tree else config
    (folder / "config.json").write_bytes(mutate.edited(told, raw) if raw else told)
    stored = mutate.with_edits(weights, header) if header else weights
    (folder / file).write_bytes(mutate.edited(stored, content) if content else stored)


@fuzzer(150)
def fuzz_checkpoint(folder):
    model = tiny_classifier(folder)
    config, weights = (model / "config.json").read_bytes(), (model / "model.safetensors").read_bytes()

    def act(example):
        spoil(model, config, weights, "model.safetensors", example)
        for options in ({}, {"labels": ("a", "b", "c")}, {"head": "masked_lm"}, {"head": None}):
            try:
                works(Bert.from_pretrained(model, **options))
            except UserError as error:
                one_sentence(error, "config.json", "model.safetensors")

    return checkpoint_edits, act


@fuzzer(150)
def fuzz_compressed(folder):
    masks.save_compressed(masked(tiny_classifier(folder)), folder / "small")
    small = folder / "small"
    config, weights = (small / "config.json").read_bytes(), (small / masks.COMPRESSED).read_bytes()

    def act(example):
        spoil(small, config, weights, masks.COMPRESSED, example)
        try:
            works(masks.load_compressed(small))
        except UserError as error:
            one_sentence(error, "small")

    return checkpoint_edits, act


def masked(folder: Path) -> Bert:
    model = Bert.from_pretrained(folder)
    masks.layer_masks(model, 0.5).apply(model)
    return model


@fuzzer(120)
def fuzz_masks(folder):
    model = masked(tiny_classifier(folder))
    file = masks.layer_masks(model, 0.5).save(folder / "masks.safetensors")
    valid = file.read_bytes()
    shapes = json.loads(mutate.header_of(valid)["__metadata__"]["shapes"])

    def act(example):
        header, edits, inner = example
        content = mutate.with_edits(valid, header) if header else valid
        if inner and not header:
            told = mutate.header_of(valid)
            told["__metadata__"]["shapes"] = mutate.dumped(mutate.grown(shapes, inner)).decode()
            content = mutate.with_header(valid, json.dumps(told).encode())
        file.write_bytes(mutate.edited(content, edits) if edits else content)
        try:
            found = masks.Masks.load(file)
        except UserError as error:
            one_sentence(error, file.name)
            return
        assert all(keep.dtype == torch.bool for keep in found.keep.values())
        try:
            found.apply(model)
        except UserError as error:
            one_sentence(error, "mask")

    return st.tuples(st.none() | mutate.tree_edits, st.none() | mutate.byte_edits, st.none() | mutate.tree_edits), act


@fuzzer(80)
def fuzz_general(folder):
    teacher = Bert.from_pretrained(tiny_classifier(folder))
    student = Bert(BertConfig(120, 8, 1, 2, 16, 40), torch.Generator().manual_seed(0))
    student.tokenizer_folder = teacher.tokenizer_folder
    made = student.save_pretrained(folder / "student")
    maps = {f"{m}": linear.weight.detach() for m, linear in enumerate(Projections(8, 16, 1).maps)}
    save_file(maps, made / general.PROJECTIONS)
    card = {"teacher": general._sizes(teacher.config), "settings": {"student": "1x8"}}
    weights = (made / general.PROJECTIONS).read_bytes()

    def act(example):
        told, raw, header, content = example
        written = mutate.dumped(mutate.grown(card, told) if told else card)
        (made / general.CARD).write_bytes(mutate.edited(written, raw) if raw else written)
        stored = mutate.with_edits(weights, header) if header else weights
        (made / general.PROJECTIONS).write_bytes(mutate.edited(stored, content) if content else stored)
        try:
            works(general.load(made, teacher)[0])
        except UserError as error:
            one_sentence(error, "student")

    return checkpoint_edits, act


@fuzzer(50)
def fuzz_tokenizer(folder):
    model = tiny_classifier(folder)
    valid = {name: (model / name).read_bytes() for name in TOKENIZER_FILES if (model / name).is_file()}

    def act(example):
        name, tree, raw = example
        for other, content in valid.items():
            (model / other).write_bytes(content)
        told = tree if name.endswith(".json") else None  # a vocab.txt is no tree
        content = mutate.dumped(mutate.grown(json.loads(valid[name]), told)) if told else valid[name]
        (model / name).write_bytes(mutate.edited(content, raw) if raw else content)
        try:
            tokenizer = text.load_tokenizer(model)
            encoded = text.encode(tokenizer, [*GOOD, "über\0 ß 中文"], max_length=8)
        except UserError as error:
            one_sentence(error, "model", "max_length")
            return
        assert all(0 < len(ids) <= 8 and (ids >= 0).all() for ids in encoded.ids)

    return st.tuples(st.sampled_from(sorted(valid)), st.none() | mutate.tree_edits, st.none() | mutate.byte_edits), act


@fuzzer(25)
def fuzz_encoder(folder):
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made = {}
    for kind in (transformers.RobertaConfig, transformers.MPNetConfig, transformers.AlbertConfig):
        more = {"embedding_size": 8} if kind is transformers.AlbertConfig else {}
        config = kind(**sizes, **more, max_position_embeddings=40, pad_token_id=1)
        model = transformers.AutoModel.from_config(config)
        model.save_pretrained(folder / config.model_type)
        place = folder / config.model_type
        made[config.model_type] = place, (place / "config.json").read_bytes(), (place / "model.safetensors").read_bytes()

    def act(example):
        kind, edits = example
        place, config, weights = made[kind]
        spoil(place, config, weights, "model.safetensors", edits)
        try:
            model = encoders.load(place)
        except UserError as error:
            one_sentence(error, kind)
            return
        assert sum(p.numel() for p in model.parameters()) < 100_000

    return st.tuples(st.sampled_from(sorted(made)), checkpoint_edits), act


@fuzzer(80)
def fuzz_run_checkpoint(folder):
    def run(path):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return model, Checkpoint(path, model, optimizer, schedule, History())

    model, kept = run(folder / "run.safetensors")
    model(torch.ones(1, 3)).sum().backward()
    kept.optimizer.step()
    kept.save(7)
    valid = kept.path.read_bytes()
    said = json.loads(mutate.header_of(valid)["__metadata__"]["run"])

    def act(example):
        header, edits, inner = example
        content = mutate.with_edits(valid, header) if header else valid
        if inner and not header:
            told = mutate.header_of(valid)
            told["__metadata__"]["run"] = mutate.dumped(mutate.grown(said, inner)).decode()
            content = mutate.with_header(valid, json.dumps(told).encode())
        path = folder / "spoilt.safetensors"
        path.write_bytes(mutate.edited(content, edits) if edits else content)
        model, checkpoint = run(path)
        state = torch.get_rng_state()
        try:
            assert 0 <= checkpoint.load() < 10**6
            assert all(torch.isfinite(p).all() for p in model.parameters())
        except UserError as error:
            one_sentence(error, path.name)
        finally:
            torch.set_rng_state(state)

    return st.tuples(st.none() | mutate.tree_edits, st.none() | mutate.byte_edits, st.none() | mutate.tree_edits), act


# The command line

OPTIONS = (
    "--base", "--data", "--out", "--epochs", "--lr", "--batch-size", "--max-length", "--seed", "--resume", "--teacher", "--student",
    "--corpus", "--start", "--layer-map", "--steps", "--measure-every", "--checkpoint-every", "--precision", "--general",
    "--augment", "--sparsity", "--epochs-intermediate", "--epochs-prediction", "--temperature", "--model", "--method", "--split",
    "--json", "--format", "--unlabelled", "--allow-weak-teacher", "--tensorboard", "--help", "--version", "--", "-h", "-x",
)  # fmt: skip
COMMANDS = ("teach", "general", "distill", "prune", "evaluate", "export")
ODD_WORDS = (
    "", "-1", "0", "1", "2", "0.5", "1e400", "nan", "inf", "9" * 5000, "2147483648", "1,2", "1,,2", "99999999999999999999x1", "2x8",
    "4x312", "1x99999996", "100000x16", "0x0", "~nobody/x", "~", "/", ".", "..", "/dev/null", "/proc/self/mem", "x" * 300, "a/b/c",
    "\udcff", "ü\n", "\x1b[2J", "heads", "onnx", "random", "teacher", "1_0", "١", "glue/sst2", "glue/stsb", "movie_reviews/../x",
)  # fmt: skip
REQUIRED = {
    "teach": ("--base", "--data", "--out"), "general": ("--teacher", "--corpus", "--out"),
    "distill": ("--teacher", "--data", "--out"), "prune": ("--model", "--data", "--out"), "evaluate": ("--model", "--data"),
    "export": ("--model", "--out"),
}  # fmt: skip


@fuzzer(60)
def fuzz_command_line(folder):
    model = tiny_classifier(folder)
    write_csv(folder / "films.csv", zip(TEXTS, LABELS, strict=True))
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    good = {"--base": model, "--teacher": model, "--model": model, "--data": folder / "films.csv", "--out": folder / "out",
            "--corpus": folder / "text.txt"}  # fmt: skip

    def act(example):
        command, more, loose = example
        argv = [command]
        if command in REQUIRED and not loose:
            argv += [word for name in REQUIRED[command] for word in (name, str(good[name]))]
        argv += [str(good[word]) if word in good and loose else word for word in more]
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        assert code in (0, 2), argv

    word = st.sampled_from((*OPTIONS, *ODD_WORDS)) | st.text(st.characters(exclude_characters="\0"), max_size=8)
    pair = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(ODD_WORDS)).map(list)
    more = st.lists(word, max_size=4) | st.lists(pair, max_size=3).map(lambda pairs: sum(pairs, []))
    return st.tuples(st.sampled_from(COMMANDS), more, st.booleans()) | st.tuples(word, more, st.just(True)), act


@pytest.fixture
def no_training(monkeypatch):
    """Stop each command where the training would begin: whatever was asked for has been checked by then."""

    def stop(*_, **__):
        raise UserError("this would train now")

    monkeypatch.setattr(course, "fine_tune", stop)
    for name in ("kd.distill", "stage1.distill_general", "pruning.prune_by", "train.predict", "models.fetch"):
        module, function = name.split(".")
        monkeypatch.setattr(f"tinylib.commands.{module}.{function}", stop)


@pytest.mark.parametrize(("name", "target", "examples"), TARGETS, ids=[name for name, *_ in TARGETS])
def test_fuzz(tmp_path, name, target, examples, no_training, capsys):
    folder = tmp_path / name
    folder.mkdir()
    count = hammer(name, *target(folder), examples)
    assert count > 5
    with capsys.disabled():
        if MINUTES:
            print(f"\n{name}: {count:,} examples", end="")
