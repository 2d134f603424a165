"""TinyBERT's inner losses against loops, closed forms and PyTorch's own; layer maps, the SVD start, a whole run."""

import copy
import dataclasses
import errno
import functools
import hashlib
import inspect
import json
import math
import shutil
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylib import distill, layers, measure, models, paging, train
from tinylib.bert import Bert, BertConfig
from tinylib.distill import LayerMap, attention_loss, embedding_loss, hidden_loss
from tinylib.errors import UserError
from tinylib.losses import soft_target_loss, value_relation_loss
from tinylib.student import SEEN, STARTS, cut_head, explained, new_student, states_basis, svd_basis
from tinylib.text import Encoded
from tinylib.train import Examples, loader

STATE_LOSSES = [hidden_loss, embedding_loss]
LOSSES = [*STATE_LOSSES, attention_loss]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))  # B, T, and width or heads
TEACHER = BertConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=16, head="classification", labels=("no", "yes"),
)  # fmt: skip
STUDENT = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(loss, B=3, T=5, C=4, seed=0, **options):
    """Return random states or scores of a student and a teacher, and how many tokens of each row are real."""
    g = generator(seed)
    shape = (B, C, T, T) if loss is attention_loss else (B, T, C)
    student, teacher = (torch.randn(shape, generator=g, **options) for _ in range(2))
    return student, teacher, torch.randint(1, T + 1, (B,), generator=g)


def real(lengths, T):
    return torch.arange(T)[None] < lengths[:, None]


def fill_padding(loss, x, lengths, value):
    """Return a copy with ``value`` wherever a padding token has a part."""
    x = x.clone()
    for b, n in enumerate(lengths.tolist()):
        if loss is attention_loss:
            x[b, :, n:], x[b, :, :, n:] = value, value
        else:
            x[b, n:] = value
    return x


def by_loops(loss, student, teacher, lengths):
    """Average the squared differences over what is real, one number at a time."""
    squares = []
    for b, n in enumerate(lengths.tolist()):
        s, t = student[b].tolist(), teacher[b].tolist()
        if loss is attention_loss:
            squares += [
                (s[h][i][j] - t[h][i][j]) ** 2 for h in range(len(s)) for i in range(n) for j in range(n)
            ]
        else:
            squares += [(s[i][c] - t[i][c]) ** 2 for i in range(n) for c in range(len(s[i]))]
    return sum(squares) / len(squares)


# -- the losses --------------------------------------------------------------


