"""The exercise checks: every wrong answer refused with the right words, every right one accepted, nothing raised."""

import importlib

import mutants
import pytest

from tinylib import checks

WRONG, RIGHT = mutants.collect()
STARRED = ("attend", "soft_target_loss", "hidden_loss", "attention_loss", "embedding_loss", "magnitude_mask")


def label(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("name", "attempt", "words"), WRONG, ids=label)
def test_wrong_answers_are_refused_by_the_right_message(name, attempt, words):
    report = checks.run(name, attempt)
    assert not report.passed, f"{name} accepts {label(attempt)}"
    assert words.lower() in report.message.lower(), report.message


@pytest.mark.parametrize(("name", "attempt"), RIGHT, ids=label)
def test_right_answers_are_accepted(name, attempt):
    report = checks.run(name, attempt)
    assert report.passed, report.message


def test_every_check_has_mutants_and_right_variants():
    wrong = {name: sum(n == name for n, _, _ in WRONG) for name in checks.names()}
    right = {name: sum(n == name for n, _ in RIGHT) for name in checks.names()}
    assert set(STARRED) <= set(checks.names())
    assert {n: c for n, c in wrong.items() if c < mutants.FEWEST} == {}, "too few mistakes kept"
    assert {n: c for n, c in right.items() if c < 2} == {}, "fewer than two right variants kept"


@pytest.mark.parametrize("name", STARRED)
def test_a_check_takes_the_package_function(name):
    owner = {"attend": "attention", "magnitude_mask": "prune"}.get(name, "distill")
    report = checks.run(name, getattr(importlib.import_module(f"tinylib.{owner}"), name))
    assert report.passed, report.message


KINDS = ("nothing", "a number", "a text", "raises", "a constant", "its first input")


def raising(*_, **__):
    raise ValueError("boom")


@pytest.mark.parametrize("attempt", [None, 3, "text", raising, lambda: 1, lambda *a, **k: a[0]], ids=KINDS)
@pytest.mark.parametrize("name", checks.names())
def test_no_attempt_makes_a_check_raise(name, attempt):
    report = checks.run(name, attempt)
    assert not report.passed
    assert len(report.message) > 20


def test_an_unknown_name_is_answered_with_the_nearest():
    report = checks.run("atend", None)
    assert not report.passed
    assert "attend" in report.message
