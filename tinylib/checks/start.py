"""Checks of lesson 00: two formulas that the whole course uses."""

import math
import numbers

import numpy as np
from torch import Tensor

from tinylib.checks.core import Wrong, call, check


def number(name: str, value) -> float:
    """Return the learner's answer as a float; a NumPy number, and a tensor or an array of one element, will do."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
        raise Wrong(f"{name} should be one number, but yours is a {type(value).__name__}{shape}.")
    return float(value)


def near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))


@check("retention")
def retention(attempt) -> None:
    """The share of the teacher's accuracy that the student keeps."""
    for student, teacher in ((0.72, 0.80), (0.90, 0.90), (0.826, 0.871)):
        got, right = number("Retention", call(attempt, student, teacher)), student / teacher
        if near(got, right):
            continue
        known = {
            "upside down: it is the student's share of the teacher's accuracy, not the reverse": teacher / student,
            "a difference of accuracies: that is the loss in points; retention is a ratio": student - teacher,
            "a difference of accuracies: that is the gap in points; retention is a ratio": teacher - student,
            "the share that is lost; retention is what is kept": 1 - student / teacher,
            "100 times too large: give a share such as 0.9, not a percentage": 100 * student / teacher,
            "the product of the two; a share is a ratio": student * teacher,
            "the student's accuracy alone: compare it with the teacher's": student,
            "the teacher's accuracy alone: compare the student's with it": teacher,
            "a ratio of the errors; retention compares how often each is right": (1 - student) / (1 - teacher),
            "the mean of the two; a share is a ratio": (student + teacher) / 2,
        }
        for sentence, value in known.items():
            if near(got, value):
                raise Wrong(f"For accuracies {student} and {teacher} you return {got:.4g}, which is {sentence}.")
        raise Wrong(
            f"For a student at {student} and a teacher at {teacher} retention is {right:.4g}, but you return {got:.4g}."
        )


@check("megabytes")
def megabytes(attempt) -> None:
    """The size of a model's weights in millions of bytes."""
    for parameters, *given in ((14_350_248, 32), (22_713_216, 16), (1_000, 8), (1_000_000,)):
        bits = given[0] if given else 32
        got, right = number("The size", call(attempt, parameters, *given)), parameters * bits / 8e6
        if near(got, right):
            continue
        known = {
            "in megabits: a byte has 8 bits": parameters * bits / 1e6,
            "in units of 2²⁰ bytes (mebibytes); a megabyte is 10⁶": parameters * bits / 8 / 2**20,
            "in bytes; a megabyte is 10⁶ bytes": parameters * bits / 8,
            "in kilobytes; a megabyte is 10⁶ bytes": parameters * bits / 8e3,
            "in gigabytes; a megabyte is 10⁶ bytes": parameters * bits / 8e9,
            "what 32 bits take, whatever `bits` says: use the argument": parameters * 4 / 1e6,
            "one byte a parameter, whatever `bits` says: use the argument": parameters / 1e6,
            "8 times too large: divide by the 8 bits of a byte instead of multiplying": parameters * bits * 8 / 1e6,
            "parameters divided by bits; each parameter *takes* that many bits": parameters / bits / 1e6,
        }
        for sentence, value in known.items():
            if near(got, value):
                raise Wrong(f"For {parameters:,} parameters of {bits} bits you return {got:.6g}, which is {sentence}.")
        raise Wrong(f"{parameters:,} parameters of {bits} bits take {right:.6g} MB, but you return {got:.6g}.")
