"""Tables from the user's files: CSV, TSV, JSONL and Parquet, each cell checked, each row known by its number.

What cannot be used is refused with the file, the row and the remedy, so that a mistake is found in the file
and not in a traceback of the training.

Labels are classes or scores. Whole numbers and names are classes. Numbers of which at least ``FRACTIONS`` of the train
split have a fraction are scores, and so are those of a Parquet file whose own description, as Hugging Face `datasets`
writes it, says that the column holds floating-point numbers. Anything between is refused: a fraction among names, a stray
one among whole numbers.
"""

import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import datasets as hf
import pyarrow.parquet as pq

from tinylib.errors import UserError, is_full_memory

MOST_ROWS = 50  # a byte of a Parquet file: no texts that differ are packed so tightly, and a false count would fill the memory
FRACTIONS = 0.1  # from this share of labels with a fraction on, numbers are scores and not classes
LINE_END = "\r\n|\r|\n"  # of Windows, of old Macs, of all others
LARGEST_SCORE = 1e6  # in size: the squares that training sums up must stay far from the end of float32

# GLUE names its sentences differently in each task.
GLUE_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
    "stsb": ("sentence1", "sentence2"),
}
KNOWN = {"text", "text_pair", "label", *(name for names in GLUE_COLUMNS.values() for name in names)}  # columns that are read


@dataclass(frozen=True)
class Rows:
    """Hold the rows of one file as they were read, with what an error message needs to point at one of them.

    `numbers` counts as an editor does (lines, from 1) or as a table does (rows, from 1), as `unit` says.
    `names` are the class names where the file carries them (Parquet written by Hugging Face `datasets`), and `scores`
    tells whether it says that its labels are scores.
    """

    source: str
    numbers: list
    texts: list
    pairs: list | None
    labels: list
    unit: str = "line"
    names: tuple | None = None
    scores: bool = False

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


