"""Checks of lesson 10: operations, percentiles, quantisation, bytes."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tinylib.bert import Bert, BertConfig
from tinylib.checks.core import Wrong, call, draw
from tinylib.checks.core import check as register
from tinylib.checks.start import number
from tinylib.measure import flops, parameters

# -- operations ----------------------------------------------------------------


@register("forward_flops")
def forward_flops(attempt) -> None:
    """Floating-point operations of the encoder's matrix products."""
    for C, F, L, T in ((10, 23, 3, 7), (312, 1200, 4, 128), (12, 48, 2, 40), (16, 16, 1, 7)):
        got = number("The count", call(attempt, C, F, L, T))
        projections, attention, ffn = 8 * T * C * C, 4 * T * T * C, 4 * T * C * F
        layer = projections + attention + ffn
        wanted = flops(BertConfig.parse(f"{L}x{C}", intermediate_size=F, num_attention_heads=1), T)
        _compare(f"C={C}, F={F}, L={L}, T={T}", got, wanted, {
            "a multiplication and an addition are two operations; you count one.": L * layer / 2,
            "attention has two products of T × T with C: the scores, and the mixture of the values.":
                L * (layer - attention / 2),
            "attention's two products are missing: q·kᵀ, and weights·v.": L * (layer - attention),
            "the scores are T × T: attention grows with the square of the length.": L * (projections + 4 * T * C + ffn),
            "scores of T × T with C columns cost T²·C, not T·C².": L * (projections + 4 * T * C * C + ffn),
            "scores of T × T with C columns cost T²·C, not T²·C².": L * (projections + 4 * T * T * C * C + ffn),
            "there are four projections: query, key, value and the output.":
                (L * (layer - 2 * T * C * C), L * (layer - 6 * T * C * C)),
            "the feed-forward network has two matrices, up and down.": L * (layer - ffn / 2),
            "the feed-forward network is missing.": L * (projections + attention),
            "that is one layer; the encoder has L.": layer,
            "that is for each token; give the count of the whole sequence.": L * layer / T,
            "the heads share the width C between them: all together cost as much as one of width C.":
                (L * (projections + 12 * attention + ffn), 12 * L * layer),
            "a product of n × k with k × m takes 2nkm operations, additions included; you count them twice.": 2 * L * layer,
            "the pooler is not asked for: count the encoder's layers alone.": L * layer + 2 * C * C,
            "F is the feed-forward network's own width; it need not be 4C.": L * (projections + attention + 16 * T * C * C),
            "that is in units of 10⁹; give the operations themselves.": L * layer / 1e9,
            "a look-up in the word table multiplies nothing.": L * layer + 2 * T * C * 30522,
            "the projections are applied to each of the T tokens.": L * (8 * C * C + attention + ffn),
        })  # fmt: skip


# -- times ---------------------------------------------------------------------


