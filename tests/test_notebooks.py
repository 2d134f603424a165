"""The lessons as files: executed, clean, linked, and with exercises whose solutions pass.

nbval runs the lessons (`make test`); what stands here needs no kernel. The conventions of a lesson:

- The first cell is markdown: `# Title`, the question, what you will be able to do, times, prerequisites.
- The first code cell is the set-up cell; `python notebooks/tools/colab.py stamp` writes it.
- `make notebooks LESSONS=notebooks/04_distillation_loss.ipynb` runs a lesson and saves it as it is committed.
- Tags: those of lessons.TAGS. In 00, 01 and 02 nbval compares all outputs, so a cell there that shows a
  widget or a progress bar is tagged `nbval-ignore-output`; elsewhere `nbval-check-output` asks for one.
- A picture is shown with `tinylib.plots.show(fig, alt=...)`, which gives it alt text. Under test it wants a title and
  at most 12 inches.
- One of the first three markdown cells names the lesson before, by number or by a link.
- A term of the glossary is linked where the lesson that defines it first says it in prose (the opening, headings and
  code do not count).
- A derivation is `**Derivation 3: what of.**` or a heading of that form, numbered from 1 on; a cell tagged `proof` after it,
  before the next one, asserts it in numbers.
- The last markdown cell links to a later lesson: `[Next: ...](05_magnitude_pruning.ipynb)`.

An exercise is a row of cells in this order, with other cells between them if need be:

1. markdown: a heading `### Exercise …` and, in it or in the line after it, the difficulty and the time it takes,
   `(★★☆, 10 minutes)` (no tag);
2. code, tagged `exercise`, with the metadata `{"exercise": "hidden_loss"}`: the stub, which runs but fails;
3. code, tagged `check`: `checks.run("hidden_loss", my_loss)` on what the stub defines. It must not raise;
4. markdown, tagged `hint`: `<details><summary>Hint</summary> ... </details>`;
5. markdown, tagged `solution`: `<details><summary>Solution</summary> ... </details>` with one or more
   ```python blocks that can be pasted over the stub.

The tests run the set-up cell, the cells tagged `needed` before the stub (the lesson's imports are one; keep
them quick and free of magics), then the stub or its solution, then the check. `checks.run` must refuse the
stub and pass the solution.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import check
import colab
import matplotlib.pyplot as plt
import nbformat
import prose
import pytest
import road
import run as run_tool
from conftest import ROOT
from lessons import LINE_LIMIT, SIZE_LIMIT, WIDGET_VIEW, code_cells, faults, lessons, read, tags

LESSONS = lessons()
NOTEBOOKS = {path: read(path) for path in LESSONS}
LINK = re.compile(
    r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)[^)]*\)|<img[^>]*src=\"(?P<src>[^\"]+)\"[^>]*>"
)


class Exercise(NamedTuple):
    """One exercise of a lesson."""

    lesson: Path
    name: str
    needed: list[str]  # sources to run first
    stub: str
    check: str
    hint: str
    solution: str


def find_exercises(path: Path, notebook: nbformat.NotebookNode) -> list[Exercise]:
    """Collect a lesson's exercises; cells belong to the stub above them."""
    found, needed = [], []
    for at, cell in enumerate(notebook.cells):
        if {"setup", "needed"} & set(tags(cell)):
            needed.append(cell.source)
        if "exercise" not in tags(cell):
            continue
        following = {}
        for later in notebook.cells[at + 1 :]:
            if "exercise" in tags(later):
                break
            following |= {tag: later.source for tag in ("check", "hint", "solution") if tag in tags(later)}
        parts = (following.get(tag, "") for tag in ("check", "hint", "solution"))
        found.append(Exercise(path, cell.metadata.get("exercise", ""), list(needed), cell.source, *parts))
    return found


EXERCISES = [exercise for path in LESSONS for exercise in find_exercises(path, NOTEBOOKS[path])]

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: f"{e.lesson.stem[:2]}-{e.name}")


# -- every lesson ------------------------------------------------------------


