"""Unlabelled text for general distillation: read as a stream, tokenized and packed once, then memory-mapped.

Sentences of one document are packed into sequences of at most ``max_length`` tokens, never across documents. The packed
sequences lie in the cache as Arrow files (Hugging Face ``datasets``), which the operating system pages in as they are read:
a corpus larger than memory works the same way.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from tinylib import models
from tinylib.datasets import data_folder
from tinylib.errors import UserError
from tinylib.files import LINE_END
from tinylib.stored import first_line, read_json
from tinylib.text import Encoded, load_tokenizer, pad

PARTS = ("train", "validation")
HELD_OUT = 50  # every fiftieth document is for validation
CHUNK = 2000  # sentences tokenized at a time
LONGEST = 10_000  # sentences: a longer document is taken in parts, so that a file without empty lines is no trouble
SUFFIXES = (".parquet", ".txt")
COUNTS = "counts.json"


class Corpus(Dataset):
    """Packed sequences on disk; an item is its row number, since batches are padded whole (``train.loader``)."""

    def __init__(self, rows: hf.Dataset, pad_id: int = 0):
        self.rows, self.pad_id = rows.with_format("numpy"), pad_id
        self._lengths = torch.from_numpy(self.rows["length"][:].astype("int64"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each sequence, [CLS] and [SEP] counted."""
        return self._lengths

    @property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return int(self._lengths.sum())

    def spread(self, count: int) -> "Corpus":
        """Return a corpus of ``count`` sequences (at most), spread evenly over this one."""
        count = min(count, len(self))
        return Corpus(self.rows.select([i * len(self) // count for i in range(count)]), self.pad_id)

    def encoded(self, rows: Sequence[int]) -> Encoded:
        """Read some sequences into memory."""
        ids = tuple(torch.from_numpy(i.astype("int64")) for i in self.rows[list(rows)]["ids"])
        return Encoded(ids, tuple(torch.zeros_like(i) for i in ids), self.pad_id)

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """Return ids, mask, segments (B, T) and rows (B,), the places in the corpus."""
        return pad(self.encoded(rows), range(len(rows))) | {"rows": torch.tensor(rows)}


def load(source: str | Path, base: str | Path, max_length: int = 128) -> dict[str, Corpus]:
    """Return ``{"train": …, "validation": …}`` of a corpus, packed for the tokenizer of the model ``base``.

    ``source``: "corpus" (shipped), a file or a folder of files: .txt (one sentence or paragraph a line, an empty line between
    documents) or .parquet (columns ``document`` and ``text``, a row a sentence). Every fiftieth document is held out.
    The first call packs (about 20 s for 30 MB) into the cache, file by file, keyed by file, tokenizer and length; later calls map
    it. A call that was killed goes on with the file that it was at, and one more file packs that file alone.
    Raises UserError for a source that cannot be read or holds too few documents, and for ``max_length`` below 3.
    """
    if max_length < 3:
        raise UserError(f"max_length={max_length} leaves no room for the text; give at least 3")
    paths = files(source)
    tokenizer = load_tokenizer(base)
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    folders, begun = [], 0
    for path in paths:
        recipe = {"file": models.sha256_of(path), "tokenizer": vocabulary, "max_length": max_length, "format": 3}
        begin = begun % HELD_OUT  # of the file's first document: which ones are held out depends on it
        make = functools.partial(_pack, path, begin, tokenizer, max_length)
        folders.append(models.product("corpus", recipe | {"begin": begin}, make))
        begun += read_json(folders[-1] / COUNTS)["documents"]
    corpus = {}
    for part in PARTS:
        rows = [rows for folder in folders if len(rows := _mapped(folder / f"{part}.arrow"))]
        if not rows:
            for folder in folders:
                models.take_away(folder)
            raise UserError(
                f"the corpus {source} has too few documents for its {part} part; give {HELD_OUT} or more, in .txt files "
                "with an empty line between them"
            )
        corpus[part] = Corpus(hf.concatenate_datasets(rows), tokenizer.pad_token_id or 0)
    return corpus


def _mapped(path: Path) -> hf.Dataset:
    try:
        return hf.Dataset.from_file(str(path))
    except Exception as error:  # pyarrow's kinds; only of a corpus that was packed when the cache had no lists of its files
        remedy = f"delete {path.parent}, and it is packed anew"
        raise UserError(f"the packed corpus {path} is damaged ({first_line(error)}); {remedy}") from None


def files(source: str | Path) -> list[Path]:
    """Return the files of a corpus, sorted by name; raise UserError if there are none."""
    folder = data_folder() / "corpus" if str(source) == "corpus" else models.expanded(source)
    found = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    usable = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not usable:
        what = "holds no" if found or folder.is_dir() else "does not exist: give a folder with"
        raise UserError(f"the corpus {source} {what} .txt or .parquet files; or name the shipped one, corpus")
    return usable


def fingerprint(source: str | Path) -> dict[str, str]:
    """Return the sha256 (hex) of each file of a corpus by name; raise UserError if there is none."""
    return {path.name: models.sha256_of(path) for path in files(source)}


def documents(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Yield documents as lists of sentences, reading no more than a part of one file at a time.

    Raises UserError for a .txt file that is not UTF-8 and for a .parquet file that is damaged, lacks a column or holds what is
    no text.
    """
    for path in paths:
        yield from _parquet(path) if path.suffix.lower() == ".parquet" else _lines(path)


def _parquet(path: Path) -> Iterator[list[str]]:
    try:
        table = pq.ParquetFile(path)
        if not {"document", "text"} <= set(table.schema_arrow.names):
            raise UserError(f"{path} lacks the columns document and text; a corpus has one row a sentence")
        current, sentences = None, []
        for part in table.iter_batches(batch_size=10_000, columns=["document", "text"]):
            for number, text in zip(part["document"].to_pylist(), part["text"].to_pylist(), strict=True):
                if sentences and (number != current or len(sentences) == LONGEST):
                    yield sentences
                    sentences = []
                current = number
                if not isinstance(text, str | None):
                    raise UserError(f"{path}: a row of the column text is {text!r}, not a text; write it as strings")
                if text:
                    sentences.append(text)
        if sentences:
            yield sentences
    except UserError:
        raise
    except Exception as error:  # pyarrow's kinds, and Python's for dates beyond the calendar and the like
        raise UserError(f"{path} cannot be read ({first_line(error)}); write it again") from None


def _lines(path: Path) -> Iterator[list[str]]:
    sentences: list[str] = []
    place = 0
    with open(path, "rb") as file:
        for raw in file:
            try:
                text = raw.decode("utf-8" if place else "utf-8-sig")
            except UnicodeDecodeError as error:
                where = f"byte {place + error.start}"
                raise UserError(f"{path} is not UTF-8 ({error.reason} at {where}); save it as UTF-8") from None
            place += len(raw)
            ended = raw.endswith(b"\n")
            if raw.endswith(b"\r\r\n"):  # Windows' line end, written as text once more: one end, no empty line
                text = text.rstrip("\r\n") + "\n"
            for line in map(str.strip, re.split(LINE_END, text)[: -1 if ended else None]):
                if line:
                    sentences.append(line)
                if sentences and (not line or len(sentences) == LONGEST):
                    yield sentences
                    sentences = []
    if sentences:
        yield sentences


def pack(documents: Iterator[list[str]], tokenizer, max_length: int) -> Iterator[list[int]]:
    """Yield sequences of token ids: [CLS], as many whole sentences of one document as fit, [SEP].

    A sentence that alone is too long is cut into pieces of the full length.
    """
    room = max_length - 2
    for chunk in _chunks(documents):
        texts = [text for document in chunk for text in document]
        ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for document in chunk:
            current: list[int] = []
            for _ in document:
                sentence = next(ids)
                if current and len(current) + len(sentence) > room:
                    yield [tokenizer.cls_token_id, *current, tokenizer.sep_token_id]
                    current = []
                whole = (len(sentence) - 1) // room * room if sentence else 0  # what is cut off in full pieces; a rest stays
                for start in range(0, whole, room):
                    yield [tokenizer.cls_token_id, *sentence[start : start + room], tokenizer.sep_token_id]
                current = current + sentence[whole:]
            if current:
                yield [tokenizer.cls_token_id, *current, tokenizer.sep_token_id]


def _chunks(documents: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    chunk, size = [], 0
    for document in documents:
        # a book of one document would be a chunk too large: its sentences are taken in parts
        for start in range(0, len(document), CHUNK):
            chunk.append(document[start : start + CHUNK])
            size += len(chunk[-1])
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _pack(path: Path, begin: int, tokenizer, max_length: int, out: Path) -> None:
    """Write the packed sequences of both parts of a file into ``out``, some thousand at a time.

    ``begin``: the number of its first document, which decides with the following ones which are held out.
    """
    schema = pa.schema([("ids", pa.list_(pa.int32())), ("length", pa.int32())])
    read = dict.fromkeys(PARTS, 0)

    def own(part: str) -> Iterator[list[str]]:
        for number, document in enumerate(documents([path]), begin):
            read[part] += 1
            if (number % HELD_OUT == HELD_OUT - 1) == (part == "validation"):
                yield document

    for part in PARTS:
        bar = tqdm(pack(own(part), tokenizer, max_length), desc=f"packing {path.name} ({part})", unit="", leave=False)
        sequences = iter(bar)
        with pa.OSFile(str(out / f"{part}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while ids := list(itertools.islice(sequences, CHUNK)):
                writer.write(pa.record_batch([ids, [len(i) for i in ids]], schema=schema))
    (out / COUNTS).write_text(json.dumps({"documents": read["train"]}), encoding="utf-8")
