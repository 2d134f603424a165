"""Checks of lesson 17: the gradient of a whole from its parts', what a ring sends, who owns a row, how often to save."""

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from tinylib.checks.core import Wrong, call, check, compare, draw
from tinylib.checks.start import near, number


@check("weighted_mean_gradient")
def weighted_mean_gradient(attempt) -> None:
    """The gradient of a mean over all things, from those of the means over parts that differ in size."""
    for counts, shape, seed in (((8, 2, 4), (2, 3), 10), ((3, 5), (4,), 0), ((1, 2, 2, 7), (3,), 20), ((4, 0, 2), (5,), 30)):
        gradients = [draw(*shape, seed=seed + p) for p in range(len(counts))]
        if 0 in counts:  # a mean over nothing
            gradients[counts.index(0)] = torch.full(shape, math.nan, dtype=torch.float64)
        got = call(attempt, gradients, list(counts))
        kept = [(g, n) for g, n in zip(gradients, counts, strict=True) if n]
        if len(kept) < len(counts) and isinstance(got, Tensor) and got.isnan().any():
            raise Wrong(
                "A process that holds nothing has the count 0, and its mean is 0/0, NaN. 0 · NaN is NaN again: leave such a part "
                "out."
            )
        compare(f"For counts {list(counts)} the gradient", got, _combined(kept), _gradient_mistakes(kept, len(counts)))


def _combined(parts: list[tuple[Tensor, int]]) -> Tensor:
    return sum(n * g for g, n in parts) / sum(n for _, n in parts)


def _gradient_mistakes(parts: list[tuple[Tensor, int]], processes: int) -> dict[str, Tensor]:
    gradients, counts = zip(*parts, strict=True)
    N, P, right = sum(counts), processes, _combined(parts)
    return {
        "That averages the processes' means as equals: a part of one thing counts as much as a part of eight. Weigh each by its "
        "share n_p/N.": torch.stack(gradients).mean(0),
        "That is the sum of the means. Each of them wants its share n_p/N of the things.": sum(gradients),
        "Your weights n_p are not divided by their sum N, so they are no shares.": right * N,
        "You divide by the number of processes instead of by N, the number of things.": right * N / P,
        "You weigh by n_p/N and divide by the number of processes as well: the shares add up to 1 already.": right / P,
        "You divide by N twice.": right / N,
        "Your weights are n_p divided by the largest count; divide by the sum of all.": right * N / max(counts),
        "Your weights are n_p divided by the smallest count; divide by the sum of all.": right * N / min(counts),
        "Your weights are upside down: the part with more things has the smaller one. Each gradient is a mean already; n_p/N is "
        "its share of the whole.": sum(g / n for g, n in parts) / sum(1 / n for n in counts),
        "You divide each gradient by its count: but each is a mean already, and wants to be multiplied by its share.":
            sum(g / n for g, n in parts),
        "You divide each mean by N; that leaves out how many things it stands for, n_p.": sum(gradients) / N,
        "That is one process's gradient alone: the last one's.": gradients[-1],
        "That is one process's gradient alone: the first one's.": gradients[0],
        "That is the gradient of the largest part alone.": gradients[max(range(len(counts)), key=counts.__getitem__)],
        "You weigh by a softmax of the counts; the share is simply n_p/N.":
            torch.einsum("p,p...->...", torch.tensor(counts, dtype=torch.float64).softmax(0), torch.stack(gradients)),
        "You weigh by n_p², over the sum of the squares: the share is n_p/N.":
            sum(n * n * g for g, n in parts) / sum(n * n for n in counts),
        "The counts are paired with the wrong gradients: count p belongs to gradient p.":
            sum(n * g for g, n in zip(gradients, reversed(counts), strict=True)) / N,
    }  # fmt: skip


