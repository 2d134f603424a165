"""Checks of lesson 09: judging a student, and cutting one out of its teacher."""

import torch

from tinylib.checks.core import Wrong, call, check, compare, generator
from tinylib.checks.start import near, number


@check("gap_closed")
def gap_closed(attempt) -> None:
    """The share of the gap between labels-only training and the teacher that distillation closes."""
    for d, s, t in ((0.84, 0.74, 0.86), (0.79, 0.75, 0.95), (0.70, 0.75, 0.85), (0.866, 0.782, 0.86)):
        got, right = number("The share", call(attempt, d, s, t)), (d - s) / (t - s)
        if near(got, right):
            continue
        known = {
            "the share that is left open; give the one that is closed": (t - d) / (t - s),
            "the retention; take the labels-only student off both sides": d / t,
            "a gain in accuracy; divide it by the gap to the teacher": d - s,
            "upside down: the whole gap goes below the line": (t - s) / (d - s),
            "relative to the student's accuracy; the gap is measured against the teacher": (d - s) / s,
            "relative to the teacher's accuracy; divide by the gap, teacher minus labels-only": (d - s) / t,
            "the gap left, relative to the gain; divide the gain by the whole gap": (t - d) / (d - s),
            "of the wrong sign: the gain is distilled minus labels-only": -(d - s) / (t - s),
            "cut off below 0; a distilled student that is worse closes a negative share, and the figure should say so": max(
                0.0, (d - s) / (t - s)
            ),
            "cut off at 1; a student better than its teacher closes more than the gap, and the figure should say so": min(
                1.0, (d - s) / (t - s)
            ),
            "a percentage; give a share such as 0.5": 100 * (d - s) / (t - s),
        }
        for sentence, value in known.items():
            if near(got, value):
                raise Wrong(
                    f"For distilled {d}, labels only {s}, teacher {t} you return {got:.4g}, which is {sentence}."
                )
        raise Wrong(
            f"For distilled {d}, labels only {s}, teacher {t} the share is {right:.4g}, but you return {got:.4g}."
        )


@check("squeeze")
def squeeze(attempt) -> None:
    """A linear layer seen through an orthonormal basis: VᵀWV."""
    for big, small, seed in ((6, 4, 0), (9, 2, 1), (5, 5, 2)):
        g = generator(seed)
        weight = torch.randn(big, big, generator=g)
        basis, _ = torch.linalg.qr(torch.randn(big, small, generator=g))
        wanted = basis.T @ weight @ basis
        mistakes = {
            "You return the teacher's matrix itself: it still reads and writes the wide hidden states.": weight,
            "Only the input side is squeezed (W·V): the result must be written back in the narrow basis too.": weight
            @ basis,
            "Only the output side is squeezed (Vᵀ·W): what it reads is narrow too.": basis.T @ weight,
            "W is transposed: a linear layer computes W·x, so W stands unturned between Vᵀ and V.": basis.T
            @ weight.T
            @ basis,
            "You cut out the first rows and columns; that is right only if the basis is made of unit vectors.": weight[
                :small, :small
            ],
            "You project but stay wide (V·Vᵀ·W·V·Vᵀ): the student's matrix works on narrow states.": basis
            @ wanted
            @ basis.T,
            "The result is divided by the width: orthonormal columns need no scaling.": wanted / small,
            "The result is multiplied by the width: orthonormal columns need no scaling.": wanted * small,
        }
        compare("The squeezed matrix", call(attempt, weight, basis), wanted, mistakes)


@check("fold_value_bias")
def fold_value_bias(attempt) -> None:
    """The output bias that makes the value bias superfluous."""
    for width, seed in ((4, 0), (7, 1)):
        g = generator(seed)
        weight = torch.randn(width, width, generator=g)
        value, output = torch.randn(width, generator=g), torch.randn(width, generator=g)
        mistakes = {
            "The value bias is lost: it reaches the output through W_o.": output,
            "The value bias goes through W_o before it is added; you add it as it is.": output + value,
            "The old output bias is lost: add it.": weight @ value,
            "W_o is transposed: the output is W_o·(…), so the bias becomes W_o·b_v.": weight.T @ value + output,
            "The sign is wrong: dropping b_v takes W_o·b_v away, so it has to be added.": output - weight @ value,
            "The old output bias does not go through W_o: it is added after it.": weight @ (value + output),
            "The sum over the keys is counted: the attention weights sum to 1, so b_v arrives once.": width
            * (weight @ value)
            + output,
            "You average over the width: the weights of attention already sum to 1.": weight @ value / width + output,
        }
        compare("The new bias", call(attempt, weight, value, output), weight @ value + output, mistakes)
