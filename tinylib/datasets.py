"""Labelled texts from shipped sets, the user's own files or GLUE, checked on the way in.

Everything ends as a ``datasets.DatasetDict`` (Hugging Face) with the splits train, validation and test and
the columns ``text`` (``text_pair`` too for sentence pairs) and ``label`` (a ``ClassLabel``: numbers and names
stay together). Files are read into memory: no progress bars, no cache folder, no network.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict  # by name: beartype looks DatasetDict's own "Dataset" up here

from tinylib.errors import UserError
from tinylib.models import hub_answers

# The splits, and what their files may be called.
SPLITS = {"train": ("train",), "validation": ("validation", "dev", "valid", "val"), "test": ("test",)}
# GLUE names its sentences differently in each task. Its regression task (stsb) has no classes and is refused.
GLUE_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}


@dataclass(frozen=True)
class Rows:
    """Hold the rows of one file as they were read, with what an error message needs to point at one of them.

    `numbers` counts as an editor does (lines, from 1) or as a table does (rows, from 1), as `unit` says.
    `names` are the class names where the file carries them (Parquet written by Hugging Face `datasets`).
    """

    source: str
    numbers: list
    texts: list
    pairs: list | None
    labels: list
    unit: str = "line"
    names: tuple | None = None

    def at(self, index: int) -> str:
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def take(self, indices: list) -> "Rows":
        pick = lambda column: [column[i] for i in indices]  # noqa: E731
        pairs = None if self.pairs is None else pick(self.pairs)
        return replace(
            self, numbers=pick(self.numbers), texts=pick(self.texts), pairs=pairs, labels=pick(self.labels)
        )

    def keys(self) -> list[str]:
        pairs = self.pairs or [""] * len(self.texts)
        return [f"{normalise(text)}\t{normalise(pair)}" for text, pair in zip(self.texts, pairs, strict=True)]


def data_folder() -> Path:
    """Return the folder of the shipped data: ``tinylib/_data`` once installed, ``data`` in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent / "data"):
        if (folder / "movie_reviews").is_dir():
            return folder
    raise UserError(f"the shipped data is missing beside {package}: install the package again")