DERIVATION = re.compile(r"(?:#+ |\*\*)Derivation (\d+):")  # a heading, or bold


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_derivation_is_proved_by_numbers_before_the_next_one(path):
    numbers, proved = [], []
    for cell in NOTEBOOKS[path].cells:
        if cell.cell_type == "markdown":
            for number in DERIVATION.findall(cell.source):
                numbers.append(int(number))
                proved.append(False)
        elif proved and "proof" in tags(cell):
            proved[-1] |= bool(re.search(r"\bassert\b|three_ways\(", cell.source))
    assert numbers == list(range(1, len(numbers) + 1)), "derivations are numbered from 1 on"
    assert numbers or path.stem.startswith("00"), "a lesson derives something"
    assert all(proved), f"no cell tagged proof asserts anything after derivation {numbers[proved.index(False)]}"



@each_lesson
def test_the_lesson_can_be_committed(path):
    assert not faults(path, NOTEBOOKS[path])


@each_lesson
def test_the_lesson_begins_with_its_title_and_the_set_up_cell(path):
    notebook, address = NOTEBOOKS[path], colab.read_address(ROOT / "pyproject.toml")
    title, setup = notebook.cells[0], code_cells(notebook)[0]
    remedy = "say `python notebooks/tools/colab.py stamp`"
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert setup.source == colab.setup_cell(address), remedy
    assert tags(setup) == colab.SETUP_TAGS, remedy
    badge = address and address.badge(path.name)
    assert (badge in title.source) if badge else (colab.BADGE not in title.source), remedy


@each_lesson
def test_the_lesson_has_every_part(path):
    markdown = [cell.source for cell in NOTEBOOKS[path].cells if cell.cell_type == "markdown"]
    opening, whole = markdown[0], "\n".join(markdown)
    for part in ("**The question:**", "**After this lesson you can**", "**Time:**", "**You need:**"):
        assert part in opening, f"the first cell lacks {part}"
    assert "GPU" in opening, "say how long it takes with a GPU"
    assert re.search(r"(?m)^## Recap$", whole)
    assert len(re.findall(r"(?m)^[1-9]\. ", whole[whole.index("\n## Recap") :])) >= 5, "a recap of five lines"
    assert re.search(r"\*\*(What is s|S)till unsolved:\*\*", whole), "say what is still unsolved"
    assert re.search(r"(?m)^(## Sources|\*\*Sources)", whole)
    assert whole.count("**Predict first:**") + whole.count("**Guess first:**") >= 2
    assert len(re.findall(r"(?m)^#{2,3} (?:Exercise|Question|Explain|Predict|An open experiment)", whole)) >= 5
    answers = re.findall(r"<summary>(?:A m|M)odel answer", whole)
    assert len(answers) >= 2, "two questions that ask for a prediction or an explanation"


@each_lesson
def test_links_and_pictures_resolve(path):
    for cell in NOTEBOOKS[path].cells:
        for link in LINK.finditer(cell.source) if cell.cell_type == "markdown" else ():
            target = (link["target"] or link["src"]).split("#")[0]
            if link[0].startswith("!"):
                assert link["text"], f"{target} has no alt text"
            if target and not re.match(r"(https?|mailto|attachment|data):", target):
                assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"
        if cell.cell_type == "markdown":
            assert not prose.nameless_pictures(cell.source), "a screen reader has nothing to say for these"


@each_lesson
def test_the_lesson_goes_on_from_the_one_before(path):
    if path != LESSONS[0]:
        before = LESSONS[LESSONS.index(path) - 1]
        assert prose.names_lesson(NOTEBOOKS[path], before), f"name lesson {before.name[:2]} in the first three markdown cells"


@each_lesson
def test_every_task_says_how_hard_it_is_and_how_long_it_takes(path):
    assert not prose.tasks_without_cost(NOTEBOOKS[path]), "put (★★☆, 10 minutes) into the heading, or into the line after it"
    for at, cell in enumerate(NOTEBOOKS[path].cells):
        if "exercise" in tags(cell):
            above = "\n".join(c.source for c in NOTEBOOKS[path].cells[:at] if c.cell_type == "markdown")
            assert re.findall(r"(?m)^#{2,4} (\w+)", above)[-1] == "Exercise", f"cell {at + 1} has no heading of its own"


