"""TinyBERT from first principles: attention, BERT, distillation and pruning, each idea once.

Submodules load on first use, so that ``import tinylib`` costs nothing. With ``TINYLIB_TYPECHECK=1`` in the
environment the shapes in the signatures are checked at every call (jaxtyping, beartype); the tests and the
notebooks under test set it.
"""

import importlib
import os
import sys

__version__ = "0.1.0"
PYTHON = (3, 10)  # the oldest that runs the package

# Import order: each module imports only from those before it (tests/test_structure.py enforces it).
MODULES = (
    "typecheck", "errors", "options", "proofs", "stored", "processes", "sharing", "interrupt", "history", "models", "paging",
    "cards",
    "attention", "config", "bert", "text", "foreign", "encoders", "measure", "files", "datasets", "metrics", "checkpoint", "onednn",
    "rows", "train", "tasks", "augment", "losses", "fitted", "student", "rowwise", "layers", "corpus", "mlm", "general", "distill",
    "masks", "structure", "prune", "ledger", "plots", "course", "owndata", "logs", "export", "quantize", "job", "widgets",
    "checks", "doctor", "output", "reports", "commands", "cli",
)  # fmt: skip

if sys.version_info < PYTHON:  # before the modules, whose syntax an older Python cannot read
    found = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(f"tinylib needs Python 3.10 or newer, and this is {found}; install a newer one")

if os.environ.get("TINYLIB_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("tinylib", "tinylib.typecheck.checked")


def __getattr__(name: str):
    if name in MODULES:
        return importlib.import_module(f"tinylib.{name}")
    raise AttributeError(f"module 'tinylib' has no attribute {name!r}; its modules are {', '.join(MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