@each_loss
@given(sizes=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_loss_is_zero_at_equality_and_positive_elsewhere(loss, sizes, seed):
    student, teacher, lengths = inputs(loss, *sizes, seed=seed)
    mask = real(lengths, sizes[1])
    assert loss(teacher, teacher, mask).item() == loss(teacher, teacher).item() == 0.0
    assert loss(student, teacher, mask).item() > 0
    assert loss(student, teacher, mask).item() == pytest.approx(loss(teacher, student, mask).item())
    assert loss(2 * student, 2 * teacher, mask).item() == pytest.approx(
        4 * loss(student, teacher, mask).item()
    )


@each_loss
@given(sizes=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_loss_is_the_mean_that_loops_give(loss, sizes, seed):
    student, teacher, lengths = inputs(loss, *sizes, seed=seed, dtype=torch.float64)
    wanted = by_loops(loss, student, teacher, lengths)
    assert loss(student, teacher, real(lengths, sizes[1])).item() == pytest.approx(wanted, rel=1e-12)


@each_loss
def test_without_a_mask_a_loss_is_pytorchs(loss):
    student, teacher, _ = inputs(loss)
    torch.testing.assert_close(loss(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(loss(student, teacher, torch.ones(3, 5)), F.mse_loss(student, teacher))


@each_loss
@pytest.mark.parametrize("junk", [0.0, 7.0, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient(loss, junk, dtype):
    student, teacher, lengths = inputs(loss)
    mask = real(lengths, 5).to(dtype)
    student.requires_grad_()
    wanted = loss(student, teacher, mask)
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    dirty = fill_padding(loss, student.detach(), lengths, junk).requires_grad_()
    got = loss(dirty, fill_padding(loss, teacher, lengths, -junk), mask)
    (gradient,) = torch.autograd.grad(got, dirty)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert torch.equal(fill_padding(loss, gradient, lengths, 0.0), gradient), "a gradient reaches the padding"


@each_loss
@given(more=st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_more_padding_changes_nothing(loss, more):
    student, teacher, lengths = inputs(loss)
    widths = (0, more, 0, more) if loss is attention_loss else (0, 0, 0, more)
    wide = [F.pad(x, widths, value=3.0) for x in (student, teacher)]
    torch.testing.assert_close(loss(*wide, real(lengths, 5 + more)), loss(student, teacher, real(lengths, 5)))


@each_loss
def test_the_gradient_is_the_closed_form_and_passes_finite_differences(loss):
    student, teacher, lengths = inputs(loss, dtype=torch.float64)
    mask = real(lengths, 5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, mask), student)
    count = fill_padding(loss, torch.ones_like(teacher), lengths, 0.0)
    torch.testing.assert_close(gradient, 2 * count * (student - teacher).detach() / count.sum())
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), student)


@each_loss
def test_the_teacher_gets_no_gradient(loss):
    student, teacher, lengths = inputs(loss)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, real(lengths, 5)).backward()
    assert student.grad is not None
    assert teacher.grad is None


@each_loss
def test_a_batch_of_padding_alone_gives_zero(loss):
    student, teacher, _ = inputs(loss)
    assert loss(student, teacher, torch.zeros(3, 5, dtype=torch.bool)).item() == 0.0


@each_loss
def test_wrong_shapes_are_refused_with_a_sentence(loss):
    student, teacher, _ = inputs(loss)
    remedy = "as many heads" if loss is attention_loss else "project"
    other = teacher[:, :2] if loss is attention_loss else teacher[..., :2]
    with pytest.raises(UserError, match=f"{loss.__name__}.*{remedy}"):
        inspect.unwrap(loss)(
            student, other
        )  # as users call it: the tests' own check of shapes would come first
    with pytest.raises(UserError, match=rf"{loss.__name__}: mask has shape \(3, 4\).*\(3, 5\)"):
        loss(student, teacher, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="mask has shape"):
        loss(student, teacher, torch.ones(3, 5, 5, dtype=torch.bool))


# -- layer maps --------------------------------------------------------------


def test_the_layer_maps_are_the_papers():
    assert LayerMap.uniform(12, 4) == (3, 6, 9, 12)
    assert LayerMap.uniform(6, 4) == (2, 3, 5, 6)
    assert LayerMap.top(12, 4) == (9, 10, 11, 12)
    assert LayerMap.bottom(12, 4) == (1, 2, 3, 4)
    assert [LayerMap.uniform(12, 4)(m) for m in range(5)] == [0, 3, 6, 9, 12]
    assert LayerMap([2, 2, 6]) == (2, 2, 6)


@given(N=st.integers(1, 48), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_layer_map_rises_within_the_teacher(N, data):
    M = data.draw(st.integers(1, N))
    for made in (LayerMap.uniform(N, M), LayerMap.top(N, M), LayerMap.bottom(N, M)):
        assert len(made) == M
        assert list(made) == sorted(set(made))
        assert 1 <= made[0] <= made[-1] <= N
    assert LayerMap.uniform(N, M)[-1] == LayerMap.top(N, M)[-1] == N
    assert LayerMap.uniform(N, N) == LayerMap.top(N, N) == LayerMap.bottom(N, N) == tuple(range(1, N + 1))
    if N % M == 0:
        assert LayerMap.uniform(N, M) == tuple(m * N // M for m in range(1, M + 1))


@pytest.mark.parametrize("make", [LayerMap.uniform, LayerMap.top, LayerMap.bottom])
@pytest.mark.parametrize("sizes", [(4, 6), (4, 0)])
def test_a_student_deeper_than_its_teacher_is_refused(make, sizes):
    with pytest.raises(UserError, match=f"student_layers={sizes[1]} must be between 1 and the teacher's 4"):
        make(*sizes)


def test_faulty_layer_maps_are_refused():
    for chosen in ((), (0, 2), (-1,)):
        with pytest.raises(UserError, match="must name a teacher layer"):
            LayerMap(chosen)
    for m in (-1, 5):
        with pytest.raises(UserError, match=f"m={m} is no layer of this student"):
            LayerMap.uniform(12, 4)(m)
    teacher = Bert(TEACHER, generator())
    for chosen in ((1, 2, 3), (1, 4)):
        with pytest.raises(UserError, match="must name 2 teacher layers between 1 and 3"):
            distill.distill_intermediate(
                teacher.eval(), small_student(teacher), examples(4), distill.Settings(layer_map=chosen)
            )


# -- where a student starts --------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 11, 12])
def test_the_svd_basis_is_the_best_of_its_width(width):
    g = generator()
    table = torch.randn(200, 12, generator=g) * torch.linspace(3, 0.3, 12) @ torch.randn(12, 12, generator=g)
    basis = svd_basis(table, width)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width), atol=1e-5, rtol=0)
    _, s, vh = torch.linalg.svd(table.double(), full_matrices=False)
    overlap = torch.linalg.svdvals(vh[:width] @ basis.double())  # all 1: the two span the same space
    torch.testing.assert_close(overlap, torch.ones(width, dtype=torch.float64), atol=1e-5, rtol=0)
    best = (s[:width].square().sum() / s.square().sum()).item()
    assert explained(table, basis) == pytest.approx(best, abs=1e-6)
    lost = (table - table @ basis @ basis.T).square().sum().item()
    assert lost == pytest.approx(s[width:].square().sum().item(), rel=1e-3, abs=1e-3)
    for seed in range(5):  # Eckart and Young: no other basis keeps more
        other = torch.linalg.qr(torch.randn(12, width, generator=generator(seed))).Q
        assert explained(table, other) <= explained(table, basis) + 1e-6


def test_a_basis_wider_than_the_table_is_refused():
    with pytest.raises(UserError, match="width=13 is greater than the teacher's 12"):
        svd_basis(torch.randn(20, 12), 13)


def small_student(teacher, start="embeddings", seed=0, **changes):
    texts = examples(80).encoded if start in SEEN else None
    basis = texts and states_basis(teacher, texts, (0, 2, 3), 16)
    return new_student(teacher, STUDENT.replace(**changes), (2, 3), start, generator(seed), basis, texts)


@pytest.mark.parametrize("start", STARTS)
def test_a_new_student_has_its_own_sizes_and_the_teachers_head(start):
    teacher = Bert(TEACHER.replace(layer_norm_eps=1e-3, pad_token_id=None), generator())
    student = small_student(teacher, start)
    assert student.training
    assert student.config.labels == TEACHER.labels
    assert (student.config.layer_norm_eps, student.config.pad_token_id) == (1e-3, None)
    assert (student.config.vocab_size, student.config.hidden_size) == (50, 16)
    again = small_student(teacher, start).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in student.state_dict().items())
    assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)


@pytest.mark.parametrize("width", [1, 10, 16, 24])
def test_the_basis_of_the_states_is_the_svd_s_of_them_all(width):
    teacher, data = Bert(TEACHER, generator()), examples(20)
    rows = []
    for ids, segments in zip(data.encoded.ids, data.encoded.segments, strict=True):  # one by one, without padding
        with torch.inference_mode():
            states = teacher.eval()(ids[None], segments=segments[None], keep_hidden=(0, 2, 3)).hidden_states
        rows += [states[n][0] for n in (0, 2, 3)]
    table = torch.cat(rows)
    basis = states_basis(teacher.train(), data.encoded, (0, 2, 3, 3), width)  # a layer that two learn from counts once
    assert teacher.training
    torch.testing.assert_close(basis.T @ basis, torch.eye(width), atol=1e-5, rtol=0)
    assert explained(table, basis) == pytest.approx(explained(table, svd_basis(table, width)), abs=1e-5)
    if width == 24:
        assert torch.equal(basis, torch.eye(24)), "as wide as the teacher: nothing is turned"


def test_a_start_at_the_states_keeps_more_of_them_than_one_at_the_word_table():
    teacher, data = Bert(TEACHER, generator()).eval(), examples(40)
    settings = distill.Settings(student="2x16", start="states", layer_map=(2, 3))
    student, projections = distill.first_student(teacher, settings, data)
    basis = states_basis(teacher, data.encoded, (0, 2, 3), 16)
    for m in range(3):
        assert torch.equal(projections.maps[m].weight, basis), "the map leads back by the transposed basis"
    torch.testing.assert_close(student.embeddings.word.weight, teacher.embeddings.word.weight @ basis)
    batch = data.collate(list(range(40)))
    loss = {}
    for start in ("teacher", "states"):
        pair = layers.Distiller(*distill.first_student(teacher, settings.replace(start=start), data))
        pair.eval()
        weights = distill.Weights(attention=0.0)
        loss[start] = sum(layers.matching_loss(teacher, LayerMap((2, 3)), weights)(pair, batch).values()).item()
    assert loss["states"] < loss["teacher"]


def test_without_a_general_student_the_texts_decide_where_it_starts():
    teacher, data = Bert(TEACHER, generator()).eval(), examples(80)
    general, states, cut = (
        [*distill.first_student(teacher, distill.Settings(student="2x16", start=start), given)[0].parameters()]
        for start, given in (("general", data), ("states", data), ("general", None))
    )
    assert all(torch.equal(a, b) for a, b in zip(general, states, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(general, cut, strict=True))


def test_a_run_that_goes_on_takes_no_basis_again(tmp_path, monkeypatch):
    teacher, data = Bert(TEACHER, generator()).eval(), examples(24)
    for start in ("general", "states", "fitted"):  # no general student is shipped for this teacher
        settings = distill.Settings(student="2x16", start=start, epochs_intermediate=2, epochs_prediction=1, batch_size=8)
        first = distill.distill(teacher, data, settings, folder=tmp_path / start)
        with monkeypatch.context() as patch:
            patch.setattr(distill, "states_basis", None)
            again = distill.distill(teacher, data, settings, folder=tmp_path / start)
        for name, value in first.student.state_dict().items():
            assert torch.equal(again.student.state_dict()[name], value), name
        for ours, theirs in zip(first.projections.parameters(), again.projections.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_teacher_in_double_precision_starts_a_student_as_in_single():
    teacher, data = Bert(TEACHER, generator()).eval(), examples(24)
    settings = distill.Settings(student="2x16", start="states")
    single = distill.first_student(teacher, settings, data)[0].state_dict()
    double = distill.first_student(copy.deepcopy(teacher).double(), settings, data)[0].state_dict()
    torch.testing.assert_close(double["embeddings.word.weight"].abs(), single["embeddings.word.weight"].abs(), atol=1e-3, rtol=1e-2)


def test_a_start_at_the_states_without_texts_is_a_sentence():
    teacher = Bert(TEACHER, generator())
    settings = distill.Settings(student="2x16", start="states")
    with pytest.raises(UserError, match="start='states' needs texts"):
        distill.first_student(teacher, settings)
    with pytest.raises(UserError, match="no texts whose hidden states"):
        states_basis(teacher, examples(4).encoded.select([]), (0, 1), 16)
    with pytest.raises(UserError, match="width=25 is greater than the teacher's 24"):
        states_basis(teacher, examples(4).encoded, (0, 1), 25)


def test_a_start_from_embeddings_keeps_what_the_basis_keeps_of_them():
    teacher = Bert(TEACHER, generator())
    table = teacher.embeddings.word.weight.detach()
    basis = svd_basis(table, 16)
    student = small_student(teacher)
    torch.testing.assert_close(student.embeddings.word.weight.detach(), table @ basis)
    back = student.embeddings.word.weight.detach() @ basis.T
    kept = 1 - ((table - back).square().sum() / table.square().sum()).item()
    assert kept == pytest.approx(explained(table, basis), abs=1e-5)


def test_a_student_as_large_as_its_teacher_starts_as_the_teacher():
    teacher = shaken(Bert(TEACHER, generator())).eval()
    student = new_student(teacher, TEACHER, (1, 2, 3), "teacher", generator(1)).eval()
    ids = torch.randint(1, 50, (2, 7), generator=generator())
    ours, theirs = (m(ids, keep_hidden=range(4), keep_scores=(1, 2, 3)) for m in (student, teacher))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-3)
    for m in range(4):
        torch.testing.assert_close(ours.hidden_states[m], theirs.hidden_states[m], atol=1e-4, rtol=1e-3)
    for m in (1, 2, 3):  # what moves a row's scores as a whole is lost, and no softmax sees it
        torch.testing.assert_close(
            ours.scores[m].softmax(-1), theirs.scores[m].softmax(-1), atol=1e-4, rtol=1e-3
        )


def test_faulty_starts_are_refused():
    teacher = Bert(TEACHER, generator())
    with pytest.raises(UserError, match="start='warm' is not one of random, embeddings, teacher, states"):
        small_student(teacher, "warm")
    with pytest.raises(UserError, match="2 teacher layers for 3 student layers"):
        small_student(teacher, num_hidden_layers=3)
    for odd in (0, 4):
        with pytest.raises(UserError, match=rf"names layer {odd}, but the teacher has layers 1 to 3"):
            new_student(teacher, STUDENT, (odd, 3), "teacher")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 24])  # 24 is the teacher's
