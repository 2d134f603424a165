"""Lesson 00."""

import numpy as np
import torch

KINDS = {32: torch.float32, 16: torch.float16, 8: torch.int8}

MUTANTS = {
    "retention": [
        (lambda s, t: t / s, "upside down"),
        (lambda s, t: s - t, "difference"),
        (lambda s, t: t - s, "difference"),
        (lambda s, t: 1 - s / t, "lost"),
        (lambda s, t: 100 * s / t, "100 times"),
        (lambda s, t: s * t, "product"),
        (lambda s, t: s, "student's accuracy alone"),
        (lambda s, t: t, "teacher's accuracy alone"),
        (lambda s, t: (1 - s) / (1 - t), "errors"),
        (lambda s, t: 0.9, "you return 0.9"),
        (lambda s, t: f"{s / t}", "number"),
        (lambda s, t: None, "return"),
    ],
    "megabytes": [
        (lambda n, bits=32: n * bits / 1e6, "megabits"),
        (lambda n, bits=32: n * bits / 8 / 2**20, "mebibytes"),
        (lambda n, bits: n * bits / 8 / 1e6, "missing"),
        (lambda n, bits=8: n * bits / 8 / 1e6, "you return 1"),
        (lambda n, bits=32: n * bits / 8, "in bytes"),
        (lambda n, bits=32: n * bits / 8 / 1e3, "kilobytes"),
        (lambda n, bits=32: n * bits / 8 / 1e9, "gigabytes"),
        (lambda n, bits=32: n * 4 / 1e6, "use the argument"),
        (lambda n, bits=32: n / 1e6, "use the argument"),
        (lambda n, bits=32: n * bits * 8 / 1e6, "8 times"),
        (lambda n, bits=32: n / bits / 1e6, "takes"),
        (lambda n, bits=32: 57.4, "you return 57.4"),
    ],
}
RIGHT = {
    "retention": [
        lambda s, t: s / t,
        lambda s, t: s * t**-1,
        lambda s, t: np.float32(1) - np.float32(t - s) / np.float32(t),
        lambda s, t: torch.tensor(s) / t,
    ],
    "megabytes": [
        lambda n, bits=32: n * bits / 8e6,
        lambda n, bits=32: n * (bits / 8) / 10**6,
        lambda n, bits=32: torch.empty(n, dtype=KINDS[bits], device="meta").nbytes / 1e6,
    ],
}
