"""Labelled texts from shipped sets, the user's own files or GLUE, checked on the way in.

Everything ends as a ``datasets.DatasetDict`` (Hugging Face) with the splits train, validation and test and
the columns ``text`` (``text_pair`` too for sentence pairs) and ``label`` (a ``ClassLabel``: numbers and names
stay together; or scores, the targets of a regression, as floats: ``files`` has the rule). Files are read into
memory: no progress bars, no cache folder, no network.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict  # by name: beartype looks DatasetDict's own "Dataset" up here

from tinylib.errors import UserError, UserNote
from tinylib.files import GLUE_COLUMNS, READERS, Rows, checked, checked_splits, from_columns, read, settled
from tinylib.files import normalise as normalise  # offered here too: it decides what counts as a duplicate
from tinylib.models import expanded, hub_answers

# The content of the shipped sets (``fingerprint``), as data/README.md records it.
FINGERPRINTS = {
    "movie_reviews": "038eee772e05d8534d82417243fb557ebc998d9f6bdc7afd2fddb63474eb6fed",
    "questions": "49dfccf52e6fbd6c2909ed6d906128e31b6ab7feb03c7fd41a69832dbba25092",
    "inference": "2cfe2d3ed7e922534a9e72c09dd4980416cf5ca8a86055433815d1afbb4a4e31",
}
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"  # the commit of nyu-mll/glue on the hub: the same texts whenever fetched
SCORE = "score"  # the one name of a regression's labels, where classes have theirs
REPEATED = 0.2  # of a folder's test texts; with more of them in train as well, no figure would mean anything
# MNLI has two validation splits, of the training texts' genres and of others; "mnli" is judged by the first.
FROM_HALF = {"mnli_mismatched": ("mnli", "mismatched")}
# The splits, and what their files may be called.
SPLITS = {"train": ("train",), "validation": ("validation", "dev", "valid", "val"), "test": ("test",)}


def data_folder() -> Path:
    """Return the folder of the shipped data: ``tinylib/_data`` once installed, ``data`` in a checkout.

    Raises UserError if it is missing.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent / "data"):
        if (folder / "movie_reviews").is_dir():
            return folder
    raise UserError(f"the shipped data is missing beside {package}: install the package again")


def load(name_or_path: str | os.PathLike, seed: int = 0) -> DatasetDict:
    """Load labelled texts as train, validation and test.

    `name_or_path` is a shipped name (``movie_reviews``, ``questions``,
    ``inference``), a CSV, TSV, JSONL or Parquet file (duplicates are
    dropped, then it is split 80/10/10 by `seed`, each class or range of scores in proportion), a folder with one
    such file for each split (taken as they are), or ``glue/<task>``. A folder of a shipped set's name:
    ``./movie_reviews``. Texts of a folder's validation and test that are in train too are told of in a
    `UserNote`, and so are texts with more than one label. Raises `UserError` with the file, the row and the remedy
    for input that cannot be used: more than ``REPEATED`` of the test texts in train is such.
    """
    name, path = os.fspath(name_or_path), expanded(name_or_path)
    if not name:  # else it would be the current folder
        raise UserError("the data set's name is empty: give a shipped name, glue/<task>, a file or a folder")
    shipped = sorted(file.parent.name for file in data_folder().glob("*/train.parquet"))
    if name in shipped:
        return _load_folder(data_folder() / name, seed)
    if path.is_dir():
        return _load_folder(path, seed)
    if path.is_file():
        rows = settled({"train": checked(read(path))})["train"]
        data = assemble(split(rows, seed))
        _note_alike(data, str(path))
        _note_contradictions(rows, "the first of them stays")
        return data
    if re.fullmatch(r"glue/\w+", name):
        return _load_glue(name.removeprefix("glue/"), seed)
    near = difflib.get_close_matches(name, shipped, n=1)
    known = f"give {', '.join(shipped)}, glue/<task>, a file or a folder"
    hint = f"did you mean {near[0]}?" if near else known
    raise UserError(f"no data set, file or folder is called {name}: {hint}")


def has_scores(data: DatasetDict | Dataset) -> bool:
    """Tell whether the labels are scores (a regression), not classes."""
    return not isinstance((data["train"] if isinstance(data, dict) else data).features["label"], hf.ClassLabel)


def label_names(data: DatasetDict) -> list[str]:
    """Return the class names, whose positions are their numbers in the column ``label``; of scores the one name "score"."""
    return [SCORE] if has_scores(data) else list(data["train"].features["label"].names)


