"""Mutation tests: small mistakes in the package's most important functions, each of which the tests must notice (`make mutation`).

A mutant differs from the function in one place: a comparison or an operator swapped, a negation dropped, a constant moved by one,
a statement left out. Its code takes the place of the function's own in a forked process (so every reference to the function
sees it), and the tests named for it run there until the first fails. A mutant that no test notices has survived: either a test is
missing, or it computes the same (``EQUIVALENT`` says why). Needs `fork`: Linux or macOS.

    cd tests && python -m mutation            all targets
    cd tests && python -m mutation attend     some of them
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

# The check of shapes wraps each function; without it the code that is replaced is the function's own.
os.environ["TINYLIB_TYPECHECK"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

TESTS = Path(__file__).parent
PATIENCE = 90  # seconds for the tests of one mutant: one that never ends is noticed


@dataclass(frozen=True)
class Target:
    """A function, and the tests that must notice a mistake in it: a file and pytest's -k."""

    module: str
    function: str
    tests: str
    only: str = ""


STEPS = "plain_loop or memory or parts or number or adamw or minimised or loss or stopped or frozen"
DRAWN = "draw or algorithm or probability or max_length or says or longer"
BUCKETS = "row or seed or padding or short or unshuffled or stopped"
READ = "test_train.py test_robust.py test_bad_checkpoints.py"
KEPT = "run_s or (checkpoint or resumed or killed or good) and not bad_checkpoints"
TARGETS = {
    "attend": Target("attention", "attend", "test_attention.py"),
    "attention_weights": Target("attention", "attention_weights", "test_attention.py"),
    "attention_scores": Target("attention", "attention_scores", "test_attention.py"),
    "attention_loss": Target("losses", "attention_loss", "test_distill.py", "loss"),
    "hidden_loss": Target("losses", "_masked_mean_square", "test_distill.py", "loss"),
    "soft_target_loss": Target("losses", "soft_target_loss", "test_distill_losses.py"),
    "magnitude_mask": Target("masks", "magnitude_mask", "test_prune.py", "mask or count or share or nan"),
    "LayerMap.uniform": Target("layers", "LayerMap.uniform", "test_distill.py", "map or deeper"),
    "LayerMap._check": Target("layers", "LayerMap._check", "test_distill.py", "map or deeper"),
    "Step._take": Target("train", "Step._take", "test_train.py test_robust.py", STEPS),
    "RowGradient": Target("rows", "RowGradient.__call__", "test_rows.py"),
    "onednn._product": Target("onednn", "_product", "test_onednn.py", "not many_shapes"),
    "onednn._sum_over_rows": Target("onednn", "_sum_over_rows", "test_onednn.py", "not many_shapes"),
    "onednn._whole": Target("onednn", "_whole", "test_onednn.py", "not many_shapes"),
    "onednn._fits": Target("onednn", "_fits", "test_onednn.py", "not many_shapes"),
    "OneDNN": Target("onednn", "OneDNN.__torch_function__", "test_onednn.py", "not many_shapes"),
    "train._split": Target("train", "_split", "test_train.py test_robust.py", "parts"),
    "Checkpoint._age": Target("checkpoint", "Checkpoint._age", "test_train.py test_robust.py", KEPT),
    "Checkpoint._newest_whole": Target("checkpoint", "Checkpoint._newest_whole", READ, KEPT),
    "checkpoint._read": Target("checkpoint", "_read", "test_train.py test_bad_checkpoints.py", KEPT),
    "pad": Target("text", "pad", "test_text.py", "padd"),
    "LengthBuckets._batches": Target("text", "LengthBuckets._batches", "test_text.py", BUCKETS),
    "algorithm_1": Target("augment", "algorithm_1", "test_augment.py", DRAWN),
    "augment._chosen": Target("augment", "_chosen", "test_augment.py", DRAWN),
    "augment._draw": Target("augment", "_draw", "test_augment.py", DRAWN),
    "shrink": Target("structure", "shrink", "test_shrink.py", "shrunk or neurons or layers or nothing or fewer or leave or heads"),
}
# Mutants that compute the same, each with the reason: (target, what was changed) -> why
ALONE = "the whole batch's share is 1, and the sum is the same by the longer way; several processes are tests/test_processes.py's"
NOTE = '{} → {} in warnings.warn(f"{{what}}: going on from the one before it, of step {{sai…'
POINTS = "the line of the source that the note points at, which the command line does not show"
ANY_SEED = "any number that seed and epoch decide gives an order as good"
STABLE = "torch's other sort leaves equal lengths in order too, here; it need not elsewhere"
AS_LONG = "both are as long as each other by the way they are made"
EQUIVALENT = {
    ("attention_scores", "-2 → 2 in k.transpose(-2, -1)"): "k has four axes, so −2 is 2",
    ("attention_loss", "0 → -1 in difference[:, 0]"): "only the shape is looked at, which all heads share",
    ("Step._take", "Eq → NotEq in len(parts) == 1 and processes.count() == 1"): ALONE,
    ("Step._take", "1 → 0 in len(parts) == 1"): ALONE,
    ("Step._take", "1 → 2 in processes.count() == 1"): ALONE,
    ("Step._take", "1 → 0 in processes.count() == 1"): ALONE,
    ("RowGradient", "0 → -1 in table.grad._indices()[0]"): "a table's sparse gradient has one row of places",
    ("onednn._product", "LtE → Lt in if width <= out:"): "where both are as wide, both ways copy as much",
    ("onednn._fits", "0 → 1 in x.numel() > 0"): "a product of one number is the same by PyTorch",
    ("OneDNN", "0 → -1 in bias[0]"): "there is one bias at most",
    ("train._split", "True → False in zip(batch, values, strict=True)"): AS_LONG,
    ("train._split", "True → False in zip(*(v.chunk(parts) for v in batch.values()), strict=True)"): AS_LONG,
    ("train._split", "True → False in zip(pieces, longest, strict=True)"): AS_LONG,
    ("Checkpoint._newest_whole", NOTE.format(2, 3)): POINTS,
    ("Checkpoint._newest_whole", NOTE.format(2, 1)): POINTS,
    ("LengthBuckets._batches", "Add → Sub in torch.Generator().manual_seed(self.seed * 1000003 + self.epoch)"): ANY_SEED,
    ("LengthBuckets._batches", "1000003 → 1000004 in self.seed * 1000003"): ANY_SEED,
    ("LengthBuckets._batches", "1000003 → 1000002 in self.seed * 1000003"): ANY_SEED,
    ("LengthBuckets._batches", "True → False in torch.argsort(self.lengths[pool], stable=True)"): STABLE,
    ("LengthBuckets._batches", "True → False in torch.argsort(self.lengths, stable=True)"): STABLE,
    ("soft_target_loss", "-1 → 1 in F.log_softmax(fine(student_logits) / temperature, dim=-1)"): "logits have two axes",
    ("soft_target_loss", "-1 → 1 in F.log_softmax(fine(teacher_logits.detach()) / temperature, dim=-1)"): "logits have two axes",
    ("magnitude_mask", "-1 → 1 in (size == threshold).nonzero().squeeze(-1)"): "nonzero() of one axis gives (n, 1)",
    ("magnitude_mask", "1 → 2 in (size == threshold).nonzero().squeeze(-1)"): "a column of places sets the same weights",
    ("magnitude_mask", "1 → 0 in (size == threshold).nonzero().squeeze(-1)"): "a column of places sets the same weights",
}

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
LEFT_OUT = ast.Expr | ast.Assign | ast.AugAssign | ast.If | ast.Raise | ast.Continue | ast.Break
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the line, what it says there, and the whole module's tree with it."""

    line: int
    change: str
    tree: ast.Module


