"""Lesson 07."""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from tinylib import corpus
from tinylib.checks.general import Ready
from tinylib.losses import attention_loss, attention_probability_loss, embedding_loss, hidden_loss


def counts(texts, vocabulary):
    return torch.bincount(torch.cat(list(texts)), minlength=vocabulary)


def each(texts, vocabulary):
    return torch.stack([torch.bincount(ids, minlength=vocabulary) for ids in texts])


def texts_used_up(texts, vocabulary, times=1):
    total = torch.zeros(vocabulary, dtype=torch.long)
    while texts:
        total += torch.bincount(texts.pop(), minlength=vocabulary)
    return (total >= times).sum().item() / vocabulary


def texts_reversed(texts, vocabulary, times=1):
    texts.reverse()
    return coverage_by_sets(texts, vocabulary, times)


def loss(
    said,
    told,
    mask,
    layer_map,
    project,
    kinds="eha",
    first=1,
    taught_by=None,
    own=lambda m: m,
    attention=attention_loss,
):
    taught_by, M, found = taught_by or layer_map, len(layer_map), 0.0
    if "e" in kinds:
        found = embedding_loss(project(0, said.hidden_states[0]), told.hidden_states[0], mask)
    for m in range(first, M + 1):
        if "h" in kinds:
            found = found + hidden_loss(project(own(m), said.hidden_states[m]), told.hidden_states[taught_by(m)], mask)
        if "a" in kinds:
            found = found + attention(said.scores[m], told.scores[taught_by(m)], mask)
    return found


def embedding_in_the_loop(said, told, mask, layer_map, project):
    extra = embedding_loss(project(0, said.hidden_states[0]), told.hidden_states[0], mask)
    return loss(said, told, mask, layer_map, project) + (len(layer_map) - 1) * extra


def without_the_last(said, told, mask, layer_map, project):
    return loss(said, told, mask, layer_map[:-1], project, taught_by=layer_map)


def averaged_layers(said, told, mask, layer_map, project):
    return loss(said, told, mask, layer_map, project, "e") + loss(said, told, mask, layer_map, project, "ha") / len(
        layer_map
    )


def in_place(said, told, mask, layer_map, project):
    for m in said.scores:
        told.scores[layer_map(m)].mul_(mask[:, None, None, :])
    return loss(said, told, mask, layer_map, project)


def pack(
    documents, max_length, cls, sep, crossing=False, room=None, keep_rest=True, truncate=False, split=False, lone=False
):
    """Pack as one should, or with one of the mistakes."""
    room = max_length - 2 if room is None else room
    found, current = [], []
    for document in documents:
        if not crossing:
            current = []
        for sentence in document:
            sentence = list(sentence)
            if split:
                while current and len(current) + len(sentence) > room:
                    cut = room - len(current)
                    found.append([cls, *current, *sentence[:cut], sep])
                    current, sentence = [], sentence[cut:]
            if current and len(current) + len(sentence) > room:
                found.append([cls, *current, sep])
                current = []
            while len(sentence) > room:
                found.append([cls, *sentence[:room], sep])
                sentence = [] if truncate else sentence[room:]
            current = current + sentence
            if lone and len(document) > 1 and current:
                found.append([cls, *current, sep])
                current = []
        if current and keep_rest and not crossing:
            found.append([cls, *current, sep])
    if current and crossing:
        found.append([cls, *current, sep])
    return found


def joined_with_sep(documents, max_length, cls, sep):
    return [[cls, *[t for s in d for t in (*s, sep)]] for d in documents]


def by_pieces(documents, max_length, cls=101, sep=102):
    """Cut all sentences first; then every piece goes where it fits."""
    room, found = max_length - 2, []
    for document in documents:
        boxes = [[]]
        for piece in (s[i : i + room] for s in document for i in range(0, len(s), room)):
            if len(boxes[-1]) + len(piece) > room:
                boxes.append([])
            boxes[-1].extend(piece)
        found += [[cls, *box, sep] for box in boxes if box]
    return found


def emptied(documents, max_length, cls, sep):
    found = pack(documents, max_length, cls, sep)
    for document in documents:
        document.clear()
    return found