def load(name_or_path: str | os.PathLike, seed: int = 0) -> DatasetDict:
    """Load labelled texts as train, validation and test.

    `name_or_path` is a shipped name (``movie_reviews``), a CSV, TSV, JSONL or Parquet file (duplicates are
    dropped, then it is split 80/10/10 by `seed`, each class in proportion), a folder with one such file for
    each split (taken as they are), or ``glue/<task>``. A folder of a shipped set's name: ``./movie_reviews``.
    Raises `UserError` with the file, the row and the remedy for input that cannot be used.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    shipped = sorted(file.parent.name for file in data_folder().glob("*/train.parquet"))
    if name in shipped:
        return _load_folder(data_folder() / name, seed)
    if path.is_dir():
        return _load_folder(path, seed)
    if path.is_file():
        return assemble(split(_checked(read(path)), seed))
    if re.fullmatch(r"glue/\w+", name):
        return _load_glue(name.removeprefix("glue/"), seed)
    near = difflib.get_close_matches(name, shipped, n=1)
    known = f"give {', '.join(shipped)}, glue/<task>, a file or a folder"
    hint = f"did you mean {near[0]}?" if near else known
    raise UserError(f"no data set, file or folder is called {name}: {hint}")


def label_names(data: DatasetDict) -> list[str]:
    """Return the class names; the position of a name is its number in the column ``label``."""
    return list(data["train"].features["label"].names)


def class_balance(data: DatasetDict) -> dict[str, dict[str, int]]:
    """Count the rows of each class in each split."""
    names = label_names(data)
    counts = {part: Counter(rows["label"][:]) for part, rows in data.items()}
    return {part: {name: count[i] for i, name in enumerate(names)} for part, count in counts.items()}


def fingerprint(data: DatasetDict | Dataset) -> str:
    """Return the sha256 (hex) of the content: splits, class names, rows in order; the format is no part."""
    digest = hashlib.sha256()
    for part, rows in sorted(data.items()) if isinstance(data, dict) else [("", data)]:
        columns = _columns(rows)
        head = [part, columns, list(rows.features["label"].names)]
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
        features["label"] = {"names": list(rows.features["label"].names), "_type": "ClassLabel"}
        types = [(column, pa.int64() if column == "label" else pa.string()) for column in columns]
        # `datasets` keeps the class names under this key
        schema = pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})
        table = pa.table({column: rows[column][:] for column in columns}, schema=schema)
        fixed = {"compression": "zstd", "compression_level": 19, "version": "2.6", "row_group_size": 1 << 20}
        path = Path(folder) / f"{part}.parquet"
        pq.write_table(table, path, use_dictionary=False, write_statistics=False, **fixed)


def _columns(rows: Dataset) -> list[str]:
    return [column for column in ("text", "text_pair", "label") if column in rows.column_names]


def normalise(text: str) -> str:
    """Fold case and whitespace: two texts that agree after it count as the same sentence."""
    return " ".join(text.casefold().split())


def split(rows: Rows, seed: int) -> dict[str, Rows]:
    """Drop duplicates (the first stays) and cut each class into 80 % train, 10 % validation and 10 % test.

    The shuffle sorts by sha256 of seed and sentence: it repeats on any machine with any library version, and
    the order of the rows in the file does not matter.
    """
    keys = rows.keys()
    first = {keys[i]: i for i in reversed(range(len(keys)))}
    order = [first[key] for key in _shuffled(first, seed)]
    by_label = defaultdict(list)
    for index in order:
        by_label[rows.labels[index]].append(index)
    part_of = {}
    for members in by_label.values():
        # A rare class still appears in each part while it has three rows; below that it stays in train.
        tenth = max(round(len(members) / 10), int(len(members) >= 3))
        for place, index in enumerate(members):
            part_of[index] = "validation" if place < tenth else "test" if place < 2 * tenth else "train"
    parts = {part: [index for index in order if part_of[index] == part] for part in SPLITS}
    if not parts["validation"]:
        raise UserError(
            f"{rows.source} has {len(first)} different texts and no label with three of them, too few to "
            "split 80/10/10: add rows, or give a folder with train, validation and test files"
        )
    return {part: rows.take(indices) for part, indices in parts.items()}


def _shuffled(keys: dict | list, seed: int) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())


def read(path: Path) -> Rows:
    """Read one CSV, TSV, JSONL or Parquet file, with the row numbers that an error message will need."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is of an unknown format: give a .csv, .tsv, .jsonl or .parquet file")
    try:
        return reader(path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be read ({why}): check the file and its permissions") from error


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not UTF-8 text: save the file in UTF-8") from None


def _read_csv(path: Path) -> Rows:
    text = _decoded(path)
    if path.suffix.lower() == ".csv":
        records = _csv_records(path, text, ",", csv.QUOTE_MINIMAL)
    else:
        records = _tsv_records(path, text)
    if not records:
        raise UserError(f"{path} is empty: its first line must name the columns text and label")
    header = [field.strip() for field in records[0][1]]
    columns = {name: [fields[i] for _, fields in records[1:]] for i, name in enumerate(header)}
    return _rows(str(path), [line for line, _ in records[1:]], columns)


def _tsv_records(path: Path, text: str) -> list[tuple[int, list]]:
    # Some TSV files (GLUE's) hold lone quotation marks as text. Reading these as quotes breaks the table or
    # swallows whole rows into one field; then the file is read without quotes, if that makes a table.
    problem = quoted = None
    try:
        quoted = _csv_records(path, text, "\t", csv.QUOTE_MINIMAL)
        if not any("\n" in field and "\t" in field for _, fields in quoted for field in fields):
            return quoted
    except UserError as error:
        problem = error
    try:
        return _csv_records(path, text, "\t", csv.QUOTE_NONE)
    except UserError:
        if problem is not None:
            raise problem from None
        return quoted


def _csv_records(path: Path, text: str, delimiter: str, quoting: int) -> list[tuple[int, list]]:
    """Parse into (line where the record starts, fields), every record as wide as the first."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    records, line = [], 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {line} is no table row ({error}): check its quotes") from None
        if fields is None:
            return records
        if any(field.strip() for field in fields):
            if records and len(fields) != len(records[0][1]):
                wide = f"{len(fields)} fields where the first line has {len(records[0][1])}"
                raise UserError(
                    f"{path}, line {line} has {wide}: put a text that contains the separator or a line break "
                    "between double quotes"
                )
            records.append((line, fields))
        line = reader.line_num + 1  # a quoted field may span lines: the next record starts after its last one


def _read_jsonl(path: Path) -> Rows:
    numbers, records = [], []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): write one object a line") from None
        if not isinstance(record, dict):
            raise UserError(f'{path}, line {number} is not an object: write {{"text": "…", "label": "…"}}')
        numbers.append(number)
        records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    return _rows(str(path), numbers, {name: [record.get(name) for record in records] for name in names})


def _read_parquet(path: Path) -> Rows:
    try:
        table = pq.ParquetFile(path).read()
        features = hf.Features.from_arrow_schema(table.schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}): write it again") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return _rows(str(path), list(range(1, table.num_rows + 1)), columns, "row", features.get("label"))


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _rows(source: str, numbers: list, columns: dict, unit: str = "line", feature: object = None) -> Rows:
    """Find text, text_pair and label among the columns; GLUE's names of them are known."""
    found = list(columns)
    for names in sorted(
        GLUE_COLUMNS.values(), key=len, reverse=True
    ):  # pairs first: qnli has a "sentence" too
        if "text" not in columns and all(name in columns for name in names):
            renamed = zip(("text", "text_pair"), names, strict=False)
            columns = {**columns, **{new: columns[old] for new, old in renamed}}
    missing = [name for name in ("text", "label") if name not in columns]
    if missing:
        shown = ", ".join(repr(name) for name in found[:8]) or "none"
        unsplit = len(found) == 1 and re.search("[;\t|]", found[0])
        hint = "separate the columns by commas" if unsplit else "rename or add it"
        raise UserError(f"{source} has no column {' and no column '.join(missing)}, only {shown}: {hint}")
    names = tuple(feature.names) if isinstance(feature, hf.ClassLabel) else None
    return Rows(source, numbers, columns["text"], columns.get("text_pair"), columns["label"], unit, names)


def _checked(rows: Rows) -> Rows:
    """Refuse empty or non-text cells and missing or fractional labels; return the rows with plain labels."""
    if not rows.numbers:
        raise UserError(f"{rows.source} has no rows: add at least a few for each label")
    for name, column in (("text", rows.texts), ("text_pair", rows.pairs or [])):
        for i, value in enumerate(column):
            if value is None or value == "" or isinstance(value, str) and not value.strip():
                raise UserError(f"{rows.at(i)}: {name} is empty: fill it in or delete the row")
            if not isinstance(value, str):
                raise UserError(f"{rows.at(i)}: {name} is {value!r}, not a text: put it in quotation marks")
            if not value.isascii() and re.search("[\ud800-\udfff]", value):
                raise UserError(f"{rows.at(i)}: {name} holds half a character (\\ud800…): delete it")
    labels = [_plain_label(label, rows.at(i)) for i, label in enumerate(rows.labels)]
    mixed = any(isinstance(label, str) for label in labels)
    return replace(rows, labels=[str(label) for label in labels] if mixed else labels)


def _plain_label(label: object, where: str) -> str | int:
    """Return a label as whole number or name; the texts "1" and "1.0" of a CSV file are the number 1."""
    if isinstance(label, str):
        label = label.strip()
    if label is None or str(label).lower() in ("", "nan", "<na>"):
        raise UserError(f"{where}: label is missing: fill it in or delete the row")
    if isinstance(label, int):
        return int(label)
    number = re.fullmatch(r"([+-]?\d{1,18})(\.\d+)?", str(label))
    if number and not (number[2] or ".").strip(".0"):
        return int(number[1])
    if number or isinstance(label, float):
        raise UserError(f"{where}: label {label} is a fraction, no class: use whole numbers or names")
    if not isinstance(label, str) or re.search("[\ud800-\udfff]", label):
        raise UserError(f"{where}: label is {label!r}: use a whole number or a name")
    return label


def assemble(parts: dict[str, Rows]) -> DatasetDict:
    """Turn checked rows into Hugging Face datasets that share one set of class names, those of train."""
    train = parts["train"]
    if any((part.pairs is None) != (train.pairs is None) for part in parts.values()):
        raise UserError(f"{train.source} and the other splits differ in text_pair: give it to all or none")
    names = train.names if all(part.names == train.names for part in parts.values()) else None
    if names is None and any(isinstance(label, str) for part in parts.values() for label in part.labels):
        parts = {name: replace(part, labels=list(map(str, part.labels))) for name, part in parts.items()}
    present = set(parts["train"].labels)
    if len(present) < 2:
        raise UserError(
            f"{train.source} has one label only, {present.pop()}: a classifier needs at least two"
        )
    known = list(range(len(names))) if names else sorted(present)
    number_of = {label: i for i, label in enumerate(known)}
    label_feature = hf.ClassLabel(names=list(names or map(str, known)))
    data = DatasetDict()
    for name, part in parts.items():
        for i, label in enumerate(part.labels):
            if label not in number_of:
                raise UserError(
                    f"{part.at(i)}: label {label} is not in {train.source}: correct it or add rows"
                )
        columns = (
            {"text": part.texts} if part.pairs is None else {"text": part.texts, "text_pair": part.pairs}
        )
        features = hf.Features({**{column: hf.Value("string") for column in columns}, "label": label_feature})
        columns["label"] = [number_of[label] for label in part.labels]
        data[name] = Dataset.from_dict(columns, features)
    return data


def _load_folder(folder: Path, seed: int) -> DatasetDict:
    parts = {}
    for name, stems in SPLITS.items():
        readable = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in _READERS)
        files = [path for path in readable if path.stem.lower() in stems]
        if len(files) != 1:
            what = f"{len(files)} files ({', '.join(path.name for path in files)})" if files else "no file"
            raise UserError(
                f"{folder} has {what} for {name}: give one .csv, .tsv, .jsonl or .parquet file for each of "
                "train, validation and test, or give a single file to have it split"
            )
        parts[name] = _checked(read(files[0]))
    parts = _without_hidden_labels(parts, seed)
    seen = set(parts["train"].keys())
    shared = sum(key in seen for key in parts["test"].keys())
    if shared:
        warnings.warn(f"{folder}: {shared} texts of test are in train too, a flattering test", stacklevel=3)
    return assemble(parts)


