"""Data augmentation of TinyBERT (Jiao et al. 2020, Algorithm 1): copies of a sentence with some of its words replaced.

For each copy and each word: a word that is one word piece takes the masked language model's K most probable words at its
place, in the copy as changed so far; any other word takes its K nearest words by word vector; with probability p_t one of
the K, drawn uniformly, replaces it. Where the paper leaves a choice, or its code differs:

- A word is what the tokenizer takes for one and what holds letters and digits only, so "isn't" is isn, ', t. Punctuation
  and symbols are never replaced and never candidates; neither are special tokens and pieces ("##ly").
- The model's K words may hold the original one, as in the paper; the nearest words do not (a word is not its own neighbour).
- A word that is not replaced stays as it was. Read to the letter, Algorithm 1 would leave its [MASK] in the copy.
- Copies may equal the sentence or each other, as in the paper; its code drops those, and spares stop words.

The model runs only where a word is replaced, and all copies advance together, each to its next word to replace.
"""

import functools
import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tinylib import models, onednn
from tinylib.bert import Bert
from tinylib.datasets import data_folder
from tinylib.errors import UserError
from tinylib.stored import first_line, read_tensors
from tinylib.text import POOL, Encoded, LengthBuckets, pad

BATCH = 32  # sentences; more are slower on a CPU, whose cache they overflow, and faster on a GPU
TIE = 2e-4  # two logits as close as that may change places with the batch's shape; float32 moves them by a tenth of it

Question = tuple[tuple[int, ...], int]  # token ids of a sentence with one [MASK], and the place of that [MASK]
Draws = list[list[float]]  # one copy's: for each word two numbers of [0, 1), replace it or not, and which candidate
Copy = Generator[Question, list[str], str]  # asks, is told the K words, and ends with the copy's text


