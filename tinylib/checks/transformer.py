"""Checks of lesson 02: positions, LayerNorm, GELU, the encoder block, and the number of parameters."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylib import attention
from tinylib.bert import BertConfig, EncoderLayer
from tinylib.checks.core import Wrong, call, check, compare, draw, generator, needs_gradient

# -- sinusoidal_positions ------------------------------------------------------


@check("sinusoidal_positions")
def sinusoidal_positions(attempt: Callable) -> None:
    """attempt(length, width) -> (length, width): sin in the even columns, cos in the odd ones."""
    for T, C in ((6, 8), (11, 4), (1, 2), (40, 16)):
        got, wanted = call(attempt, T, C), attention.sinusoidal_positions(T, C).double()
        if isinstance(got, Tensor) and got.is_floating_point():
            got = got.double()  # either precision will do
        compare(f"The table of {T} positions, {C} wide", got, wanted, _position_slips(T, C), 1e-4)


def _position_slips(T: int, C: int) -> dict[str, Tensor]:
    t = torch.arange(T, dtype=torch.float64)

    def table(rate: Tensor, t: Tensor = t) -> Tensor:
        angle = t[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    column = torch.arange(0, C, 2, dtype=torch.float64)
    rate, own = 10000.0 ** (-column / C), 10000.0 ** (-torch.arange(C, dtype=torch.float64) / C)
    right, angle, each = table(rate), t[:, None] * rate, t[:, None] * own
    odd = torch.arange(C) % 2 == 1
    return {
        "Sine and cosine have changed places: the sine stands in the even columns 0, 2, …": (
            torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
        ),
        "You put all sines first and all cosines behind them. Here they alternate, so that each pair of neighbouring "
        "columns is one clock hand: stack on a last axis and flatten it.": torch.cat([angle.sin(), angle.cos()], 1),
        "The exponent is half as large as it should be: 10000^(2i/C), where i counts the pairs. Column 2i itself is "
        "that 2i.": table(10000.0 ** (-column / 2 / C)),
        "The exponent is twice as large as it should be: column 2i has 10000^(2i/C), not 10000^(4i/C).": (
            table(10000.0 ** (-2 * column / C))
        ),
        "Each column has a rate of its own. A sine and its cosine share one: column 2i+1 uses the exponent 2i/C too.": (
            torch.where(odd, each.cos(), each.sin())
        ),
        "Here i counts pairs, not columns: columns 2i and 2i+1 share the exponent 2i/C.": (
            torch.where(odd, (t[:, None] * own**2).cos(), (t[:, None] * own**2).sin())
        ),
        "You count positions from 1; the first token's position is 0, its row is 0, 1, 0, 1, …": table(rate, t + 1),
        "You multiply by 10000^(2i/C) instead of dividing by it: the later columns must turn slower, not faster.": (
            table(10000.0 ** (column / C))
        ),
        "The base is 10000, not 1000.": table(1000.0 ** (-column / C)),
        "All columns turn at one speed; the rate 10000^(−2i/C) depends on the column.": table(torch.ones(C // 2)),
        "All zeros: this is still the stub.": torch.zeros_like(right),
        "There is only the sine: the odd columns hold the cosine of the same angle.": each.sin(),
        "Rows and columns are swapped: one row a position, (length, width).": right.T,
        "These are the angles themselves; take their sine and cosine.": (
            torch.stack([angle, angle], dim=-1).flatten(1)
        ),
    }


# -- layer_norm ----------------------------------------------------------------


@check("layer_norm")
def layer_norm(attempt: Callable) -> None:
    """attempt(x, weight, bias, eps): x (…, C), weight and bias (C,) -> (…, C)."""
    for shape, seed in (((3, 6), 1), ((2, 4, 5), 2), ((7,), 3)):
        C, eps = shape[-1], 0.1  # large, so that forgetting it shows
        x = 2.0 * draw(*shape, seed=seed) + 1.0
        weight, bias = 1.0 + 0.3 * draw(C, seed=seed + 10), draw(C, seed=seed + 20)
        got = call(attempt, x, weight, bias, eps)
        wanted = F.layer_norm(x, (C,), weight, bias, eps)
        compare(f"LayerNorm of x {shape}", got, wanted, _norm_slips(x, weight, bias, eps), 1e-6)
    ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
    flat = call(attempt, torch.full((2, 6), 3.0, dtype=torch.float64), ones, zeros, 1e-5)
    if not torch.isfinite(flat).all():
        raise Wrong("A row of equal numbers gives NaN, 0/0: add eps to the variance before the square root.")
    x = draw(3, 6, seed=4).requires_grad_()
    out = call(attempt, x, ones, zeros, 1e-5)
    why = "Every layer below learns through this one."
    needs_gradient("The output", out.square() @ torch.arange(6.0).double(), x, why)
    (got,) = torch.autograd.grad((out * ones.cumsum(0)).sum(), x)
    (wanted,) = torch.autograd.grad((F.layer_norm(x, (6,), ones, zeros, 1e-5) * ones.cumsum(0)).sum(), x)
    compare(
        "The gradient of your LayerNorm", got, wanted, tolerance=1e-6,
        mistakes={
            "The values are right but the gradient is not: mean and variance depend on x, and must stay in the graph "
            "(no .detach(), .item() or torch.no_grad()).": got
        },
    )  # fmt: skip


def _norm_slips(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> dict[str, Tensor]:
    mean, centred = x.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    hat, C = centred / (variance + eps).sqrt(), x.shape[-1]
    slips = {
        "eps stands outside the root: it is √(σ² + eps), not σ + eps.": centred / (variance.sqrt() + eps),
        "eps is missing: the root is of σ² + eps.": centred / variance.sqrt(),
        "The variance is divided by C − 1, as .var() does without unbiased=False; LayerNorm divides by C.": (
            centred / (variance * C / (C - 1) + eps).sqrt()
        ),
        "You divide by .std(), which takes C − 1, and eps stands outside the root: it is √(σ² + eps), σ² over C.": (
            centred / ((variance * C / (C - 1)).sqrt() + eps)
        ),
        "You divide by the variance instead of its square root, the standard deviation.": centred / (variance + eps),
        "The mean is not subtracted (that is RMSNorm, which other models use).": (
            x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        ),
        "The mean is not subtracted: take x − μ before dividing.": x / (variance + eps).sqrt(),
        "You subtract the mean but do not divide by the standard deviation.": centred,
        "The mean is added instead of subtracted.": (x + mean) / (variance + eps).sqrt(),
        "You divide by the mean of |x − μ|; the standard deviation squares first.": (
            centred / (centred.abs().mean(-1, keepdim=True) + eps)
        ),
    }
    found = {sentence: value * weight + bias for sentence, value in slips.items()}
    if x.dim() > 1:
        first = (x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt()
        every = (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt()
        found["You normalise over the first axis, across the batch (that is BatchNorm); each token is normalised over "
              "its own C numbers, the last axis."] = first * weight + bias  # fmt: skip
        found["You take one mean and variance of the whole tensor; each token has its own, over the last axis."] = (
            every * weight + bias
        )
    return found | {
        "weight and bias are not used: multiply by weight, then add bias.": hat,
        "The bias is missing: add it at the end.": hat * weight,
        "The weight is missing: multiply by it before the bias is added.": hat + bias,
        "The bias is added before the weight multiplies; it comes last: x̂·weight + bias.": (hat + bias) * weight,
        "Weight and bias have changed places.": hat * bias + weight,
        "x itself is scaled and shifted; use the normalised x̂.": x * weight + bias,
        "You return x unchanged; is this still the stub?": x,
    }


# -- gelu ----------------------------------------------------------------------


@check("gelu")
def gelu(attempt: Callable) -> None:
    """attempt(x) -> x·Φ(x), of x's shape."""
    for x in (torch.linspace(-6, 6, 49, dtype=torch.float64), 2 * draw(2, 3, 4, seed=1)):
        compare(f"GELU of x {tuple(x.shape)}", call(attempt, x), F.gelu(x), _gelu_slips(x), 1e-7)
    x = torch.tensor([-60.0, 60.0])
    compare("GELU of −60 and 60 in float32", call(attempt, x), F.gelu(x), tolerance=1e-6)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64).requires_grad_()
    needs_gradient("GELU", call(attempt, x), x, "The layers below learn through it.")