def test_a_teacher_in_half_precision_is_cut_in_float32(dtype, width):
    half = Bert(TEACHER, generator()).eval().to(dtype)
    config = STUDENT.replace(hidden_size=width)
    student = new_student(half, config, (2, 3), "teacher", generator())
    assert {p.dtype for p in half.parameters()} == {dtype}
    wide = copy.deepcopy(half).float()
    wanted = new_student(wide, config, (2, 3), "teacher", generator()).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())
    basis = layers.first_projections(half, config, "teacher", 0).maps[0].weight
    assert torch.equal(basis, layers.first_projections(wide, config, "teacher", 0).maps[0].weight)
    wanted = {name: value.clone() for name, value in wanted.items()}
    cut_head(student, half, basis.detach())
    assert all(torch.equal(value, wanted[name]) for name, value in student.state_dict().items())


# -- one step and the run ----------------------------------------------------


def examples(count=24, seed=0):
    g = generator(seed)
    ids = tuple(
        torch.randint(1, 50, (int(n),), generator=g) for n in torch.randint(3, 12, (count,), generator=g)
    )
    return Examples(Encoded(ids, tuple((torch.arange(len(x)) >= 2).long() for x in ids)))


@pytest.fixture
def teacher():
    teacher = Bert(TEACHER.replace(initializer_range=0.2), generator()).eval()
    return teacher.requires_grad_(False)