@register("percentile_latency")
def percentile_latency(attempt) -> None:
    """Nearest rank: the smallest time that a share of the calls do not exceed."""
    for count, share, seed in ((60, 0.95, 0), (10, 0.5, 1), (7, 0.9, 3), (100, 0.07, 2), (5, 1.0, 4), (40, 0.99, 5)):
        times = (draw(count, seed=seed).abs() * 10 + 1).tolist()
        got = number("The percentile", call(attempt, times, share))
        order, n = sorted(times), count
        k = math.ceil(round(share * n, 9))
        at, percent = share * (n - 1), share / 100 * (n - 1)
        between, low = (order[int(x)] + x % 1 * (order[min(int(x) + 1, n - 1)] - order[int(x)]) for x in (at, percent))
        case = f"{n} times, share {share}"
        _compare(case, got, order[k - 1], {
            "the times are not sorted.": (times[k - 1], times[min(int(share * n), n - 1)]),
            "0.07 · 100 is a little more than 7 in floating point, and ceil makes 8 of it: round first.":
                order[min(math.ceil(share * n), n) - 1],
            "that is the slowest call.": order[-1],
            f"that is the fastest call. (A share of {share} is {100 * share:g} calls of a hundred: do not divide it by 100.)":
                order[0],
            f"np.percentile takes {100 * share:g} where a share is {share}, and it interpolates between two calls.": low,
            "you take one place too far: lists begin at 0.": order[min(k, n - 1)],
            f"you take one place too few: of {share * n:.4g} calls the whole number that is at least as large counts, "
            "and lists begin at 0.": order[max(k - 2, 0)],
            "you count from the slow end.": (order[n - k], order[max(math.ceil(round(n - share * n, 9)) - 1, 0)]),
            "that is the mean, which one slow call moves.": sum(times) / n,
            "you interpolate between two calls; give a time that was measured.": between,
            "that is the median, whatever the share.":
                (order[math.ceil(n / 2) - 1], order[n // 2], statistics.median(times)),
            "that is a share of the slowest time, not the time of a share of the calls.": share * order[-1],
            "that is a place in the sorted list; give the time that stands there.": (k - 1, k),
        }, slack=1e-4)  # fmt: skip


# -- quantisation --------------------------------------------------------------


@register("quantize_rows")
def quantize_rows(attempt) -> None:
    """Symmetric quantisation with a scale a row."""
    for bits, seed in ((8, 0), (4, 1), (6, 2)):
        weight = draw(5, 7, seed=seed)
        weight[1] *= 30
        weight[2, 3] = -weight[2].abs().max() - 1  # the largest magnitude of this row is negative
        _quantised(call(attempt, weight, bits), weight, bits)
    weight = draw(4, 6, seed=3)
    weight[2] = 0
    try:
        with AnotherProcessor():
            answer = call(attempt, weight, 8)
    except (ArithmeticError, ValueError) as error:
        raise Wrong(f"A row of zeros makes your function raise {type(error).__name__}: {error}. Its integers are 0.") from None
    q, scale = _two(answer)
    if q.shape == weight.shape and (q[2].any() or not torch.isfinite(scale).all()):
        raise Wrong(
            "A row of zeros gives 0/0, which is NaN, and what a NaN becomes as an integer depends on the processor. Its "
            "integers must be 0 and its scale finite: divide by 1 where the scale is 0."
        )
    _quantised((q, scale), weight, 8)


class AnotherProcessor(TorchFunctionMode):
    """While it is on, NaN becomes 77 as an integer: any number would do, and on some processors it is 0 by chance."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function; where it made integers of NaN, put 77."""
        result, source = function(*args, **(kwargs or {})), args[0] if args else None
        if isinstance(source, Tensor) and isinstance(result, Tensor) and result.shape == source.shape:
            if source.is_floating_point() and result.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                return result.masked_fill(source.isnan(), 77)
        return result


def _two(answer) -> tuple[Tensor, Tensor]:
    if not isinstance(answer, tuple | list) or len(answer) != 2 or not all(isinstance(x, Tensor) for x in answer):
        raise Wrong("Return two tensors: (q, scale).")
    q, scale = answer
    if q.is_floating_point() and not scale.is_floating_point():
        raise Wrong("You return them in the wrong order: first the integers q, then the scale.")
    return q, scale


def _quantised(answer, weight: Tensor, bits: int) -> None:
    q, scale = _two(answer)
    top, case = 2 ** (bits - 1) - 1, f"{bits} bits"
    largest = weight.abs().amax(1, keepdim=True)
    right = largest / top
    if q.shape != weight.shape:
        raise Wrong(f"q should have the weight's shape {tuple(weight.shape)}, but yours has {tuple(q.shape)}.")
    if q.is_floating_point():
        close = torch.allclose(q.double(), weight, atol=right.max().item())
        what = "the weights put back (q·scale)" if close else f"a tensor of {q.dtype}"
        raise Wrong(f"q should be integers of torch.int8, but yours is {what}: return round(weight / scale) as torch.int8.")
    if q.dtype != torch.int8:
        raise Wrong(f"q should be of torch.int8, one byte with a sign, but yours is of {q.dtype}.")
    if scale.numel() == 1:
        raise Wrong("You use one scale for the whole matrix; each row should have its own: amax(dim=1, keepdim=True).")
    if scale.shape == (1, weight.shape[1]):
        raise Wrong("Your scales belong to the columns; give each row its own: dim=1.")
    if scale.shape != right.shape:
        shapes = f"{tuple(right.shape)}, but yours has {tuple(scale.shape)}"
        raise Wrong(f"scale should have shape {shapes}: keepdim=True keeps the axis.")
    if not scale.is_floating_point():
        raise Wrong(f"scale should be of a floating-point type, but yours is of {scale.dtype}.")
    s, used = scale.double(), largest[:, 0] > 0
    high, low = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
    for sentence, wrong in {
        "you divide by 2^bits − 1: signed integers of that many bits do not fit into int8, and the large weights wrap around.":
            largest / (2**bits - 1),
        f"2^(bits−1) = {top + 1} is one too many: the largest integer is {top}, and beyond it int8 wraps around.":
            largest / (top + 1),
        "you always use 127, whatever `bits` says.": largest / 127,
        "the scale is upside down: it is the largest magnitude divided by the largest integer.": top / largest,
        "you take the largest weight, not the largest magnitude: a large negative one does not fit.":
            high / top,
        "you take the smallest weight, not the largest magnitude: a large positive one does not fit.": -low / top,
        "you spread the range from smallest to largest; symmetric means that 0 stays 0: take the largest magnitude.":
            (high - low) / (2 * top),
        "you spread the range from smallest to largest, which needs a zero point too; symmetric means that 0 stays 0: take "
        "the largest magnitude.": (high - low) / (2**bits - 1),
        "you use the mean magnitude; then all larger weights are cut off.": weight.abs().mean(1, keepdim=True) / top,
    }.items():  # fmt: skip
        if torch.allclose(s[used], wrong[used], rtol=1e-4) and not torch.allclose(s[used], right[used], rtol=1e-4):
            raise Wrong(f"{case}: {sentence}")
    off = ~torch.isclose(s, right, rtol=1e-4)[:, 0] & used
    if off.any():
        row = off.nonzero()[0].item()
        raise Wrong(f"{case}: the scale of row {row} should be {right[row].item():.4g}, but yours is {s[row].item():.4g}.")
    exact = torch.where(largest > 0, weight / right, torch.zeros_like(weight))
    if torch.equal(q.double(), exact.round()):
        return
    if torch.equal(q.double(), exact.trunc()):
        raise Wrong(f"{case}: you cut the fraction off; .to(torch.int8) does that. Round first.")
    if torch.equal(q.double(), exact.floor()):
        raise Wrong(f"{case}: you round down; round to the nearest integer.")
    if torch.equal(q.double(), exact.ceil()):
        raise Wrong(f"{case}: you round up; round to the nearest integer.")
    wanted = exact.round()
    row = (q.double() != wanted).any(1).nonzero()[0].item()
    raise Wrong(f"{case}: row {row} should be {wanted[row].long().tolist()}, but yours is {q[row].tolist()}.")


# -- bytes ---------------------------------------------------------------------


@register("model_bytes")
def model_bytes(attempt) -> None:
    """Bytes of an encoder with its tables at one number of bits and the rest at another."""
    for V, P, C, F, L, table, rest in ((61, 19, 10, 23, 3, 24, 32), (30522, 512, 312, 1200, 4, 4, 8), (90, 10, 6, 9, 3, 32, 16)):
        got = number("The size", call(attempt, V, P, C, F, L, table, rest))
        tables, layer = (V + P + 2) * C, 4 * (C * C + C) + C * F + F + F * C + C + 4 * C
        others = 2 * C + L * layer + C * C + C
        if C < 100:  # the formula against a model
            sizes = {"vocab_size": V, "max_position_embeddings": P, "num_attention_heads": 1, "intermediate_size": F}
            assert parameters(Bert(BertConfig.parse(f"{L}x{C}", **sizes))) == tables + others
        size = lambda t, o, table=table, rest=rest: (t * table + o * rest) / 8  # noqa: E731
        _compare(f"{L} layers {C} wide", got, size(tables, others), {
            "that is bits; a byte has 8.": 8 * size(tables, others),
            "table_bits and rest_bits are swapped.": (tables * rest + others * table) / 8,
            "table_bits is used for everything; the rest has rest_bits.": size(tables + others, 0),
            "rest_bits is used for everything; the tables have table_bits.": size(0, tables + others),
            f"{table} // 8 is {table // 8}: add up the bits first, and divide by 8 at the end.":
                tables * (table // 8) + others * (rest // 8),
            "that is the number of parameters; each has its bits.": tables + others,
            "you multiply by 8; a byte has 8 bits, so divide.": 64 * size(tables, others),
            "the biases are missing.": size(tables, others - L * (5 * C + F) - C),
            "the biases of attention's four matrices are missing.": size(tables, others - L * 4 * C),
            "the biases of the feed-forward network are missing: F of `up`, C of `down`.": size(tables, others - L * (F + C)),
            "the layer norms are missing: 2C each, one behind the tables and two a layer.":
                size(tables, others - 2 * C - L * 4 * C),
            "the layer norm behind the tables is missing.": size(tables, others - 2 * C),
            "a layer has two layer norms, one behind attention and one behind the feed-forward network.":
                size(tables, others - L * 2 * C),
            "a layer norm has 2C parameters, a scale and a shift for each of the C numbers.":
                size(tables, others - C - L * 2 * C),
            "the layer norm behind the tables belongs to the rest.": size(tables + 2 * C, others - 2 * C),
            "the layer norms, too, are counted at rest_bits.": size(tables, others + (2 * C + L * 4 * C) * (32 - rest) / rest),
            "the biases and layer norms, too, are counted at rest_bits.":
                size(tables, others + (3 * C + L * (9 * C + F)) * (32 - rest) / rest),
            "the pooler is missing.": size(tables, others - C * C - C),
            "the position table is a table too, of `positions` rows.": size(tables - P * C, others + P * C),
            "the position table is missing.": size(tables - P * C, others),
            "the segment table is missing: two rows of C.": size(tables - 2 * C, others),
            "the segment table has two rows, one for each of two sentences.": size(tables - C, others),
            "the segment table is a table too, of two rows.": size(tables - 2 * C, others + 2 * C),
            "attention has four matrices: the output's is missing.": size(tables, others - L * (C * C + C)),
            "the four matrices of attention are missing.": size(tables, others - L * 4 * (C * C + C)),
            "the feed-forward network has two matrices.":
                (size(tables, others - L * (F * C + C)), size(tables, others - L * (F * C + F)), size(tables, others - L * F * C)),
            "the feed-forward network is missing.": size(tables, others - L * (2 * F * C + F + C)),
            "F is the feed-forward network's own width; it need not be 4C.":
                size(tables, others + L * (2 * C + 1) * (4 * C - F)),
            "you count one layer; there are L.": size(tables, others - (L - 1) * layer),
            "the pooler is there once, not in each layer.": size(tables, others + (L - 1) * (C * C + C)),
            "the tables are there once, not in each layer.": (size(L * tables, others), L * size(tables, others)),
            "that is kilobytes; give bytes.": (size(tables, others) / 1000, size(tables, others) / 1024),
            "that is megabytes; give bytes.": (size(tables, others) / 1e6, size(tables, others) / 2**20),
            "you count the tables alone.": size(tables, 0),
            "the tables are missing.": size(0, others),
        }, slack=1.0)  # fmt: skip


def _compare(
    case: str, got: float, wanted: float, mistakes: Mapping[str, float | tuple[float, ...]], slack: float = 1e-6
) -> None:
    """Raise Wrong unless got is wanted, with the sentence of the mistake whose result, or one of whose results, it is."""
    if abs(got - wanted) <= max(slack, 1e-9 * abs(wanted)):
        return
    for sentence, values in mistakes.items():
        for value in values if isinstance(values, tuple) else (values,):
            if abs(got - value) <= max(min(slack, 1e-3 * abs(value)), 1e-9 * abs(value)):
                raise Wrong(f"{case}: {sentence}")
    raise Wrong(f"{case}: {wanted:.6g} is right, but you return {got:.6g}.")
