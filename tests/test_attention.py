"""Attention against PyTorch's kernel and layer and finite differences, and the properties it must have."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinylib.attention import (
    MultiHeadAttention,
    attend,
    attention_scores,
    causal_mask,
    float32_precision,
    padding_mask,
    sinusoidal_positions,
)
from tinylib.errors import UserError

quick = settings(max_examples=40, deadline=None)  # a busy machine is no failure
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Draw tensors in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def draw_qkv(seed: int, B: int, H: int, T: int, S: int, D: int, Dv: int) -> list[torch.Tensor]:
    """Draw queries, keys and values."""
    return draw(seed, (B, H, T, D), (B, H, S, D), (B, H, S, Dv))


# -- attend --------------------------------------------------------------------


@quick
@given(seeds, sizes, sizes, sizes, sizes, sizes, sizes, st.sampled_from(["none", "full", "keys", "pairs"]))
def test_attend_agrees_with_pytorch_for_every_size_and_mask(seed, B, H, T, S, D, Dv, kind):
    q, k, v = draw_qkv(seed, B, H, T, S, D, Dv)
    shape = {"none": None, "full": (B, H, T, S), "keys": (B, 1, 1, S), "pairs": (T, S)}[kind]
    # about one key in three is hidden, so rows that may look nowhere come up all the time
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.35
    out, weights = attend(q, k, v, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    seen = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand_as(weights)
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).to(weights.dtype))
    assert (weights[~seen] == 0).all()
    assert (weights >= 0).all()


def test_the_causal_mask_is_pytorchs():
    q, k, v = draw_qkv(0, 2, 3, 5, 5, 4, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, causal_mask(5))[0], expected)
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_row_that_may_look_nowhere_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in draw_qkv(0, 1, 2, 3, 4, 5, 5))
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    out, weights = attend(q, k, v, mask)
    assert (out[..., 1, :] == 0).all()
    assert (weights[..., 1, :] == 0).all()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][..., 1, :] == 0).all()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences(masked):
    inputs = tuple(x.requires_grad_() for x in draw_qkv(1, 1, 2, 3, 4, 2, 3))
    mask = padding_mask(torch.tensor([3]), 4)[:, None, None, :] if masked else None
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask), inputs)


@quick
@given(seeds)
def test_shuffled_keys_change_nothing_and_shuffled_queries_shuffle_the_output(seed):
    q, k, v = draw_qkv(seed, 1, 2, 5, 6, 3, 3)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=g), torch.randperm(6, generator=g)
    out = attend(q, k, v)[0]
    torch.testing.assert_close(attend(q, k[:, :, columns], v[:, :, columns])[0], out)
    torch.testing.assert_close(attend(q[:, :, rows], k, v)[0], out[:, :, rows])


@quick
@given(seeds, st.integers(1, 4))
def test_padding_changes_nothing(seed, extra):
    q, k, v = draw_qkv(seed, 1, 2, 3, 4, 5, 5)
    waste_k, waste_v = draw(seed + 1, (1, 2, extra, 5), (1, 2, extra, 5))
    padded = torch.cat([k, 50 * waste_k], dim=2), torch.cat([v, 50 * waste_v], dim=2)
    mask = padding_mask(torch.tensor([4]), 4 + extra)[:, None, None, :]
    torch.testing.assert_close(attend(q, *padded, mask)[0], attend(q, k, v)[0])


def test_scores_are_scaled_by_the_root_of_the_width():
    q, k, _ = draw_qkv(0, 4, 4, 200, 200, 64, 1)
    assert abs(attention_scores(q, k).std().item() - 1) < 0.05
    torch.testing.assert_close(attention_scores(q, k), q @ k.mT / 8)


def test_the_lengths_give_the_padding_mask():
    mask = padding_mask(torch.tensor([3, 0, 2]), 3)
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_a_mask_of_numbers_is_refused(dtype):
    plain = _without_typecheck()
    q, k, v = draw_qkv(0, 1, 1, 2, 2, 2, 2)
    with pytest.raises(UserError, match=r"must be torch\.bool, True = may look; write mask\.bool\(\)"):
        plain.attend(q, k, v, torch.ones(2, 2, dtype=dtype))
    with pytest.raises(UserError, match=r"must be torch\.bool"):
        inspect.unwrap(attend)(q, k, v, torch.ones(2, 2, dtype=dtype))
    layer = plain.MultiHeadAttention(4, 2)
    with pytest.raises(UserError, match=r"mask is torch\."):
        layer(torch.ones(1, 2, 4), mask=torch.ones(2, 2, dtype=dtype))


def _without_typecheck():
    """Load the module as a learner's kernel does, without the checking of shapes that the tests turn on."""
    import importlib.util

    from tinylib import attention

    spec = importlib.util.spec_from_file_location("plain_attention", attention.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- MultiHeadAttention --------------------------------------------------------


def make_pair(width: int, heads: int) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Make our layer and PyTorch's, with the same weights."""
    ours = MultiHeadAttention(width, heads).double()
    theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(generator=g)
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    return ours, theirs


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (12, 3), (12, 12), (8, 2)])
def test_the_layer_agrees_with_pytorchs(width, heads):
    ours, theirs = make_pair(width, heads)
    x, memory = draw(0, (2, 5, width), (2, 7, width))
    torch.testing.assert_close(ours(x)[0], theirs(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(ours(x, memory)[0], theirs(x, memory, memory, need_weights=False)[0])
    # PyTorch's masks are the other way round: True = may not look
    causal, padding = causal_mask(5), padding_mask(torch.tensor([5, 3]), 5)
    torch.testing.assert_close(ours(x, mask=causal)[0], theirs(x, x, x, attn_mask=~causal)[0])
    expected = theirs(x, x, x, key_padding_mask=~padding)[0]
    torch.testing.assert_close(ours(x, mask=padding[:, None, None, :])[0], expected)


def test_the_kept_scores_give_the_weights_of_pytorchs_layer():
    ours, theirs = make_pair(12, 3)
    (x,) = draw(0, (2, 5, 12))
    out, scores = ours(x, keep_scores=True)
    _, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(scores.softmax(-1), weights)
    without, none = ours(x)
    assert none is None
    torch.testing.assert_close(without, out)


def test_value_relations_are_the_scaled_products_of_each_heads_values():
    layer, _ = make_pair(12, 3)
    (x,) = draw(0, (2, 5, 12))
    v = layer.value(x).view(2, 5, 3, 4)
    torch.testing.assert_close(layer.value_relations(x), torch.einsum("bthd,bshd->bhts", v, v) / 4**0.5)


@pytest.mark.parametrize("mask", [None, causal_mask(5), torch.zeros(5, 5, dtype=torch.bool)])
def test_the_fused_path_is_attend(mask):
    layer, _ = make_pair(12, 4)
    (x,) = draw(0, (2, 5, 12))
    q, k, v = layer.split(layer.query(x)), layer.split(layer.key(x)), layer.split(layer.value(x))
    by_hand = layer.output(attend(q, k, v, mask)[0].transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask=mask)[0], by_hand)


def test_heads_are_separate_attentions_on_neighbouring_columns():
    layer, _ = make_pair(12, 3)
    (x,) = draw(0, (1, 5, 12))
    cuts = [slice(4 * h, 4 * h + 4) for h in range(3)]
    q, k, v = (part(x)[:, None] for part in (layer.query, layer.key, layer.value))
    separate = [attend(q[..., cut], k[..., cut], v[..., cut])[0][:, 0] for cut in cuts]
    torch.testing.assert_close(layer(x)[0], layer.output(torch.cat(separate, dim=-1)))


@quick
@given(seeds)
def test_the_layer_knows_no_order(seed):
    layer, _ = make_pair(8, 2)
    (x,) = draw(seed, (1, 6, 8))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order])


