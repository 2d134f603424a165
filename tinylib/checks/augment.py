"""Checks of lesson 08: copies that change nothing, neighbours by cosine, words for a blank, one copy by Algorithm 1."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylib.augment import WordVectors, is_word
from tinylib.checks.core import Wrong, call, check, draw, generator
from tinylib.checks.start import number


def strings(name: str, answer) -> list[str]:
    """Return an answer as a list of strings, or refuse it by what it is instead."""
    if isinstance(answer, str):
        raise Wrong(f"{name} should be a list of strings, but yours is one string.")
    if isinstance(answer, Tensor):
        raise Wrong(f"{name} should be a list of strings, but yours is a tensor: look up the string of each index.")
    if not isinstance(answer, list | tuple):
        raise Wrong(f"{name} should be a list of strings, but yours is a {type(answer).__name__}.")
    other = next((type(x) for x in answer if not isinstance(x, str)), None)
    if other:
        why = {
            int: "numbers: look up the string of each index",
            float: "scores: return the strings that have them",
            Tensor: "tensors: turn the indices into numbers with .tolist() and look up the string of each",
            tuple: "tuples: keep the strings alone",
            list: "lists: one flat list is wanted",
        }
        raise Wrong(f"{name} should be a list of strings, but yours holds {why.get(other, other.__name__)}.")
    return list(answer)


@check("unchanged_share")
def unchanged_share(attempt) -> None:
    """The share of copies that equal their sentence."""
    for n, p, hit in ((6, 0.4, 0.3), (11, 0.25, 0.7), (19, 0.45, 0.55), (3, 1.0, 0.5), (4, 0.0, 0.2)):
        got, stays = number("The share", call(attempt, n, p, hit)), 1 - p * (1 - hit)
        right = stays**n
        if abs(got / right - 1) <= 1e-5:  # float32 will do
            continue
        known = {
            "the probability that one word is not replaced; a replaced one may get itself back, and all n must stay": 1 - p,
            "the share of copies in which no word is replaced: a replaced word may get itself back": (1 - p) ** n,
            "the probability that one word stays: all n must, so raise it to the power n": stays,
            "the share of copies that do change": 1 - right,
            "the share of copies in which every word is replaced": p**n,
            "the share of copies in which every word changes": (p * (1 - hit)) ** n,
            "the share of copies in which at least one word stays: all must": 1 - (p * (1 - hit)) ** n,
            "for one word that is not replaced *and* is hit; either is enough": (1 - p) * hit,
            "for words that are not replaced *and* are hit; either is enough": ((1 - p) * hit) ** n,
            "with hit as one more condition; a word that is not replaced needs no hit": (1 - p) ** n * hit,
            "with hit the wrong way round: a hit gives the word back, so it changes with p·(1 − hit)": (1 - p * hit) ** n,
            "with hit added as it is: only a replaced word can be hit, so add p·hit": (1 - p + hit) ** n,
            "for all kept or all hit; each word goes its own way": (1 - p) ** n + (p * hit) ** n,
            "for words that are all replaced and hit: those that are not replaced stay, too": (p * hit) ** n,
            "the share if every word is replaced (p = 1)": hit**n,
            "with p and 1 − p exchanged: p is the probability that a word is replaced": (p + (1 - p) * hit) ** n,
            "the number of words that change on average, not the probability that none does": n * p * (1 - hit),
            "1 minus the mean number of words that change, near the answer for a small p alone": 1 - n * p * (1 - hit),
            "the number of words that stay on average: raise to the power n instead of multiplying by n": n * stays,
            "a percentage; give a share such as 0.5": 100 * right,
        }  # fmt: skip
        case = f"For {n} words, p = {p} and hit = {hit}"
        for sentence, value in known.items():
            if abs(got - value) <= 1e-6 * abs(value):
                raise Wrong(f"{case} you return {got:.4g}, which is {sentence}.")
        raise Wrong(f"{case} the share is {right:.4g}, but you return {got:.4g}. Begin with one word: how can it stay?")


NAMES = "great film poor story fine movie bad plot good actor dull".split()


def _vectors(n: int, seed: int) -> Tensor:
    """Draw word vectors of quite different lengths, the only case in which dot product and cosine disagree."""
    return (draw(n, 4, seed=seed) * draw(n, 1, seed=seed + 500).exp()).float()


@check("nearest_words")
def nearest_words(attempt) -> None:
    """The k words of the largest cosine, the nearest first."""
    cases = [
        ("good", NAMES, _vectors(11, 15), 4),
        ("film", NAMES[:8], _vectors(8, 6), 3),
        ("bad", NAMES, _vectors(11, 2), 10),
    ]
    for word, twin in (("movie", 1), ("movie", 8)):  # a word of the same direction, before and after it
        vectors = _vectors(11, 3)
        vectors[twin] = 2 * vectors[NAMES.index(word)]
        cases.append((word, NAMES, vectors, 4))
    for word, words, vectors, k in cases:
        got = strings("The answer", call(attempt, word, list(words), vectors.clone(), k))
        wanted = WordVectors(words, vectors).nearest(word, k)
        if got != wanted:
            _explain_neighbours(got, wanted, word, words, vectors, k)
    _check_stranger(attempt, "zebra", vectors, k)


def _explain_neighbours(
    got: list[str], wanted: list[str], word: str, words: list[str], vectors: Tensor, k: int
) -> None:
    """Raise Wrong with what was measured and what was cut out of the ranking."""
    case = f"For {word!r} and k={k} you return {got}."
    if got == words[:k]:
        raise Wrong(f"{case} These are the first words of the list, whatever their vectors: rank all words by cosine.")
    if unknown := [w for w in got if w not in words]:
        raise Wrong(f"{case} {unknown[0]!r} is not in the list of words.")
    own, units = vectors[words.index(word)], F.normalize(vectors, dim=-1)
    cosines = units @ units[words.index(word)]
    twin = words[int(cosines.masked_fill(torch.tensor([w == word for w in words]), -2).argmax())]
    if cosines[words.index(twin)] > 0.9999 and word in got:
        raise Wrong(
            f"{case} The first of the ranking is not always the word itself: {twin!r} has the same direction. Take the word "
            "off by its name or its index."
        )
    if cosines[words.index(twin)] > 0.9999 and twin not in got:
        raise Wrong(
            f"{case} {twin!r} is missing, whose cosine with {word!r} is 1, too: take the word itself off by its name, not "
            "by its cosine. (A dict from cosine to word would lose it as well.)"
        )
    columns = F.normalize(vectors, dim=0)
    measures = {
        "": cosines,
        "You rank by the dot product, which grows with the length of a vector: divide by the length of each.": vectors @ own,
        "You rank by the Euclidean distance, in which lengths count: the cosine sees directions alone.": -(
            vectors - own
        ).norm(dim=-1),
        "You rank by the sum of differences, in which lengths count: the cosine sees directions alone.": -(
            vectors - own
        ).abs().sum(-1),
        "You rank by the absolute cosine: −1 is the opposite direction, the farthest of all.": cosines.abs(),
        "You normalise columns: a row is a word's vector and gets length 1 (dim=-1).": columns @ columns[words.index(word)],
    }  # fmt: skip
    for measure, scores in measures.items():
        for cut, answer in _cuts([words[i] for i in scores.argsort(descending=True).tolist()], word, k).items():
            if got == answer:
                raise Wrong(" ".join(filter(None, (case, measure, cut))))
    if word in got:
        raise Wrong(f"{case} {word!r} itself is among them: a word is not its own neighbour.")
    if sorted(got) == sorted(wanted):
        raise Wrong(
            f"{case} These are the right words, but not in the order of their cosines: the nearest comes first."
        )
    if len(got) != k:
        raise Wrong(f"{case} {k} words are asked for, not {len(got)}.")
    numbers = ", ".join(f"{w} {cosines[words.index(w)]:.3f}" for w in wanted)
    raise Wrong(f"{case} The largest cosines are {numbers}.")


def _cuts(ranked: list[str], word: str, k: int) -> dict[str, list[str]]:
    """Return what may be cut out of a ranking, the right answer first."""
    others = [w for w in ranked if w != word]
    return {
        "": others[:k],
        "You take off the first of the ranking, which need not be the word itself.": ranked[1 : k + 1],
        "The word itself is among them: its cosine with itself is 1, but it is not its own neighbour.": ranked[:k],
        "The word itself is among them, and so there are k + 1.": ranked[: k + 1],
        "There is one too many: k + 1 leaves room for the word itself, which has to go.": others[: k + 1],
        "There is one too few: take the word itself off before you cut to k.": others[: k - 1],
        "These are the farthest words: rank from large to small.": others[::-1][:k],
        "The right words, but the nearest comes last.": others[:k][::-1],
    }


def _check_stranger(attempt: Callable, word: str, vectors: Tensor, k: int) -> None:
    """Raise Wrong unless a word that is not in the list has no neighbours."""
    case = f"For {word!r}, which is not among the words,"
    try:
        got = call(attempt, word, list(NAMES), vectors.clone(), k)
    except Wrong as wrong:
        raise Wrong(f"{case} return [], as it has no vector. {wrong}") from None
    except Exception as error:  # noqa: BLE001 (whatever .index() or a dict raises)
        raise Wrong(f"{case} your function raises {type(error).__name__}. It has no vector, so return [].") from None
    if strings("The answer", got):
        raise Wrong(f"{case} you return {got}. It has no vector, so return [].")


@check("blank_candidates")
def blank_candidates(attempt) -> None:
    """The k most probable whole words for a blank."""
    for ranking, k, highest in (
        (". the ##s [MASK] , good 2 ##ly film café ! story of and great 1998", 5, 9.5),
        ("very ##ed a 3 ; [SEP] plot - ##ing actor 1960 by ##er ' to in [PAD]", 4, -1.5),  # no logit above 0
        ("##s ##ly [CLS] . ##ing , ! [UNK] ##ed ; : film 7 plot the [SEP] a so", 3, 2.0),  # no word among the first 11
    ):
        ranked = ranking.split()
        order = torch.randperm(len(ranked), generator=generator(k)).tolist()
        vocabulary = [ranked[r] for r in order]
        logits = torch.tensor([highest - 0.7 * r - 0.01 * r * r for r in order])
        got = strings("The answer", call(attempt, logits, list(vocabulary), k))
        if got != _fit(ranked)[:k]:
            _explain_candidates(got, ranked, vocabulary, logits, k)


def _fit(tokens: Iterable[str]) -> list[str]:
    return [token for token in tokens if is_word(token)]


def _explain_candidates(got: list[str], ranked: list[str], vocabulary: list[str], logits: Tensor, k: int) -> None:
    """Raise Wrong with what the tokens returned are, or how they were chosen."""
    words, by_size = _fit(ranked), [vocabulary[i] for i in logits.abs().argsort(descending=True).tolist()]
    case = f"From the ranking {' '.join(ranked[: k + 5])} … you return {got} for k={k}."
    known = {
        "These are the k most probable tokens, whatever they are: leave out all that are no words, then take k.": ranked[:k],
        "Numbers are missing: isalpha() refuses digits, isalnum() takes them.": [w for w in words if w.isalpha()][:k],
        "A word with an accent is missing: isalnum() knows all alphabets, a-z does not.": [w for w in words if w.isascii()][:k],
        "These are the least probable words: sort from large to small.": words[::-1][:k],
        "The right words, but the most probable comes last.": words[:k][::-1],
        "The right words, but sorted by the alphabet: the most probable comes first.": sorted(words[:k]),
        "You cut ## off: ##ly goes on with a word and is none by itself.": _fit(t.removeprefix("##") for t in ranked)[:k],
        "These are the first words of the vocabulary, whatever their logits.": _fit(vocabulary)[:k],
        "You rank by the absolute value: a large negative logit is a small probability.": _fit(by_size)[:k],
        "There is one too many.": words[: k + 1],
    }  # fmt: skip
    for sentence, answer in known.items():
        if got == answer:
            raise Wrong(f"{case} {sentence}")
    if unknown := [token for token in got if token not in vocabulary]:
        raise Wrong(f"{case} {unknown[0]!r} is not in the vocabulary: return its strings as they are.")
    if unfit := [token for token in got if not is_word(token)]:
        kinds = [f"{token} is {_kind(token)}" for token in unfit]
        zero = " All logits are negative here, and one that is set to 0 becomes the largest: use −inf."
        why = zero if logits.max() < 0 else ""
        raise Wrong(f"{case} Not all are whole words: {', '.join(kinds)}.{why}")
    if got == words[: len(got)]:
        raise Wrong(
            f"{case} Only {len(got)} of {k} come back: if you take tokens first and then drop those that are no words, "
            "some are lacking. Drop first, then take k."
        )
    if sorted(got) == sorted(words[:k]):
        raise Wrong(f"{case} These are the right words, but not in the order of their logits.")
    raise Wrong(f"{case} The most probable whole words are {words[:k]}.")


def _kind(token: str) -> str:
    if token.startswith("##"):
        return "a piece of a word"
    return "a special token" if token.startswith("[") else "punctuation"


SPARE = "tale role cast song joke idea scene voice girl hero city war quiet loud young slow warm odd brave".split()


@dataclass
class Sentence:
    """A sentence to copy, and made-up candidates: those for a blank depend on every other word that ``fill`` is shown."""

    words: list[str]
    rare: tuple[str, ...]  # words of several pieces
    strangers: tuple[str, ...]  # those of them without a vector
    draws: list[tuple[float, float]]
    probability: float
    told: list[str] | None = None  # the last answer

    @property
    def single(self) -> list[bool]:
        """Tell of each word whether it is one word piece."""
        return [word not in self.rare for word in self.words]

    def blank(self, words: list[str], i: int) -> list[str]:
        """Return 5 candidates for position i, the original word among them, as it often is."""
        chance = random.Random(" ".join([*words[:i], f"[{i}]", *words[i + 1 :]]))  # no seed but the question itself
        found = [*chance.sample(SPARE, 4), self.words[i % len(self.words)]]
        chance.shuffle(found)
        return found

    def near(self, word: str) -> list[str]:
        """Return 3 neighbours of a word, or none."""
        return [] if word in self.strangers else random.Random(word).sample(SPARE, 3)

    def fill(self, words, i) -> list[str]:
        """Answer the attempt's question for a blank, or refuse the question."""
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise Wrong("fill(words, i) takes a list of all words, then a position; you give it something else.")
        if len(words) != len(self.words):
            raise Wrong(
                f"You show fill {len(words)} words of a sentence of {len(self.words)}: the model sees the whole copy, what "
                "comes after the blank as well, and a new word stands in place of the old."
            )
        if not isinstance(i, int) or not 0 <= i < len(words):
            raise Wrong(f"You ask fill for position {i!r} of {len(words)} words: it is that of the word, from 0.")
        self.told = self.blank(list(words), i)
        return list(self.told)

    def neighbours(self, word) -> list[str]:
        """Answer the attempt's question for neighbours, or refuse the question."""
        if word not in self.words:
            raise Wrong(f"You ask for the neighbours of {word!r}: ask for those of the word at this place, words[i].")
        self.told = self.near(word)
        return list(self.told)