@check("ring_bytes")
def ring_bytes(attempt) -> None:
    """What each process sends in a ring all-reduce."""
    for size, P in ((1200, 5), (58_000_000, 8), (900, 3), (1000, 2), (1_000_003, 7), (640, 1)):
        got = number("The number of bytes", call(attempt, size, P))
        _one_of(f"For {size:,} bytes and {P} processes", got, 2 * (P - 1) / P * size, {
            "what all processes send together; asked is what each of them sends": 2 * (P - 1) * size,
            "what one of the two halves sends; reduce-scatter and all-gather each send P − 1 pieces": (P - 1) / P * size,
            "what a process receives that all the others send their whole gradient to": (P - 1) * size,
            "the whole gradient there and back; the piece that a process ends up with itself it does not send, so there are P − 1 "
            "rounds of a P-th, not P": 2 * size,
            "the whole gradient once": size,
            "a factor (P + 1)/P; there is one round less than there are processes": 2 * (P + 1) / P * size,
            "upside down: the share is (P − 1)/P, below 1": 2 * P / (P - 1) * size if P > 1 else math.inf,
            "one piece; each process sends P − 1 of them in each half": size / P,
            "two pieces, one of each half; there are P − 1 rounds in each half": 2 * size / P,
            "the number of pieces (or rounds), not of bytes": 2 * (P - 1),
            "a share of the gradient, not bytes: multiply by its size": 2 * (P - 1) / P,
            "in bits; asked are bytes": 16 * (P - 1) / P * size,
            "four times too much: size is in bytes already": 8 * (P - 1) / P * size,
            "what is sent and received together; asked is what is sent": 4 * (P - 1) / P * size,
            "in megabytes; asked are bytes": 2 * (P - 1) / P * size / 1e6,
            "pieces whose size is rounded down: use / instead of //": 2 * (P - 1) * (size // P),
            "a product of the size and a logarithm: that is a tree's, not a ring's": 2 * math.log2(P) * size,
            "a tree's log₂ P instead of a ring's rounds": math.log2(P) * size,
        })  # fmt: skip


@check("own_rows")
def own_rows(attempt) -> None:
    """The rows of a batch that a process owns: row r belongs to process r mod P."""
    for rows, P in (([7, 2, 12, 9, 4, 11, 30], 3), ([8, 3, 14, 5, 20, 6, 9, 17, 0], 4), ([5, 11, 17, 2], 3), ([6, 1, 9], 1)):
        answers = []
        for index in range(P):
            case = f"Of the rows {rows}, process {index} of {P}"
            answers.append(_rows(case, call(attempt, rows, index, P)))
        owned = [[r for r in rows if r % P == index] for index in range(P)]
        if answers == owned:
            continue
        for sentence, rows_of in _row_mistakes(rows, P).items():
            if answers == [rows_of(index) for index in range(P)]:
                raise Wrong(f"For the rows {rows} and {P} processes {sentence}")
        _name_rows(rows, P, answers, owned)


def _rows(case: str, got) -> list[int]:
    if isinstance(got, Tensor):
        raise Wrong(f"{case}: return a list of row numbers, not a tensor.")
    if isinstance(got, Iterator):
        raise Wrong(f"{case}: you return an iterator that is empty after one reading; make a list of it.")
    if not isinstance(got, list | tuple | range | np.ndarray):
        order = ", which has no order" if isinstance(got, set) else ""
        raise Wrong(f"{case}: return a list of row numbers, not {type(got).__name__}{order}.")
    got = got.tolist() if isinstance(got, np.ndarray) else list(got)
    other = next((r for r in got if not isinstance(r, Integral)), None)
    if other is not None:
        raise Wrong(f"{case}: row numbers are whole numbers (int), but your list holds {other!r}.")
    return [int(r) for r in got]


def _row_mistakes(rows: list[int], P: int) -> dict[str, Callable[[int], list]]:
    """Return what known mistakes give to each process, by the sentence for the learner."""
    n, fewer = -(-len(rows) // P), len(rows) // P
    return {
        "you return True and False for each row; return the rows.": lambda i: [r % P == i for r in rows],
        "you return the places of the rows in the batch; return the rows.":
            lambda i: [at for at, r in enumerate(rows) if r % P == i],
        "you deal the batch out by place, so a row belongs to another process whenever the order changes, and its teacher outputs "
        "lie elsewhere: go by the row's number.": lambda i: rows[i::P],
        "you cut the batch into blocks by place, so a row belongs to another process in each epoch: go by the row's number.":
            lambda i: rows[i * n : (i + 1) * n],
        "you cut the batch into equal blocks by place and leave the rest to nobody: go by the row's number.":
            lambda i: rows[i * fewer : (i + 1) * fewer],
        "you return the rows of all the others.": lambda i: [r for r in rows if r % P != i],
        "your processes are numbered from 1; here the first one is 0.": lambda i: [r for r in rows if r % P == i - 1],
        "your remainder is off by one: r mod P counts from 0, as the processes do.":
            lambda i: [r for r in rows if r % P == (i + 1) % P],
        "you go by r // P, the quotient; the owner is the remainder, r % P.": lambda i: [r for r in rows if r // P == i],
        "you take r mod index; the owner is r mod count.": lambda i: [r for r in rows if i and r % i == 0],
        "you take the rows that count divides, whatever the process.": lambda i: [r for r in rows if r % P == 0],
        "you return all rows; each process works on its own only.": lambda i: rows,
        "you count the processes from the end.": lambda i: [r for r in rows if r % P == P - 1 - i],
        "you return nothing, whatever the process.": lambda i: [],
        "you return the places in each process's own table, r // P; return the row numbers.":
            lambda i: [r // P for r in rows if r % P == i],
    }  # fmt: skip


def _name_rows(rows: list[int], P: int, answers: list[list], owned: list[list[int]]) -> None:
    index = next(i for i in range(P) if answers[i] != owned[i])
    case, got, own = f"Of the rows {rows}, process {index} of {P}", answers[index], owned[index]
    if sorted(map(str, got)) == sorted(map(str, own)):
        raise Wrong(f"{case}: these are the right rows in another order; keep the batch's.")
    if not own:
        raise Wrong(f"{case} owns none of them, and the answer is []; you return {got}, which others count already.")
    if set(got) == set(own):
        raise Wrong(f"{case}: a row stands there more than once, so it would count twice.")
    if set(got) < set(own):
        raise Wrong(f"{case}: {sorted(set(own) - set(got))} are missing; nobody else works on them.")
    raise Wrong(f"{case} owns {own}, but you return {got}.")


@check("checkpoint_interval")
def checkpoint_interval(attempt) -> None:
    """Young's interval between checkpoints, on several machines."""
    for C, M, P in ((8.0, 90_000.0, 3), (60.0, 86_400.0, 1), (2.5, 2_592_000.0, 64), (20.0, 604_800.0, 8)):
        got = number("The interval", call(attempt, C, M, P))
        right = math.sqrt(2 * C * M / P)
        _one_of(f"With {C:g} s to save, a failure every {M:,.0f} s on each of {P} machines", got, right, {
            "√(C·M/P): the 2 is missing. A failure costs half an interval on average, and the half becomes a 2 under the root":
                right / math.sqrt(2),
            "what stands under the root: take the square root": right**2,
            "what holds for one machine: with P of them a failure comes P times as often": right * math.sqrt(P),
            "longer with more machines; more machines fail more often, so divide by their number": right * P,
            "divided by the number of machines outside the root; it stands under it": right / math.sqrt(P),
            "the time lost to the optimal interval as a share, √(2C·P/M), not the interval": math.sqrt(2 * C * P / M),
            "√(C·M/(2P)): the 2 belongs above. At the minimum C/τ² = P/(2M)": right / 2,
            "upside down, √(2M/(C·P)): the longer a save takes, the rarer it should be": math.sqrt(2 * M / C / P),
            "the time between two failures of all machines together; save before it": M / P,
            "half the time between two failures": M / P / 2,
            "in minutes; asked are seconds": right / 60,
            "in hours; asked are seconds": right / 3600,
            "a cube root; the derivative has 1/τ², so it is a square root": (2 * C * M / P) ** (1 / 3),
            "too large by the factor √2: lost is *half* an interval on average": right * math.sqrt(2),
            "the number of checkpoints between two failures": M / P / right,
            "one checkpoint's time less (or more) than asked: Young's rule is the root alone": (right - C, right + C),
            "√2 · C · M/P: C and M/P belong under the root too": math.sqrt(2) * C * M / P,
        })  # fmt: skip


def _one_of(case: str, got: float, right: float, mistakes: Mapping[str, float | tuple[float, ...]]) -> None:
    """Raise Wrong unless got is right, with the sentence of the mistake that gives it."""
    if near(got, right):
        return
    for sentence, values in mistakes.items():
        for value in values if isinstance(values, tuple) else (values,):
            if near(got, value):
                raise Wrong(f"{case} you return {got:.6g}, which is {sentence}.")
    if near(got, -right):
        raise Wrong(f"{case} you return {got:.6g}: the sign is wrong.")
    raise Wrong(f"{case} the answer is {right:.6g}, but you return {got:.6g}.")
