"""The shape of the repository: import order, one copy of each definition, a tidy top level."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from lessons import code_cells, lessons, read

import tinylib

PACKAGE = ROOT / "tinylib"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The tree of the course; a newcomer should find nothing else at the top.
TOP_LEVEL = {
    "README.md", "LICENSE", "LICENSE-CONTENT", "CITATION.cff", "SECURITY.md",
    "Makefile", "pyproject.toml", "requirements.txt", "environment.yml",
    ".ci", ".gitignore", ".gitattributes", "notebooks", "tinylib", "data", "tests", "benchmarks", "docs",
}  # fmt: skip
SIZE_LIMIT = 50_000_000  # bytes of one file


def committed() -> list[str]:
    """List the files that are or would be committed, as paths from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("this copy of the course is not a git repository")
    return sorted(name for name in set(done.stdout.split("\0")) if name and (ROOT / name).is_file())


@cache
def parse_notebook(path: Path) -> ast.Module:
    """Parse a lesson's code cells, magics and shell lines left out."""
    lines = "\n".join(cell.source for cell in code_cells(read(path))).splitlines()
    return ast.parse("\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines))


def module_name(path: Path) -> str:
    """Give the place of a file in the order of imports: a subpackage counts as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.Module) -> set[str]:
    """Find the submodules of tinylib that a module imports, at any depth of the code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("tinylib.")}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: say `from tinylib.x import ...`, no relative import"
            source = node.module.split(".")
            if source[:1] == ["tinylib"]:
                found |= {source[1]} if len(source) > 1 else {name.name for name in node.names}
    return found & {module_name(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_those_above_it(path):
    imported = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    name = module_name(path)
    if name == "__init__":
        assert not imported, "`import tinylib` must stay cheap"
    elif name != "__main__":
        assert name in tinylib.MODULES, f"put {name} into tinylib.MODULES, at its place in the order"
        allowed = {name, *tinylib.MODULES[: tinylib.MODULES.index(name)]}
        assert imported <= allowed, f"{name} may not import {sorted(imported - allowed)}: they come after it"


# Run where the package lies; what Python itself has loaded before (coverage, say) is none of the package's.
IMPORT = """
import sys, time
before, start = set(sys.modules), time.perf_counter()
import tinylib
print(time.perf_counter() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def import_anew() -> tuple[float, set[str]]:
    """Import the package as a learner does, in a new process; give the seconds and the packages that it brought along."""
    env = {name: value for name, value in os.environ.items() if name != "TINYLIB_TYPECHECK"}
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    seconds, *packages = done.stdout.split()
    return float(seconds), set(packages)


def test_importing_the_package_imports_no_other():
    _, packages = import_anew()
    assert "tinylib" in packages
    foreign = packages - {"tinylib"} - sys.stdlib_module_names
    assert not foreign, "import it in the module that needs it: `import tinylib` must stay cheap"


@pytest.mark.alone
def test_importing_the_package_takes_no_time():
    assert min(import_anew()[0] for _ in range(3)) < 0.3


def definitions(tree: ast.Module) -> set[tuple[str, str]]:
    """Find each function and class, not the methods, as (name, body) without docstrings and annotations."""
    found, rest = set(), list(tree.body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add((node.name, ast.dump(_Bare().visit(ast.parse(ast.unparse(node))))))
        if not isinstance(node, ast.ClassDef):
            rest += ast.iter_child_nodes(node)
    return found


class _Bare(ast.NodeTransformer):
    """Take docstrings, annotations and decorators away, so that a copy without them is still seen as one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns, node.decorator_list = None, []
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def _without_docstring(self, node):
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


def test_no_definition_stands_twice_in_the_package():
    seen = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                key = next(iter(definitions(ast.Module([node], []))))
                assert key not in seen, f"{node.name} stands in {seen[key]} and in {path}: import it"
                seen[key] = path


@cache
def package_definitions() -> set[tuple[str, str]]:
    """Give the definitions of all modules."""
    return set().union(*(definitions(ast.parse(module.read_text(encoding="utf-8"))) for module in MODULES))


@pytest.mark.parametrize("path", lessons(), ids=lambda path: path.stem)
def test_a_lesson_repeats_no_definition_of_the_package(path):
    repeated = sorted(name for name, body in definitions(parse_notebook(path)) if (name, body) in package_definitions())
    assert not repeated, f"import {repeated} from tinylib instead of writing it again"


def test_no_definition_stands_in_two_lessons():
    seen = {}
    for path in lessons():
        for name, body in sorted(definitions(parse_notebook(path))):
            first = seen.setdefault((name, body), path.name)
            assert first == path.name, f"{name} stands in {first} and in {path.name}: put it into tinylib and import it"


# What a lesson may call as a public name of tinylib is called, and why; elsewhere the learner would meet two things of one name.
SAME_NAME = {
    ("02", "write"): "the decoder writes a sequence of digits; tinylib's write files",
    ("07", "command"): "the line that starts stage 1 as a program; cards.command writes one into a model card",
    ("10", "row"): "a row out of this lesson's own measurements; job.row measures a model anew",
}


@cache
def public_names() -> dict[str, str]:
    """Give the public functions and classes of the package by name, with their module; those of the checks stay there."""
    found = {}
    for path in MODULES:
        if module_name(path) != "checks":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name] = module_name(path)
    return found


@pytest.mark.parametrize("path", lessons(), ids=lambda path: path.stem)
def test_a_lesson_calls_nothing_of_its_own_by_a_name_of_the_package(path):
    package, number = public_names(), path.name[:2]
    own = {name for name, _ in definitions(parse_notebook(path)) if (number, name) not in SAME_NAME}
    found = {name: f"tinylib.{package[name]}" for name in sorted(own & set(package))}
    assert not found, "import these, give your own another name, or say in SAME_NAME why not"


def test_a_copied_definition_is_found():
    original = ast.parse('def f(x: int, y: int = 2) -> int:\n    """Add."""\n    return x + y')
    copy = ast.parse("def f(x, y=2):\n    return x + y")
    other = ast.parse("def f(x, y=2):\n    return x - y")
    assert definitions(original) == definitions(copy) != definitions(other)


def test_the_top_level_holds_what_the_design_names():
    extra = {name.split("/")[0] for name in committed()} - TOP_LEVEL
    assert not extra, f"these belong into a folder, or into TOP_LEVEL with a reason: {sorted(extra)}"


def test_no_file_is_too_large():
    large = {name: (ROOT / name).stat().st_size for name in committed()}
    large = {name: size for name, size in large.items() if size > SIZE_LIMIT}
    assert not large, f"over {SIZE_LIMIT / 1e6:.0f} MB, which git hosts refuse or punish: {large}"


def test_no_file_names_a_path_of_this_machine():
    home, here = f"{Path.home()}/", f"{ROOT}/"
    texts = {
        name
        for name in committed()
        if Path(name).suffix in {".py", ".md", ".ipynb", ".toml", ".yml", ".txt", ".cff"}
    }
    found = [
        name
        for name in sorted(texts)
        if any(p in (ROOT / name).read_text(encoding="utf-8") for p in (home, here))
    ]
    assert not found, f"another machine has no such path: {found}"