def normalise(text: str) -> str:
    """Fold case and whitespace: two texts that agree after it count as the same sentence."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Table:
    """Hold the columns of one file by name, the number of each row, and what the file itself says its label is."""

    numbers: list
    columns: dict
    unit: str = "line"
    feature: object = None


def read(path: Path) -> Rows:
    """Read one CSV, TSV, JSONL or Parquet file, with the row numbers that an error message will need.

    Raises UserError for another format, a file that cannot be read, and one without the columns text and label.
    """
    table = _table(path, READERS, "give a .csv, .tsv, .jsonl or .parquet file")
    return from_columns(str(path), table.numbers, table.columns, table.unit, table.feature)


def read_texts(path: Path) -> Rows:
    """Read texts (and pairs) without labels: a .txt file of one text a line, or a table, whose label is not looked at.

    The rows are checked (``checked_texts``), empty lines of a .txt file are left out, and each label is None.
    Raises UserError for another format, a file that cannot be read, one without a column text, and as ``checked_texts`` does.
    """
    readers = READERS | {".txt": _read_txt}
    table = _table(path, readers, "give a .txt file of one text a line, or a .csv, .tsv, .jsonl or .parquet file")
    return checked_texts(from_columns(str(path), table.numbers, table.columns, table.unit, labelled=False))


def _table(path: Path, readers: dict, known: str) -> Table:
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is of an unknown format: {known}")
    try:
        return reader(path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be read ({why}): check the file and its permissions") from error


def _decoded(path: Path) -> str:
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.split(LINE_END.encode(), raw[: error.start]))
        raise UserError(f"{path}, line {line} is not UTF-8 text: save the file in UTF-8") from None


def _read_txt(path: Path) -> Table:
    lines = re.split(LINE_END, _decoded(path))
    told = [(number, line) for number, line in enumerate(lines, start=1) if not _blank(line)]
    return Table([number for number, _ in told], {"text": [line for _, line in told]})


def _read_csv(path: Path) -> Table:
    text = _decoded(path)
    if path.suffix.lower() == ".csv":
        records = _csv_records(path, text, ",", csv.QUOTE_MINIMAL)
    else:
        records = _tsv_records(path, text)
    if not records:
        raise UserError(f"{path} is empty: its first line must name the columns text and label")
    header = [field.strip() for field in records[0][1]]
    pairs = [(name, [fields[i] for _, fields in records[1:]]) for i, name in enumerate(header)]
    return Table([line for line, _ in records[1:]], _by_name(path, pairs))


def _tsv_records(path: Path, text: str) -> list[tuple[int, list]]:
    # Some TSV files (GLUE's) hold lone quotation marks as text. Reading these as quotes breaks the table or
    # swallows whole rows into one field; then the file is read without quotes, if that makes a table.
    problem = quoted = None
    try:
        quoted = _csv_records(path, text, "\t", csv.QUOTE_MINIMAL)
        if not any(re.search("[\r\n]", field) and "\t" in field for _, fields in quoted for field in fields):
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


def _read_jsonl(path: Path) -> Table:
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
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(numbers, columns)


def _read_parquet(path: Path) -> Table:
    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > MOST_ROWS * path.stat().st_size:
            raise ValueError(f"it claims {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes")
        every = file.schema_arrow.names
        table = file.read([name for name in every if name in KNOWN])  # what else there is may be large, or of any type
        features = hf.Features.from_arrow_schema(table.schema)
        pairs = [(name, column.to_pylist()) for name, column in zip(table.column_names, table.columns, strict=True)]
        pairs += [(name, []) for name in every if name not in KNOWN]
    except Exception as error:  # pyarrow's kinds, and any that a made-up description or a date beyond the calendar brings up
        if is_full_memory(error):
            raise
        raise UserError(f"{path} is not a readable Parquet file ({error or type(error).__name__}): write it again") from None
    # what is written without Hugging Face's description has types that a stray fraction or a gap decided
    feature = features.get("label") if b"huggingface" in (table.schema.metadata or {}) else None
    return Table(list(range(1, file.metadata.num_rows + 1)), _by_name(path, pairs), "row", feature)


def _by_name(path: Path, pairs: list[tuple[str, list]]) -> dict[str, list]:
    """Return columns by name; of two that are called alike nobody knows which one is meant."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        twice = Counter(name for name, _ in pairs)
        for name in KNOWN & columns.keys():
            if twice[name] > 1:
                raise UserError(f"{path} has {twice[name]} columns called {name}: rename all but one")
    return columns


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def from_columns(
    source: str, numbers: list, columns: dict, unit: str = "line", feature: object = None, labelled: bool = True
) -> Rows:
    """Find text, text_pair and, if ``labelled``, label among the columns; GLUE's names of them are known.

    ``feature``: what Hugging Face `datasets` says of the label, if it does: class names, or a type of number.
    Raises UserError if a column is missing or a class name is no text.
    """
    found = list(columns)
    for names in sorted(
        GLUE_COLUMNS.values(), key=len, reverse=True
    ):  # pairs first: qnli has a "sentence" too
        if "text" not in columns and all(name in columns for name in names):
            renamed = zip(("text", "text_pair"), names, strict=False)
            columns = {**columns, **{new: columns[old] for new, old in renamed}}
    missing = [name for name in ("text", "label")[: 1 + labelled] if name not in columns]
    if missing:
        shown = ", ".join(repr(name) for name in found[:8]) or "none"
        unsplit = len(found) == 1 and re.search("[,;\t|]", found[0])
        sign = "tabs" if source.lower().endswith(".tsv") else "commas"
        hint = f"separate the columns by {sign}" if unsplit else "rename or add it"
        raise UserError(f"{source} has no column {' and no column '.join(missing)}, only {shown}: {hint}")
    names = tuple(feature.names) if isinstance(feature, hf.ClassLabel) else None
    if names is not None and not all(isinstance(name, str) and name.strip() and _whole(name) for name in names):
        raise UserError(f"{source} names its classes {names!r}, which are not all texts: write the file again")
    scores = isinstance(feature, hf.Value) and feature.dtype.startswith("float")
    labels = columns["label"] if labelled else [None] * len(numbers)
    return Rows(source, numbers, columns["text"], columns.get("text_pair"), labels, unit, names, scores)


def checked_texts(rows: Rows) -> Rows:
    """Raise UserError for empty or non-text cells, and for a file without rows."""
    if not rows.numbers:
        raise UserError(f"{rows.source} has no rows: add some, of labelled ones at least a few for each label")
    for name, column in (("text", rows.texts), ("text_pair", rows.pairs or [])):
        for i, value in enumerate(column):
            if value is None or isinstance(value, str) and _blank(value):
                raise UserError(f"{rows.at(i)}: {name} is empty: fill it in or delete the row")
            if not isinstance(value, str):
                raise UserError(f"{rows.at(i)}: {name} is {value!r}, not a text: put it in quotation marks")
            if not _whole(value):
                raise UserError(f"{rows.at(i)}: {name} holds half a character (\\ud800…): delete it")
    return rows


