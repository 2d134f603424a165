"""The numbers that a command line may be given, for argparse's ``type``: what is none of them is refused with what is wanted."""

import argparse
import contextlib
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)
LARGEST = 2**31  # of whole numbers: what PyTorch's generators and counters take everywhere


def number(kind: type[N], accept: Callable[[N], bool], wanted: str) -> Callable[[str], N]:
    """Return a parser of numbers that ``accept`` takes; ``wanted`` says in its refusal what it would have taken."""

    def parse(text: str) -> N:
        with contextlib.suppress(ValueError):
            if accept(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


count = number(int, lambda n: 1 <= n < LARGEST, f"a whole number from 1 to {LARGEST - 1}")
count_from_0 = number(int, lambda n: 0 <= n < LARGEST, f"a whole number from 0 to {LARGEST - 1}")
seed = number(int, lambda n: 0 <= n < LARGEST, f"a whole number from 0 to {LARGEST - 1}")
rate = number(float, lambda x: 0 < x < float("inf"), "a number greater than 0")
amount = number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
share = number(float, lambda x: 0 <= x < 1, "a share of at least 0 and less than 1")
