"""Checks of lesson 05: which weights go, by what schedule, and what is left on disk."""

from collections.abc import Callable

import torch
from torch import Tensor

from tinylib.checks.core import Wrong, call, compare, generator
from tinylib.checks.core import check as register
from tinylib.checks.start import number


@register("removal_cost")
def removal_cost(attempt) -> None:
    """The loss's change when a weight is set to zero, from its Taylor expansion: −g·w + ½·h·w²."""
    for shape in ((6,), (3, 4)):
        g = generator(len(shape))
        w, grad = torch.randn(2, *shape, generator=g, dtype=torch.float64)
        h = torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        first, second = -grad * w, 0.5 * h * w**2
        compare(
            "The cost",
            call(attempt, w, grad, h),
            first + second,
            {
                "Your first-order term has the wrong sign: the weight moves by δ = −w: g·δ = −g·w.": second - first,
                "The ½ of the second-order term is missing.": first + 2 * second,
                "Only the first-order term is there: add ½·h·w².": first,
                "Only the second-order term is there: at a point that is no minimum −g·w counts too.": second,
                "The first-order term has a sign: removing a weight may also lower the loss.": first.abs() + second,
                "You take the size of the cost, but removing a weight may also lower the loss.": (first + second).abs(),
                "Your second-order term holds h·w; it is ½·h·w², since δ² = w².": first + 0.5 * h * w,
                "You add the costs up; give one number for each weight.": (first + second).sum(),
                "The sign is wrong: this is how much the loss would fall.": -(first + second),
                "The curvature is squared; it is ½·h·w².": first + 0.5 * (h * w) ** 2,
                "The curvature is not used: the second-order term is ½·h·w².": first + 0.5 * w**2,
            },
        )


# -- masks ---------------------------------------------------------------------


def _flat_mask(size: Tensor, remove: int) -> Tensor:
    keep = torch.ones(size.numel(), dtype=torch.bool)
    keep[size.flatten().argsort(stable=True)[:remove]] = False
    return keep.reshape(size.shape)


def _need_mask(got, weight: Tensor, what: str = "The mask") -> None:
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} should be a tensor of the weight's shape, but yours is a {type(got).__name__}.")
    if got.shape != weight.shape:
        shapes = f"of the weight's shape {tuple(weight.shape)}, but yours is {tuple(got.shape)}"
        raise Wrong(f"{what} should be {shapes}: rank all weights together, then give them their places back.")
    if got.dtype != torch.bool:
        weights = got.is_floating_point() and torch.equal(got[got != 0], weight[got != 0])
        why = (
            "you return the pruned weight itself; return which weights stay"
            if weights
            else "compare, and keep the answer"
        )
        raise Wrong(f"{what} should hold True and False (torch.bool), but yours is {got.dtype}: {why}.")


def _compare_mask(got: Tensor, weight: Tensor, sparsity: float, mistakes: dict[str, Tensor]) -> None:
    """Raise Wrong unless the ``round(sparsity · n)`` smallest go; which of equals goes is left open."""
    n, remove = weight.numel(), round(sparsity * weight.numel())
    gone, size = int((~got).sum()), weight.abs()
    right = gone == remove and (remove in (0, n) or size[~got].max() <= size[got].min())
    if right:
        return
    if remove == 0:
        raise Wrong(f"At sparsity 0 every weight stays, but you remove {gone} of {n}: mind what [:-0] gives.")
    wanted = _flat_mask(size, remove)
    if torch.equal(got, ~wanted):
        raise Wrong("Your mask is inverted: True means kept, and the small weights are the ones to remove.")
    for sentence, value in mistakes.items():
        if torch.equal(got, value):
            raise Wrong(sentence)
    if gone != remove:
        tied = " Some of them have equal magnitude: count, do not only compare with a threshold." if _tied(size) else ""
        share = f"round({sparsity:g} · {n}) = {remove}"
        raise Wrong(f"You remove {gone} of {n} weights; sparsity {sparsity:g} asks for exactly {share}.{tied}")
    worst = f"{size[~got].max():.2f}, but keep one of {size[got].min():.2f}"
    raise Wrong(f"The count is right, the choice is not: you remove a weight of magnitude {worst}.")