MUTANTS = {
    "coverage": [
        (lambda t, v, times=1: sum(len(ids) for ids in t) / v, "number of tokens"),
        (lambda t, v, times=1: (counts(t, v) >= times).sum().item(), "number of pieces"),
        (lambda t, v, times=1: 100 * (counts(t, v) >= times).sum().item() / v, "percentage"),
        (lambda t, v, times=1: (counts(t, v) < times).sum().item() / v, "not covered"),
        (lambda t, v, times=1: (counts(t, v) > 0).sum().item() / v, "occur at all"),
        (lambda t, v, times=1: (counts(t, v) > times).sum().item() / v, "more than"),
        (lambda t, v, times=1: (counts(t, v) == times).sum().item() / v, "exactly"),
        (lambda t, v, times=1: (each(t, v) >= times).any(0).sum().item() / v, "within one text"),
        (lambda t, v, times=1: ((each(t, v) > 0).sum(0) >= times).sum().item() / v, "number of texts"),
        (lambda t, v, times=1: (counts(t[:1], v) >= times).sum().item() / v, "first text"),
        (lambda t, v, times=1: (counts(t[-1:], v) >= times).sum().item() / v, "last text"),
        (lambda t, v, times=1: (each(t, v) >= times).float().mean().item(), "mean over the texts"),
        (lambda t, v, times=1: (counts(t, v) >= times).sum().item() / sum(map(len, t)), "tokens read"),
        (lambda t, v, times=1: (counts(t, v) >= times) / v, "of shape (26,)"),
        (lambda t, v, times=1: 0.1, "you return 0.1"),
        (lambda t, v, times=1: [ids.fill_(0) for ids in t] and 0.1, "`t` in place: afterwards `t[0]` holds other numbers"),
        (texts_reversed, "in place: afterwards something else stands at `texts[0]`"),
        (texts_used_up, "in place: afterwards the list `texts` is shorter"),
    ],
    "general_loss": [
        (lambda *a: loss(*a) + F.cross_entropy(a[0].logits, a[1].logits.softmax(-1)), "prediction loss"),
        (lambda *a: loss(*a) + F.mse_loss(a[0].logits, a[1].logits), "prediction loss"),
        (lambda *a: loss(*a, "ha"), "embedding loss (m = 0) is missing"),
        (lambda *a: loss(*a, "ea"), "hidden losses are missing"),
        (lambda *a: loss(*a, "eh"), "attention losses are missing"),
        (embedding_in_the_loop, "before the loop"),
        (lambda *a: loss(*a, "h", first=len(a[3])), "only the last"),
        (lambda *a: loss(*a, first=len(a[3])), "only the last"),
        (without_the_last, "last layer is missing"),
        (averaged_layers, "average"),
        (lambda *a: loss(*a) / (len(a[3]) + 1), "average"),
        (lambda *a: loss(a[0], a[1], None, a[3], a[4]), "padding is counted"),
        (lambda *a: loss(*a, taught_by=lambda m: m), "layer_map(m)"),
        (lambda *a: loss(*a, own=lambda m: 0), "projection of the embeddings"),
        (lambda *a: loss(*a, own=lambda m: m - 1), "off by one"),
        (lambda *a: loss(*a, attention=attention_probability_loss), "after the softmax"),
        (lambda *a: -loss(*a), "wrong sign"),
        (lambda *a: 2 * loss(*a), "2 times too large"),
        (lambda *a: loss(*a).detach(), "no gradient"),
        (lambda *a: loss(*a).float(), "float64"),
        (lambda *a: loss(*a).item(), "should be a tensor"),
        (lambda *a: torch.stack([loss(*a), loss(*a)]), "shape"),
        (in_place, "in place"),
    ],
    "pack_documents": [
        (lambda d, n, cls=101, sep=102: [[cls, *s, sep] for doc in d for s in doc], "max_length"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, lone=True), "as many sentences as fit"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, crossing=True), "crosses documents"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, room=n), "max_length − 2"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, keep_rest=False), "lost"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, truncate=True), "long sentence cut off"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, split=True), "is cut"),
        (lambda d, n, cls=101, sep=102: pack(d, n, 101, 102), "use the arguments"),
        (lambda d, n, cls=101, sep=102: pack(d[:1], n, cls, sep), "lost"),
        (lambda d, n, cls=101, sep=102: [s[1:-1] for s in pack(d, n, cls, sep)], "begins with cls"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep) + [[cls, sep]], "no text"),
        (lambda d, n, cls=101, sep=102: pack(d[::-1], n, cls, sep), "order"),
        (joined_with_sep, "inside a sequence"),
        (emptied, "`documents` in place: afterwards the list `documents[0]` is shorter"),
        (lambda d, n, cls=101, sep=102: sum(pack(d, n, cls, sep), []), "list of sequences"),
        (lambda d, n, cls=101, sep=102: pack(d, n, cls, sep, room=n - 3), "as many sentences as fit"),
    ],
    "training_flops": [
        (lambda n, e, t, s: n * s, "student's forward pass alone"),
        (lambda n, e, t, s: n * e * (t + s), "forward passes alone"),
        (lambda n, e, t, s: n * e * (t + 2 * s), "two products"),
        (lambda n, e, t, s: n * e * (t + 4 * s), "three backward passes"),
        (lambda n, e, t, s: 3 * n * e * (t + s), "through the teacher, too"),
        (lambda n, e, t, s: n * e * (3 * t + s), "instead of the student"),
        (lambda n, e, t, s: n * e * 3 * s, "without the teacher"),
        (lambda n, e, t, s: n * e * (t + 6 * s), "factor 6"),
        (lambda n, e, t, s: n * e * (2 * t + 6 * s), "factors 2 and 6"),
        (lambda n, e, t, s: n * (t + 3 * s), "one epoch"),
        (lambda n, e, t, s: t + 3 * s, "per token"),
        (lambda n, e, t, s: n * (t + 3 * e * s), "one epoch only"),
        (lambda n, e, t, s: (n + e) * (t + 3 * s), "added"),
        (lambda n, e, t, s: 1e15, "you return 1e+15"),
        (lambda n, e, t, s: torch.tensor([n * e * t, 3.0 * n * e * s]), "of shape (2,)"),
    ],
}


