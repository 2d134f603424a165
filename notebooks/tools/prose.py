"""The rules that the text of a lesson keeps, beside the glossary and the lessons around it (tests/test_notebooks.py)."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat

TASK = re.compile(r"#{2,4} (?:Exercise|Question|Explain|Predict|An open experiment)\b")
COST = re.compile(r"[★☆]{3}, \d+ minutes?\b")  # how hard, and how long
BEGINNING = 3  # markdown cells in which a lesson says where it goes on from

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]*)[^)]*\)")
TO_GLOSSARY = re.compile(r"docs/glossary\.md#([\w-]+)$")
NOT_PROSE = re.compile(
    r"(?ms)^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|</?\w[^>]*>"  # code, formulas, HTML tags
    r"|^#{1,6} [^\n]*|\*\*Derivation \d+:[^*\n]*\*\*"  # headings
    r"|^\|[^\n]*\d\d_\w+\.ipynb\)[^\n]*"  # rows of a table of lessons
)
IMAGE, DRAWING = re.compile(r"<img\b[^>]*>"), re.compile(r"<svg\b[^>]*>(?P<inside>.*?)</svg>", re.DOTALL)

# How a term is said beside its own words and their plural.
FORMS = {
    "fine-tuning": "fine-tun(?:e|es|ed|ing)",
    "pruning": "prun(?:e|es|ed|ing)",
    "query": "quer(?:y|ies)",
    "vocabulary": "vocabular(?:y|ies)",
    "word-piece": r"WordPiece|word\s+pieces?",
    "residual": r"residuals?(?:\s+connections?)?",
    "gradient-clipping": "clip(?:s|ped|ping)",
    "calibration": "calibrat(?:e|es|ed|ion)",
    "overfitting": "overfit(?:s|ting)?",
    "packing": "pack(?:s|ed|ing)",
    "quantisation": "quantis(?:e|es|ed|ation)",
    "general-distillation": r"general\s+distillation|stage\s+1",
    "task-distillation": r"task\s+distillation|stage\s+2",
}


def markdown(notebook: nbformat.NotebookNode) -> list[str]:
    """Give the text of the markdown cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def names_lesson(notebook: nbformat.NotebookNode, other: Path) -> bool:
    """Say whether the beginning of a lesson names another one, by number or by a link."""
    said = "\n".join(markdown(notebook)[:BEGINNING])
    return other.name in said or re.search(rf"(?i)\blessons?\s+{other.name[:2]}\b", said) is not None


def tasks_without_cost(notebook: nbformat.NotebookNode) -> list[str]:
    """List the headings of exercises that lack stars or minutes, in the heading or in the line after it."""
    found = []
    for source in markdown(notebook):
        lines = [line for line in source.splitlines() if line.strip()]
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if TASK.match(line) and not (COST.search(line) or COST.search(after)):
                found.append(line)
    return found


def nameless_pictures(text: str) -> list[str]:
    """List the pictures in HTML that a screen reader could not name: ``<img>`` without alt, ``<svg>`` without a label."""
    images = [tag for tag in IMAGE.findall(text) if not re.search(r"""\salt=(["'])\s*[^"'\s]""", tag)]
    for drawing in DRAWING.finditer(text):
        tag = drawing[0][: drawing.start("inside") - drawing.start()]
        if not re.search(r"""\saria-label=(["'])\s*[^"'\s]""", tag) and "<title>" not in drawing["inside"]:
            images.append(tag)
    return images


def said_too_early(notebook: nbformat.NotebookNode, terms: Mapping[str, str]) -> dict[str, str]:
    """Give the terms that a lesson says in prose before it links them, each with the place.

    terms: the glossary, id -> term. Only terms that the lesson links are looked at. The first cell, which tells what the
    lesson is going to do, counts as its table of contents; and a term within a longer one ("attention" in "attention loss")
    is no use of it.
    """
    text, linked = _prose(notebook)
    words = {name: _words(name, term) for name, term in terms.items()}
    uses = {name: [m.span() for m in pattern.finditer(text)] for name, pattern in words.items()}
    found = {}
    for name, (start, _) in linked.items():
        longer = [other for other in terms if len(terms[other]) > len(terms[name]) and words[name].search(terms[other])]
        others = [span for other in longer for span in uses[other]]
        others += [span for other, span in linked.items() if other != name]  # a link's text belongs to the term it links
        for left, right in uses[name]:
            if left >= start:
                break
            if not any(low <= left and right <= high for low, high in others):
                found[name] = " ".join(text[max(0, left - 50) : right + 30].split())
                break
    return found


def _prose(notebook: nbformat.NotebookNode) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return a lesson's text with all that is no prose blanked out, and where each term of the glossary is first linked."""
    texts, linked, at = [], {}, 0
    for number, source in enumerate(markdown(notebook)):
        for name, left, right in _glossary_links(source):
            linked.setdefault(name, (at + left, at + right))
        text = LINK.sub(_keep_the_text, NOT_PROSE.sub(_blank, source)).replace("*", " ")
        texts.append(text if number else _blank(text))
        at += len(source) + 1
    return "\n".join(texts), linked


def _glossary_links(source: str) -> Iterator[tuple[str, int, int]]:
    for link in LINK.finditer(source):
        if to := TO_GLOSSARY.search(link["target"]):
            yield to[1], link.start("text"), link.end("text")


def _keep_the_text(link: re.Match) -> str:
    """Blank a link; of one to the glossary the text stays at its place. What names another lesson is no use of a term."""
    if not TO_GLOSSARY.search(link["target"]):
        return _blank(link[0])
    before, text, after = link.start("text") - link.start(), link["text"], link.end() - link.end("text")
    return " " * before + text + " " * after


def _blank(text: str | re.Match) -> str:
    return re.sub(r"[^\n]", " ", text if isinstance(text, str) else text[0])


def _words(name: str, term: str) -> re.Pattern:
    """Return the pattern of a term as a whole word: its first name, with an abbreviation in brackets, and simple inflections."""
    parts = [re.sub(r"\s*\([^)]*\)", "", term).split(", ")[0], *re.findall(r"\(([A-Z]{2,})\)", term)]
    patterns = [FORMS[name]] if name in FORMS else []
    for part in parts if name not in FORMS else ():
        plural = "(?:e?s)?" if part[-1].isalpha() else ""
        patterns.append(re.escape(part).replace(r"\ ", r"\s+") + plural)
    # names are written as they are, other words may begin a sentence
    said = "|".join(p if re.search(r"[A-Z]{2}|[a-z][A-Z]|\[", p) else f"(?i:{p})" for p in patterns)
    return re.compile(rf"(?<![\w-])(?:{said})(?![\w-])")