def _without_hidden_labels(parts: dict[str, Rows], seed: int) -> dict[str, Rows]:
    """Do without a test split whose labels are all -1: only GLUE's server knows the labels of its test sets.

    Validation becomes test, and as many rows as it has, at most a tenth, leave train to become validation.
    """
    if set(parts["test"].labels) != {-1} or -1 in parts["train"].labels:
        return parts
    train, test = parts["train"], parts["validation"]
    count = max(1, min(len(test.texts), len(train.texts) // 10))
    keys = train.keys()
    moved = set(_shuffled(list(dict.fromkeys(keys)), seed)[:count])  # by text: no duplicate stays behind
    stay, leave = ([i for i, key in enumerate(keys) if (key in moved) == want] for want in (False, True))
    return {"train": train.take(stay), "validation": train.take(leave), "test": test}


def _load_glue(task: str, seed: int) -> DatasetDict:
    if task not in GLUE_COLUMNS:
        why = "has scores instead of classes" if task == "stsb" else "is not a GLUE task"
        raise UserError(f"glue/{task} {why}: choose one of {', '.join(sorted(GLUE_COLUMNS))}")
    try:
        with _local_copies_only_if_offline():
            hub_data = hf.load_dataset("nyu-mll/glue", task)
    except Exception as error:  # the hub's client raises many kinds; each means that the data did not come
        raise UserError(
            f"glue/{task} could not be loaded from the Hugging Face hub ({type(error).__name__}): check the "
            "internet connection, or give a folder with the task's train, validation and test files"
        ) from error
    parts = {}
    for name in SPLITS:
        rows = hub_data[name if name in hub_data else f"{name}_matched"]  # mnli: matched and mismatched
        columns = {column: rows[column][:] for column in rows.column_names}
        numbers = list(range(1, len(rows) + 1))
        source = f"glue/{task} {name}"
        parts[name] = _checked(_rows(source, numbers, columns, "row", rows.features["label"]))
    return assemble(_without_hidden_labels(parts, seed))


@contextlib.contextmanager
def _local_copies_only_if_offline() -> Iterator[None]:
    """Keep the hub's client to its local copies while the hub does not answer; its own retries take 20 s."""
    before = hf.config.HF_HUB_OFFLINE
    hf.config.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        hf.config.HF_HUB_OFFLINE = before
