"""A student fitted to its teacher's states: least squares against other solvers, nearer states, and what is left alone."""

import copy

import pytest
import torch
from test_distill import TEACHER, examples, generator
from test_encoders import SCORED, batch, folders  # noqa: F401 (a fixture)
from torch import nn

from tinylib import distill, encoders, fitted, layers
from tinylib.bert import Bert
from tinylib.errors import UserError, UserNote
from tinylib.student import new_student, states_basis

MAP = (2, 3)


@pytest.fixture(scope="module")
def teacher():
    return Bert(TEACHER, generator()).eval()


def cut(teacher, data, start, **more):
    """Give a student of two layers of 16, its basis, and both."""
    config = layers.student_config(teacher, "2x16")
    basis = states_basis(teacher, data.encoded, (0, *MAP), 16)
    return new_student(teacher, config, MAP, start, generator(1), basis, **more).eval(), basis


def test_a_linear_map_is_the_one_that_least_squares_gives(monkeypatch):
    monkeypatch.setattr(fitted, "PULL", 0.0)
    x, y, linear = torch.randn(5000, 7), torch.randn(5000, 3), nn.Linear(7, 3)
    with torch.no_grad():
        fitted._fit_linear(linear, x, y)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(5000, 1)], 1).double(), y.double()).solution
    torch.testing.assert_close(linear.weight.double(), best[:-1].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear.bias.double(), best[-1], atol=1e-5, rtol=1e-4)


def test_a_direction_that_no_text_shows_keeps_its_weights():
    x = torch.randn(500, 4)
    x[:, 2] = 0
    linear = nn.Linear(4, 3)
    before = linear.weight[:, 2].clone()
    with torch.no_grad():
        fitted._fit_linear(linear, x, torch.randn(500, 3))
    assert torch.equal(linear.weight[:, 2], before)


def test_a_norm_gets_the_line_of_each_coordinate():
    import numpy as np

    norm, x = nn.LayerNorm(5), torch.randn(400, 5)
    z = nn.functional.layer_norm(x, (5,))
    y = z * torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0]) + torch.arange(5.0) + 0.1 * torch.randn(400, 5)
    with torch.no_grad():
        fitted._fit_norm(norm, x, y)
    for i in range(5):
        slope, shift = np.polyfit(z[:, i].numpy(), y[:, i].numpy(), 1)
        assert norm.weight[i].item() == pytest.approx(slope, abs=1e-4)
        assert norm.bias[i].item() == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize("name", ["bert", *SCORED])
def test_what_a_teacher_of_any_kind_says_of_a_layer(folders, name):  # noqa: F811
    teacher = encoders.load(folders[name])
    ids, mask, segments = batch(teacher)
    both = {"ids": ids, "mask": mask, "segments": segments}
    states = teacher(ids, mask, segments, keep_hidden=(1, 2, 3)).hidden_states
    for n in (1, 2, 3):  # ALBERT's three are one layer, called three times
        before, between, after, end, said = fitted._told(teacher, n, both, torch.eye(teacher.config.hidden_size))
        source = teacher.layers[n - 1]
        torch.testing.assert_close(end, states[n][mask])
        torch.testing.assert_close(source.ffn_norm(after), end, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(source.attention_norm(before), between, atol=1e-5, rtol=1e-4)
        rest = after - between - source.down.bias  # what the neurons say, through the output matrix
        assert rest.norm() <= said.sqrt().norm() * torch.linalg.matrix_norm(source.down.weight, 2) * 1.001


def test_the_states_come_nearer_on_other_texts_too(teacher):
    seen, unseen = examples(150, seed=1), examples(40, seed=2)
    loss = {}
    for start in ("states", "fitted"):
        student, basis = cut(teacher, seen, start, texts=seen.encoded)
        pair = layers.Distiller(student, layers.Projections(16, 24, 2, basis)).eval()
        whole = unseen.collate([unseen[i] for i in range(40)])
        with torch.inference_mode():
            found = layers.matching_loss(teacher, layers.LayerMap(MAP), layers.Weights(), by_layer=True)(pair, whole)
        loss[start] = {name: value.item() for name, value in found.items()}
    near = {name: loss["fitted"][name] / loss["states"][name] for name in loss["states"] if name[0] != "attention"}
    assert max(near.values()) < 0.9, near


def test_it_is_the_same_twice_and_leaves_modes_and_the_teacher_alone(teacher):
    data, before = examples(150), copy.deepcopy(teacher.state_dict())
    settings = distill.Settings(student="2x16", start="fitted", layer_map=MAP)
    one, two = (distill.first_student(teacher, settings, data)[0] for _ in range(2))
    assert one.training
    assert not teacher.training
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(part._forward_pre_hooks for part in (*teacher.modules(), *one.modules()))


def test_too_few_tokens_leave_the_cut_as_it_is(teacher):
    data = examples(20)
    with pytest.warns(UserNote, match="too few tokens to fit a student of this width"):
        fit, _ = cut(teacher, data, "fitted", texts=data.encoded)
    plain, basis = cut(teacher, data, "states")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in fit.state_dict().items())
    assert not fitted.fit_to_states(fit, teacher, data.encoded, MAP, basis)


def test_texts_are_spread_over_all_where_they_are_too_many(monkeypatch):
    data = examples(100)
    monkeypatch.setattr(fitted, "TOKENS", int(data.encoded.lengths.sum()) // 3)
    some = fitted._some(data.encoded)
    assert len(some) in (25, 34)
    assert torch.equal(some.ids[-1], data.encoded.ids[(len(some) - 1) * (100 // len(some) + (100 % len(some) > 0))])


def test_without_texts_it_is_a_sentence(teacher):
    with pytest.raises(UserError, match="start='fitted' needs texts"):
        cut(teacher, examples(20), "fitted")
    with pytest.raises(UserError, match="start='fitted' needs the states_basis"):
        layers.first_projections(teacher, layers.student_config(teacher, "2x16"), "fitted", 0)
