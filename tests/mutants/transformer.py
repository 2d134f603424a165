"""Lesson 02."""

import math

import numpy as np
import torch
import torch.nn.functional as F

# -- sinusoidal_positions ------------------------------------------------------


def positions_with(rate, place=lambda a: torch.stack([a.sin(), a.cos()], -1).flatten(1), first=0, base=10000.0):
    """Make a table that does one thing its own way."""
    return lambda length, width: place(torch.arange(first, first + length)[:, None] * base ** rate(width))


def usual(width):
    return -torch.arange(0, width, 2) / width


def positions_each_column_its_rate(length, width):
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(width) / width)
    return torch.where(torch.arange(width) % 2 == 1, angle.cos(), angle.sin())


def positions_only_sine(length, width):
    return (torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(width) / width)).sin()


def positions_by_loops(length, width):
    table = torch.zeros(length, width)
    for t in range(length):
        for i in range(0, width, 2):
            table[t, i] = math.sin(t / 10000 ** (i / width))
            table[t, i + 1] = math.cos(t / 10000 ** (i / width))
    return table


def positions_by_a_complex_number(length, width):
    rate = torch.exp(-math.log(10000) * torch.arange(0, width, 2, dtype=torch.float64) / width)
    z = torch.exp(1j * torch.arange(length, dtype=torch.float64)[:, None] * rate)
    return torch.stack([z.imag, z.real], -1).reshape(length, width)


def positions_for_width_eight(length, width):
    return positions_by_loops(length, 8)