SENTENCES = (
    Sentence(
        "the film is zany and strangely tender but mawkish here".split(), ("zany", "strangely", "tender", "mawkish"),
        ("strangely",),
        [(0.71, 0.10), (0.13, 0.74), (0.22, 0.38), (0.31, 0.88), (0.93, 0.05), (0.08, 0.52), (0.64, 0.29), (0.37, 0.53),
         (0.55, 0.36), (0.85, 0.45)],
        0.4,
    ),
    Sentence(
        "a warmhearted story about two quarrelsome people".split(), ("warmhearted", "quarrelsome"), ("warmhearted",),
        [(0.05, 0.81), (0.30, 0.47), (0.70, 0.12), (0.69, 0.33), (0.12, 0.92), (0.41, 0.70), (0.95, 0.27)],
        0.7,  # exactly one u
    ),
    Sentence(
        "not a dull minute in it".split(), ("minute",), (),
        [(0.99, 0.99), (0.50, 0.00), (0.00, 0.97), (0.75, 0.95), (0.98, 0.59), (0.35, 0.93)],
        1.0,
    ),
    Sentence("it works well".split(), ("works",), (), [(0.0, 0.5), (0.2, 0.9), (0.0, 0.1)], 0.0),
)  # fmt: skip


@check("augment_once")
def augment_once(attempt) -> None:
    """One copy of a sentence by Algorithm 1."""
    for case in SENTENCES:
        got = _attempted(attempt, case)
        wanted = _copied(case)
        if got == wanted:
            continue
        if _attempted(attempt, case) != got:
            raise Wrong("Your function gives another copy each time: decide by the numbers in draws, not by your own.")
        _explain_copy(attempt, got, wanted, case)