def _tied(size: Tensor) -> bool:
    return size.unique().numel() < size.numel()


@register("magnitude_mask")
def magnitude_mask(attempt) -> None:
    """The smallest weights by magnitude go: exactly round(sparsity·n), True = kept."""
    g = generator()
    whole = torch.tensor([[1.0, -1.0, 2.0, 2.0], [-2.0, 3.0, 1.0, -3.0]])
    first = torch.randn(6, 5, generator=g)
    # 2.8 and 2.25 weights to remove: neither rounding down nor rounding up gives both
    uneven = [(10 * torch.randn(n, generator=g), sparsity) for n, sparsity in ((7, 0.4), (9, 0.25))]
    deep = torch.randn(3, 4, 2, generator=g)
    for weight, sparsity in [
        (first, 0.3),
        (deep, 0.75),
        (10 * first, 0.3),
        *uneven,
        (whole, 0.5),
        (first, 0.0),
    ]:
        got = call(attempt, weight, sparsity)
        _need_mask(got, weight)
        n = weight.numel()
        remove = round(sparsity * n)
        size = weight.abs()
        ranked = size.flatten().sort().values
        below, above = ranked[max(remove - 1, 0)], ranked[remove]  # equal if the cut goes through weights of equal magnitude
        tied = "count, do not only compare with a threshold: of equal magnitudes some stay and some go"
        _compare_mask(got, weight, sparsity, {
            f"You cut at {below:g}, the magnitude of several weights, and all of them go; {tied}.": size > below,
            f"You cut at {above:g}, the magnitude of several weights, and all of them stay; {tied}.": size >= above,
            "You rank the signed weights, so large negative ones go first. Magnitude is the absolute value.":
                _flat_mask(weight, remove),
            "You keep the share `sparsity`; it is the share to remove.": _flat_mask(size, n - remove),
            "You remove the largest weights; those matter most.": _flat_mask(-size, remove),
            "`sparsity` is a share of the weights, not a threshold for their magnitude.": size > sparsity,
            "You cut at a share of the largest magnitude; cut so that a share of the weights goes.":
                size > sparsity * size.max(),
            "You prune each row by itself; rank all weights of the tensor together.":
                _by_row(size, sparsity, -1),
            "You prune each column by itself; rank all weights of the tensor together.":
                _by_row(size, sparsity, 0),
        })  # fmt: skip


def _by_row(size: Tensor, sparsity: float, dim: int) -> Tensor:
    if size.ndim < 2:
        return torch.zeros_like(size, dtype=torch.bool)
    rank = size.argsort(dim=dim, stable=True).argsort(dim)
    return rank >= round(sparsity * size.shape[dim])


@register("global_masks")
def global_masks(attempt) -> None:
    """One threshold for several weights: dict of tensors in, dict of masks out."""
    g = generator(5)
    scales = {"up": 0.3, "query": 3.0, "down": 0.6}
    shapes = {"up": (8, 4), "query": (4, 4), "down": (4, 8)}
    # rounded, so that some are of equal magnitude; 0.36 of the 80 are 28.8
    weights = {name: (scales[name] * torch.randn(shapes[name], generator=g)).round(decimals=1) for name in scales}
    together = torch.cat([w.flatten() for w in weights.values()])
    for sparsity in (0.5, 0.8, 0.0, 0.36):
        got = call(attempt, {name: w.clone() for name, w in weights.items()}, sparsity)
        if not isinstance(got, dict) or set(got) != set(weights):
            raise Wrong(f"Return a dict with a mask under each of the names {', '.join(weights)}.")
        for name, w in weights.items():
            _need_mask(got[name], w, f"The mask of {name!r}")
        mask = torch.cat([got[name].flatten() for name in weights])
        remove = round(sparsity * len(together))
        join = lambda make: torch.cat([make(w).flatten() for w in weights.values()])  # noqa: E731, B023
        each = lambda w: _flat_mask(w.abs(), round(sparsity * w.numel()))  # noqa: E731, B023
        cut = torch.stack(
            [w.abs().flatten().sort().values[max(round(sparsity * w.numel()) - 1, 0)] for w in weights.values()]
        )
        over = lambda t: together.abs() > t  # noqa: E731
        _compare_mask(mask, together, sparsity, {
            "You prune every matrix by the same share. Rank the weights of all of them together.": join(each),
            "You divide each matrix by its own scale before ranking. Rank the plain magnitudes.":
                _flat_mask(join(lambda w: w.abs() / w.std()), remove),
            "You take the mean of the matrices' own thresholds. Rank all weights together to find one.":
                over(cut.mean()),
            "You take the largest of the matrices' own thresholds. Rank all weights together to find one.":
                over(cut.max()),
            "Your threshold comes from the first matrix alone.": over(cut[0]),
            "Your threshold comes from the last matrix alone.": over(cut[-1]),
            "You rank the signed weights. Magnitude is the absolute value.": _flat_mask(together, remove),
            "You keep the share `sparsity`; it is the share to remove.":
                _flat_mask(together.abs(), len(together) - remove),
        })  # fmt: skip