def test_the_future_has_no_influence_under_a_causal_mask():
    layer, _ = make_pair(8, 2)
    (x,) = draw(0, (1, 6, 8))
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x, mask=causal_mask(6))[0], layer(changed, mask=causal_mask(6))[0]
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_number_of_heads_costs_no_parameters(heads):
    count = sum(p.numel() for p in MultiHeadAttention(8, heads).parameters())
    assert count == 4 * (8 * 8 + 8)


def test_dropout_acts_in_training_only():
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.ones(1, 6, 8) * torch.arange(6.0)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(layer.train()(x)[0], layer(x)[0])
    torch.testing.assert_close(layer.eval()(x)[0], layer(x)[0])


@pytest.mark.parametrize(("width", "heads", "remedy"), [(65, 4, 68), (10, 3, 12), (4, 8, 8)])
def test_heads_that_do_not_divide_the_width_are_refused(width, heads, remedy):
    message = f"width={width} must be a multiple of heads={heads}; try width={remedy}"
    with pytest.raises(UserError, match=message):
        MultiHeadAttention(width, heads)
    MultiHeadAttention(remedy, heads)


@pytest.mark.parametrize(("width", "heads", "head_width"), [(8, 0, None), (8, -2, None), (0, 2, None), (-8, 2, None), (8, 2, 0)])
def test_sizes_below_one_are_refused(width, heads, head_width):
    with pytest.raises(UserError, match="at least 1"):
        MultiHeadAttention(width, heads, head_width=head_width)


