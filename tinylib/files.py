"""Tables from the user's files: CSV, TSV, JSONL and Parquet, each cell checked, each row known by its number.

What cannot be used is refused with the file, the row and the remedy, so that a mistake is found in the file
and not in a traceback of the training.
"""

import csv
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq

from tinylib.errors import UserError

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


def normalise(text: str) -> str:
    """Fold case and whitespace: two texts that agree after it count as the same sentence."""
    return " ".join(text.casefold().split())


def read(path: Path) -> Rows:
    """Read one CSV, TSV, JSONL or Parquet file, with the row numbers that an error message will need."""
    reader = READERS.get(path.suffix.lower())
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
    return from_columns(str(path), [line for line, _ in records[1:]], columns)


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
    columns = {name: [record.get(name) for record in records] for name in names}
    return from_columns(str(path), numbers, columns)


def _read_parquet(path: Path) -> Rows:
    try:
        table = pq.ParquetFile(path).read()
        features = hf.Features.from_arrow_schema(table.schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}): write it again") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return from_columns(str(path), list(range(1, table.num_rows + 1)), columns, "row", features.get("label"))


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def from_columns(
    source: str, numbers: list, columns: dict, unit: str = "line", feature: object = None
) -> Rows:
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


def checked(rows: Rows) -> Rows:
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