# -- numbers -------------------------------------------------------------------


def _compare_number(
    case: str, got: float, wanted: float, mistakes: dict[str, Callable | float], slack: float = 1e-6
) -> None:
    if abs(got - wanted) <= slack:
        return
    for sentence, value in mistakes.items():
        if abs(got - value) <= slack:
            raise Wrong(f"{case}: {sentence}")
    raise Wrong(f"{case}: {wanted:.6g} is right, but you return {got:.6g}.")


@register("cubic_sparsity")
def cubic_sparsity(attempt) -> None:
    """Zhu and Gupta's schedule between begin and end, constant outside."""
    for step, begin, end, final in (
        (30, 10, 60, 0.8),
        (45, 0, 60, 0.5),
        (10, 10, 60, 0.8),
        (60, 10, 60, 0.8),
        (3, 10, 60, 0.8),
        (99, 10, 60, 0.8),
    ):
        got = number("The sparsity", call(attempt, step, begin, end, final))
        p = (step - begin) / (end - begin)
        c = min(max(p, 0.0), 1.0)
        wanted = final * (1 - (1 - c) ** 3)
        if step < begin or step > end:
            when = (
                f"before step {begin} nothing is removed"
                if step < begin
                else f"after step {end} the sparsity stays at {final}"
            )
            _compare_number(f"At step {step} of a schedule from {begin} to {end}", got, wanted, {
                f"{when}; clamp the progress between 0 and 1.": final * (1 - (1 - p) ** 3),
            })  # fmt: skip
        q = step / end
        case = f"At step {step} of a schedule from {begin} to {end} with final sparsity {final}"
        _compare_number(case, got, wanted, {
            "that is the straight line; the schedule is cubic.": final * c,
            "the exponent is 2; it is 3.": final * (1 - (1 - c) ** 2),
            "that is what is still to come: your sparsity falls, and it should rise.": final * (1 - c) ** 3,
            "slow at first and fast at the end is the wrong way round: it is 1 − (1 − p)³, not p³.":
                final * c**3,
            "the final sparsity is missing as a factor.": 1 - (1 - c) ** 3,
            "the schedule starts at `begin`: subtract it from step and from end.": final * (1 - (1 - q) ** 3),
            "subtract `begin` from `end` too: the schedule is end − begin steps long.":
                final * (1 - (1 - (step - begin) / end) ** 3),
            "you return a percentage; give a share.": 100 * wanted,
            "that is the share kept; give the share removed.": 1 - wanted,
            "you divide in whole numbers (//), which leaves 0.": 0.0 if 0 < c < 1 else float("nan"),
            "you jump to the final sparsity at once.": final if c < 1 else float("nan"),
        })  # fmt: skip


