"""The exercise checks: every wrong answer refused with the right words, every right one accepted, nothing raised."""

import asyncio
import dataclasses
import importlib

import mutants
import pytest
import torch

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
    assert {n: c for n, c in right.items() if c < 3} == {}, "fewer than three right variants kept"


@pytest.mark.parametrize("name", STARRED)
def test_a_check_takes_the_package_function(name):
    owner = {"attend": "attention", "magnitude_mask": "prune"}.get(name, "distill")
    report = checks.run(name, getattr(importlib.import_module(f"tinylib.{owner}"), name))
    assert report.passed, report.message


# -- whatever an answer changes in its inputs is refused


def within(x):
    """Yield an input and all that it holds, from the outside to the inside."""
    yield x
    if dataclasses.is_dataclass(x):
        x = vars(x)
    if isinstance(x, torch.nn.Module):
        x = x.state_dict()
    if isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            yield from within(part)


def other_numbers(x):
    for t in within(x):
        if isinstance(t, torch.Tensor) and t.numel():
            t.data.copy_(~t if t.dtype == torch.bool else t + 1)
            return True
    return False


def one_fewer(x):
    full = next((c for c in within(x) if isinstance(c, dict | list) and c), None)
    if full is not None:
        full.pop(next(iter(full)) if isinstance(full, dict) else 0)
    return full is not None


def another_order(x):
    for c in within(x):
        if isinstance(c, dict) and len(c) > 1:
            key = next(iter(c))
            c[key] = c.pop(key)
            return True
        if isinstance(c, list) and repr(c) != repr(c[::-1]):
            c.reverse()
            return True
    return False


CHANGES = (other_numbers, one_fewer, another_order)


class Careless:
    """A right answer that changes the input at one place in one way before it returns."""

    def __init__(self, right, change, place):
        self.right, self.change, self.place = right, change, place
        self.places, self.done = 0, False

    def __call__(self, *inputs):
        answer = self.right(*inputs)
        self.places = max(self.places, len(inputs))
        if self.place < len(inputs):
            self.done = self.change(inputs[self.place])
            if not self.done:
                raise LookupError("nothing to change here, so there is no need to go on")
        return answer


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", checks.names())
def test_an_answer_that_changes_any_input_is_refused(name, change):
    right, place, places = next(f for n, f in RIGHT if n == name), 0, 1
    while place < places:
        careless = Careless(right, change, place)
        report = checks.run(name, careless)
        if careless.done:
            assert f"changes its input `inputs[{place}]` in place" in report.message
        place, places = place + 1, careless.places


def test_every_exercise_whose_inputs_can_be_changed_keeps_an_answer_that_does():
    for name in checks.names():
        seen = []
        checks.run(name, lambda *inputs, seen=seen: seen.extend(inputs))
        if any(isinstance(x, torch.Tensor | list | dict) for x in seen):
            assert any("in place" in words for n, _, words in WRONG if n == name), name


def test_the_message_names_the_argument_as_the_learner_does():
    def weights_used_up(matrices, sparsity):
        matrices.clear()

    message = checks.run("global_masks", weights_used_up).message
    assert "changes its input `matrices` in place: afterwards `matrices['up']` is gone" in message


# -- nothing raised

KINDS = ("nothing", "a number", "a text", "raises", "leaves", "a constant", "its first input")


def raising(*_, **__):
    raise ValueError("boom")


def leaving(*_, **__):
    raise SystemExit(1)


@pytest.mark.parametrize("attempt", [None, 3, "text", raising, leaving, lambda: 1, lambda *a, **k: a[0]], ids=KINDS)
@pytest.mark.parametrize("name", checks.names())
def test_no_attempt_makes_a_check_raise(name, attempt):
    report = checks.run(name, attempt)
    assert not report.passed
    assert len(report.message) > 20


def test_an_unknown_name_is_answered_with_the_nearest():
    report = checks.run("atend", None)
    assert not report.passed
    assert "attend" in report.message


class Unprintable(Exception):
    """An exception that cannot even say what it is."""

    def __str__(self):
        raise ValueError("no text")


def raiser(error):
    def attempt(*_):
        raise error

    return attempt


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SystemExit(0), "ends the program"),
        (GeneratorExit(), "raised GeneratorExit"),
        (StopIteration(), "raised StopIteration"),
        (asyncio.CancelledError(), "raised CancelledError"),
        (RecursionError("too deep"), "raised RecursionError: too deep"),
        (Unprintable(), "raised Unprintable"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_whatever_the_code_raises_is_reported(error, words):
    report = checks.run("gelu", raiser(error))
    assert not report.passed
    assert words in report.message


def test_an_interrupt_by_the_learner_goes_through():
    with pytest.raises(KeyboardInterrupt):
        checks.run("gelu", raiser(KeyboardInterrupt()))


def test_the_arguments_the_wrong_way_round_are_a_report_too():
    report = checks.run(torch.nn.functional.gelu, "gelu")
    assert not report.passed
    assert "name comes first" in report.message


def test_gradients_that_a_cell_before_switched_off_do_no_harm():
    with torch.no_grad():
        assert checks.run("soft_target_loss", next(f for n, f in RIGHT if n == "soft_target_loss")).passed
        assert not torch.is_grad_enabled()