@each_lesson
def test_the_lesson_ends_with_a_link_to_a_later_one(path):
    if path == LESSONS[-1]:
        return
    last = [cell for cell in NOTEBOOKS[path].cells if cell.cell_type == "markdown"][-1]
    later = {lesson.name for lesson in LESSONS if lesson > path}
    assert later & {link["target"] for link in LINK.finditer(last.source)}, (
        "link to the next lesson in the last cell"
    )


@pytest.mark.parametrize(("name", "mode"), [("01_self_attention", "--nbval"), ("03_teacher", "--nbval-lax")])
def test_make_test_compares_every_output_of_the_strict_lessons(monkeypatch, name, mode):
    asked = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(check.subprocess, "run", lambda command, **_: asked.append(command) or done)
    assert check._run(ROOT / "notebooks" / f"{name}.ipynb", 1, [])[0] == 0
    assert [word for word in asked[0] if word in ("--nbval", "--nbval-lax")] == [mode]
    assert "notebooks/tools/check.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


# -- glossary, map and the other pages ----------------------------------------

PATTERNS = ("*.md", "docs/*.md", "benchmarks/*.md", "data/**/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
ROW = re.compile(
    r'(?m)^\| <a id="(?P<id>[\w-]+)"></a>\*\*(?P<term>.+?)\*\* \| (?P<said>.+?) \| \[(?P<lesson>\d\d)\]\(.+?\) \| (?P<zh>.+?) \|$'
)
GLOSSARY = {row["id"]: row for row in ROW.finditer((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))}
TO_GLOSSARY = re.compile(r"\]\(\.\./docs/glossary\.md#([\w-]+)\)")


def glossary_links(path) -> list[str]:
    """List the terms that a lesson links, in order."""
    return [name for cell in NOTEBOOKS[path].cells if cell.cell_type == "markdown" for name in TO_GLOSSARY.findall(cell.source)]


@each_lesson
def test_terms_are_linked_to_the_glossary_where_they_are_first_said(path):
    linked = glossary_links(path)
    assert set(linked) <= set(GLOSSARY), "linked, but not in docs/glossary.md"
    own = [name for name, row in GLOSSARY.items() if row["lesson"] == path.stem[:2]]
    assert own
    assert {name: linked.count(name) for name in own} == dict.fromkeys(own, 1), "one link, in the lesson that defines the term"


# Uses of a term's word before the term is linked that are none of the term, and why.
OTHER_MEANING = {
    ("01", "value"): "what a dictionary returns, from which attention's values have their name",
}


@each_lesson
def test_a_term_is_linked_no_later_than_it_is_said(path):
    before = {name for lesson in LESSONS if lesson < path for name in glossary_links(lesson)}
    early = prose.said_too_early(NOTEBOOKS[path], {name: row["term"] for name, row in GLOSSARY.items()})
    due = {name: place for name, place in early.items() if GLOSSARY[name]["lesson"] == path.stem[:2] and name not in before}
    left = {name: place for name, place in due.items() if (path.stem[:2], name) not in OTHER_MEANING}
    assert not left, "move the link to where the lesson first says the term, or the sentence behind it"


def test_the_glossary_has_no_row_that_the_lint_cannot_read():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert text.count('<a id="') == len(GLOSSARY) > 100


def test_every_page_that_is_committed_is_read_here():
    done = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("this copy of the course is not a git repository")
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()} <= names, "add its folder to PATTERNS"