@register("bitmask_bytes")
def bitmask_bytes(attempt) -> None:
    """One bit a weight and the values of those kept, in bytes."""
    for count, sparsity, bits in (
        (8_000, 0.7, 32),
        (8_000, 0.7, 16),
        (1_000_000, 0.9, 8),
        (8_000, 0.0, 32),
        (1_001, 0.3, 16),
    ):
        got = number("The size", call(attempt, count, sparsity, bits))
        kept = count - round(sparsity * count)
        mask, values = count / 8, kept * bits / 8
        slack = 1.0 if count % 8 else 1e-3  # to the next whole byte or not
        case = f"{count} weights at sparsity {sparsity} and {bits} bits a value"
        _compare_number(case, got, mask + values, {
            "that is bits; a byte has 8.": 8 * (mask + values),
            "the bitmask itself is missing: one bit for every weight says where the kept ones stand.": values,
            "the values are missing: the bitmask alone cannot give the weights back.": mask,
            "the mask takes one bit a weight, not one byte.": 8 * mask + values,
            "you store the values of the weights that are removed.": mask + (count - kept) * bits / 8,
            "you use 32 bits a value whatever `value_bits` says.": mask + kept * 4,
            "that is the dense size: zeros and all.": count * bits / 8,
            "you store every value and the mask besides.": mask + count * bits / 8,
            "the mask needs a bit for the removed weights too.": kept / 8 + values,
            "that is a 32-bit place beside each kept value, not a bitmask.": kept * (bits + 32) / 8,
            "that is megabytes; give bytes.": (mask + values) / 1e6,
            "the value bits are not divided by 8: bytes, not bits.": mask + kept * bits,
            "the mask is counted in bits, the values in bytes.": count + values,
        }, slack)  # fmt: skip


# -- structure -----------------------------------------------------------------


@register("remove_neurons")
def remove_neurons(attempt) -> None:
    """Take neurons out: rows of ``up``, entries of its bias, columns of ``down``."""
    for neurons, width in ((8, 5), (6, 6)):
        g = generator(neurons)
        up, bias = torch.randn(neurons, width, generator=g), torch.randn(neurons, generator=g)
        down, keep = torch.randn(width, neurons, generator=g), torch.rand(neurons, generator=g) < 0.6
        got = call(attempt, up, bias, down, keep)
        if not isinstance(got, tuple | list) or len(got) != 3 or not all(isinstance(x, Tensor) for x in got):
            raise Wrong("Return three tensors: the smaller up weight, its bias, the smaller down weight.")
        square = neurons == width
        _part("The up weight", got[0], up[keep], neurons, {
            "You zero the rows of `up`, but they are still there: index with the mask.": up * keep[:, None],
            "You remove the neurons that should stay: keep is True for those.": up[~keep],
            "You cut the columns of `up`. A neuron is a row of it.": up[:, keep] if square else up[:0],
            "`up` is as large as before.": up,
            "Your first tensor is transposed: keep nn.Linear's layout (neurons, width).": up[keep].T,
            "The first tensor should be `up`, and yours is `down`.": down[:, keep],
        })  # fmt: skip
        _part("The up bias", got[1], bias[keep], neurons, {
            "The bias is as long as before: each removed neuron had an entry in it.": bias,
            "You zero the entries of the bias, but they are still there.": bias * keep,
            "You remove the bias of the neurons that should stay.": bias[~keep],
        })  # fmt: skip
        _part("The down weight", got[2], down[:, keep], neurons, {
            "`down` is as large as before: it has a column for every neuron, so those go too.": down,
            "You zero the columns of `down`, but they are still there.": down * keep,
            "You cut the rows of `down`. A neuron is a column of it.": down[keep] if square else down[:0],
            "You remove the columns of the neurons that should stay.": down[:, ~keep],
            "Your third tensor is transposed: keep nn.Linear's layout (width, neurons).": down[:, keep].T,
        })  # fmt: skip


def _part(name: str, got: Tensor, right: Tensor, neurons: int, mistakes: dict[str, Tensor]) -> None:
    known = any(got.shape == value.shape and torch.equal(got, value) for value in mistakes.values())
    if got.shape != right.shape and not known:
        stay = max(right.shape) if right.ndim == 1 else right.shape[0 if "up" in name else 1]
        shapes = f"{name} should have shape {tuple(right.shape)}, but yours has {tuple(got.shape)}"
        raise Wrong(f"{shapes}: {stay} of {neurons} neurons stay.")
    compare(name, got, right, mistakes)