def class_balance(data: DatasetDict) -> dict[str, dict[str, int]]:
    """Count the rows of each class in each split; raise UserError for scores, which have no classes."""
    if has_scores(data):
        raise UserError("the labels are scores, not classes: take the mean and the spread of the column label")
    names = label_names(data)
    counts = {part: Counter(rows["label"][:]) for part, rows in data.items()}
    return {part: {name: count[i] for i, name in enumerate(names)} for part, count in counts.items()}


def fingerprint(data: DatasetDict | Dataset) -> str:
    """Return the sha256 (hex) of the content: splits, class names, rows in order; the format is no part."""
    digest = hashlib.sha256()
    for part, rows in sorted(data.items()) if isinstance(data, dict) else [("", data)]:
        columns = _columns(rows)
        head = [part, columns, [SCORE] if has_scores(rows) else list(rows.features["label"].names)]
        for row in (head, *zip(*(rows[column][:] for column in columns), strict=True)):
            digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def save(data: DatasetDict, folder: str | os.PathLike) -> None:
    """Write one Parquet file for each split into `folder`; `load(folder)` gives rows and class names back.

    The writer's settings are fixed, so with one version of pyarrow the same rows give the same bytes.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, rows in data.items():
        columns = _columns(rows)
        features = {column: {"dtype": "string", "_type": "Value"} for column in columns}
        scores, number = has_scores(rows), pa.int64()
        if scores:
            features["label"], number = {"dtype": "float64", "_type": "Value"}, pa.float64()
        else:
            features["label"] = {"names": list(rows.features["label"].names), "_type": "ClassLabel"}
        types = [(column, number if column == "label" else pa.string()) for column in columns]
        # `datasets` keeps the class names under this key, and `files` sees by it that these labels are scores
        schema = pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
        table = pa.table({column: rows[column][:] for column in columns}, schema=schema)
        fixed = {"compression": "zstd", "compression_level": 19, "version": "2.6", "row_group_size": 1 << 20}
        path = Path(folder) / f"{part}.parquet"
        pq.write_table(table, path, use_dictionary=False, write_statistics=False, **fixed)


def _columns(rows: Dataset) -> list[str]:
    return [column for column in ("text", "text_pair", "label") if column in rows.column_names]


def split(rows: Rows, seed: int) -> dict[str, Rows]:
    """Drop duplicates (the first stays) and cut each class into 80 % train, 10 % validation and 10 % test.

    Scores have no classes: of each ten neighbours in their order one goes to validation and one to test, so that all
    three parts range over low and high alike. The shuffle sorts by sha256 of seed and sentence: it repeats on any
    machine with any library version, and the order of the rows in the file does not matter. Raises UserError if the
    texts are too few for a validation part.
    """
    keys = rows.keys()
    first = {keys[i]: i for i in reversed(range(len(keys)))}
    order = [first[key] for key in _shuffled(first, seed)]
    part_of = {}
    for members in _strata(rows.labels, order):
        # A rare class still appears in each part while it has three rows; below that it stays in train.
        tenth = max(round(len(members) / 10), int(len(members) >= 3))
        for place, index in enumerate(members):
            part_of[index] = "validation" if place < tenth else "test" if place < 2 * tenth else "train"
    parts = {part: [index for index in order if part_of[index] == part] for part in SPLITS}
    if not parts["validation"]:
        labels = "" if isinstance(rows.labels[0], float) else " and no label with three of them"
        raise UserError(
            f"{rows.source} has {len(first)} different texts{labels}, too few to "
            "split 80/10/10: add rows, or give a folder with train, validation and test files"
        )
    return {part: rows.take(indices) for part, indices in parts.items()}


def _strata(labels: list, order: list[int]) -> list[list[int]]:
    """Return the rows in groups that are to be split alike, each in the shuffled order: the classes, or ten scores in a row."""
    if not isinstance(labels[order[0]], float):
        by_label = defaultdict(list)
        for index in order:
            by_label[labels[index]].append(index)
        return list(by_label.values())
    ranked = sorted(order, key=labels.__getitem__)  # stable: equal scores stay shuffled
    starts = list(range(0, max(len(ranked) - 4, 1), 10))  # a rest below five goes with the ten before it
    place = {index: i for i, index in enumerate(order)}
    return [sorted(ranked[a:b], key=place.__getitem__) for a, b in zip(starts, [*starts[1:], len(ranked)], strict=True)]


def _shuffled(keys: dict | list, seed: int) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())


def assemble(parts: dict[str, Rows]) -> DatasetDict:
    """Turn checked and settled rows into Hugging Face datasets that share one set of class names, those of train.

    Raises UserError if some splits have text_pair and others not, if train has one label or score only, and for a label that
    train does not know.
    """
    train = parts["train"]
    if any((part.pairs is None) != (train.pairs is None) for part in parts.values()):
        raise UserError(f"{train.source} and the other splits differ in text_pair: give it to all or none")
    if isinstance(train.labels[0], float):
        return _assemble_scores(parts)
    parts, names = _in_one_numbering(parts)
    present = set(parts["train"].labels)
    if len(present) < 2:
        raise UserError(
            f"{train.source} has one label only, {present.pop()}: a classifier needs at least two"
        )
    known = names or sorted(present)
    number_of = {label: i for i, label in enumerate(known)}
    label_feature = hf.ClassLabel(names=list(map(str, known)))
    data = DatasetDict()
    for name, part in parts.items():
        for i, label in enumerate(part.labels):
            if label not in number_of:
                raise UserError(
                    f"{part.at(i)}: label {label} is not in {train.source}: correct it or add rows"
                )
        data[name] = _dataset(part, [number_of[label] for label in part.labels], label_feature)
    return data


def _in_one_numbering(parts: dict[str, Rows]) -> tuple[dict[str, Rows], list[str] | None]:
    """Return the parts with labels that mean the same in all of them, and the names of train's file in their order, if it has any.

    A number is that of its own file's names. In a file without names it is a number of train's, unless train's names are
    numbers themselves: then it is such a name. Splits whose classes were numbered one by one may give one number to two classes.
    """
    names = parts["train"].names
    numbered = all(isinstance(label, int) for part in parts.values() for label in part.labels)
    if numbered and not names and len({part.names for part in parts.values()} - {None}) <= 1:
        return parts, None

    numbers = names and all(name.strip().lstrip("-").isdecimal() for name in names)

    def told(label: int | str, own: tuple | None) -> str:
        return own[label] if own and isinstance(label, int) and 0 <= label < len(own) else str(label)

    spoken = {
        part: replace(rows, labels=[told(label, rows.names or (None if numbers else names)) for label in rows.labels])
        for part, rows in parts.items()
    }
    return spoken, list(names) if names else None


def _assemble_scores(parts: dict[str, Rows]) -> DatasetDict:
    train = parts["train"]
    if len(set(train.labels)) < 2:
        raise UserError(f"{train.source} has one score only, {train.labels[0]:g}: there is nothing to learn from it")
    return DatasetDict({name: _dataset(part, part.labels, hf.Value("float64")) for name, part in parts.items()})


def _dataset(rows: Rows, labels: list, feature: hf.ClassLabel | hf.Value) -> Dataset:
    columns = {"text": rows.texts} if rows.pairs is None else {"text": rows.texts, "text_pair": rows.pairs}
    features = hf.Features({**{column: hf.Value("string") for column in columns}, "label": feature})
    return Dataset.from_dict({**columns, "label": labels}, features)


def _load_folder(folder: Path, seed: int) -> DatasetDict:
    parts = {}
    for name, stems in SPLITS.items():
        readable = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in READERS)
        files = [path for path in readable if path.stem.lower() in stems]
        if len(files) != 1:
            what = f"{len(files)} files ({', '.join(path.name for path in files)})" if files else "no file"
            raise UserError(
                f"{folder} has {what} for {name}: give one .csv, .tsv, .jsonl or .parquet file for each of "
                "train, validation and test, or give a single file to have it split"
            )
        parts[name] = read(files[0])
    told = checked_splits(parts)
    parts = settled(_without_hidden_labels(told, seed))
    data = assemble(parts)
    _check_repeats(parts)
    if parts["test"].source != told["test"].source:
        why = f"{told['test'].source}: all labels are -1, as where they are kept secret, so validation serves as test"
        warnings.warn(f"{why}, and {len(parts['validation'].texts):,} texts of train as validation", UserNote, stacklevel=3)
    _note_alike(data, str(folder))
    _note_contradictions(parts["train"], "a model cannot learn both: correct or delete them")
    return data


def repeats(parts: dict[str, list[str]]) -> dict[str, int]:
    """Count the texts of validation and of test that are in train too; ``parts`` holds each split's keys (``Rows.keys``)."""
    seen = set(parts["train"])
    return {part: sum(key in seen for key in parts[part]) for part in ("validation", "test")}