def both_outputs(teacher, student, batch, layer_map):
    layers = range(1, len(layer_map) + 1)
    told = distill.teacher_forward(teacher, batch, [layer_map(m) for m in (0, *layers)], layer_map)
    said = student(batch["ids"], batch["mask"], batch["segments"], keep_hidden=(0, *layers), keep_scores=layers)
    return said, told


def test_the_intermediate_losses_are_the_sums_over_the_mapped_layers(teacher):
    student, layer_map = small_student(teacher).eval(), LayerMap([2, 3])
    project = distill.Projections(16, 24, 2, generator=generator())
    batch = next(iter(loader(examples(), 5)))
    said, told = both_outputs(teacher, student, batch, layer_map)
    mask, g = batch["mask"], layer_map
    wanted = {
        "embedding": embedding_loss(project(0, said.hidden_states[0]), told.hidden_states[0], mask),
        "hidden": sum(
            hidden_loss(project(m, said.hidden_states[m]), told.hidden_states[g(m)], mask) for m in (1, 2)
        ),
        "attention": sum(attention_loss(said.scores[m], told.scores[g(m)], mask) for m in (1, 2)),
    }
    got = distill.intermediate_losses(said, told, mask, layer_map, project, distill.Weights())
    assert list(got) == list(wanted)
    torch.testing.assert_close(got, wanted)
    weighted = distill.Weights(embedding=0.0, hidden=0.5, attention=3.0)
    got = distill.intermediate_losses(said, told, mask, layer_map, project, weighted)
    torch.testing.assert_close(got, {"hidden": 0.5 * wanted["hidden"], "attention": 3 * wanted["attention"]})


def test_value_relations_can_take_the_place_of_the_scores(teacher):
    student, layer_map = small_student(teacher).eval(), LayerMap([2, 3])
    batch = next(iter(loader(examples(), 5)))
    given = batch["ids"], batch["mask"], batch["segments"]
    said, told = (model(*given, keep_relations=(1, 2, 3)[:n]).relations for model, n in ((student, 2), (teacher, 3)))
    wanted = {("attention", m): value_relation_loss(said[m], told[layer_map(m)], batch["mask"]) for m in (1, 2)}
    pair = distill.Distiller(student, distill.Projections(16, 24, 2, generator=generator()))
    weights = distill.Weights(embedding=0.0, hidden=0.0, attention_on="values")
    assert layers.Wanted.by(layer_map, weights) == layers.Wanted((), (), (1, 2), (), (), (2, 3)), "more than is needed"
    torch.testing.assert_close(layers.matching_loss(teacher, layer_map, weights, by_layer=True)(pair, batch), wanted)


def test_an_unknown_kind_of_attention_loss_is_refused():
    with pytest.raises(UserError, match="attention_on='keys' is not one of scores, probabilities, divergence, values"):
        distill.Weights(attention_on="keys")


def test_each_layer_and_the_embeddings_have_a_projection_of_their_own():
    project = distill.Projections(16, 24, 2, generator=generator())
    assert [tuple(p.shape) for p in project.parameters()] == [(24, 16)] * 3
    assert not torch.equal(project.maps[0].weight, project.maps[1].weight)
    same = distill.Projections(16, 24, 2, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(project.parameters(), same.parameters(), strict=True))
    basis = svd_basis(torch.randn(50, 24, generator=generator()), 16)
    states = torch.randn(2, 3, 16, generator=generator())
    torch.testing.assert_close(distill.Projections(16, 24, 2, basis)(1, states), states @ basis.T)


def test_a_teacher_in_training_mode_is_refused(teacher):
    teacher.train()
    with pytest.raises(UserError, match="training mode.*teacher.eval()"):
        distill.teacher_forward(teacher, next(iter(loader(examples(), 4))))
    with pytest.raises(UserError, match="training mode"):
        distill.distill(teacher, examples(), distill.Settings(student="2x16"), student=small_student(teacher))


def test_the_teachers_forward_leaves_no_graph(teacher):
    teacher.requires_grad_(True)
    out = distill.teacher_forward(teacher, next(iter(loader(examples(), 4))), (0, 3), (1,))
    assert not out.hidden_states[3].requires_grad
    assert not out.scores[1].requires_grad


@pytest.mark.parametrize(("dtype", "off"), [("float16", 1e-3), ("int8", 2e-2)])
def test_cached_teacher_outputs_are_the_live_ones_within_their_precision(teacher, dtype, off):
    data, layer_map = examples(), LayerMap([2, 3])
    cached = distill.TeacherOutputs(teacher, data, (0, 2, 3), (2, 3), dtype=dtype)
    student, project = small_student(teacher).eval(), distill.Projections(16, 24, 2, generator=generator())
    for batch in loader(data, 5, shuffle=True):
        said, live = both_outputs(teacher, student, batch, layer_map)
        told = cached.batch(batch["rows"].tolist(), batch["ids"].shape[1], batch["ids"].device)
        for layer in (0, 2, 3):
            padded = live.hidden_states[layer].masked_fill(~batch["mask"][..., None], 0)
            torch.testing.assert_close(told.hidden_states[layer], padded, atol=2 * off, rtol=off)
        losses = [
            distill.intermediate_losses(said, source, batch["mask"], layer_map, project, distill.Weights())
            for source in (told, live)
        ]
        torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    needed = distill.TeacherOutputs.bytes_needed(teacher, data, (0, 2, 3), (2, 3), dtype=dtype)
    assert needed == cached.hidden.nbytes + cached.square.nbytes