def mutants(source: str, function: str) -> Iterator[Mutant]:
    """Yield every mutant of a function of a module."""
    places = len(list(_changes(_find(ast.parse(source), function))))
    for place in range(places):
        tree = ast.parse(source)
        found = _find(tree, function)
        node, what, act = list(_changes(found))[place]
        change = f"{what} in {_around(found, node)}"
        act()
        ast.fix_missing_locations(tree)
        yield Mutant(node.lineno, change, tree)


def _find(tree: ast.Module, function: str) -> ast.FunctionDef:
    node: ast.AST = tree
    for name in function.split("."):
        node = next(n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    return node


def _around(function: ast.FunctionDef, node: ast.AST) -> str:
    """Return the expression or the first line of the statement that a node stands in."""
    above = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    outer = node if isinstance(node, ast.stmt) else above[id(node)]
    while isinstance(outer, ast.UnaryOp | ast.Tuple | ast.Slice | ast.keyword | ast.cmpop):
        outer = above[id(outer)]
    text = ast.unparse(outer).splitlines()[0]
    return text if len(text) <= 70 else text[:69] + "…"


def _changes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, Callable]]:
    """Yield the node, the kind and the act of each change; docstrings, annotations and messages of errors are left alone."""
    silent = {id(n) for n in ast.walk(function) if isinstance(n, ast.Raise) for n in ast.walk(n)}
    silent |= {id(n) for n in ast.walk(function.args)}
    silent |= {id(n) for n in ast.walk(function.returns)} if function.returns else set()
    for node in ast.walk(function):
        if id(node) not in silent or isinstance(node, ast.Raise):
            yield from _of_operators(node)
            yield from _of_constants(node)
            yield from _of_statements(node)