def _check_repeats(parts: dict[str, Rows]) -> None:
    """Say how many texts of validation and test are in train too; refuse a test split of which that is too large a share."""
    keys = {part: rows.keys() for part, rows in parts.items()}
    counts = repeats(keys)
    for part in ("test", "validation"):  # first what may be refused: a mistake is one sentence, without a note before it
        count = counts[part]
        if not count:
            continue
        rows, train, share = parts[part], parts["train"], count / len(keys[part])
        seen = {key: i for i, key in reversed(list(enumerate(keys["train"])))}
        i = next(i for i, key in enumerate(keys[part]) if key in seen)
        where = f"the first is {rows.unit} {rows.numbers[i]}, in {train.source} {train.unit} {train.numbers[seen[keys[part][i]]]}"
        told = f"{rows.source}: {count} texts of {part} are in train too ({share:.0%} of them; {where})"
        if part == "test" and share > REPEATED:
            remedy = "delete them from one of the two, or give a single file, whose duplicates are dropped before it is split"
            raise UserError(f"{told}, and above {REPEATED:.0%} a test says nothing: {remedy}")
        warnings.warn(f"{told}, a flattering {part}: delete them from train", UserNote, stacklevel=4)


def contradictions(keys: list[str], labels: list) -> list[int]:
    """Return the rows whose text stood in an earlier row with another label."""
    first: dict = {}
    return [i for i, (key, label) in enumerate(zip(keys, labels, strict=True)) if first.setdefault(key, label) != label]