def anchors(text: str) -> set[str]:
    """List what a link into a page can aim at: its ids, and its headings as hosts turn them into ids."""
    headings = re.findall(r"(?m)^#{1,6} (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    slugs = (re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*re.findall(r'id="([^"]+)"', text), *slugs}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_of_the_other_pages_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert not prose.nameless_pictures(text), "a screen reader has nothing to say for these"
    for link in LINK.finditer(re.sub(r"(?ms)^```.*?^```", "", text)):
        target, _, anchor = (link["target"] or link["src"]).partition("#")
        if link[0].startswith("!"):
            assert link["text"].strip(), f"{target} has no alt text"
        if re.match(r"(https?|mailto):", target):
            continue
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(to.read_text(encoding="utf-8")), f"{page.name}: no anchor {anchor} in {to.name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_the_pages_for_readers_say_what_holds_on_every_machine(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\d (?:ms|milliseconds)\b.{0,40}", text)
    assert not found, f"a time of one machine, which the lesson's next run changes: give the ratio instead of {found}"
    for link in re.finditer(r"\]\((?:\.\./)?(?P<to>notebooks/\w+\.ipynb)\)[,;]?\s+sections? (?P<number>\d+)", text):
        whole = "\n".join(prose.markdown(NOTEBOOKS[ROOT / link["to"]]))
        assert re.search(rf"(?m)^## {link['number']}\.", whole), f"{link['to']} has no section {link['number']}"


ANSWERS = re.split(r"(?m)^### ", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"))[1:]
# Jiao et al. 2020, what no lesson prints
IN_THE_PAPER = set("1.1 14.5 44.1 52.2 52.8 67.0 70.0 71.1 71.6 71.9 77.0 82.1 88.4 92.6 93.4".split())


def said_and_printed(path: Path) -> str:
    """Give the text and the outputs of a lesson."""
    outputs = [output for cell in code_cells(NOTEBOOKS[path]) for output in cell.outputs]
    shown = [str(text) for o in outputs for mime, text in o.get("data", {}).items() if mime.startswith("text/")]
    return "\n".join([*(cell.source for cell in NOTEBOOKS[path].cells), *(str(o.get("text", "")) for o in outputs), *shown])


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: re.search('id="(.+?)"', answer)[1])
def test_a_number_of_an_answer_stands_in_a_lesson_that_it_links_or_in_the_readme(answer):
    known = (ROOT / "README.md").read_text(encoding="utf-8")
    known += "".join(said_and_printed(ROOT / to) for to in set(re.findall(r"\(\.\./(notebooks/\w+\.ipynb)\)", answer)))
    prose_only = re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)]*\)", "", answer)
    numbers = set(re.findall(r"(?<![\w.,])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+|\d{3,})(?![\w])", prose_only)) - IN_THE_PAPER
    lost = [number for number in sorted(numbers) if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", known)]
    assert not lost, "docs/faq.md says what its lessons do not (any more): look there, and mend the answer"


def test_the_map_shows_the_lessons_and_is_as_drawn():
    assert road.FILE.read_text(encoding="utf-8") == road.draw(), "say `python notebooks/tools/road.py`"
    written = {number for number, _, left_open in road.STOPS if not left_open.startswith("(")}
    assert written == {path.stem[:2] for path in LESSONS}


# -- every exercise ----------------------------------------------------------


@each_exercise
def test_the_exercise_is_complete(exercise):
    from tinylib import checks

    assert exercise.name in checks.names(), (
        'the stub needs the metadata {"exercise": "<a name of checks.names()>"}'
    )
    assert f'"{exercise.name}"' in exercise.check, "a cell tagged check must run the check of that name"
    for part in (exercise.hint, exercise.solution):
        assert re.search(r"<details>.*<summary>.*</details>", part, re.DOTALL), (
            "fold the hint and the solution"
        )
    assert solution_code(exercise)


def solution_code(exercise: Exercise) -> str:
    """Give the code of a solution cell."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", exercise.solution, re.DOTALL | re.MULTILINE))


def reports(exercise: Exercise, attempt: str, monkeypatch) -> list:
    """Run an attempt and its check as the lesson would; give the reports of checks.run."""
    from tinylib import checks

    found, original = [], checks.run

    def record(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(checks, "run", record)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(exercise.lesson.parent)
    namespace = {"__name__": "__main__"}
    for source in (*exercise.needed, attempt, exercise.check):
        exec(compile(source, exercise.lesson.name, "exec"), namespace)
    plt.close("all")
    return found


@each_exercise
def test_the_solution_passes(exercise, monkeypatch):
    found = reports(exercise, solution_code(exercise), monkeypatch)
    assert found
    assert all(report.passed for report in found), [report.message for report in found]


@each_exercise
def test_the_stub_is_refused_and_does_not_raise(exercise, monkeypatch):
    found = reports(exercise, exercise.stub, monkeypatch)
    assert any(not report.passed for report in found)
    assert all(report.message for report in found)


# -- the tools ---------------------------------------------------------------


def make_notebook(*sources: str, outputs: list | None = None) -> nbformat.NotebookNode:
    """Make a notebook of code cells, as if executed."""
    cells = [nbformat.v4.new_code_cell(s, execution_count=n) for n, s in enumerate(sources, start=1)]
    cells[-1].outputs = [nbformat.from_dict(output) for output in outputs or []]
    return nbformat.v4.new_notebook(cells=cells)


def show(data: dict, metadata: dict | None = None) -> dict:
    """Make a display output."""
    return {"output_type": "display_data", "data": data, "metadata": metadata or {}}


def print_to(name: str, text: str) -> dict:
    """Make a stream output."""
    return {"output_type": "stream", "name": name, "text": text}


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "boom", "traceback": []}, "error: E: boom"),
        (print_to("stderr", "IProgress not found"), "stderr on the page"),
        (print_to("stdout", f"saved to {Path.home()}/x"), "path of this machine"),
        (print_to("stdout", f"{ROOT}/notebooks"), "path of this machine"),
        (show({"text/plain": "<Axes at 0x7f00deadbeef>"}), "object's address"),
        (show({"image/png": "AAAA"}), "no alt text"),
        (show({WIDGET_VIEW: {}}), "live widget"),
        (show({"text/html": '<img src="x.png">'}), "nothing to say"),
        (show({"text/html": '<img alt="" src="x.png">'}), "nothing to say"),
        (show({"image/svg+xml": "<svg role='img'><rect/></svg>"}), "nothing to say"),
        (print_to("stdout", "x" * SIZE_LIMIT), "fewer or smaller figures"),
    ],
)
def test_a_faulty_output_is_found(output, fault):
    found = faults(Path("x.ipynb"), make_notebook("1", outputs=[output]))
    assert len(found) == 1
    assert fault in found[0]


def test_faulty_cells_are_found_and_clean_ones_are_not():
    good = make_notebook("x = 1", "x", outputs=[show({"image/png": "A"}, {"image/png": {"alt": "A line."}})])
    assert not faults(Path("x.ipynb"), good)
    bad = make_notebook("x = 1\n" * (LINE_LIMIT + 1), "plt.plot();")
    bad.cells[1].metadata["tags"] = ["nbval-skip"]
    bad.cells[1].execution_count = 7
    bad.cells[1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=2)]
    bad.metadata["widgets"] = {"x": {}}
    found = "\n".join(faults(Path("x.ipynb"), bad))
    assert all(
        word in found for word in ("counts", "lines of code", "trailing ';'", "unknown tag", "no state", "Out[2] beside In[7]")
    )


def test_a_picture_in_html_with_a_name_is_no_fault():
    named = '<svg aria-label="A line."><rect/></svg><svg><title>A line</title></svg><img src="x.png" alt=\'A line.\'>'
    assert not faults(Path("x.ipynb"), make_notebook("1", outputs=[show({"text/html": named})]))


def make_pages(*sources: str) -> nbformat.NotebookNode:
    """Make a notebook of markdown cells."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source) for source in sources])


def test_the_lesson_before_is_found_by_number_and_by_link():
    before = Path("05_magnitude_pruning.ipynb")
    opening = "# Title, section 05, 1.05"
    assert not prose.names_lesson(make_pages(opening, "a", "b", "Lesson 05"), before)
    assert prose.names_lesson(make_pages(opening, "a", "Lesson 05 ended so."), before)
    assert prose.names_lesson(make_pages("[There](05_magnitude_pruning.ipynb) we began."), before)


def test_a_task_without_stars_or_minutes_is_found():
    good = ("### Exercise 1: x (★☆☆, 5 minutes)", "### Question · y\n*★★☆, 10 minutes.* Why?", "### Exercises there\n\nNo task.")
    bad = ("### Exercise 2: x (★☆☆)", "### An open experiment\n\n20 minutes.", "### Explain\n\nWhy?\n\n(★☆☆, 5 minutes)")
    assert prose.tasks_without_cost(make_pages(*good, *bad)) == ["### Exercise 2: x (★☆☆)", "### An open experiment", "### Explain"]


TERMS = {"mask": "mask (of attention)", "loss": "attention loss", "kl": "Long name (KL)"} | {w: w for w in ("attention", "query")}


def to(name: str, text: str) -> str:
    """Link a term to the glossary, as a lesson does."""
    return f"[{text}](../docs/glossary.md#{name})"


@pytest.mark.parametrize(
    ("text", "early"),
    [
        (f"A {to('mask', '*mask*')} hides. Masks are boolean.", []),
        (f"Masks are boolean. A {to('mask', 'mask')} hides.", ["mask"]),
        (f"Many queries come. A {to('query', 'query')} asks.", ["query"]),
        (f"The KL falls. The {to('kl', 'long name')} too; pickle holds none.", ["kl"]),
        (f"The {to('loss', 'attention loss')} needs {to('attention', 'attention')}.", []),
        (f"The attention\nloss. {to('attention', 'Attention')} and the {to('loss', 'attention loss')}.", ["loss"]),
        (f"self-attention, unmasked, `mask`, $mask$, <b mask>.\n\n```\nmask\n```\n{to('mask', 'm')} {to('attention', 'a')}", []),
        (f"## The mask\n| [02 The mask](02_x.ipynb) | mask |\n[about masks](02_x.ipynb)\n\nA {to('mask', 'mask')}.", []),
        (f"**Derivation 1: a mask.** Now {to('mask', 'masks')}.", []),
        (f"| what | a mask |\n\nA {to('mask', 'mask')}.", ["mask"]),
        ("A mask that is not linked here.", []),
    ],
)
def test_a_term_that_is_said_before_its_link_is_found(text, early):
    assert sorted(prose.said_too_early(make_pages("# Masks of attention\n\nThe opening says mask.", text), TERMS)) == early


@pytest.mark.slow
def test_the_runner_saves_a_clean_lesson_and_leaves_a_faulty_one_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_TIER", "laptop")
    path = tmp_path / "00_x.ipynb"
    imports = "import ipywidgets\nfrom tqdm.auto import tqdm"
    widgets = "for i in tqdm(range(3)):\n    pass\nipywidgets.interact(lambda x: print(x), x=(0, 3))\nNone"
    notebook = make_notebook(imports, widgets, "print(6 * 7)", "")
    notebook.cells[1].metadata = nbformat.from_dict({"tags": ["nbval-ignore-output"], "scrolled": True})
    path.write_text(nbformat.writes(notebook))
    monkeypatch.setattr(run_tool, "CELL_TIMEOUT", 120)  # a lost reply is a failure in two minutes, not in twenty-five
    assert run_tool.run(path)
    saved = read(path)
    assert [cell.execution_count for cell in saved.cells] == [1, 2, 3, None]
    assert saved.cells[1].outputs == []
    assert saved.cells[1].metadata == {"tags": ["nbval-ignore-output"]}
    assert saved.cells[2].outputs[0].text == "42\n"
    assert set(saved.metadata) == {"kernelspec", "language_info"}
    first = path.read_text()
    assert run_tool.run(path)
    assert path.read_text() == first, "a second run changes nothing"

    saved.cells[2].source = "1 / 0"
    path.write_text(before := nbformat.writes(saved))
    assert not run_tool.run(path)
    assert path.read_text() == before