def _of_operators(node: ast.AST) -> Iterator[tuple[ast.AST, str, Callable]]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if new := COMPARE.get(type(op)):
                yield node, f"{type(op).__name__} → {new.__name__}", lambda i=i, new=new: node.ops.__setitem__(i, new())
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        new = ARITHMETIC[type(node.op)]
        yield node, f"{type(node.op).__name__} → {new.__name__}", lambda: setattr(node, "op", new())
    if isinstance(node, ast.BoolOp):
        new = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield node, f"{type(node.op).__name__} → {new.__name__}", lambda: setattr(node, "op", new())
    for name, child in ast.iter_fields(node):
        inner = child if isinstance(child, list) else [child]
        for i, one in enumerate(inner):
            if isinstance(one, ast.UnaryOp) and isinstance(one.op, ast.Not | ast.USub | ast.Invert):
                act = lambda name=name, i=i, one=one, child=child: (  # noqa: E731
                    child.__setitem__(i, one.operand) if isinstance(child, list) else setattr(node, name, one.operand)
                )
                yield one, f"{ast.unparse(one)} → {ast.unparse(one.operand)}", act


def _of_constants(node: ast.AST) -> Iterator[tuple[ast.AST, str, Callable]]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float):
        return
    other = (not node.value,) if isinstance(node.value, bool) else (node.value + 1, node.value - 1)
    for new in other:
        yield node, f"{node.value} → {new}", lambda new=new: setattr(node, "value", new)


def _of_statements(node: ast.AST) -> Iterator[tuple[ast.AST, str, Callable]]:
    for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        for i, one in enumerate(body if isinstance(body, list) else []):
            told = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            if isinstance(one, LEFT_OUT) and not told:
                act = lambda i=i, body=body: body.__setitem__(i, ast.copy_location(ast.Pass(), body[i]))  # noqa: E731
                yield one, f"{type(one).__name__} left out", act


def code_of(tree: ast.Module, file: str, function: str) -> CodeType:
    """Return the code of a function out of its module's, which is compiled and never run."""
    code = compile(tree, file, "exec")
    for name in function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def own(target: Target):
    """Return the function that a target names, as Python holds it."""
    found = importlib.import_module(f"tinylib.{target.module}")
    for name in target.function.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "__func__", found)
    return inspect.unwrap(found)


def arguments(target: Target) -> list[str]:
    files = [str(TESTS / name) for name in target.tests.split()]
    only = ["-k", target.only] if target.only else []
    fast = "not slow and not network and not browser and not alone"
    quiet = ["-q", "--no-header", "--tb=no", "-W", "ignore", "-p", "no:xdist", "-p", "no:cacheprovider"]
    return [*files, *only, "-m", fast, "-x", *quiet]


def passes(target: Target) -> bool:
    """Run a target's tests in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return pytest.main(arguments(target)) == 0


def survives(target: Target, mutant: Mutant) -> bool:
    """Tell whether the tests pass with a mutant in the function's place, in a forked process."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            signal.alarm(PATIENCE)  # the signal ends the process, which counts as noticed
            function = own(target)
            function.__code__ = code_of(mutant.tree, function.__code__.co_filename, target.function)
            code = 0 if passes(target) else 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return status == 0


def examine(name: str) -> tuple[int, list[Mutant]]:
    """Return how many mutants a target has, and those that survive."""
    target = TARGETS[name]
    source = Path(inspect.getsourcefile(own(target))).read_text(encoding="utf-8")
    found = list(mutants(source, target.function))
    return len(found), [mutant for mutant in found if survives(target, mutant)]


def main(chosen: list[str]) -> int:
    """Print the table; return 1 if a mutant survives that is not known to compute the same."""
    sys.path.insert(0, str(TESTS))
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    left, all_mutants, all_killed = 0, 0, 0
    print(f"{'function':<28}{'mutants':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}{'seconds':>9}")
    for name in chosen or TARGETS:
        started = time.perf_counter()
        for when in ("", " when they run a second time in one process"):  # as they do with each mutant, which would seem noticed
            if not passes(TARGETS[name]):
                print(f"{name}: its tests fail{when} without any mutant; mend them first", file=sys.stderr)
                return 1
        count, alive = examine(name)
        same = [m for m in alive if (name, m.change) in EQUIVALENT]
        new = [m for m in alive if (name, m.change) not in EQUIVALENT]
        left += len(new)
        all_mutants, all_killed = all_mutants + count, all_killed + count - len(alive)
        seconds = time.perf_counter() - started
        print(f"{name:<28}{count:>8}{count - len(alive):>8}{len(same):>12}{len(new):>10}{seconds:>9.0f}")
        print("".join(f"    survived, line {m.line}: {m.change}\n" for m in new), end="", flush=True)
    print(f"{'all':<28}{all_mutants:>8}{all_killed:>8}{all_mutants - all_killed - left:>12}{left:>10}")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
