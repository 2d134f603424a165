"""Checks of lesson 07: vocabulary coverage, the loss of general distillation, packing, the cost of a training."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylib import corpus
from tinylib.bert import BertOutput
from tinylib.checks.core import Wrong, call, check, compare, draw, needs_gradient
from tinylib.checks.start import near, number
from tinylib.layers import LayerMap
from tinylib.losses import attention_loss, attention_probability_loss, embedding_loss, hidden_loss


@check("coverage")
def coverage(attempt) -> None:
    """The share of the vocabulary that occurs often enough."""
    one = [4, 16, 16, 15, 16, 16, 13, 16, 2, 8, 5, 1, 11, 15, 16, 0, 6, 1, 8, 0, 16, 13]
    two, three = (
        [4, 4, 4, 1, 4, 4, 2, 4, 0, 4, 1, 4],
        [13, 13, 13, 13, 6, 13, 2, 12, 10, 10, 13, 8, 9, 13, 2, 13, 4, 10],
    )
    texts = [torch.tensor(ids) for ids in (one, two, three)]
    for vocabulary, times in ((26, 2), (26, 1), (40, 3)):
        counts = torch.stack([torch.bincount(ids, minlength=vocabulary) for ids in texts])
        total, tokens = counts.sum(0), int(counts.sum())
        got = number("The coverage", call(attempt, texts, vocabulary, times))
        right = (total >= times).sum().item() / vocabulary
        if near(got, right):
            continue
        known = {
            "the number of tokens by the vocabulary: each piece counts once, however often it occurs": tokens
            / vocabulary,
            "a number of pieces; divide it by the vocabulary": (total >= times).sum().item(),
            "a percentage; give a share such as 0.5": 100 * right,
            "the share that is not covered": 1 - right,
            "the share of pieces that occur at all: count only those with `times` or more": (total > 0).sum().item()
            / vocabulary,
            "the share for *more than* `times`: a piece with exactly that many counts too": (total > times).sum().item()
            / vocabulary,
            "the share for *exactly* `times`: more often counts too": (total == times).sum().item() / vocabulary,
            "the share for `times` within one text: add the counts of all texts first": (counts >= times)
            .any(0)
            .sum()
            .item()
            / vocabulary,
            "the share by the number of texts that hold a piece; each occurrence counts": ((counts > 0).sum(0) >= times)
            .sum()
            .item()
            / vocabulary,
            "the first text's alone: take all texts": (counts[0] >= times).sum().item() / vocabulary,
            "the last text's alone: take all texts": (counts[-1] >= times).sum().item() / vocabulary,
            "the mean over the texts; a piece that two texts share counts once": (counts >= times).sum().item()
            / len(texts)
            / vocabulary,
            "the sum over the texts; a piece that two texts share counts once": (counts >= times).sum().item()
            / vocabulary,
            "a share of the tokens read; divide by the vocabulary": (total >= times).sum().item() / tokens,
            "a share of the pieces that occur; divide by the vocabulary": (total >= times).sum().item()
            / (total > 0).sum().item(),
            "a share of the ids up to the largest; divide by the vocabulary": (total >= times).sum().item()
            / (int(total.nonzero().max()) + 1),
        }
        for sentence, value in known.items():
            if near(got, value):
                raise Wrong(
                    f"For times={times} and a vocabulary of {vocabulary} you return {got:.4g}, which is {sentence}."
                )
        raise Wrong(
            f"For times={times} and a vocabulary of {vocabulary} the share is {right:.4g}, but you return {got:.4g}."
        )


def outputs(width: int, layers: int, seed: int, grad: bool = False) -> BertOutput:
    """Draw what a model of some layers returns for 2 texts of 5 positions, 3 heads and 4 classes."""
    hidden = {m: draw(2, 5, width, seed=seed + m).requires_grad_(grad) for m in range(layers + 1)}
    scores = {m: draw(2, 3, 5, 5, seed=seed + 50 + m).requires_grad_(grad) for m in range(1, layers + 1)}
    return BertOutput(hidden[layers], draw(2, 4, seed=seed + 99), hidden, scores)


def parts(
    said, told, mask, taught_by: Callable, project: Callable, attention: Callable = attention_loss
) -> dict[str, list[Tensor]]:
    """Return the losses of each kind, one a student layer; layer m learns from the teacher's ``taught_by(m)``."""
    states, layers = said.hidden_states, range(1, len(said.scores) + 1)
    return {
        "embedding": [embedding_loss(project(0, states[0]), told.hidden_states[0], mask)],
        "hidden": [hidden_loss(project(m, states[m]), told.hidden_states[taught_by(m)], mask) for m in layers],
        "attention": [attention(said.scores[m], told.scores[taught_by(m)], mask) for m in layers],
    }


def total(found: dict[str, list[Tensor]]) -> Tensor:
    """Return the sum of all losses."""
    return sum(sum(values) for values in found.values())