# torch.backends itself does not reach a product whose backend was ever set by itself, as other tests do
SETTINGS = [
    (torch.backends, "ieee", "highest"), (torch.backends.cuda.matmul, "tf32", "high"),
    (torch.backends.mkldnn.matmul, "bf16", "medium"),
]  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no precision of each backend")
@pytest.mark.parametrize(("backend", "chosen", "told"), SETTINGS)
def test_the_precision_of_each_backend_may_be_set_by_itself(backend, chosen, told):
    assert float32_precision() == torch.get_float32_matmul_precision() == "highest"
    layer, x = MultiHeadAttention(8, 2).eval(), draw(0, (2, 3, 8))[0].float()
    exact = layer(x)[0]
    before = backend.fp32_precision
    try:
        backend.fp32_precision = chosen
        assert float32_precision() == told
        torch.testing.assert_close(layer(x)[0], exact, rtol=0.02, atol=0.02)
    finally:
        backend.fp32_precision = before
    assert float32_precision() == "highest"


# -- sinusoidal positions ------------------------------------------------------


def test_positions_are_the_formula_of_the_paper():
    table = sinusoidal_positions(50, 8)
    assert table.shape == (50, 8)
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@quick
@given(st.integers(0, 40), st.integers(0, 40))
def test_a_shift_is_a_rotation_that_does_not_depend_on_the_position(start, shift):
    table = sinusoidal_positions(100, 16).unflatten(1, (8, 2))  # (sine, cosine) of each frequency
    angle = shift / 10000 ** (torch.arange(0, 16, 2) / 16)
    sine, cosine = table[start].unbind(-1)
    turned = [sine * angle.cos() + cosine * angle.sin(), cosine * angle.cos() - sine * angle.sin()]
    torch.testing.assert_close(table[start + shift], torch.stack(turned, dim=-1), atol=1e-4, rtol=0)


@quick
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_the_dot_product_of_two_positions_depends_on_their_distance_only(a, b, shift):
    table = sinusoidal_positions(64, 32)
    torch.testing.assert_close(table[a] @ table[b], table[a + shift] @ table[b + shift], atol=1e-3, rtol=0)


def test_no_two_positions_are_alike():
    table = sinusoidal_positions(512, 64)
    assert torch.pdist(table).min() > 0.5


def test_an_odd_width_is_refused():
    with pytest.raises(UserError, match="width=7 must be even.*try width=8"):
        sinusoidal_positions(10, 7)