def coverage_by_sets(texts, vocabulary, times=1):
    found = [token for ids in texts for token in ids.tolist()]
    return len({token for token in found if found.count(token) >= times}) / vocabulary


def loss_by_lists(said, told, mask, layer_map, project):
    layers = range(1, len(layer_map) + 1)
    states = [
        hidden_loss(project(m, said.hidden_states[m]), told.hidden_states[layer_map(m)], mask) for m in (0, *layers)
    ]
    return torch.stack(states + [attention_loss(said.scores[m], told.scores[layer_map(m)], mask) for m in layers]).sum()


def loss_from_the_top(said, told, mask, layer_map, project):
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]

    def down_from(m):
        states = F.mse_loss(project(m, said.hidden_states[m])[mask], told.hidden_states[layer_map(m)][mask])
        if m == 0:
            return states
        both = [out.masked_select(pairs) for out in (said.scores[m], told.scores[layer_map(m)])]
        return states + F.mse_loss(*both) + down_from(m - 1)

    return down_from(len(layer_map))


RIGHT = {
    "coverage": [
        lambda t, v, times=1: (counts(t, v) >= times).sum().item() / v,
        coverage_by_sets,
        lambda t, v, times=1: sum(n >= times for n in Counter(torch.cat(t).tolist()).values()) / v,
        lambda t, v, times=1: (counts(t, v) >= times).sum() / v,
        lambda t, v, times=1: np.mean(np.bincount(np.concatenate(t), minlength=v) >= times, dtype=np.float32),
    ],
    "general_loss": [loss, loss_by_lists, loss_from_the_top],
    "pack_documents": [
        lambda d, n, cls=101, sep=102: pack(d, n, cls, sep),
        lambda d, n, cls=101, sep=102: [tuple(s) for s in corpus.pack(iter(d), Ready(cls, sep), n)],
        by_pieces,
    ],
    "training_flops": [
        lambda tokens, epochs, teacher, student: tokens * epochs * (teacher + 3 * student),
        lambda tokens, epochs, teacher, student: (
            sum([tokens * teacher, tokens * student, 2 * tokens * student]) * epochs
        ),
        lambda n, e, t, s: np.dot([1, 3], [t, s]) * n * e,
        lambda n, e, t, s: torch.tensor(n * e * (t + 3.0 * s)),
    ],
}