@check("general_loss")
def general_loss(attempt) -> None:
    """The sum of stage 1: embedding, hidden and attention losses, no prediction loss."""
    for choice, N, seed in (((2, 4), 4, 0), ((1, 3, 4), 5, 200)):
        layer_map, M = LayerMap(choice), len(choice)
        said, told = outputs(4, M, seed, grad=True), outputs(6, N, seed + 1000)
        maps = draw(M + 1, 4, 6, seed=seed + 7)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)

        def project(m, hidden, maps=maps):
            return hidden @ maps[m]

        got = call(attempt, said, told, mask, layer_map, project)
        right = total(parts(said, told, mask, layer_map, project))
        compare("The loss", got, right, _general_mistakes(said, told, mask, layer_map, project))
        for name, source in (("embeddings", said.hidden_states[0]), ("attention", said.scores[1])):
            needs_gradient("The loss", got, source, f"The student's {name} must learn from it.")


def _general_mistakes(said, told, mask, layer_map, project) -> dict[str, Tensor]:
    found, M = parts(said, told, mask, layer_map, project), len(layer_map)
    (embedding,), hidden, attention = found["embedding"], found["hidden"], found["attention"]
    whole, targets = total(found), told.logits.softmax(-1)
    kl = F.kl_div(said.logits.log_softmax(-1), targets, reduction="batchmean")

    def using(mask=mask, taught_by=layer_map, projection=lambda m: m, attention=attention_loss):
        own = lambda m, states: project(projection(m), states)  # noqa: E731
        return total(parts(said, told, mask, taught_by, own, attention))

    prediction = "The prediction loss is in it: in stage 1 the teacher has no task, so it is left out."
    averaged = "You average over the layers: the losses are summed, every λ is 1."
    return {
        prediction: whole + F.cross_entropy(said.logits, targets),
        f"{prediction} ": whole + F.mse_loss(said.logits, told.logits),
        f"{prediction}  ": whole + kl,
        "The embedding loss (m = 0) is missing.": whole - embedding,
        "The hidden losses are missing.": whole - sum(hidden),
        "The attention losses are missing.": whole - sum(attention),
        "The embedding loss is counted once for each layer: it stands before the loop.": whole + (M - 1) * embedding,
        "Only the last layer's hidden loss is in it: sum over all layers, and add the other losses.": hidden[-1],
        "The embedding loss is missing, and of the layers you take only the last.": hidden[-1] + attention[-1],
        "Of the layers you take only the last: sum over m = 1 to M.": embedding + hidden[-1] + attention[-1],
        "The last layer is missing: range(1, M) ends at M − 1.": whole - hidden[-1] - attention[-1],
        averaged: embedding + sum(hidden) / M + sum(attention) / M,
        f"{averaged} ": whole / (M + 1),
        f"{averaged}  ": whole / (2 * M + 1),
        "Padding is counted: hand the mask to every loss.": using(mask=None),
        "Layer m learns from the teacher's layer m: it must be layer g(m) = layer_map(m).": using(
            taught_by=lambda m: m
        ),
        "All layers use the projection of the embeddings: layer m has its own, project(m, …).": using(
            projection=lambda m: 0
        ),
        "The projections are off by one: layer m has project(m, …), the embeddings project(0, …).": using(
            projection=lambda m: max(m - 1, 0)
        ),
        "The hidden states are off by one: hidden_states[0] is the embeddings, layer m has hidden_states[m].": (
            embedding + sum(attention)
            + sum(hidden_loss(project(m, said.hidden_states[m]), told.hidden_states[layer_map(m + 1)], mask) for m in range(M))
        ),
        "Attention is compared after the softmax; the scores themselves are matched (equation 7).": using(
            attention=attention_probability_loss
        ),
    }


class Ready:
    """A tokenizer for sentences that are token ids already."""

    def __init__(self, cls: int, sep: int):
        self.cls_token_id, self.sep_token_id = cls, sep

    def __call__(self, sentences, **options):
        return {"input_ids": sentences}


@check("pack_documents")
def pack_documents(attempt) -> None:
    """Whole sentences of one document to a sequence."""
    for lengths, max_length, cls, sep in (
        ([[3, 4, 2], [1], [5, 5]], 10, 101, 102),
        ([[2, 2, 2, 2], [3, 3], [6], [1, 5, 1]], 8, 101, 102),
        ([[4, 15, 2], [7, 6, 1]], 8, 1, 2),  # sentences that are too long
    ):
        new = itertools.count(1000)
        documents = [[[next(new) for _ in range(n)] for n in sentences] for sentences in lengths]
        got = call(attempt, documents, max_length, cls, sep)
        flat = isinstance(got, list | tuple) and all(isinstance(s, list | tuple) for s in got)
        if not flat or not all(isinstance(token, int) for sequence in got for token in sequence):
            raise Wrong("The answer should be a list of sequences, each a list of token ids.")
        wanted = list(corpus.pack(iter(documents), Ready(cls, sep), max_length))
        if [list(s) for s in got] != wanted:
            _explain_packing([list(s) for s in got], wanted, documents, max_length, cls, sep)