def _gelu_slips(x: Tensor) -> dict[str, Tensor]:
    phi, density = torch.special.ndtr(x), (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return {
        "This is the tanh approximation, off by up to 0.0005. BERT uses the exact Φ, which torch.erf gives.": (
            F.gelu(x, approximate="tanh")
        ),
        "This is x·sigmoid(1.702·x), an approximation that is off by up to 0.02; use the exact Φ.": (
            x * torch.sigmoid(1.702 * x)
        ),
        "This is SiLU, x·sigmoid(x): another function with a similar shape.": F.silu(x),
        "This is ReLU: it drops every negative x, while GELU weighs x by Φ(x).": F.relu(x),
        "The √2 is missing: Φ(x) = ½·(1 + erf(x/√2)).": x * 0.5 * (1 + torch.erf(x)),
        "The √2 multiplies where it should divide: Φ(x) = ½·(1 + erf(x/√2)).": x
        * 0.5
        * (1 + torch.erf(x * math.sqrt(2))),
        "You divide by 2 inside erf; it is x/√2.": x * 0.5 * (1 + torch.erf(x / 2)),
        "The ½ is missing: without it, GELU(x) tends to 2x.": 2 * x * phi,
        "This is Φ(x) alone, a weight between 0 and 1; multiply x by it.": phi,
        "This is erf in place of Φ: erf runs from −1 to 1, Φ from 0 to 1.": x * torch.erf(x / math.sqrt(2)),
        "You weigh x by the bell curve φ(x); GELU uses the area under it up to x, Φ(x).": x * density,
        "You weigh x by 1 − Φ(x): large x must pass, small x must not.": x * (1 - phi),
        "This is GELU's derivative, Φ(x) + x·φ(x).": phi + x * density,
    }


# -- encoder_block -------------------------------------------------------------


@check("encoder_block")
def encoder_block(attempt: Callable) -> None:
    """attempt(layer, x, mask) -> (B, T, C), from the layer's attention, up, down and its two LayerNorms."""
    for C, heads, lengths, seed in ((12, 3, (5, 3), 1), (8, 2, (4, 1, 2), 2)):
        layer = _random_layer(C, heads, seed)
        x = draw(len(lengths), max(lengths), C, seed=seed + 5)
        mask = attention.padding_mask(torch.tensor(lengths), max(lengths))[:, None, None, :]
        with torch.no_grad():
            wanted, slips = layer(x, mask, False)[0], _block_slips(layer, x, mask)
        got = call(attempt, layer, x, mask)
        if isinstance(got, tuple):
            raise Wrong("Your block returns a tuple; return x alone (layer.attention gives the output and the scores).")
        compare(f"The block's output for x {tuple(x.shape)}", got, wanted, slips, 1e-6)
    x = x.clone().requires_grad_()
    needs_gradient("The output", call(attempt, layer, x, mask).pow(3), x, "The layers below learn through this one.")


def _random_layer(C: int, heads: int, seed: int) -> EncoderLayer:
    config = BertConfig(
        vocab_size=2, hidden_size=C, num_attention_heads=heads, intermediate_size=3 * C, num_hidden_layers=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer, g = EncoderLayer(config).double().eval(), generator(seed)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                around = 1.0 if isinstance(module, nn.LayerNorm) else 0.0
                module.weight.normal_(around, 0.4, generator=g)
                module.bias.normal_(0.0, 0.4, generator=g)
    return layer


def _block_slips(layer: EncoderLayer, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    one, two, up, down = layer.attention_norm, layer.ffn_norm, layer.up, layer.down

    def attend(x: Tensor, mask: Tensor | None = mask) -> Tensor:
        return layer.attention(x, mask=mask)[0]

    def transform(x: Tensor, act: Callable = F.gelu) -> Tensor:
        return down(act(up(x)))

    a = one(x + attend(x))
    middle = x + attend(one(x))
    return {
        "You return x unchanged; is this still the stub?": x,
        "The first residual is missing: attention's output is added to x before LayerNorm.": (
            (lambda b: two(b + transform(b)))(one(attend(x)))
        ),
        "The second residual is missing: the feed-forward output is added to what went into it.": two(transform(a)),
        "Both residuals are missing: x + attention(x), and again x + feed-forward(x).": two(transform(one(attend(x)))),
        "This is a pre-LayerNorm block (GPT-2's). BERT normalises after each addition: LayerNorm(x + sublayer(x)).": (
            middle + transform(two(middle))
        ),
        "The two LayerNorms are swapped: attention_norm comes after attention, ffn_norm after the feed-forward part.": (
            (lambda b: one(b + transform(b)))(two(x + attend(x)))
        ),
        "You use attention_norm twice; the second LayerNorm is ffn_norm.": one(a + transform(a)),
        "The mask does not reach attention: padding is looked at. Pass mask=mask.": (
            (lambda b: two(b + transform(b)))(one(x + attend(x, None)))
        ),
        "The mask is turned round: True means 'may look'.": (
            (lambda b: two(b + transform(b)))(one(x + attend(x, ~mask)))
        ),
        "GELU is missing between up and down: two linear maps in a row are one linear map.": two(a + down(up(a))),
        "That is ReLU between up and down; BERT uses GELU.": two(a + transform(a, F.relu)),
        "That is the tanh approximation of GELU; BERT uses the exact one, F.gelu(x).": (
            two(a + transform(a, lambda z: F.gelu(z, approximate="tanh")))
        ),
        "GELU comes after down; it belongs between up and down.": two(a + F.gelu(down(up(a)))),
        "LayerNorm is inside the residual: you add x to LayerNorm(attention). Add first, then normalise.": (
            (lambda b: b + two(transform(b)))(x + one(attend(x)))
        ),
        "The second residual adds the block's input x; it adds what went into the feed-forward part.": (
            two(x + transform(a))
        ),
        "The feed-forward part reads x; it reads the output of the attention part.": two(a + transform(x)),
        "The last LayerNorm is missing.": a + transform(a),
        "The first LayerNorm is missing: normalise after each of the two additions.": (
            (lambda b: two(b + transform(b)))(x + attend(x))
        ),
        "The feed-forward part is missing: after attention comes down(GELU(up(x))).": a,
        "The attention part is missing.": (lambda b: two(b + transform(b)))(one(x)),
        "Feed-forward comes before attention; attention is first.": (
            (lambda b: one(b + attend(b)))(two(x + transform(x)))
        ),
    }


# -- count_parameters ----------------------------------------------------------


@check("count_parameters")
def count_parameters(attempt: Callable) -> None:
    """attempt(config) -> the number of parameters of a BERT without a head, pooler included."""
    odd = BertConfig(
        vocab_size=100, hidden_size=12, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=30, type_vocab_size=5,
    )  # fmt: skip
    # the odd one first: where no two sizes are alike, a difference tells which part is wrong
    configs = {
        "a small model (V 100, 30 positions, 5 segments, C 12, F 20, L 3, H 4)": odd,
        "MiniLM-L6": BertConfig.minilm_l6(), "BERT-base": BertConfig.bert_base(), "TinyBERT4": BertConfig.tinybert4(),
    }  # fmt: skip
    for name, config in configs.items():
        got, wanted = call(attempt, config), _count(config)
        if isinstance(got, np.generic) or (isinstance(got, Tensor) and got.numel() == 1):
            got = got.item()
        if not isinstance(got, int | float) or isinstance(got, bool):
            raise Wrong(f"Return a number, not a {type(got).__name__}.")
        if got == wanted:
            if not isinstance(got, int):
                raise Wrong(f"{got!r} is right, but parameters are counted in whole numbers: use // or no division.")
            continue
        for sentence, value in _count_slips(config).items():
            if got == value:
                raise Wrong(f"For {name} you have {got:,} instead of {wanted:,}. {sentence}")
        raise Wrong(
            f"For {name} you have {got:,} instead of {wanted:,}, {abs(wanted - got):,} too "
            f"{'few' if got < wanted else 'many'}. Which part has that many?"
        )


def _count(config: BertConfig) -> int:
    C, F_, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * (C * C + C) + (C * F_ + F_) + (F_ * C + C) + 2 * 2 * C
    return tables * C + 2 * C + L * layer + C * C + C


def _count_slips(config: BertConfig) -> dict[str, int]:
    C, F_, L, right = config.hidden_size, config.intermediate_size, config.num_hidden_layers, _count(config)
    V, P, S, H = (
        config.vocab_size, config.max_position_embeddings, config.type_vocab_size, config.num_attention_heads,
    )  # fmt: skip
    biases = L * (4 * C + F_ + C)
    layer = 4 * (C * C + C) + (C * F_ + F_) + (F_ * C + C) + 4 * C
    return {
        "No linear map has its bias: a map from n to m numbers has n·m weights and m biases.": right - biases - C,
        "The layers' linear maps lack their biases: a map from n to m numbers has n·m weights and m biases.": (
            right - biases
        ),
        "The pooler, a linear map from C to C on top of [CLS], is missing.": right - C * C - C,
        "The pooler's bias is missing.": right - C,
        "That is the table of words alone. Two more tables, their LayerNorm, L layers and the pooler are to come.": V * C,
        "The table of positions is missing.": right - P * C,
        "The table of segments is missing.": right - S * C,
        "Positions and segments have tables too.": right - (P + S) * C,
        "The table of words is missing, the largest part of a small model.": right - V * C,
        "The embeddings are missing.": right - (V + P + S) * C - 2 * C,
        "The embeddings' own LayerNorm is missing, 2·C numbers.": right - 2 * C,
        "All LayerNorms are missing: each has C weights and C biases, two a layer and one on the embeddings.": (
            right - 4 * C * L - 2 * C
        ),
        "The layers' LayerNorms are missing: two of 2·C numbers in each layer.": right - 4 * C * L,
        "A layer has two LayerNorms, not one.": right - 2 * C * L,
        "A LayerNorm has C weights and C biases.": right - 2 * C * L - C,
        "Attention has four maps: query, key, value, and the output map, which you left out.": right - L * (C * C + C),
        "The heads share one query, key and value map of C to C, each reading its slice: do not multiply by H.": (
            right + L * (H - 1) * 4 * (C * C + C)
        ),
        "The heads share one query, key and value map of C to C: you multiply three of the four maps by H.": (
            right + L * (H - 1) * 3 * (C * C + C)
        ),
        "Only one layer is counted; there are L of them.": right - (L - 1) * layer,
        "The feed-forward width is config.intermediate_size, not always 4·C: TinyBERT4's is 1200.": (
            right + L * (2 * C + 1) * (4 * C - F_)
        ),
        "The feed-forward part has two maps, up and down.": right - L * (F_ * C + C),
        "The output map of a masked-LM head is not part of the encoder (and it shares the word table).": right + V * C,
    }