@dataclass(frozen=True)
class AugmentSettings:
    """How sentences are augmented; the defaults are the paper's (section 3.2). Raises UserError for a value out of range."""

    copies: int = 20  # N_a, of each sentence
    probability: float = 0.4  # p_t, that a word is replaced
    candidates: int = 15  # K, the words that one is drawn from
    max_length: int = 128  # tokens that the model reads; words beyond them are not replaced

    def __post_init__(self):
        for name, least in (("copies", 1), ("candidates", 1), ("max_length", 3)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.probability <= 1:
            raise UserError(f"probability={self.probability} must lie between 0 and 1; the paper's is 0.4")


class WordVectors:
    """Word vectors to look up a word's neighbours in: ``words[i]`` has row i of ``vectors``.

    Raises UserError unless each word has one vector and stands there once.
    """

    def __init__(self, words: Sequence[str], vectors: Float[Tensor, "N E"]):
        if len(words) != len(vectors):
            raise UserError(f"{len(words)} words but {len(vectors)} vectors; give one vector a word, in the same order")
        self.words = list(words)
        self.rows = {word: row for row, word in enumerate(self.words)}
        if len(self.rows) < len(self.words):  # the second would be the first one's nearest neighbour
            twice = next(word for row, word in enumerate(self.words) if self.rows[word] != row)
            raise UserError(f"the word {twice!r} stands twice; give one vector a word")
        # In float64 no rounding can swap two neighbours, however many words are looked up at once.
        self.directions = F.normalize(vectors.double(), dim=-1)
        self.unfit = torch.tensor([not is_word(word) for word in self.words])
        self._known: dict[tuple[str, int], list[str]] = {}

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "WordVectors":
        """Read vectors.safetensors (tensor "vectors", (N, E)) and words.txt (a word a line); the shipped ones if None.

        Raises UserError if one of the two is missing or damaged, or if they do not fit together.
        """
        folder = Path(folder) if folder is not None else data_folder() / "word_vectors"
        try:
            words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
            vectors = read_tensors(folder / "vectors.safetensors")["vectors"]
            if vectors.ndim != 2 or not vectors.is_floating_point():
                raise ValueError(f"vectors is {tuple(vectors.shape)} {vectors.dtype}, not (words, numbers of each)")
            return cls(words[:-1] if words[-1] == "" else words, vectors)
        except (LookupError, ValueError, OSError) as error:  # UserError is a ValueError
            raise UserError(
                f"{folder} holds no usable word vectors ({first_line(error)}); it needs words.txt and vectors.safetensors, "
                "and None names the folder that comes with the course"
            ) from None

    @staticmethod
    def fingerprint() -> str:
        """Return the sha256 (hex) of the shipped vectors and of their words."""
        folder = data_folder() / "word_vectors"
        both = (models.sha256_of(folder / name) for name in ("vectors.safetensors", "words.txt"))
        return hashlib.sha256("".join(both).encode()).hexdigest()

    def nearest(self, word: str, k: int) -> list[str]:
        """Return the k words of the largest cosine with ``word``, the nearest first; none for a word without a vector.

        Raises UserError for ``k`` below 1.
        """
        return self.nearest_each([word], k)[0]

    def nearest_each(self, words: Sequence[str], k: int) -> list[list[str]]:
        """Return the k nearest words of each word; all that were not asked before are looked up in one go.

        Raises UserError for ``k`` below 1.
        """
        if k < 1:
            raise UserError(f"k={k} must be at least 1")
        new = [word for word in dict.fromkeys(words) if word in self.rows and (word, k) not in self._known]
        for part in (new[start : start + 64] for start in range(0, len(new), 64)):  # 64 rows of N cosines at a time
            rows = torch.tensor([self.rows[word] for word in part])
            cosines = (self.directions[rows] @ self.directions.T).masked_fill(self.unfit, -torch.inf)
            cosines[torch.arange(len(rows)), rows] = -torch.inf
            values, indices = cosines.topk(min(k, len(self.words)))
            for word, value, index in zip(part, values.tolist(), indices.tolist(), strict=True):
                self._known[word, k] = [self.words[i] for i, v in zip(index, value, strict=True) if v > -torch.inf]
        return [self._known.get((word, k), []).copy() for word in words]


def is_word(text: str) -> bool:
    """Tell whether a text may be replaced or replace another: letters and digits only, as BERT splits words."""
    return text.isalnum()


@dataclass(frozen=True)
class Words:
    """A text cut into the tokenizer's words; what stands between them is kept, so that ``join`` gives the text back."""

    surfaces: tuple[str, ...]  # as they stand in the text
    names: tuple[str, ...]  # as the tokenizer and the word vectors see them: lower case, no accents
    pieces: tuple[tuple[int, ...], ...]  # token ids
    gaps: tuple[str, ...]  # what stands before each word, and after the last
    joined: tuple[bool, ...]  # whether the tokenizer sees nothing in the gap: "中文" is two words

    def join(self, new: dict[int, str]) -> str:
        """Return the text with some words replaced and every other character as it was."""
        words = [new.get(i, word) for i, word in enumerate(self.surfaces)]
        text = self.gaps[0]
        for i, word in enumerate(words):
            touching = i and self.joined[i] and (i in new or i - 1 in new)
            if touching and not _splits(words[i - 1][-1]) and not _splits(word[0]):
                text += " "  # two replacements in "中文" would become one word
            text += word + self.gaps[i + 1]
        return text


def _splits(character: str) -> bool:
    """Tell whether a character is a word by itself for BERT: punctuation, and all of ASCII's symbols."""
    return unicodedata.category(character).startswith("P") or (character.isascii() and not character.isalnum())


def split_words(tokenizer, text: str) -> Words:
    """Cut a text into words with the tokenizer's own rules, so that words and word pieces line up."""
    options = {"add_special_tokens": False, "truncation": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer([text], **options).encodings[0]
    seen = tokenizer.backend_tokenizer.normalizer
    normalise = seen.normalize_str if seen else lambda s: s
    starts, ends, pieces = [], [], []
    tokens = zip(encoded.word_ids, encoded.offsets, encoded.ids, strict=True)
    for _, group in itertools.groupby(tokens, key=lambda token: token[0]):
        members = list(group)
        starts.append(members[0][1][0])
        ends.append(members[-1][1][1])
        pieces.append(tuple(token for _, _, token in members))
    for i, (end, limit) in enumerate(zip(ends, [*starts, len(text)][1:], strict=True)):
        while end < limit and unicodedata.category(text[end]).startswith("M"):
            end += 1  # the tokenizer drops a written-out accent; it goes with its letter, not with the gap
        ends[i] = end
    surfaces = tuple(text[start:end] for start, end in zip(starts, ends, strict=True))
    gaps = tuple(text[start:end] for start, end in zip([0, *ends], [*starts, len(text)], strict=True))
    names = tuple(normalise(surface).strip().lower() for surface in surfaces)
    return Words(surfaces, names, tuple(pieces), gaps, tuple(not normalise(gap) for gap in gaps))


class BlankFiller:
    """Answer what the masked language model would put at a [MASK]: its K most probable whole words, the likeliest first.

    Runs the model in evaluation mode, in batches of like length, and its vocabulary-wide head at the masked places only.
    Raises UserError for a model without a masked-LM head, a tokenizer that is not the model's, more candidates or a greater
    max_length than the two allow, and ``batch_size`` below 1.
    """

    def __init__(self, model: Bert, tokenizer, settings: AugmentSettings, batch_size: int = BATCH):
        self.model, self.settings, self.batch_size = model, settings, batch_size
        self._check(model, tokenizer)
        self.start, self.mask, self.end = tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id
        self.unknown, self.pad_id = tokenizer.unk_token_id, tokenizer.pad_token_id or 0
        self.tokenizer, self._pieces = tokenizer, {}
        self.vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        unfit = torch.ones(model.config.vocab_size, dtype=torch.bool)
        unfit[: len(tokenizer)] = torch.tensor([not is_word(token) for token in self.vocabulary])
        if settings.candidates > int((~unfit).sum()):
            raise UserError(
                f"candidates={settings.candidates} is more than the {int((~unfit).sum())} whole words of the tokenizer"
            )
        self.device = next(model.parameters()).device
        self.unfit = unfit.to(self.device)

    def _check(self, model: Bert, tokenizer) -> None:
        if model.config.head != "masked_lm":
            raise UserError(
                f"augmentation fills blanks, and this model's head is {model.config.head!r}; "
                'load one with mlm.shipped()'
            )
        if tokenizer.mask_token_id is None or len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"the tokenizer ({len(tokenizer)} tokens, mask token {tokenizer.mask_token}) is not that of the model "
                f"(vocab_size={model.config.vocab_size}); load both from one folder"
            )
        if self.settings.max_length > model.config.max_position_embeddings:
            limit = model.config.max_position_embeddings
            raise UserError(f"max_length={self.settings.max_length} is more than the model's {limit} positions")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")

    def question(self, pieces: Sequence[tuple[int, ...]], i: int) -> Question:
        """Return the token ids of a sentence with word i masked, cut at max_length, and the place of the [MASK]."""
        before = [token for piece in pieces[:i] for token in piece]
        after = [token for piece in pieces[i + 1 :] for token in piece]
        ids = [self.start, *before, self.mask, *after][: self.settings.max_length - 1]
        return (*ids, self.end), 1 + len(before)

    def may_ask(self, words: Words, i: int) -> bool:
        """Tell whether a word is one word piece, one that the model knows."""
        return len(words.pieces[i]) == 1 and words.pieces[i][0] != self.unknown

    def fits(self, pieces: Sequence[tuple[int, ...]], i: int) -> bool:
        """Tell whether word i lies within max_length, [CLS] and [SEP] counted."""
        return sum(map(len, pieces[: i + 1])) <= self.settings.max_length - 2

    def pieces_of(self, word: str) -> tuple[int, ...]:
        """Return the token ids of a word that comes into a copy."""
        if word not in self._pieces:
            self._pieces[word] = tuple(self.tokenizer.encode(word, add_special_tokens=False))
        return self._pieces[word]

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[list[str]]:
        """Return the K words of each question, in the order given; a question that comes twice is computed once."""
        if not questions:
            return []
        unique = list(dict.fromkeys(questions))
        ids = tuple(torch.tensor(question[0]) for question in unique)
        encoded = Encoded(ids, tuple(torch.zeros_like(row) for row in ids), self.pad_id)
        answers: dict[Question, list[str]] = {}
        training = self.model.training
        self.model.eval()
        try:
            for rows in LengthBuckets(encoded.lengths, self.batch_size, shuffle=False):
                tokens, close = self._likeliest(encoded, unique, rows)
                for row, best, near in zip(rows, tokens, close, strict=True):
                    if near and len(rows) > 1:  # alone, so that its neighbours in the batch cannot decide it
                        best = self._likeliest(encoded, unique, [row])[0][0]
                    answers[unique[row]] = [self.vocabulary[token] for token in best]
        finally:
            self.model.train(training)
        return [answers[question] for question in questions]

    def _likeliest(
        self, encoded: Encoded, questions: Sequence[Question], rows: list[int]
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the K likeliest tokens of each row, and whether rounding may have decided between the last and the next."""
        batch = pad(encoded, rows)
        places = torch.tensor([questions[row][1] for row in rows], device=self.device)
        with onednn.products(self.device):
            logits = self.model.token_logits(
                self._encode(batch["ids"].to(self.device), batch["mask"].to(self.device), places)
            )
        best = logits.masked_fill(self.unfit, -torch.inf).topk(self.settings.candidates + 1)
        close = best.values[:, -2] - best.values[:, -1] < TIE
        return best.indices[:, :-1].tolist(), close.tolist()

    def _encode(
        self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], places: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C"]:
        """Return the last layer's output at one place of each row."""
        # Bert.encode would run the last layer at every position, 13 % more time in all; but only one position's output is
        # read here, and that one looks at all of them.
        x, keys = self.model.embeddings(ids, None), mask[:, None, None, :]
        *layers, last = self.model.layers
        for layer in layers:
            x, _ = layer(x, keys, keep_scores=False)
        here = x[torch.arange(len(x), device=x.device), places][:, None]  # (B, 1, C)
        here = last.attention_norm(here + last.attention(here, memory=x, mask=keys)[0])
        return last.ffn_norm(here + last.down(F.gelu(last.up(here), approximate=last.gelu)))[:, 0]


def augment(
    texts: Sequence[str], model: Bert, tokenizer, vectors: WordVectors, settings: AugmentSettings | None = None,
    generator: torch.Generator | None = None, batch_size: int = BATCH, label: str | None = None,
) -> list[list[str]]:  # fmt: skip
    """Return ``settings.copies`` copies of each text, by Algorithm 1: each word is masked in the copy as changed so far.

    ``model`` has a masked-LM head and computes on its device, one forward pass for each one-piece word that is replaced.
    ``generator`` decides every draw (None: one seeded with 0), whatever ``batch_size``: all numbers are drawn text by text
    before the model runs, a draw picks from the K words in alphabetical order, and where rounding could decide which word
    is the K-th, the sentence is computed once more alone. With ``label`` a progress bar shows under that name.
    Raises UserError if ``texts`` is one string, and as ``BlankFiller`` does.
    """
    return _augment(_together, texts, model, tokenizer, vectors, settings, generator, batch_size, label)


def augment_from_original(
    texts: Sequence[str], model: Bert, tokenizer, vectors: WordVectors, settings: AugmentSettings | None = None,
    generator: torch.Generator | None = None, batch_size: int = BATCH, label: str | None = None,
) -> list[list[str]]:  # fmt: skip
    """Return copies as the authors' code makes them: each one-piece word of the *original* is masked once.

    All copies draw from the same candidates, so that a sentence costs at most one forward pass for each word, however many
    copies, where ``augment`` needs about p_t·N_a of them; but the replacements of one copy do not know of each other. (That
    code also shows the model the sentence unmasked beside the masked one, spares stop words and drops equal copies; this
    does not.) Raises UserError as ``augment`` does.
    """
    return _augment(_by_original, texts, model, tokenizer, vectors, settings, generator, batch_size, label)


def augment_pairs(
    texts: Sequence[str], text_pairs: Sequence[str], model: Bert, tokenizer, vectors: WordVectors,
    settings: AugmentSettings | None = None, generator: torch.Generator | None = None, batch_size: int = BATCH,
    label: str | None = None, method: Callable[..., list[list[str]]] = augment,
) -> list[list[tuple[str, str]]]:  # fmt: skip
    """Return copies of sentence pairs: copy i of the first with copy i of the second, each sentence augmented by itself.

    (The authors' code writes each copy of the first beside the original second, then each copy of the second beside the last
    copy of the first.) ``method`` is ``augment`` or ``augment_from_original``. Raises UserError unless there are as many
    ``text_pairs`` as ``texts``, and as ``method`` does.
    """
    if len(texts) != len(text_pairs):
        raise UserError(f"{len(texts)} texts and {len(text_pairs)} text_pairs: give one of each a row")
    generator = generator or torch.Generator().manual_seed(0)  # one for both sides, or equal texts would change alike
    first, second = (
        method(side, model, tokenizer, vectors, settings, generator, batch_size, label) for side in (texts, text_pairs)
    )
    return [list(zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)]


def _augment(
    method, texts: Sequence[str], model: Bert, tokenizer, vectors: WordVectors, settings: AugmentSettings | None,
    generator: torch.Generator | None, batch_size: int, label: str | None,
) -> list[list[str]]:  # fmt: skip
    """Cut the texts into groups that fill many batches, draw the numbers of each, and let ``method`` make the copies."""
    if isinstance(texts, str):
        raise UserError(f"texts is one string, {texts[:20]!r}…; give a list of texts")
    settings = settings or AugmentSettings()
    generator = generator or torch.Generator().manual_seed(0)
    filler, results = BlankFiller(model, tokenizer, settings, batch_size), []
    size = max(1, POOL * batch_size // settings.copies)
    bar = tqdm(total=len(texts) * settings.copies, desc=label, disable=label is None, unit="copy", leave=False)
    for start in range(0, len(texts), size):
        group = [split_words(tokenizer, text) for text in texts[start : start + size]]
        shapes = [(settings.copies, len(words.names), 2) for words in group]
        drawn = (torch.rand(shape, generator=generator, device=generator.device) for shape in shapes)
        draws = [own[:, : _in_reach(words, settings)].tolist() for words, own in zip(group, drawn, strict=True)]
        rare = (n for words in group for i, n in enumerate(words.names) if not filler.may_ask(words, i))
        vectors.nearest_each([*rare], settings.candidates)  # all in one product; each copy finds them known
        results += method(group, draws, filler, vectors, bar)
    bar.close()
    return results


def _in_reach(words: Words, settings: AugmentSettings) -> int:
    """Return how many words could lie within max_length, whatever replaces them: each that has a piece takes one at least."""
    some = [i for i, pieces in enumerate(words.pieces) if pieces]
    return some[settings.max_length] if len(some) > settings.max_length else len(words.names)


def _chosen(words: Words, draws: Draws, settings: AugmentSettings) -> list[int]:
    """Return the words to replace. Algorithm 1 draws after it ran the model; drawn before, most words need no run."""
    # "<" as a draw lies in [0, 1): p_t = 0 replaces nothing and p_t = 1 everything
    return [i for i, draw in enumerate(draws) if is_word(words.names[i]) and draw[0] < settings.probability]


def _draw(candidates: list[str], number: float) -> str:
    return sorted(candidates)[int(number * len(candidates))]


def _together(
    group: list[Words], draws: list[list[Draws]], filler: BlankFiller, vectors: WordVectors, bar: tqdm
) -> list[list[str]]:
    """Advance all copies together: each round answers every unfinished copy's question in one go."""
    copies = [
        algorithm_1(words, numbers, filler, vectors) for words, own in zip(group, draws, strict=True) for numbers in own
    ]
    done, answers = [""] * len(copies), dict.fromkeys(range(len(copies)))
    while answers:
        questions = {}
        for n, candidates in answers.items():
            try:
                questions[n] = copies[n].send(candidates)
            except StopIteration as end:
                done[n] = end.value
                bar.update()
        answers = dict(zip(questions, filler.answer(list(questions.values())), strict=True))
    size = filler.settings.copies
    return [done[start : start + size] for start in range(0, len(done), size)]


def algorithm_1(words: Words, draws: Draws, filler: BlankFiller, vectors: WordVectors) -> Copy:
    """Make one copy by Algorithm 1: yield a question where the model's words are needed, and return the text."""
    pieces, new = list(words.pieces), {}
    for i in _chosen(words, draws, filler.settings):
        if not filler.fits(pieces, i):  # asked here, as a neighbour may have more pieces than the word that it replaced
            break
        if filler.may_ask(words, i):
            candidates = yield filler.question(pieces, i)
        else:
            candidates = vectors.nearest(words.names[i], filler.settings.candidates)
        if candidates:
            new[i] = _draw(candidates, draws[i][1])
            pieces[i] = filler.pieces_of(new[i])
    return words.join(new)


def _by_original(
    group: list[Words], draws: list[list[Draws]], filler: BlankFiller, vectors: WordVectors, bar: tqdm
) -> list[list[str]]:
    """Ask once for each word that any copy replaces, with the original around it; then make the copies."""
    k, wanted = filler.settings.candidates, []
    for words, own in zip(group, draws, strict=True):
        chosen = [_chosen(words, numbers, filler.settings) for numbers in own]
        fits = functools.partial(filler.fits, words.pieces)  # and none behind the first that does not
        wanted.append([list(itertools.takewhile(fits, some)) for some in chosen])
    places = [(t, i) for t, own in enumerate(wanted) for i in sorted({i for some in own for i in some})]
    asked = [(t, i) for t, i in places if filler.may_ask(group[t], i)]
    answers = dict(zip(asked, filler.answer([filler.question(group[t].pieces, i) for t, i in asked]), strict=True))
    for t, i in set(places) - set(asked):
        answers[t, i] = vectors.nearest(group[t].names[i], k)
    results = []
    for t, (words, own) in enumerate(zip(group, draws, strict=True)):
        news = [
            {i: _draw(answers[t, i], numbers[i][1]) for i in some if answers[t, i]}
            for some, numbers in zip(wanted[t], own, strict=True)
        ]
        results.append([words.join(new) for new in news])
        bar.update(len(news))
    return results