def _explain_packing(got, wanted, documents, max_length: int, cls: int, sep: int) -> None:
    """Raise Wrong with the first rule that the sequences break."""
    lengths = [[len(sentence) for sentence in document] for document in documents]
    case = f"For documents with sentences of {lengths} tokens and max_length={max_length}:"
    home = {token: d for d, document in enumerate(documents) for sentence in document for token in sentence}
    inside = [[token for token in sequence if token in home] for sequence in got]
    if any(not own for own in inside):
        raise Wrong(f"{case} one of your sequences holds no text.")
    if any(sequence[0] != cls or sequence[-1] != sep for sequence in got):
        raise Wrong(f"{case} each sequence begins with cls={cls} and ends with sep={sep}; use the arguments.")
    if any(len(own) + 2 != len(sequence) for own, sequence in zip(inside, got, strict=True)):
        raise Wrong(f"{case} special tokens stand inside a sequence: only one cls at its start and one sep at its end.")
    if any(len(sequence) > max_length for sequence in got):
        longest = max(map(len, got))
        raise Wrong(
            f"{case} a sequence has {longest} tokens. cls and sep count too: the room for text is max_length − 2."
        )
    if any(len({home[token] for token in own}) > 1 for own in inside):
        raise Wrong(f"{case} a sequence crosses documents: close the sequence at the end of each document.")
    tokens, all_tokens = [t for own in inside for t in own], list(home)
    if len(tokens) < len(all_tokens):
        missing = sorted(set(all_tokens) - set(tokens))
        last = missing[-1] == [t for t in all_tokens if home[t] == home[missing[-1]]][-1]
        why = "is the rest behind a document's last full sequence dropped, or a long sentence cut off?"
        raise Wrong(
            f"{case} {len(missing)} tokens are lost{', the end of a document among them' if last else ''}: {why}"
        )
    if tokens != all_tokens:
        raise Wrong(f"{case} the tokens are not in their order, or some stand twice.")
    if len(got) > len(wanted):
        raise Wrong(
            f"{case} you make {len(got)} sequences where {len(wanted)} hold everything: fill each with as many sentences as "
            "fit, the rest of a long sentence included."
        )
    if len(got) < len(wanted):
        raise Wrong(
            f"{case} a sentence longer than the room begins a new sequence; do not fill up the current one with its first tokens."
        )
    raise Wrong(
        f"{case} a sentence that would fit into the next sequence is cut: only those longer than the room may be."
    )


@check("training_flops")
def training_flops(attempt) -> None:
    """The operations of a distillation: forward through the teacher, forward and backward through the student."""
    for tokens, epochs, teacher, student in (
        (1_000, 3, 170, 13),
        (7_614_619, 2, 22_413_312, 10_942_464),
        (10, 1, 5, 7),
    ):
        got = number("The cost", call(attempt, tokens, epochs, teacher, student))
        right = tokens * epochs * (teacher + 3 * student)
        if near(got / right, 1.0):
            continue
        every = tokens * epochs
        known = {
            "of the student's forward pass alone, in one epoch": tokens * student,
            "of the forward passes alone: the student's backward pass takes twice its forward pass more": every
            * (teacher + student),
            "with a backward pass that costs as much as the forward pass: it has two products for each one": every
            * (teacher + 2 * student),
            "with three backward passes: forward and backward together cost three forward passes": every
            * (teacher + 4 * student),
            "with a backward pass through the teacher, too: nothing is learnt there": every * 3 * (teacher + student),
            "with the backward pass through the teacher instead of the student": every * (3 * teacher + student),
            "without the teacher: it runs forward on every token": every * 3 * student,
            "with the factor 6, which is for a number of weights; these are FLOPs already": every
            * (teacher + 6 * student),
            "with the factors 2 and 6, which are for numbers of weights; these are FLOPs already": every
            * (2 * teacher + 6 * student),
            "for one epoch": tokens * (teacher + 3 * student),
            "per token: multiply by the tokens and epochs": teacher + 3 * student,
            "with the teacher in one epoch only: without a cache it runs in each": tokens
            * (teacher + epochs * 3 * student),
            "with epochs added instead of multiplied": (tokens + epochs) * (teacher + 3 * student),
        }
        for sentence, value in known.items():
            if near(got / right, value / right):
                raise Wrong(
                    f"For {tokens:,} tokens, {epochs} epochs, teacher {teacher:,} and student {student:,} you return "
                    f"{got:.6g}, which is the cost {sentence}."
                )
        raise Wrong(
            f"For {tokens:,} tokens, {epochs} epochs, teacher {teacher:,} and student {student:,} the cost is {right:.6g}, "
            f"but you return {got:.6g}."
        )