def test_cached_scores_and_value_relations_are_told_apart(teacher):
    data = examples()
    cached = distill.TeacherOutputs(teacher, data, (), (2,), (1, 3))
    for batch in loader(data, 5):
        live = distill.teacher_forward(teacher, batch, (), (2,), (1, 3))
        told = cached.batch(batch["rows"].tolist(), batch["ids"].shape[1], batch["ids"].device)
        pairs = (batch["mask"][:, :, None] & batch["mask"][:, None, :])[:, None]
        for ours, theirs in ((told.scores, live.scores), (told.relations, live.relations)):
            assert ours.keys() == theirs.keys()
            for layer in ours:
                torch.testing.assert_close(ours[layer], theirs[layer].masked_fill(~pairs, 0.0), atol=2e-3, rtol=1e-3)
    assert distill.TeacherOutputs.bytes_needed(teacher, data, (), (2,), (1, 3)) == cached.square.nbytes


def outputs_in_cache() -> list:
    return [p for p in models.products() if p.kind == "teacher-outputs"]


def test_outputs_are_found_again_under_their_key_and_gone_when_the_step_is_done(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data = examples()
    told = []

    def stopped_run():
        with layers.teacher_outputs(teacher, data, (0, 2), (2,)) as first:
            told.append(first.batch([3, 1], 12, torch.device("cpu")).hidden_states)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_run()
    (kept,) = outputs_in_cache()
    monkeypatch.setattr(layers.TeacherOutputs, "_fill", None)  # computing them again would be a TypeError
    with layers.teacher_outputs(teacher, data, (0, 2), (2,), keep=True) as second:
        again = second.batch([3, 1], 12, torch.device("cpu")).hidden_states
        torch.testing.assert_close(again, told[0], rtol=0, atol=0)
    assert outputs_in_cache() == [kept]
    with layers.teacher_outputs(teacher, data, (0, 2), (2,)):
        pass
    assert outputs_in_cache() == []


@pytest.mark.parametrize("change", ["teacher", "texts", "layers", "dtype"])
def test_outputs_of_another_teacher_text_layer_or_precision_are_not_taken(teacher, tmp_path, monkeypatch, change):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data, hidden, dtype = examples(), (0, 2), "float16"
    with layers.teacher_outputs(teacher, data, hidden, (2,), keep=True):
        pass
    if change == "teacher":
        with torch.no_grad():
            teacher.layers[0].up.bias[0] += 1
    elif change == "texts":
        data.encoded.ids[0][1] += 1
    elif change == "layers":
        hidden = (0, 3)
    else:
        dtype = "int8"
    with layers.teacher_outputs(teacher, data, hidden, (2,), keep=True, dtype=dtype):
        assert len(outputs_in_cache()) == 2


def test_outputs_that_another_run_takes_away_before_they_are_opened_are_made_again(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data, product, given = examples(), models.product, []

    def taken_once(kind, *rest):
        folder = product(kind, *rest)
        if kind == "teacher-outputs":
            given.append(folder)
            if len(given) == 1:
                shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(models, "product", taken_once)
    with layers.teacher_outputs(teacher, data, (0, 2), (2,)) as cached:
        told = cached.batch([3, 1], 12, torch.device("cpu"))
    assert len(given) == 2
    wanted = distill.TeacherOutputs(teacher, data, (0, 2), (2,)).batch([3, 1], 12, torch.device("cpu"))
    for ours, theirs in ((told.hidden_states, wanted.hidden_states), (told.scores, wanted.scores)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_full_disk_is_said_before_anything_is_computed(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(layers.TeacherOutputs, "_fill", None)
    refused = pytest.raises(UserError, match="MB free, .* MB needed.*TINYLIB_HOME")
    with refused, layers.teacher_outputs(teacher, examples(), (0,), (1,)):
        pass
    assert outputs_in_cache() == []


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_disk_that_fills_up_is_a_sentence_and_no_signal(teacher, tmp_path, tmpfs, monkeypatch, in_cache):
    small = tmpfs(size="100k")
    monkeypatch.setenv("TINYLIB_HOME", str(small if in_cache else tmp_path))
    monkeypatch.setattr(layers.tempfile, "tempdir", str(small))
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))  # as before another program filled it
    data = examples(64)
    if in_cache:
        with pytest.raises(UserError, match="the disk of the cache .* is full.*TINYLIB_HOME"):
            layers.teacher_outputs(teacher, data, (0, 1, 2, 3), (1, 2, 3)).__enter__()
    else:
        with pytest.raises(UserError, match=f"the disk of {small} has no room for the 0 MB of the teacher's outputs.*TMPDIR"):
            distill.TeacherOutputs(teacher, data, (0, 1, 2, 3), (1, 2, 3))
    assert not list(small.rglob("*.f16"))


@pytest.mark.parametrize("trouble", [None, AttributeError, OSError(errno.EOPNOTSUPP, "unknown"), OSError(errno.ENOSPC, "full")])
def test_the_files_have_their_room_before_they_are_filled(tmp_path, monkeypatch, trouble):
    def unable(*_):
        raise trouble

    if trouble:
        monkeypatch.setattr(layers.os, "posix_fallocate", unable, raising=False)
    file, size = tmp_path / "file", 3_000_001
    if getattr(trouble, "errno", None) == errno.ENOSPC:
        with pytest.raises(OSError, match="full"):
            layers._reserve(file, size)
        return
    layers._reserve(file, size)
    assert file.stat().st_size == size
    if hasattr(file.stat(), "st_blocks"):
        assert 512 * file.stat().st_blocks >= size, "it is sparse"
    assert not np.fromfile(file, np.uint8).any()


def test_outputs_without_numbers_are_read_without_being_written(teacher, tmp_path):
    first = distill.TeacherOutputs(teacher, examples(), (0,), (), folder=tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(before) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "touch", None)  # as on a disk that can only be read
        again = distill.TeacherOutputs(teacher, examples(), (0,), (), folder=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    states = [outputs.batch([3, 1], 12, torch.device("cpu")).hidden_states[0] for outputs in (first, again)]
    assert torch.equal(*states)


def test_nothing_maps_the_files_when_they_are_deleted(teacher, tmp_path, monkeypatch):
    """Windows deletes no file that is mapped."""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    held, own, asked = [], layers._drop, []

    def drop(recipe):
        asked.append([ref() for ref in held])
        own(recipe)

    monkeypatch.setattr(layers, "_drop", drop)
    with layers.teacher_outputs(teacher, examples(), (0, 2), (2,)) as cached:
        cached.batch([3, 1], 12, torch.device("cpu"))
        held += [weakref.ref(cached.hidden), weakref.ref(cached.square)]
    assert asked == [[None, None]]
    assert outputs_in_cache() == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_outputs_beyond_float16_are_a_sentence_with_the_cause(teacher, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    with torch.no_grad():
        teacher.layers[1].ffn_norm.bias[3] = 7e4
    settings = SHORT.replace(cache_dtype=dtype, epochs_intermediate=1, epochs_prediction=0)
    with pytest.raises(UserError, match="teacher's outputs are beyond 65,504.*cache_gb=0"):
        distill.distill(teacher, examples(), settings, small_student(teacher))
    _, history = distill.distill_intermediate(teacher, small_student(teacher), examples(), settings.replace(cache_gb=0))
    assert all(math.isfinite(loss) for loss in history.losses["loss"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_teaches(teacher, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    short = SHORT.replace(start="teacher", epochs_intermediate=2, epochs_prediction=1)
    result = distill.distill(teacher.to(dtype), examples(), short)
    losses = result.intermediate.losses["loss"] + result.prediction.losses["loss"]
    assert all(math.isfinite(loss) for loss in losses)


def test_the_hash_of_a_model_is_that_of_its_bytes(teacher):
    told = json.dumps(dataclasses.asdict(teacher.config), sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    assert layers.weights_hash(teacher) == digest.hexdigest()
    halves = [layers.weights_hash(copy.deepcopy(teacher).to(dtype)) for dtype in (torch.float16, torch.bfloat16)]
    assert len({digest.hexdigest(), *halves}) == 3


def test_the_files_are_mapped_and_not_read(teacher):
    cached = distill.TeacherOutputs(teacher, examples(), (0, 2, 3), (2, 3))
    assert isinstance(cached.hidden, np.memmap)
    folder = Path(cached.hidden.filename).parent
    assert folder.is_dir()
    del cached
    assert not folder.exists(), "without a folder of their own they go with the object"


SHORT = distill.Settings(
    student="2x16",
    epochs_intermediate=12,
    lr_intermediate=5e-3,
    epochs_prediction=8,
    lr_prediction=5e-3,
    batch_size=8,
)


def counted(teacher, monkeypatch) -> list:
    """Note the shape of every batch that the teacher reads."""
    read, forward = [], teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda ids, *a, **k: read.append(tuple(ids.shape)) or forward(ids, *a, **k))
    return read


def test_one_pass_of_the_teacher_serves_both_steps(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data, read = examples(80), counted(teacher, monkeypatch)
    distill.distill(teacher, data, SHORT, student=small_student(teacher))
    assert sum(B for B, _ in read) == len(data), "every text once, for the intermediate and the prediction step together"
    kept = layers.teacher_logits(teacher, data.encoded)
    assert sum(B for B, _ in read) == len(data)
    shutil.rmtree(tmp_path / "products" / "teacher-logits")
    again = layers.teacher_logits(teacher, data.encoded)
    assert sum(B for B, _ in read) == 2 * len(data)
    assert torch.equal(kept, again), "a run that is resumed without the cache must go on to the same weights"
    torch.testing.assert_close(kept, train.predict(teacher, data.encoded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["teacher", "texts", "segments", "precision"])
def test_logits_of_another_teacher_text_or_precision_are_not_taken(teacher, tmp_path, monkeypatch, change):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data = examples()
    first = layers.teacher_logits(teacher, data.encoded)
    with torch.no_grad():
        if change == "teacher":
            teacher.classifier.bias[0] += 1
        elif change == "texts":
            data.encoded.ids[0][1] += 1
        elif change == "segments":
            data.encoded.segments[0][1] = 1
        else:  # in name only: the numbers of this machine may be the same
            monkeypatch.setattr(layers, "float32_precision", lambda: "medium")
    second = layers.teacher_logits(teacher, data.encoded)
    assert torch.equal(second, first) == (change == "precision")
    assert len([p for p in models.products() if p.kind == "teacher-logits"]) == 2


@pytest.mark.parametrize("change", [{"hidden_act": "gelu_new"}, {"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}], ids=str)
def test_logits_of_the_same_weights_under_another_config_are_not_taken(teacher, tmp_path, monkeypatch, change):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data, (again, other) = examples(), (Bert(teacher.config.replace(**more)).eval() for more in ({}, change))
    for one in (again, other):
        one.load_state_dict(teacher.state_dict())
    assert layers.weights_hash(again) == layers.weights_hash(teacher) != layers.weights_hash(other)
    first = layers.teacher_logits(teacher, data.encoded)
    assert torch.equal(layers.teacher_logits(again, data.encoded), first)
    second = layers.teacher_logits(other, data.encoded)
    assert not torch.equal(second, first)
    torch.testing.assert_close(second, train.predict(other, data.encoded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None], ids=["empty", "garbled", "cut"])
def test_damaged_logits_in_the_cache_are_computed_anew(teacher, tmp_path, monkeypatch, content):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    data = examples()
    wanted = layers.teacher_logits(teacher, data.encoded)
    (file,) = (tmp_path / "products" / "teacher-logits").glob("*/logits.safetensors")
    whole = file.read_bytes()
    file.unlink()  # what was given is mapped from it
    file.write_bytes(whole[:-20] if content is None else content)
    assert torch.equal(layers.teacher_logits(teacher, data.encoded), wanted)
    assert file.read_bytes() == whole, "what is damaged is put in order, not met again"


def test_a_cache_that_cannot_be_written_to_keeps_nobody_from_the_logits(teacher, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "file"))  # no folder can be made there
    data = examples()
    torch.testing.assert_close(layers.teacher_logits(teacher, data.encoded), train.predict(teacher, data.encoded))


def weights_of(result):
    return {
        **result.student.state_dict(),
        **{f"p.{n}": p for n, p in result.projections.state_dict().items()},
    }


@pytest.mark.parametrize("start", ["random", "embeddings"])
def test_both_steps_lower_every_loss_and_keep_the_callers_random_state(teacher, start):
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    changed = SHORT.replace(start=start)
    results = []
    for world in (0, 1):  # what the caller has drawn must not matter
        torch.manual_seed(world)
        result = distill.distill(teacher, examples(), changed, small_student(teacher, start))
        results.append(weights_of(result))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    for history, names in (
        (result.intermediate, ("embedding", "hidden", "attention")),
        (result.prediction, ("prediction",)),
    ):
        for name in names:
            values = history.losses[name]
            assert sum(values[-6:]) < 0.8 * sum(values[:6]), f"{name} does not fall"
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())


def test_the_teachers_weights_lie_on_disk_while_the_student_learns_from_what_is_cached(teacher, monkeypatch):
    runs, inside = [], []

    def noted(*args, **more):
        inside.append([p.data_ptr() for p in teacher.parameters()])
        return train.fit(*args, **more)

    for least in (paging.LEAST, 1):  # the teacher here is too small for the first
        monkeypatch.setattr(distill, "aside", functools.partial(paging.aside, least=least))
        at_home = [p.data_ptr() for p in teacher.parameters()]
        monkeypatch.setattr(distill, "fit", noted)
        runs.append(weights_of(distill.distill(teacher, examples(), SHORT, small_student(teacher))))
        assert all((where == at_home) is (least > 1) for where in inside[-2:])
    assert len(inside) == 4
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_a_student_learns_the_teachers_value_relations(teacher):
    alone = SHORT.replace(weights=distill.Weights(embedding=0.0, hidden=0.0, attention_on="values"))
    _, history = distill.distill_intermediate(teacher, small_student(teacher, "random"), examples(), alone)
    values = history.losses["attention"]
    assert sum(values[-6:]) < 0.8 * sum(values[:6])


def test_the_prediction_step_begins_at_the_loss_of_the_texts_one_by_one(teacher):
    dropless = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data, student = examples(8), small_student(teacher, "teacher", **dropless)
    rows = list(zip(data.encoded.ids, data.encoded.segments, strict=True))
    with torch.no_grad():  # without padding
        ours, theirs = (torch.cat([m(ids[None], segments=of[None]).logits for ids, of in rows]) for m in (student, teacher))
    settings = SHORT.replace(epochs_prediction=1, temperature=2.0)  # one batch
    history = distill.distill_prediction(teacher, student, data, settings)
    assert history.losses["prediction"] == [pytest.approx(soft_target_loss(ours, theirs, 2.0).item(), rel=1e-4)]


@pytest.mark.parametrize("attention_on", ["scores", "probabilities", "values"])
def test_live_and_cached_teachers_train_alike(teacher, attention_on):
    weights = distill.Weights(attention_on=attention_on)
    short = SHORT.replace(epochs_intermediate=3, epochs_prediction=1, weights=weights)
    runs = []
    for cache_gb in (3.0, 0.0):
        result = distill.distill(
            teacher, examples(), short.replace(cache_gb=cache_gb), small_student(teacher)
        )
        runs.append(torch.tensor(result.intermediate.losses["loss"]))
    torch.testing.assert_close(*runs, rtol=1e-2, atol=1e-3)


def test_a_teacher_whose_outputs_have_no_room_is_said_to_compute_them_anew(teacher):
    def said(**changes) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distill.distill(teacher, examples(), SHORT.replace(epochs_prediction=0, **changes), small_student(teacher))
        return [str(note.message) for note in caught if "computes them anew" in str(note.message)]

    (note,) = said(epochs_intermediate=2, cache_gb=1e-6)
    assert "more than the 1e-06 that it may, so it computes them anew in each of 2 epochs; --cache-gb 0.1 spares it that" in note
    wanted = layers.Wanted.by(layers.choose_map(teacher.config, small_student(teacher).config, None), SHORT.weights)
    halved = distill.TeacherOutputs.bytes_needed(teacher, examples(), wanted.teacher_hidden, wanted.teacher_scores, dtype="int8")
    (note,) = said(epochs_intermediate=2, cache_gb=halved / 1e9)
    assert "--cache-gb 0.1 or --cache-dtype int8, which halves it, spares it that" in note
    (note,) = said(epochs_intermediate=2, cache_gb=(halved - 1) / 1e9)
    assert "int8" not in note
    assert not said(epochs_intermediate=1, cache_gb=1e-6), "once is what filling the cache would take"
    assert not said(epochs_intermediate=2, cache_gb=0.0), "this is how to ask for it"
    assert not said(epochs_intermediate=2)


def with_head(config: BertConfig, head, labels=()) -> Bert:
    return Bert(config.replace(head=head, labels=labels), generator()).eval()


REFUSED = {
    "another order": ("classification", ("no", "yes"), ("yes", "no"), "student's labels are yes, no, the teacher's no, yes"),
    "another label": ("classification", ("no", "yes"), ("no", "maybe"), "student's labels are no, maybe, the teacher's no, yes"),
    "a label more": ("classification", ("a", "b", "c"), ("a", "b"), "student's labels are a, b, the teacher's a, b, c"),
    "a score of classes": ("classification", ("no", "yes"), ("score",), "student's labels are score, the teacher's no, yes"),
    "no head of the student": ("classification", ("no", "yes"), (), "student's labels are none, the teacher's no, yes"),
    "no head of the teacher": (None, (), ("no", "yes"), "the teacher has no labels to teach"),
    "a masked LM": ("masked_lm", (), ("no", "yes"), "the teacher has no labels to teach"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_teach_the_students_labels_is_refused_at_once(case, monkeypatch):
    head, theirs, ours, words = REFUSED[case]
    teacher = with_head(TEACHER, head, theirs)
    student = with_head(teacher.config, BertConfig.head_for(ours) if ours else None, ours)
    monkeypatch.setattr(layers.TeacherOutputs, "_fill", None)  # nothing may be computed
    with pytest.raises(UserError, match=words):
        distill.distill(teacher, examples(), SHORT, student)
    with pytest.raises(UserError, match=words):
        distill.distill_prediction(teacher, student, examples(), SHORT)


def test_a_teacher_without_labels_teaches_the_inside_alone(monkeypatch):
    short = SHORT.replace(epochs_intermediate=1, epochs_prediction=0)
    for head in (None, "masked_lm"):
        teacher = with_head(TEACHER, head)
        assert distill.distill(teacher, examples(), short, small_student(teacher)).intermediate.losses["loss"]


def test_labels_that_nobody_named_go_with_any(teacher):
    student = with_head(teacher.config, "classification", ("LABEL_0", "LABEL_1"))
    short = SHORT.replace(epochs_intermediate=0, epochs_prediction=1)
    assert distill.distill(teacher, examples(), short, student).prediction.losses["loss"]


def test_an_intermediate_step_without_a_loss_is_refused(teacher):
    nothing = SHORT.replace(weights=distill.Weights(0, 0, 0), epochs_prediction=0)
    with pytest.raises(UserError, match="weights are all 0.*epochs_intermediate=0"):
        distill.distill(teacher, examples(), nothing, small_student(teacher))
    distill.distill(teacher, examples(), nothing.replace(epochs_intermediate=0), small_student(teacher))


class Killed(Exception):
    """Stands for whatever stops a run."""


@pytest.mark.parametrize(("step", "at"), [("intermediate", 5), ("intermediate", 6), ("prediction", 4)])
def test_a_stopped_run_goes_on_to_the_same_weights(teacher, tmp_path, step, at, monkeypatch):
    short = SHORT.replace(epochs_intermediate=4, epochs_prediction=2)  # of 3 steps each
    monkeypatch.setattr(distill, "fit", functools.partial(distill.fit, checkpoint_every=2))

    def run(folder=None):
        return distill.distill(
            teacher, examples(), short, small_student(teacher), folder=folder,
            after_epoch=lambda model, epoch: {"mean": float(model.embeddings.word.weight.detach().mean())},
        )  # fmt: skip

    module, loss = {"prediction": (distill, "prediction_loss"), "intermediate": (layers, "intermediate_losses")}[step]
    original, calls = getattr(module, loss), []

    def fails(*args):
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, loss, fails)
        with pytest.raises(Killed):
            run(tmp_path)
    with monkeypatch.context() as patch:
        done = []  # what is left to do, and no more
        patch.setattr(module, loss, lambda *args: done.append(1) or original(*args))
        resumed = run(tmp_path)
    assert len(done) == {5: 12 - 4, 6: 12 - 6, 4: 6 - 4}[at]
    whole = run()
    for name, wanted in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], wanted), name
    for history in ("intermediate", "prediction"):
        ours, wanted = getattr(resumed, history), getattr(whole, history)
        assert ours.losses == wanted.losses
        assert ours.measured == wanted.measured


def test_a_run_resumed_in_the_prediction_step_does_not_ask_the_teacher_again(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "home"))
    short = SHORT.replace(epochs_intermediate=2, epochs_prediction=2)  # of 3 steps each
    original, calls = distill.prediction_loss, []

    def fails(*args):
        calls.append(1)
        if len(calls) > 4:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "prediction_loss", fails)
        with pytest.raises(Killed):
            distill.distill(teacher, examples(), short, small_student(teacher), folder=tmp_path / "run")
    read = counted(teacher, monkeypatch)
    resumed = distill.distill(teacher, examples(), short, small_student(teacher), folder=tmp_path / "run")
    assert read == []
    assert [len(part.losses["loss"]) for part in (resumed.intermediate, resumed.prediction)] == [6, 6]


def test_outputs_that_a_stopped_run_has_left_go_when_the_step_is_found_finished(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "home"))
    short = SHORT.replace(epochs_intermediate=1, epochs_prediction=1)
    distill.distill(teacher, examples(), short, small_student(teacher), folder=tmp_path / "run")
    wanted = layers.Wanted.by(layers.choose_map(teacher.config, small_student(teacher).config, None), short.weights)
    with layers.teacher_outputs(teacher, examples(), wanted.teacher_hidden, wanted.teacher_scores, keep=True):
        assert len(outputs_in_cache()) == 1  # as after a kill between the step's end and their deletion
    distill.distill(teacher, examples(), short, small_student(teacher), folder=tmp_path / "run")
    assert outputs_in_cache() == []


def test_a_run_without_a_prediction_step_asks_for_no_logits(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    read, student = counted(teacher, monkeypatch), small_student(teacher)
    before = {name: t.clone() for name, t in student.state_dict().items()}
    result = distill.distill(teacher, examples(), SHORT.replace(epochs_intermediate=0, epochs_prediction=0), student)
    assert read == []
    assert result.prediction.losses == {}
    assert all(torch.equal(t, before[name]) for name, t in result.student.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is told by /proc")
def test_bert_base_teaches_tinybert4_in_a_gigabyte_and_a_half(tmp_path, monkeypatch):
    """The peak of both steps, the filling of the cache included, at the shapes and the longest batches of the benchmark."""
    code = """
import torch

from tinylib import distill
from tinylib.bert import Bert, BertConfig
from tinylib.text import Encoded
from tinylib.train import Examples

g = torch.Generator().manual_seed(0)
teacher = Bert(BertConfig.bert_base(head="classification", labels=("no", "yes")), g).eval()
ids = tuple(torch.randint(1000, 30_000, (n,), generator=g) for n in (24, 33, 47, 64) for _ in range(32))
texts = Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)))
distill.distill(teacher, texts, distill.Settings(start="random", epochs_intermediate=2, epochs_prediction=1))
"""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    monkeypatch.setenv("TINYLIB_TYPECHECK", "0")
    assert measure.process_memory(code) <= 1.5e9
