"""Lesson 08."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

UNMASKED = torch.finfo(torch.float32).min

# -- nearest_words -------------------------------------------------------------------------------------------


def cosine(own, vectors):
    return F.cosine_similarity(own[None], vectors)


def dot(own, vectors):
    return vectors @ own


def own_normalised(own, vectors):
    return vectors @ (own / own.norm())


def euclidean(own, vectors):
    return -torch.cdist(own[None], vectors)[0]


def manhattan(own, vectors):
    return -torch.cdist(own[None], vectors, p=1)[0]


def rank(word, words, vectors, measure=cosine):
    """Rank all words, the word itself among them."""
    if word not in words:
        return []
    scores = measure(vectors[words.index(word)], vectors)
    return [words[i] for i in scores.argsort(descending=True, stable=True).tolist()]


def nearest(word, words, vectors, k, measure=cosine):
    return [w for w in rank(word, words, vectors, measure) if w != word][:k]


def first_taken_off(word, words, vectors, k):
    return rank(word, words, vectors)[1 : k + 1]


def last_of_equals_taken_off(word, words, vectors, k):
    if word not in words:
        return []
    scores = cosine(vectors[words.index(word)], vectors).tolist()
    return [words[i] for i in sorted(range(len(words)), key=lambda i: (scores[i], i), reverse=True)][1 : k + 1]


def cosine_below_one(word, words, vectors, k):
    if word not in words:
        return []
    scores = cosine(vectors[words.index(word)], vectors)
    return [w for w in rank(word, words, vectors) if scores[words.index(w)] < 0.999][:k]


def dict_by_cosine(word, words, vectors, k):
    if word not in words:
        return []
    found = dict(zip(cosine(vectors[words.index(word)], vectors).tolist(), words, strict=True))
    return [found[c] for c in sorted(found, reverse=True) if found[c] != word][:k]


def by_columns(word, words, vectors, k):
    return nearest(word, words, F.normalize(vectors, dim=0), k, dot)


def normalised_in_place(word, words, vectors, k):
    vectors /= vectors.norm(dim=-1, keepdim=True)
    return nearest(word, words, vectors, k)


def removed_from_words(word, words, vectors, k):
    found = nearest(word, words, vectors, k)
    if word in words:
        words.remove(word)
    return found


def unknown_raises(word, words, vectors, k):
    return nearest(words[words.index(word)], words, vectors, k)


def unknown_key(word, words, vectors, k):
    rows = {w: i for i, w in enumerate(words)}
    return nearest(words[rows[word]], words, vectors, k)


def unknown_none(word, words, vectors, k):
    return nearest(word, words, vectors, k) or None


def indices(word, words, vectors, k):
    return [words.index(w) for w in nearest(word, words, vectors, k)]


def in_list_order(word, words, vectors, k):
    found = nearest(word, words, vectors, k)
    return [w for w in words if w in found]


def normalised_rows(word, words, vectors, k):
    if word not in words:
        return []
    row, units = words.index(word), F.normalize(vectors, dim=-1)
    scores = units @ units[row]
    scores[row] = -torch.inf
    return [words[i] for i in scores.topk(k).indices]


def others_normalised(word, words, vectors, k):
    return nearest(word, words, vectors, k, lambda own, all_: (all_ / all_.norm(dim=1, keepdim=True)) @ own)


def distance_of_units(word, words, vectors, k):
    return nearest(word, words, F.normalize(vectors.double(), dim=-1), k, euclidean)


# -- blank_candidates ----------------------------------------------------------------------------------------


def likely(logits, vocabulary, k, fit=str.isalnum, shown=str):
    order = logits.argsort(descending=True).tolist()
    return [shown(vocabulary[i]) for i in order if fit(shown(vocabulary[i]))][:k]


def top(logits, vocabulary, k):
    return [vocabulary[i] for i in logits.topk(k).indices]


def best_ids(logits, vocabulary, k):
    return [i for i in logits.argsort(descending=True).tolist() if vocabulary[i].isalnum()][:k]


def masked(logits, vocabulary, k, value=-torch.inf):
    unfit = torch.tensor([not token.isalnum() for token in vocabulary])
    return logits.masked_fill(unfit, value)


def assigned_in_place(logits, vocabulary, k):
    for i, token in enumerate(vocabulary):
        if not token.isalnum():
            logits[i] = -torch.inf
    return top(logits, vocabulary, k)


def filled_in_place(logits, vocabulary, k):
    unfit = torch.tensor([not token.isalnum() for token in vocabulary])
    return top(logits.masked_fill_(unfit, UNMASKED), vocabulary, k)


def emptied_vocabulary(logits, vocabulary, k):
    found = likely(logits, vocabulary, k)
    vocabulary.clear()
    return found


def one_by_one(logits, vocabulary, k):
    found, left = [], logits.softmax(-1).tolist()
    while len(found) < k:
        best = max(range(len(left)), key=left.__getitem__)
        left[best] = -1.0
        if vocabulary[best].isalnum():
            found.append(vocabulary[best])
    return found


# -- augment_once --------------------------------------------------------------------------------------------


def right_candidates(new, i, fill, neighbours, single, words):
    return fill(new, i) if single[i] else neighbours(words[i])


def of_original(new, i, fill, neighbours, single, words):
    return fill(words, i) if single[i] else neighbours(words[i])


def exchanged(new, i, fill, neighbours, single, words):
    return neighbours(words[i]) if single[i] else fill(new, i)


def either(new, i, fill, neighbours, single, words):
    return right_candidates(new, i, fill, neighbours, single, words) or fill(new, i)


def without_original(new, i, fill, neighbours, single, words):
    return [w for w in right_candidates(new, i, fill, neighbours, single, words) if w != words[i]]


def shifted(by):
    def candidates(new, i, fill, neighbours, single, words):
        return fill(new, (i + by) % len(new)) if single[i] else neighbours(words[i])

    return candidates


def copying(
    candidates=right_candidates, test=lambda u, v, p: u < p, pick=lambda u, v, n: int(v * n), order=slice(None)
):
    """Return a function that makes a copy as one should, or with one of the mistakes."""

    def attempt(words, fill, neighbours, single, draws, probability):
        new = list(words)
        for i in [i for i, (u, v) in enumerate(draws) if test(u, v, probability)][order]:
            found = candidates(new, i, fill, neighbours, single, words)
            if found:
                new[i] = found[pick(*draws[i], len(found))]
        return new

    return attempt


one_copy = copying()


def without_test_for_none(words, fill, neighbours, single, draws, probability):
    new = list(words)
    for i, (u, v) in enumerate(draws):
        if u < probability:
            found = right_candidates(new, i, fill, neighbours, single, words)
            new[i] = found[int(v * len(found))]
    return new


def fixed_number(words, fill, neighbours, single, draws, probability):
    return copying(pick=lambda u, v, n: int(v * 15))(words, fill, neighbours, single, draws, probability)


def one_draw(words, fill, neighbours, single, draws, probability):
    return copying(test=lambda u, v, p: draws[0][0] < p)(words, fill, neighbours, single, draws, probability)


def growing(words, fill, neighbours, single, draws, probability, shown=lambda new, words: new + words[len(new) :]):
    """Make the copy word by word."""
    new = []
    for word, one, (u, v) in zip(words, single, draws, strict=True):
        found = []
        if u < probability:
            found = fill(shown(new, words), len(new)) if one else neighbours(word)
        new.append(found[int(v * len(found))] if found else word)
    return new


def left_context(words, *rest):
    return growing(words, *rest, shown=lambda new, words: [*new, "[MASK]"])


def as_text(words, fill, *rest):
    return copying(lambda new, i, ask, *others: right_candidates(new, i, lambda w, j: fill(" ".join(w), j), *others))(
        words, fill, *rest
    )


def without_candidates_lost(words, fill, neighbours, single, draws, probability):
    new = one_copy(words, fill, neighbours, single, draws, probability)
    kept = [draws[i][0] >= probability or single[i] or neighbours(words[i]) for i in range(len(words))]
    return [word for word, keep in zip(new, kept, strict=True) if keep]


def unchanged_lost(words, fill, neighbours, single, draws, probability):
    new = one_copy(words, fill, neighbours, single, draws, probability)
    return [word for word, (u, _) in zip(new, draws, strict=True) if u < probability]


def mask_left(words, fill, neighbours, single, draws, probability):
    """Follow Algorithm 1 to the letter: the [MASK] of a word that is not replaced stays."""
    new = list(words)
    for i, (u, v) in enumerate(draws):
        if single[i]:
            new[i] = "[MASK]"
        found = right_candidates(new, i, fill, neighbours, single, words)
        if u < probability and found:
            new[i] = found[int(v * len(found))]
    return new


def neighbours_of_mask(words, fill, neighbours, single, draws, probability):
    new = list(words)
    for i, (u, v) in enumerate(draws):
        if u < probability:
            new[i] = "[MASK]"
            found = fill(new, i) if single[i] else neighbours(new[i])
            new[i] = found[int(v * len(found))] if found else words[i]
    return new


def in_place(words, fill, neighbours, single, draws, probability):
    new = words
    new[:] = one_copy(list(words), fill, neighbours, single, draws, probability)
    return new


def draws_used_up(words, fill, neighbours, single, draws, probability):
    new = one_copy(words, fill, neighbours, single, list(draws), probability)
    draws.clear()
    return new


def both_kept(words, *rest):
    return [
        w for old, new in zip(words, one_copy(words, *rest), strict=True) for w in ([old, new] if old != new else [old])
    ]


OWN = random.Random(0)


def own_numbers(words, fill, neighbours, single, draws, probability):
    return one_copy(words, fill, neighbours, single, [(OWN.random(), OWN.random()) for _ in words], probability)


def pairs(words, *rest):
    return [(word, word) for word in one_copy(words, *rest)]


def algorithm_to_the_letter(words, fill, neighbours, single, draws, probability):
    """Ask for candidates at every word, with the blank in the copy, and decide afterwards."""
    new = list(words)
    for i, (u, v) in enumerate(draws):
        if single[i]:
            new[i] = "[MASK]"
            found = fill(tuple(new), i)
        else:
            found = neighbours(words[i])
        new[i] = found[int(v * len(found))] if u < probability and found else words[i]
    return tuple(new)


MUTANTS = {
    "unchanged_share": [
        (lambda n, p, hit: 1 - p, "one word is not replaced"),
        (lambda n, p, hit: (1 - p) ** n, "may get itself back"),
        (lambda n, p, hit: 1 - p * (1 - hit), "power n"),
        (lambda n, p, hit: 1 - (1 - p * (1 - hit)) ** n, "do change"),
        (lambda n, p, hit: p**n, "every word is replaced"),
        (lambda n, p, hit: (p * (1 - hit)) ** n, "every word changes"),
        (lambda n, p, hit: 1 - (p * (1 - hit)) ** n, "at least one word stays"),
        (lambda n, p, hit: (1 - p) * hit, "either is enough"),
        (lambda n, p, hit: ((1 - p) * hit) ** n, "either is enough"),
        (lambda n, p, hit: (1 - p) ** n * hit, "needs no hit"),
        (lambda n, p, hit: (1 - p * hit) ** n, "wrong way round"),
        (lambda n, p, hit: (1 - p + hit) ** n, "add p·hit"),
        (lambda n, p, hit: (1 - p) ** n + (p * hit) ** n, "its own way"),
        (lambda n, p, hit: (p * hit) ** n, "not replaced stay"),
        (lambda n, p, hit: hit**n, "p = 1"),
        (lambda n, p, hit: (p + (1 - p) * hit) ** n, "exchanged"),
        (lambda n, p, hit: n * p * (1 - hit), "change on average"),
        (lambda n, p, hit: 1 - n * p * (1 - hit), "small p"),
        (lambda n, p, hit: n * (1 - p * (1 - hit)), "instead of multiplying"),
        (lambda n, p, hit: 100 * (1 - p * (1 - hit)) ** n, "percentage"),
        (lambda n, p, hit: 0.5, "you return 0.5"),
        (lambda n, p, hit: round((1 - p * (1 - hit)) ** n, 2), "Begin with one word"),
        (lambda n, p, hit: torch.full((n,), 1 - p * (1 - hit)).cumprod(0), "of shape (6,)"),
        (lambda n, p, hit: f"{(1 - p * (1 - hit)) ** n:.1%}", "should be one number"),
    ],
    "nearest_words": [
        (lambda word, words, vectors, k: words[:k], "first words of the list"),
        (lambda *a: nearest(*a, dot), "dot product"),
        (lambda *a: nearest(*a, own_normalised), "dot product"),
        (lambda *a: nearest(*a, euclidean), "Euclidean"),
        (lambda *a: nearest(*a, manhattan), "sum of differences"),
        (lambda *a: nearest(*a, lambda *b: cosine(*b).abs()), "absolute cosine"),
        (lambda *a: nearest(*a, lambda *b: -cosine(*b)), "farthest"),
        (lambda *a: nearest(*a, lambda *b: -dot(*b)), "dot product"),
        (lambda *a: nearest(*a, lambda *b: -euclidean(*b)), "farthest"),
        (by_columns, "columns"),
        (lambda *a: rank(*a[:3])[: a[3]], "itself is among them"),
        (lambda *a: rank(*a[:3], dot)[: a[3]], "dot product"),
        (lambda *a: rank(*a[:3], dot)[1 : a[3] + 1], "need not be the word itself"),
        (lambda *a: rank(*a[:3])[: a[3] + 1], "k + 1"),
        (lambda *a: nearest(*a[:3], a[3] + 1), "one too many"),
        (lambda *a: rank(*a[:3])[1 : a[3]], "before you cut"),
        (lambda *a: nearest(*a)[::-1], "nearest comes last"),
        (in_list_order, "order of their cosines"),
        (lambda *a: sorted(nearest(*a)), "order of their cosines"),
        (lambda *a: nearest(*a)[:1], "4 words are asked for"),
        (lambda *a: [a[0], *nearest(*a)][::-1], "not its own neighbour"),
        (lambda *a: [w.upper() for w in nearest(*a)], "not in the list of words"),
        (lambda *a: nearest(*a)[:-1] + nearest(*a, euclidean)[-1:], "largest cosines are"),
        (first_taken_off, "not always the word itself"),
        (last_of_equals_taken_off, "not always the word itself"),
        (cosine_below_one, "is missing"),
        (dict_by_cosine, "dict"),
        (indices, "look up the string"),
        (lambda *a: torch.tensor(indices(*a)), "tensor"),
        (lambda *a: list(torch.tensor(indices(*a))), "tolist"),
        (lambda *a: [(w, 0.5) for w in nearest(*a)], "tuples"),
        (lambda *a: " ".join(nearest(*a)), "one string"),
        (lambda *a: set(nearest(*a)), "set"),
        (normalised_in_place, "in place"),
        (removed_from_words, "in place: afterwards the list `words` is shorter"),
        (unknown_raises, "raises ValueError. It has no vector"),
        (unknown_key, "raises KeyError. It has no vector"),
        (unknown_none, "return []"),
        (lambda *a: nearest(*a) or [a[0]], "so return []"),
        (lambda *a: None, "return"),
    ],
    "blank_candidates": [
        (top, "whatever they are"),
        (lambda *a: [t for t in top(*a) if t.isalnum()], "Only 1 of 5"),
        (lambda x, v, k: [t for t in top(x, v, k + 5) if t.isalnum()][:k], "Drop first"),
        (lambda x, v, k: [t for t in top(x, v, 3 * k) if t.isalnum()][:k], "Drop first"),
        (lambda *a: likely(*a, fit=lambda t: not t.startswith("[")), "a piece of a word"),
        (lambda *a: likely(*a, fit=lambda t: not t.startswith("##")), "a special token"),
        (lambda *a: likely(*a, fit=lambda t: not t.startswith(("##", "["))), "punctuation"),
        (lambda *a: likely(*a, fit=str.isalpha), "isalpha"),
        (lambda *a: likely(*a, fit=lambda t: t.isascii() and t.isalnum()), "accent"),
        (lambda *a: likely(-a[0], *a[1:]), "least probable"),
        (lambda *a: likely(*a)[::-1], "comes last"),
        (lambda *a: sorted(likely(*a)), "alphabet"),
        (lambda x, v, k: [t for t in v if t.isalnum()][:k], "first words of the vocabulary"),
        (lambda x, v, k: [t for t in v if t in likely(x, v, k)], "order of their logits"),
        (lambda x, v, k: likely(x.abs(), v, k), "absolute value"),
        (lambda *a: likely(*a, shown=lambda t: t.removeprefix("##")), "cut ## off"),
        (lambda *a: [t.upper() for t in likely(*a)], "not in the vocabulary"),
        (lambda x, v, k: likely(x, v, k + 1), "one too many"),
        (lambda x, v, k: likely(x, v, k - 1), "Only 4 of 5"),
        (lambda x, v, k: top(masked(x, v, k, 0.0), v, k), "use −inf"),
        (best_ids, "look up the string"),
        (lambda *a: torch.tensor(best_ids(*a)), "tensor"),
        (lambda *a: masked(*a).softmax(-1).topk(a[2]).values.tolist(), "scores"),
        (lambda *a: likely(*a)[0], "one string"),
        (lambda *a: [likely(*a)], "lists"),
        (lambda x, v, k: likely(x, v, k)[1:] + ["and"], "most probable whole words are"),
        (assigned_in_place, "in place"),
        (filled_in_place, "in place"),
        (emptied_vocabulary, "in place: afterwards the list `vocabulary` is shorter"),
    ],
    "augment_once": [
        (lambda words, *rest: list(words), "No word is replaced"),
        (copying(of_original), "shown the original"),
        (copying(test=lambda u, v, p: u > p), "wrong way round"),
        (copying(test=lambda u, v, p: u >= p), "wrong way round"),
        (copying(test=lambda u, v, p: u <= p), "equals the probability"),
        (copying(test=lambda u, v, p: v < p, pick=lambda u, v, n: int(u * n)), "changed places"),
        (copying(test=lambda u, v, p: v < p), "v decides both"),
        (copying(pick=lambda u, v, n: int(u * n)), "u decides both"),
        (copying(test=lambda u, v, p: True), "Every word is replaced"),
        (one_draw, "whole sentence"),
        (copying(pick=lambda u, v, n: 0), "first candidate"),
        (copying(pick=lambda u, v, n: -1), "last candidate"),
        (copying(pick=lambda u, v, n: min(round(v * n), n - 1)), "round"),
        (copying(pick=lambda u, v, n: round(v * n)), "round"),
        (copying(pick=lambda u, v, n: int(v * (n - 1))), "never be drawn"),
        (copying(pick=lambda u, v, n: round(v * (n - 1))), "half their share"),
        (copying(exchanged), "model fills in for words of one piece"),
        (copying(lambda new, i, fill, *rest: fill(new, i)), "always ask fill"),
        (copying(lambda new, i, fill, neighbours, single, words: neighbours(words[i])), "always ask neighbours"),
        (copying(either), "without candidates stays"),
        (copying(lambda new, i, fill, near, single, words: fill(new, i) + near(words[i])), "join"),
        (copying(shifted(1)), "i + 1"),
        (copying(lambda new, i, fill, *rest: right_candidates(new, i, lambda w, j: fill(w, j + 1), *rest)), "position"),
        (copying(shifted(-1)), "i − 1"),
        (copying(lambda new, i, fill, *rest: right_candidates(new, i, lambda w, j: fill(w, w[j]), *rest)), "position"),
        (copying(without_original), "leave the original out"),
        (copying(lambda *a: sorted(right_candidates(*a))), "sort"),
        (copying(order=slice(1)), "first word drawn"),
        (copying(order=slice(None, None, -1)), "last word to the first"),
        (copying(order=slice(2)), "Word 3 ('zany') should be"),
        (without_test_for_none, "the word stays as it is"),
        (fixed_number, "fixed number"),
        (without_candidates_lost, "no candidates is lost"),
        (unchanged_lost, "holds every word"),
        (both_kept, "gives its place"),
        (mask_left, "[MASK] is left"),
        (neighbours_of_mask, "ask for the neighbours of '[MASK]'"),
        (left_context, "what comes after the blank"),
        (as_text, "a list of all words"),
        (in_place, "in place: afterwards something else stands at `words[1]`"),
        (draws_used_up, "`draws` in place"),
        (own_numbers, "numbers in draws"),
        (lambda *a: " ".join(one_copy(*a)), "one string"),
        (pairs, "tuples"),
        (lambda *a: None, "return"),
    ],
}


def share_by_counting(words, probability, hit):
    share = 1.0
    for _ in range(words):
        share *= (1 - probability) + probability * hit
    return share


def share_by_number_replaced(n, p, hit):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * hit**k for k in range(n + 1))


RIGHT = {
    "unchanged_share": [
        lambda words, probability, hit: (1 - probability * (1 - hit)) ** words,
        share_by_counting,
        share_by_number_replaced,
        lambda n, p, hit: torch.tensor(1 - p * (1 - hit)) ** n,
        lambda n, p, hit: np.float32(1 - p * (1 - hit)) ** n,
    ],
    "nearest_words": [nearest, normalised_rows, others_normalised, distance_of_units],
    "blank_candidates": [
        likely,
        lambda logits, vocabulary, k: top(masked(logits, vocabulary, k), vocabulary, k),
        one_by_one,
    ],
    "augment_once": [one_copy, growing, algorithm_to_the_letter],
}
