"""The Pareto ledger: rows kept by name, a front that nothing beats, a damaged file that is not lost."""

import importlib.util
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import FOLDER, code_cells, lessons, read

from tinylib import datasets, ledger, measure, plots, widgets
from tinylib.bert import Bert, BertConfig


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep the learner's own ledger out of the tests."""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    return tmp_path


def row(name="teacher", accuracy=0.9, megabytes=90.0, milliseconds=9.0):
    return {"name": name, "accuracy": accuracy, "parameters": 10, "megabytes": megabytes, "milliseconds": milliseconds}


def test_an_entry_is_what_measure_says():
    model = Bert(BertConfig.parse("1x12", intermediate_size=8, vocab_size=50), torch.Generator().manual_seed(0))
    made = ledger.entry("small", model, 0.5)
    assert made["parameters"] == measure.parameters(model)
    assert made["megabytes"] == pytest.approx(4e-6 * measure.parameters(model))
    assert made["milliseconds"] > 0
    assert ledger.entry("small", model, 0.5, megabytes=1.5)["megabytes"] == 1.5


def test_a_model_measured_again_takes_its_old_rows_place():
    ledger.add([row(), row("student", 0.8, 50.0)], "03", "reviews", "laptop")
    ledger.add([row(accuracy=0.91) | {"interval": (0.9, 0.92)}], "09", "reviews", "laptop")
    ledger.add([row(accuracy=0.5)], "03", "questions", "laptop")
    ledger.add([row(accuracy=0.95)], "03", "reviews", "gpu")
    found = ledger.rows("reviews", "laptop")
    assert [(r["name"], r["accuracy"], r["lesson"]) for r in found] == [("student", 0.8, "03"), ("teacher", 0.91, "09")]
    assert "interval" not in found[1]
    assert len(json.loads(ledger.path().read_text())) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"name": "x"}]', "{}", "\ufeff[]", '[{"name": true}]'])
def test_a_damaged_ledger_is_moved_aside_and_a_new_one_begins(home, capsys, content):
    ledger.path().write_text(content, encoding="utf-8")
    ledger.add([row()], "03", "reviews", "laptop")
    assert [r["name"] for r in ledger.rows("reviews", "laptop")] == ["teacher"]
    assert (home / "ledger.damaged.json").read_text(encoding="utf-8") == content
    assert "is damaged" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_written_stops_no_lesson(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "file"))
    ledger.add([row()], "03", "reviews", "laptop")
    assert "could not be written" in capsys.readouterr().out
    assert ledger.rows("reviews", "laptop") == []


points = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_no_other_model_beats(drawn):
    rows = [row(str(i), a / 10, float(c)) for i, (c, a) in enumerate(drawn)]
    found = ledger.front(rows)

    def beats(one, other):
        return (
            one["megabytes"] <= other["megabytes"] and one["accuracy"] >= other["accuracy"]
            and (one["megabytes"], one["accuracy"]) != (other["megabytes"], other["accuracy"])
        )  # fmt: skip

    unbeaten = {(r["megabytes"], r["accuracy"]) for r in rows if not any(beats(o, r) for o in rows)}
    assert {(r["megabytes"], r["accuracy"]) for r in found} == unbeaten
    assert len(found) == len(unbeaten)
    assert [r["megabytes"] for r in found] == sorted(r["megabytes"] for r in found)


def test_the_shipped_rows_are_complete_and_of_a_shipped_data_set():
    rows = ledger.course_rows("movie_reviews", "laptop")
    assert {"teacher"} < {r["name"] for r in rows}
    for r in rows:
        assert set(r) == set(ledger.FIELDS)
        assert 0.5 < r["accuracy"] < 1
        assert (datasets.data_folder() / r["data"]).is_dir()


def lessons_that_enter() -> set[str]:
    return {p.stem[:2] for p in lessons() if any("course.enter(" in cell.source for cell in code_cells(read(p)))}


def test_the_lessons_that_enter_models_are_those_that_the_text_names():
    found = lessons_that_enter()
    for name, own in (("00_start_here", "00"), ("09_tinybert", ""), ("10_deployment", "10")):
        text = "\n".join(cell.source for cell in read(FOLDER / f"{name}.ipynb").cells if cell.cell_type == "markdown")
        (named,) = re.findall(r"(?i)lessons ([\d, and]+) (?:add theirs|write what they make|noted what their models)", text)
        assert set(re.findall(r"\d\d", named)) == found - {own}, name
    for path in lessons():
        for cell in code_cells(read(path)):
            for lesson in re.findall(r"course\.enter\(.*, \"(\d\d)\"", cell.source):
                assert lesson == path.stem[:2], "a model is entered under another lesson's number"


def test_every_lesson_that_enters_models_has_rows_among_those_shipped():
    found = {r["lesson"] for r in ledger.course_rows("movie_reviews", "laptop")}
    assert found == lessons_that_enter() - {"03"}, "lesson 09 measures 03's teacher again"
    spec = importlib.util.spec_from_file_location("shipping", FOLDER / "tools" / "ledger.py")
    shipping = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipping)
    assert lessons_that_enter() == shipping.WANTED


OWN = [row(), row("student", 0.89, 57.0, 5.0), row("bad", 0.7, 80.0, 8.0)]
BEHIND = [row("student", 0.88, 57.0, 5.0), row("tiny", 0.86, 5.0, 2.0)]


@pytest.mark.parametrize("cost", ledger.COSTS)
@pytest.mark.parametrize("behind", [[], BEHIND])
def test_the_picture_names_every_model_once_and_marks_what_is_beaten(cost, behind):
    fig, ax = plots.figure()
    plots.pareto(OWN, behind, ax, cost)
    names = [text.get_text().split("  ")[1] for text in ax.get_legend().get_texts()]
    assert sorted(names) == sorted({r["name"] for r in [*OWN, *behind]})
    squares = [line for line in ax.lines if line.get_marker() == "s"]
    assert len(squares) == len(OWN) - len(ledger.front(OWN, cost))
    assert plots.outside(fig) == []
    plots.plt.close(fig)


def test_the_widget_finds_the_cheapest_model_that_is_good_enough():
    box = widgets.pareto_explorer(OWN, BEHIND)
    cost, floor, drawing = box.children
    for percent in (70, 86, 88, 89.5, 90):
        floor.value = percent
        for key in ledger.COSTS:
            cost.value = key
            # the learner's own student counts, not the course's
            good = [r for r in [*OWN, BEHIND[1]] if 100 * r["accuracy"] >= percent]
            best = min(good, key=lambda r: (r[key], -r["accuracy"]))
            assert f", {best['name']}, with" in drawing.value


def test_the_widget_says_when_no_model_is_good_enough_and_when_there_is_none():
    box = widgets.pareto_explorer([row(accuracy=0.855), row("b", 0.85)])
    box.children[1].value = 86.0
    assert "No model has 86.0 %: the best has 85.5 %" in box.children[-1].value
    with pytest.raises(widgets.UserError, match="run the cells above"):
        widgets.pareto_explorer([])


def test_one_model_alone_can_be_drawn():
    drawing = widgets.pareto_explorer([row()]).children[-1].value
    assert not re.search(r"\bnan\b", drawing)
    fig, ax = plots.figure()
    plots.pareto([row()], [], ax)
    assert plots.outside(fig) == []
    plots.plt.close(fig)