def _attempted(attempt: Callable, case: Sentence) -> list[str]:
    """Return the attempt's copy; an index that is out of range is explained by the candidates it was told last."""
    case.told = None
    try:
        answer = call(
            attempt, list(case.words), case.fill, case.neighbours, case.single, list(case.draws), case.probability
        )
    except (IndexError, ZeroDivisionError) as error:
        if case.told is None:
            raise
        what = f"Your function raises {type(error).__name__} ({error}) after it was told the candidates {case.told}"
        if not case.told:
            raise Wrong(f"{what}: where neighbours(word) gives none, the word stays as it is.") from None
        raise Wrong(
            f"{what}: int(v * len(candidates)) is within the list for every v below 1; a rounded or fixed number may not be."
        ) from None
    return strings("The copy", answer)


def _explain_copy(attempt: Callable, got: list[str], wanted: list[str], case: Sentence) -> None:
    """Raise Wrong with the mistake that gives this copy, or with the first word that differs."""
    where = f"For {' '.join(case.words)!r} and probability {case.probability} your copy is {' '.join(got)!r}."
    if "[MASK]" in got:
        raise Wrong(f"{where} A [MASK] is left in it: a word that is not replaced stays as it was.")
    fitting = [sentence for sentence, answer in _copying_mistakes(case).items() if got == answer]
    if len(fitting) > 1:  # two mistakes can give one copy; of another sentence they seldom do
        more, known = _attempted(attempt, SENTENCES[1]), _copying_mistakes(SENTENCES[1])
        fitting = [sentence for sentence in fitting if more == known[sentence]] or fitting
    if fitting:
        raise Wrong(f"{where} {fitting[0].strip()}")
    if len(got) != len(wanted):
        raise Wrong(f"{where} It has {len(got)} words, not {len(wanted)}: each word stays or gives its place to one.")
    i = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    (u, v), shown = case.draws[i], [*wanted[:i], *case.words[i:]]
    candidates = case.blank(shown, i) if case.single[i] else case.near(case.words[i])
    if u >= case.probability:
        why = f"u = {u} is not below {case.probability}, so it stays"
    elif not candidates:
        why = "it has no candidates, so it stays"
    else:
        why = f"u = {u} is below {case.probability}, and v = {v} draws candidate {int(v * len(candidates))} of {candidates}"
    raise Wrong(f"{where} Word {i} ({case.words[i]!r}) should be {wanted[i]!r}, but yours is {got[i]!r}: {why}.")