def _note_contradictions(rows: Rows, then: str) -> None:
    found = contradictions(rows.keys(), rows.labels)
    if found:
        note = f"{rows.at(found[0])}: this text stands above with another label, and {len(found)} rows are of that kind; {then}"
        warnings.warn(note, UserNote, stacklevel=4)


def _note_alike(data: DatasetDict, source: str) -> None:
    """Say which classes have names that differ in capitals or spaces only, as a slip makes them."""
    groups = defaultdict(list)
    for name in label_names(data):
        groups[normalise(name)].append(name)
    if alike := next((names for names in groups.values() if len(names) > 1), None):
        told = " and ".join(map(repr, alike))
        note = f"{source}: the labels {told} are different classes; if they are one, write them alike"
        warnings.warn(note, UserNote, stacklevel=3)


def _without_hidden_labels(parts: dict[str, Rows], seed: int) -> dict[str, Rows]:
    """Do without a test split whose labels are all -1: only GLUE's server knows the labels of its test sets.

    Validation becomes test, and as many rows as it has, at most a tenth, leave train to become validation.
    """
    if set(parts["test"].labels) != {-1} or -1 in parts["train"].labels:
        return parts
    train, test = parts["train"], parts["validation"]
    count = max(1, min(len(test.texts), len(train.texts) // 10))
    keys = train.keys()
    order = _shuffled(list(dict.fromkeys(keys)), seed)
    place = {key: i for i, key in enumerate(order)}
    last: dict = {}  # of each class the text that the shuffle puts last: it stays, or train would not know the class
    for key, label in zip(keys, train.labels, strict=True):
        kind = None if isinstance(label, float) else label
        last[kind] = max(last.get(kind, key), key, key=place.__getitem__)
    last_ones = set(last.values())
    moved = set([key for key in order if key not in last_ones][:count])  # by text: no duplicate stays behind
    if not moved:
        raise UserError(f"{train.source} has {len(order)} different texts, too few to make a validation part of: add rows")
    stay, leave = ([i for i, key in enumerate(keys) if (key in moved) == want] for want in (False, True))
    return {"train": train.take(stay), "validation": train.take(leave), "test": test}


def _load_glue(task: str, seed: int) -> DatasetDict:
    known = sorted({*GLUE_COLUMNS, *FROM_HALF})
    if task not in known:
        raise UserError(f"glue/{task} is not a GLUE task: choose one of {', '.join(known)}")
    task, half = FROM_HALF.get(task, (task, "matched"))
    try:
        with _local_copies_only_if_offline():
            hub_data = hf.load_dataset("nyu-mll/glue", task, revision=GLUE_REVISION)
    except Exception as error:  # the hub's client raises many kinds; each means that the data did not come
        raise UserError(
            f"glue/{task} could not be loaded from the Hugging Face hub ({type(error).__name__}): check the "
            "internet connection, or give a folder with the task's train, validation and test files"
        ) from error
    parts = {}
    for name in SPLITS:
        rows = hub_data[name if name in hub_data else f"{name}_{half}"]
        columns = {column: rows[column][:] for column in rows.column_names}
        numbers = list(range(1, len(rows) + 1))
        source = f"glue/{task} {name}"
        parts[name] = checked(from_columns(source, numbers, columns, "row", rows.features["label"]))
    return assemble(settled(_without_hidden_labels(parts, seed)))


@contextlib.contextmanager
def _local_copies_only_if_offline() -> Iterator[None]:
    """Keep the hub's client to its local copies while the hub does not answer; its own retries take 20 s."""
    before = hf.config.HF_HUB_OFFLINE
    hf.config.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        hf.config.HF_HUB_OFFLINE = before