def _blank(text: str) -> bool:
    """Tell whether a text shows nothing: no characters, or only spaces, controls and signs of no width."""
    return all(unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


def _whole(text: str) -> bool:
    """Tell whether a text holds no half of a surrogate pair, which no file could be written with."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def checked(rows: Rows) -> Rows:
    """Refuse empty or non-text cells, missing labels, and fractions among names; return the rows with plain labels.

    Those are all names, or all numbers: whole ones as int, others as float. Whether these are classes or scores is for
    ``settled`` to say, which sees all splits, as ``checked_splits`` does. Raises UserError, with the row, for what it refuses:
    also a label that is neither a finite number nor a name.
    """
    checked_texts(rows)
    labels = [_plain_label(label, rows.at(i)) for i, label in enumerate(rows.labels)]
    named = next((i for i, label in enumerate(labels) if isinstance(label, str)), None)
    if named is None:
        return replace(rows, labels=labels)
    for i, label in enumerate(labels):
        if isinstance(label, float):
            why = f"label {rows.labels[i]} is a fraction, no class, and {rows.unit} {rows.numbers[named]} has {labels[named]!r}"
            raise UserError(f"{rows.at(i)}: {why}: use whole numbers or names for classes, numbers alone for scores")
    return replace(rows, labels=_as_written(rows.labels, labels))


def _as_written(raw: list, labels: list) -> list[str]:
    """Return labels as names: 12e4 or 007 is no number beside 12f4; 1.0 is 1, which some program wrote as a fraction."""
    told = (text.strip() if isinstance(text, str) else str(text) for text in raw)
    return [str(label) if re.fullmatch(r"-?\d+\.0*", text) else text for text, label in zip(told, labels, strict=True)]


def checked_splits(parts: dict[str, Rows]) -> dict[str, Rows]:
    """Return each split ``checked``; where one has names for labels, and none fractions, all numbers are names (007 stays 007)."""
    plain = {name: checked(rows) for name, rows in parts.items()}
    kinds = {type(label) for rows in plain.values() for label in rows.labels}
    if str not in kinds or float in kinds:
        return plain

    def numbered(rows: Rows) -> bool:  # not by names of its own, and not -1 everywhere, which hides the label
        return rows.names is None and all(isinstance(label, int) for label in rows.labels) and set(rows.labels) != {-1}

    return {
        name: replace(rows, labels=_as_written(parts[name].labels, rows.labels)) if numbered(rows) else rows
        for name, rows in plain.items()
    }


def settled(parts: dict[str, Rows]) -> dict[str, Rows]:
    """Decide whether checked labels are classes or scores, by the train split (or the only one); scores become floats.

    The rule stands at the top of this module. Raises UserError for a stray fraction among classes, and for what is no
    score among scores.
    """
    train = parts.get("train") or next(iter(parts.values()))
    fractions = sum(isinstance(label, float) for label in train.labels)
    # two at the least: a single one is a slip, however few rows there are
    if not (train.scores or fractions >= max(2, FRACTIONS * len(train.labels))):
        for rows in parts.values():
            stray = next((i for i, label in enumerate(rows.labels) if isinstance(label, float)), None)
            if stray is not None:
                raise UserError(f"{rows.at(stray)}: label {rows.labels[stray]} {_stray(rows)}")
        return parts
    for rows in parts.values():
        for i, label in enumerate(rows.labels):
            if isinstance(label, str):
                raise UserError(f"{rows.at(i)}: label {label} is no number, but {train.source} has scores: correct it")
            if abs(label) > LARGEST_SCORE:
                raise UserError(f"{rows.at(i)}: label {label} is larger than {LARGEST_SCORE:,.0f}: rescale the scores")
    return {name: replace(rows, labels=[float(label) for label in rows.labels], names=None) for name, rows in parts.items()}


def _stray(rows: Rows) -> str:
    count = sum(isinstance(label, float) for label in rows.labels)
    remedy = f"use whole numbers or names for classes; scores need fractions in {FRACTIONS:.0%} of the rows of train or more"
    return f"is a fraction, no class ({count} of {len(rows.labels)} labels): {remedy} (dividing all by 10 gives them)"


def _plain_label(label: object, where: str) -> str | int | float:
    """Return a label as number or name; the texts "1", "1.0" and "1.0e+00" of a CSV file are the whole number 1."""
    if isinstance(label, str):
        label = label.strip()
    if label is None or str(label).lower() in ("", "nan", "<na>"):
        raise UserError(f"{where}: label is missing: fill it in or delete the row")
    if isinstance(label, int):
        return int(label)
    number = re.fullmatch(r"([+-]?\d{1,18})(\.\d+)?", str(label))
    if number and not (number[2] or ".").strip(".0"):
        return int(number[1])
    if number or isinstance(label, float) or re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+|[+-]?\.\d+", str(label)):
        value = float(label)
        if not math.isfinite(value):
            raise UserError(f"{where}: label {label} is no finite number: correct it or delete the row")
        # numpy.savetxt writes 1 as 1.000000e+00; up to 1e15 a float is exact enough to be told from a fraction
        return int(value) if isinstance(label, str) and value.is_integer() and abs(value) < 1e15 else value
    if not isinstance(label, str) or re.search("[\ud800-\udfff]", label):
        raise UserError(f"{where}: label is {label!r}: use a whole number or a name")
    return label