def _copied(
    case: Sentence,
    offered: Callable[[list[str], int], list[str]] | None = None,
    chosen: Callable[[float, float], bool] | None = None,
    drawn: Callable[[float, float, int], int] = lambda u, v, n: int(v * n),
    order: slice = slice(None),
) -> list[str]:
    """Return one copy by Algorithm 1, or by what a mistake makes of its steps."""
    offered = offered or (lambda new, i: case.blank(new, i) if case.single[i] else case.near(case.words[i]))
    chosen = chosen or (lambda u, v: u < case.probability)
    new = list(case.words)
    for i in [i for i, (u, v) in enumerate(case.draws) if chosen(u, v)][order]:
        if candidates := offered(new, i):
            new[i] = candidates[min(drawn(*case.draws[i], len(candidates)), len(candidates) - 1)]
    return new


def _copying_mistakes(case: Sentence) -> dict[str, list[str]]:
    p, single, old, places = case.probability, case.single, case.words, range(len(case.words))
    blank, nearest = case.blank, lambda new, i: case.near(old[i])

    def right(new, i):
        return blank(new, i) if single[i] else nearest(new, i)

    def using(**step):
        return _copied(case, **step)

    def candidates(offered):
        return _copied(case, offered=offered)

    def index(drawn):
        return _copied(case, drawn=drawn)

    changed = [u < p for u, _ in case.draws]
    lost = [changed[i] and not right(old, i) for i in places]
    kept, copied = "Words that are not replaced are lost: the copy holds every word, replaced or not.", using()
    return {
        "No word is replaced: where u < probability, put one of the candidates in the word's place.": list(old),
        "fill is shown the original: give it the copy as changed so far, so that the new words fit each other.": candidates(
            lambda new, i: right(old, i)
        ),
        "The test is the wrong way round: a word is replaced if u < probability.": using(chosen=lambda u, v: u > p),
        "The test is the wrong way round: a word is replaced if u < probability. ": using(chosen=lambda u, v: u >= p),
        "A word whose u equals the probability is replaced: test u < probability.": using(chosen=lambda u, v: u <= p),
        "u and v have changed places: the first decides whether, the second which.": using(
            chosen=lambda u, v: v < p, drawn=lambda u, v, n: int(u * n)
        ),
        "v decides both: the first number, u, decides whether a word is replaced.": using(chosen=lambda u, v: v < p),
        "u decides both: the second number, v, decides which candidate it is.": index(lambda u, v, n: int(u * n)),
        "Every word is replaced, whatever u is: only those with u < probability are.": using(chosen=lambda u, v: True),
        "One number decides for the whole sentence: each word has its own u.": using(chosen=lambda *_: changed[0]),
        "You always take the first candidate: v draws one of them.": index(lambda u, v, n: 0),
        "You always take the last candidate: v draws one of them.": index(lambda u, v, n: n - 1),
        "You round v * len(candidates): the first would get half its share; int() cuts the fraction off.": index(
            lambda u, v, n: round(v * n)
        ),
        "You multiply v by len(candidates) − 1: the last would never be drawn.": index(lambda u, v, n: int(v * (n - 1))),
        "You round: the first and the last candidate would get half their share.": index(lambda u, v, n: round(v * (n - 1))),
        "fill and neighbours have changed places: the model fills in for words of one piece.": candidates(
            lambda new, i: nearest(new, i) if single[i] else blank(new, i)
        ),
        "You always ask fill: a word of several pieces (single[i] is False) takes neighbours(word).": candidates(blank),
        "You always ask neighbours: a word of one piece (single[i] is True) takes fill(words, i).": candidates(nearest),
        "Where neighbours gives [], you ask fill: a word without candidates stays.": candidates(
            lambda new, i: right(new, i) or blank(new, i)
        ),
        "You join the candidates of fill and neighbours: a word takes those of one.": candidates(
            lambda new, i: blank(new, i) + nearest(new, i)
        ),
        "fill is asked for position i + 1: it is that of the word, without [CLS].": candidates(
            lambda new, i: blank(new, i + 1) if single[i] else nearest(new, i)
        ),
        "fill is asked for position i − 1: it is that of the word, from 0.": candidates(
            lambda new, i: blank(new, i - 1) if single[i] else nearest(new, i)
        ),
        "You leave the original out of its candidates: it may be drawn, and the word then stays.": candidates(
            lambda new, i: [word for word in right(new, i) if word != old[i]]
        ),
        "You sort the candidates: v draws from them in the order given.": candidates(lambda new, i: sorted(right(new, i))),
        "Only the first word drawn is replaced: does `return` or `break` end the loop?": using(order=slice(1)),
        "You go from the last word to the first: go from the first to the last.": using(order=slice(None, None, -1)),
        "A word that is drawn but has no candidates is lost: it stays as it was.": [copied[i] for i in places if not lost[i]],
        kept: [copied[i] for i in places if changed[i]],
        f"{kept} ": [copied[i] for i in places if changed[i] and not lost[i]],
    }  # fmt: skip
