"""From text to batches: the tokenizer (Hugging Face's), encoding, padding, and batches of like length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from tinylib import models
from tinylib.bert import read_config, tokenizer_in
from tinylib.config import BertConfig
from tinylib.errors import UserError
from tinylib.stored import first_line

POOL = 64  # batches' worth of texts sorted together: enough for little padding, few enough to stay shuffled
TOGETHER = 1000  # texts tokenized at a time: what a tokenizer notes of each token takes far more room than its number


def load_tokenizer(source: str | Path):
    """Return the fast Hugging Face tokenizer of a folder, a shipped name or a hub name.

    Raises UserError if there is none, if its files are damaged, or if it names no token for a text's beginning or end.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = models.resolve(source)
    # Without these files transformers would make a tokenizer of five tokens, which finds [UNK] everywhere.
    if tokenizer_in(folder) is None:
        raise UserError(f"{folder} has no tokenizer; copy the model's tokenizer.json into it")
    if (folder / "config.json").exists():  # transformers reads it too, and what is wrong there is not the tokenizer's fault
        told = read_config(folder)
        if told.get("model_type", "bert") == "bert":
            BertConfig.from_dict(told, where=str(folder / "config.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # an empty vocabulary, or none for what it does not know, is noticed only here
        tokenizer(["a ☃"], ["c d"], truncation=True, max_length=6, return_token_type_ids=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # ValueError, OSError, TypeError, and the Rust library's own, whose panics are no Exception
        why = first_line(error)
        if (folder / "config.json").exists():
            try:
                AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except Exception as first:
                told = folder / "config.json"
                raise UserError(f"{told} cannot be read by transformers ({first_line(first)}); correct or copy it again") from None
        raise UserError(f"{folder} holds a damaged tokenizer ({why}); copy its tokenizer.json again") from None
    # [CLS] and [SEP], of RoBERTa <s> and </s>: packing and augmenting set them by number, and a head reads the first one.
    # A padding token is not asked for: the mask hides what stands in its place.
    if lacks := [name for name in ("cls_token", "sep_token") if getattr(tokenizer, f"{name}_id") is None]:
        why = f"the tokenizer in {folder} names no {' and no '.join(lacks)}, between which BERT reads a text"
        raise UserError(f"{why}; copy the model's tokenizer_config.json and tokenizer.json again")
    return tokenizer


def same_vocabulary(one: str | Path, other: str | Path) -> bool:
    """Tell whether the tokenizers of two models give every token the same number.

    Raises UserError as ``load_tokenizer`` does.
    """
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()


@dataclass(frozen=True)
class Encoded:
    """Token ids of N texts, unpadded: ``ids[n]`` and ``segments[n]`` are 1-D, of the text's own length."""

    ids: tuple[Tensor, ...]
    segments: tuple[Tensor, ...]
    pad_id: int = 0
    truncated: int = 0  # how many texts were cut at max_length

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each text, [CLS] and [SEP] counted."""
        return torch.tensor([len(row) for row in self.ids], dtype=torch.long)

    def select(self, rows: Sequence[int]) -> "Encoded":
        """Return the texts at ``rows``, in that order."""
        return Encoded(tuple(self.ids[r] for r in rows), tuple(self.segments[r] for r in rows), self.pad_id)


def encode(tokenizer, texts: Sequence[str], text_pairs: Sequence[str] | None = None, max_length: int = 64) -> Encoded:
    """Tokenize texts (or pairs) and cut them at ``max_length`` tokens, [CLS] and [SEP] counted.

    The paper uses 64, and 128 for pairs; of a pair the longer text is cut first. Raises UserError if there
    are not as many pairs as texts, or if ``max_length`` leaves no room for a token of each.
    """
    paired = text_pairs is not None
    shortest = tokenizer.num_special_tokens_to_add(pair=paired) + 1 + paired  # RoBERTa's pairs have a separator more than BERT's
    if max_length < shortest:
        raise UserError(f"max_length={max_length} leaves no room for the text; give at least {shortest}")
    if paired and len(text_pairs) != len(texts):
        raise UserError(f"{len(texts)} texts and {len(text_pairs)} text_pairs: give one of each a row")
    if not len(texts):
        return Encoded((), (), pad_id=tokenizer.pad_token_id or 0)
    # Segments that the tokenizer would not give of itself (DistilBERT's) stay 0: a model that is used without this package
    # would not see them either.
    given = int("token_type_ids" in tokenizer.model_input_names)
    ids: list[Tensor] = []
    segments: list[Tensor] = []
    cut = 0
    for start in range(0, len(texts), TOGETHER):
        part = slice(start, start + TOGETHER)
        pairs = list(text_pairs[part]) if paired else None
        rows = tokenizer(list(texts[part]), pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
        ids += [torch.tensor(row, dtype=torch.long) for row in rows["input_ids"]]
        segments += [torch.tensor(row, dtype=torch.long) * given for row in rows["token_type_ids"]]
        # what was cut off is kept there, of pairs too; a text of exactly max_length tokens leaves nothing
        cut += sum(bool(row.overflowing) for row in rows.encodings)
    return Encoded(tuple(ids), tuple(segments), pad_id=tokenizer.pad_token_id or 0, truncated=cut)


def pad(encoded: Encoded, rows: Sequence[int]) -> dict[str, Tensor]:
    """Return the chosen texts as one batch: ids, mask (True = real token) and segments, each (B, T).

    T is the longest of them, so a batch of like lengths holds little padding.
    """
    ids = pad_sequence([encoded.ids[r] for r in rows], batch_first=True, padding_value=encoded.pad_id)
    segments = pad_sequence([encoded.segments[r] for r in rows], batch_first=True)
    lengths = torch.tensor([len(encoded.ids[r]) for r in rows])
    return {"ids": ids, "mask": torch.arange(ids.shape[1])[None] < lengths[:, None], "segments": segments}


class LengthBuckets(Sampler):
    """Yield batches (lists of rows) of texts of like length, reproducibly shuffled.

    Each epoch shuffles all rows, cuts them into pools of ``POOL`` batches, sorts each pool by length, cuts it
    into batches and shuffles the batches. Seed and epoch decide the order, so that a run that
    is resumed sees the same one (``set_epoch``). Raises UserError for ``batch_size`` below 1.
    """

    def __init__(self, lengths: Int[Tensor, " N"], batch_size: int, seed: int = 0, shuffle: bool = True):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.lengths, self.batch_size, self.seed, self.shuffle = lengths, batch_size, seed, shuffle
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order is yielded next, and how many of its batches are already done."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0  # for this pass alone: whoever iterates next gets all
        return iter(self._batches()[start:])

    def _batches(self) -> list[list[int]]:
        N, size = len(self.lengths), self.batch_size
        if not N:
            return []
        if not self.shuffle:
            return [chunk.tolist() for chunk in torch.argsort(self.lengths, stable=True).split(size)]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(N, generator=generator)
        batches = []
        for pool in order.split(POOL * size):
            by_length = pool[torch.argsort(self.lengths[pool], stable=True)]
            batches += by_length.split(size)
        return [batches[b].tolist() for b in torch.randperm(len(batches), generator=generator).tolist()]


def padding_waste(lengths: Int[Tensor, " N"], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of a padded epoch's positions that hold no token."""
    positions = sum(len(b) * int(lengths[list(b)].max()) for b in batches)
    tokens = sum(int(lengths[list(b)].sum()) for b in batches)
    return 1.0 - tokens / positions