def positions_with_columns_for_pairs(length, width):
    table = torch.zeros(length, width)
    for t in range(length):
        for i in range(width):
            angle = t / 10000 ** (2 * i / width)
            table[t, i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    return table


# -- layer_norm ----------------------------------------------------------------


def norm_with(make):
    """Make a LayerNorm whose x̂ is ``make(x, mean, variance, eps)``."""

    def layer_norm(x, weight, bias, eps):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return make(x, mean, variance, eps) * weight + bias

    return layer_norm


def right_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred * (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt() + bias


def norm_by_moments(x, weight, bias, eps=1e-12):
    C = x.shape[-1]
    mean, square = x.sum(-1, keepdim=True) / C, (x * x).sum(-1, keepdim=True) / C
    return torch.addcmul(bias, weight, (x - mean) / torch.sqrt(square - mean**2 + eps))


def norm_over_the_batch(x, weight, bias, eps):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt() * weight + bias


def norm_of_everything(x, weight, bias, eps):
    return (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt() * weight + bias


def norm_in_place(x, weight, bias, eps):
    x -= x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norm_cut(x, weight, bias, eps):
    with torch.no_grad():
        mean, std = x.mean(-1, keepdim=True), (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return (x - mean) / std * weight + bias


def norm_detached(x, weight, bias, eps):
    return right_norm(x.detach(), weight, bias, eps)


def norm_float32(x, weight, bias, eps):
    return right_norm(x.float(), weight.float(), bias.float(), eps)


def hat(x, mean, variance, eps):
    return (x - mean) / (variance + eps).sqrt()


# -- gelu ----------------------------------------------------------------------


def phi(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_in_place(x):
    x *= phi(x)
    return x


def gelu_by_numpy(x):
    values = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.detach().flatten().tolist()]
    return torch.from_numpy(np.array(values).reshape(x.shape)).to(x.dtype)


def gelu_as_a_list(x):
    return [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.flatten().tolist()]


# -- encoder_block -------------------------------------------------------------


def feed(layer, x, act=F.gelu):
    return layer.down(act(layer.up(x)))


def look(layer, x, mask):
    return layer.attention(x, mask=mask)[0]


def right_block(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.ffn_norm(x + feed(layer, x))


def block_by_hand(layer, x, mask=None):
    attended, _ = layer.attention(x, x, mask)
    middle = layer.attention_norm(torch.add(attended, x))
    wide = layer.up(middle)
    return layer.ffn_norm(layer.down(wide * phi(wide)) + middle)


def block_without_first_residual(layer, x, mask):
    x = layer.attention_norm(look(layer, x, mask))
    return layer.ffn_norm(x + feed(layer, x))


def block_without_second_residual(layer, x, mask):
    return layer.ffn_norm(feed(layer, layer.attention_norm(x + look(layer, x, mask))))


def block_without_residuals(layer, x, mask):
    return layer.ffn_norm(feed(layer, layer.attention_norm(look(layer, x, mask))))


def block_pre_norm(layer, x, mask):
    x = x + look(layer, layer.attention_norm(x), mask)
    return x + feed(layer, layer.ffn_norm(x))


def block_norms_swapped(layer, x, mask):
    x = layer.ffn_norm(x + look(layer, x, mask))
    return layer.attention_norm(x + feed(layer, x))


def block_one_norm_twice(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.attention_norm(x + feed(layer, x))


def block_without_mask(layer, x, mask):
    return right_block(layer, x, None)


def block_mask_inverted(layer, x, mask):
    return right_block(layer, x, ~mask)


def block_linear(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.ffn_norm(x + feed(layer, x, lambda z: z))


def block_relu(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.ffn_norm(x + feed(layer, x, F.relu))


def block_tanh_gelu(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.ffn_norm(x + feed(layer, x, lambda z: F.gelu(z, approximate="tanh")))


def block_gelu_last(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return layer.ffn_norm(x + F.gelu(layer.down(layer.up(x))))


def block_norm_inside(layer, x, mask):
    x = x + layer.attention_norm(look(layer, x, mask))
    return x + layer.ffn_norm(feed(layer, x))


def block_residual_of_the_input(layer, x, mask):
    return layer.ffn_norm(x + feed(layer, layer.attention_norm(x + look(layer, x, mask))))


def block_feeds_x(layer, x, mask):
    return layer.ffn_norm(layer.attention_norm(x + look(layer, x, mask)) + feed(layer, x))


def block_without_last_norm(layer, x, mask):
    x = layer.attention_norm(x + look(layer, x, mask))
    return x + feed(layer, x)


def block_without_first_norm(layer, x, mask):
    x = x + look(layer, x, mask)
    return layer.ffn_norm(x + feed(layer, x))


def block_without_feed_forward(layer, x, mask):
    return layer.attention_norm(x + look(layer, x, mask))


def block_without_attention(layer, x, mask):
    x = layer.attention_norm(x)
    return layer.ffn_norm(x + feed(layer, x))


def block_feed_forward_first(layer, x, mask):
    x = layer.ffn_norm(x + feed(layer, x))
    return layer.attention_norm(x + look(layer, x, mask))


def block_in_place(layer, x, mask):
    x += look(layer, x, mask)
    x = layer.attention_norm(x)
    return layer.ffn_norm(x + feed(layer, x))


def block_with_new_weights(layer, x, mask):
    layer.up.weight.data.mul_(0.5)
    return right_block(layer, x, mask)


def block_keeps_the_tuple(layer, x, mask):
    return layer(x, mask, True)


def block_adds_the_tuple(layer, x, mask):
    return layer.attention_norm(x + layer.attention(x, mask=mask))


def block_detached(layer, x, mask):
    return right_block(layer, x.detach(), mask)


# -- count_parameters ----------------------------------------------------------


def count_with(
    biases=True, pooler=True, positions=True, segments=True, words=True, embedding_norm=True, norms=2, maps=4,
    heads=False, layers=True, feed=None, turns=2, more=lambda c: 0,
):  # fmt: skip
    """Make a count that leaves one thing out."""

    def count(config):
        C, b = config.hidden_size, int(biases)
        F_ = config.intermediate_size if feed is None else feed(C)
        tables = (
            words * config.vocab_size + positions * config.max_position_embeddings + segments * config.type_vocab_size
        )
        attention = maps * (C * C + b * C) * (config.num_attention_heads if heads else 1)
        layer = attention + (C * F_ + b * F_) + (turns - 1) * (F_ * C + b * C) + norms * 2 * C
        total = tables * C + embedding_norm * 2 * C + layer * (config.num_hidden_layers if layers else 1)
        return total + pooler * (C * C + b * C) + more(config)

    return count


def count_right(config):
    C, F_ = config.hidden_size, config.intermediate_size
    layer = 4 * C**2 + 4 * C + 2 * C * F_ + F_ + C + 4 * C
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2
    return rows * C + config.num_hidden_layers * layer + C * (C + 1)


def count_by_building(config):
    from tinylib.bert import Bert

    with torch.device("meta"):
        return sum(p.numel() for p in Bert(config).parameters())


def count_by_numpy(config):
    C, F_ = config.hidden_size, config.intermediate_size
    shapes = [(config.vocab_size, C), (config.max_position_embeddings, C), (config.type_vocab_size, C), (2, C), (C + 1, C)]
    layer = 4 * [(C + 1, C)] + [(C + 1, F_), (F_ + 1, C), (4, C)]
    return sum(np.prod(shape) for shape in shapes + config.num_hidden_layers * layer)


def count_of_base(config):
    return 109482240


def count_as_a_text(config):
    return f"{count_right(config)}"


def count_in_millions(config):
    return count_right(config) / 1e6


def count_as_a_float(config):
    return float(count_right(config))


MUTANTS = {
    "sinusoidal_positions": [
        (positions_with(usual, lambda a: torch.stack([a.cos(), a.sin()], -1).flatten(1)), "changed places"),
        (positions_with(usual, lambda a: torch.cat([a.sin(), a.cos()], 1)), "alternate"),
        (positions_with(lambda width: usual(width) / 2), "half as large"),
        (positions_with(lambda width: usual(width) * 2), "twice as large"),
        (positions_each_column_its_rate, "share one"),
        (positions_with_columns_for_pairs, "counts pairs"),
        (positions_with(usual, first=1), "count positions from 1"),
        (positions_with(lambda width: -usual(width)), "instead of dividing"),
        (positions_with(usual, base=1000.0), "not 1000"),
        (positions_with(lambda width: torch.zeros(width // 2)), "at one speed"),
        (positions_only_sine, "only the sine"),
        (lambda length, width: positions_by_loops(length, width).T, "swapped"),
        (positions_with(usual, lambda a: torch.stack([a, a], -1).flatten(1)), "angles themselves"),
        (positions_for_width_eight, "should have shape (11, 4)"),
        (lambda length, width: positions_by_loops(length, width).tolist(), "should be a tensor"),
        (lambda length, width: torch.zeros(length, width), "still the stub"),
        (lambda length, width: torch.randn(length, width), "differs"),
    ],
    "layer_norm": [
        (norm_with(lambda x, m, v, eps: (x - m) / (v.sqrt() + eps)), "outside the root"),
        (norm_with(lambda x, m, v, eps: (x - m) / (x.std(-1, keepdim=True) + eps)), ".std()"),
        (norm_with(lambda x, m, v, eps: (x - m) / v.sqrt()), "eps is missing"),
        (norm_with(lambda x, m, v, eps: (x - m) / (x.var(-1, keepdim=True) + eps).sqrt()), "C − 1"),
        (norm_with(lambda x, m, v, eps: (x - m) / (v + eps)), "instead of its square root"),
        (norm_with(lambda x, m, v, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt()), "RMSNorm"),
        (norm_with(lambda x, m, v, eps: x / (v + eps).sqrt()), "mean is not subtracted"),
        (norm_with(lambda x, m, v, eps: x - m), "do not divide"),
        (norm_with(lambda x, m, v, eps: (x + m) / (v + eps).sqrt()), "added instead"),
        (norm_over_the_batch, "BatchNorm"),
        (norm_of_everything, "whole tensor"),
        (lambda x, weight, bias, eps: norm_with(hat)(x, 1.0, 0.0, eps), "are not used"),
        (lambda x, weight, bias, eps: norm_with(hat)(x, weight, 0.0, eps), "bias is missing"),
        (lambda x, weight, bias, eps: norm_with(hat)(x, 1.0, bias, eps), "weight is missing"),
        (lambda x, weight, bias, eps: norm_with(hat)(x, 1.0, bias, eps) * weight, "comes last"),
        (lambda x, weight, bias, eps: right_norm(x, bias, weight, eps), "changed places"),
        (lambda x, weight, bias, eps: x * weight + bias, "use the normalised"),
        (lambda x, weight, bias, eps: x, "still the stub"),
        (norm_in_place, "in place"),
        (norm_cut, "must stay in the graph"),
        (norm_detached, "no gradient"),
        (norm_float32, "float32"),
        (lambda x, weight, bias, eps: right_norm(x, weight, bias, eps).mean(-1), "should have shape"),
    ],
    "gelu": [
        (lambda x: F.gelu(x, approximate="tanh"), "tanh approximation"),
        (lambda x: x * torch.sigmoid(1.702 * x), "1.702"),
        (F.silu, "SiLU"),
        (lambda x: x.clamp(min=0), "ReLU"),
        (lambda x: x * 0.5 * (1 + torch.erf(x)), "√2 is missing"),
        (lambda x: x * 0.5 * (1 + torch.erf(x * math.sqrt(2))), "multiplies where"),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2)), "divide by 2 inside"),
        (lambda x: x * (1 + torch.erf(x / math.sqrt(2))), "½ is missing"),
        (phi, "alone"),
        (lambda x: x * torch.erf(x / math.sqrt(2)), "erf in place of"),
        (lambda x: x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), "bell curve"),
        (lambda x: x * (1 - phi(x)), "1 − Φ"),
        (lambda x: phi(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), "derivative"),
        (gelu_in_place, "in place"),
        (gelu_by_numpy, "no gradient"),
        (gelu_as_a_list, "should be a tensor"),
        (lambda x: (F.gelu(x),), "a comma at the end"),
        (torch.nn.GELU, "yours is a GELU"),
        (lambda x: -x * phi(x), "wrong sign"),
        (lambda x: x.float() * phi(x.float()), "float32"),
    ],
    "encoder_block": [
        (block_without_first_residual, "first residual is missing"),
        (block_without_second_residual, "second residual is missing"),
        (block_without_residuals, "both residuals"),
        (block_pre_norm, "pre-LayerNorm"),
        (block_norms_swapped, "swapped"),
        (block_one_norm_twice, "twice"),
        (block_without_mask, "does not reach"),
        (block_mask_inverted, "turned round"),
        (block_linear, "GELU is missing"),
        (block_relu, "ReLU"),
        (block_tanh_gelu, "tanh approximation"),
        (block_gelu_last, "comes after down"),
        (block_norm_inside, "inside the residual"),
        (block_residual_of_the_input, "adds the block's input"),
        (block_feeds_x, "reads x"),
        (block_without_last_norm, "last LayerNorm is missing"),
        (block_without_first_norm, "first LayerNorm is missing"),
        (block_without_feed_forward, "feed-forward part is missing"),
        (block_without_attention, "attention part is missing"),
        (block_feed_forward_first, "attention is first"),
        (lambda layer, x, mask: x, "still the stub"),
        (block_in_place, "in place"),
        (block_with_new_weights, "in place: afterwards `layer.up.weight` holds other numbers"),
        (block_keeps_the_tuple, "tuple"),
        (block_adds_the_tuple, "TypeError"),
        (block_detached, "gradient is zero"),
    ],
    "count_parameters": [
        (count_with(biases=False), "bias"),
        (count_with(pooler=False), "pooler"),
        (count_with(positions=False), "table of positions"),
        (count_with(segments=False), "table of segments"),
        (count_with(positions=False, segments=False), "positions and segments"),
        (count_with(words=False), "table of words"),
        (count_with(embedding_norm=False), "embeddings' own LayerNorm"),
        (count_with(embedding_norm=False, norms=0), "All LayerNorms"),
        (count_with(norms=0), "layers' LayerNorms"),
        (count_with(norms=1), "two LayerNorms"),
        (count_with(maps=3), "output map"),
        (count_with(heads=True), "do not multiply by H"),
        (count_with(layers=False), "Only one layer"),
        (count_with(feed=lambda C: 4 * C), "not always 4·C"),
        (count_with(turns=1), "up and down"),
        (count_with(more=lambda c: c.vocab_size * c.hidden_size), "masked-LM"),
        (lambda config: config.vocab_size * config.hidden_size, "table of words alone"),
        (count_of_base, "109,482,240 instead of"),
        (count_as_a_text, "Return a number"),
        (count_in_millions, "too few"),
        (count_as_a_float, "whole numbers"),
        (lambda config: np.float64(count_right(config)), "whole numbers"),
    ],
}

RIGHT = {
    "sinusoidal_positions": [positions_with(usual), positions_by_loops, positions_by_a_complex_number],
    "layer_norm": [
        right_norm,
        norm_by_moments,
        norm_with(hat),
        lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps),
    ],
    "gelu": [F.gelu, torch.nn.GELU(), lambda x: x * phi(x), lambda x: x * torch.special.ndtr(x)],
    "encoder_block": [right_block, block_by_hand, lambda layer, x, mask: layer(x, mask, False)[0]],
    "count_parameters": [count_with(), count_right, count_by_building, count_by_numpy],
}
