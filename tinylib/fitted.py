"""A student that was cut out of its teacher, fitted to the teacher's states by least squares: a start without a step of training.

A cut keeps each matrix as well as its size allows and looks at nothing else. So the layers that the map leaves out are missing,
a narrower LayerNorm divides by another length, and neurons are kept by their weights, not by what they say. ``fit_to_states``
goes through the student from the bottom to the top and mends this with a few texts: each layer, given what the layers below it
now say, gets the output matrices and the norms that come nearest to the states of the teacher's layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tinylib.bert import Bert, EncoderLayer
from tinylib.encoders import Teacher
from tinylib.text import Encoded, LengthBuckets, pad
from tinylib.train import Batch

TOKENS = 32_768  # at most that the fit looks at: 27 for each number that a row of the widest matrix of a 4x312 has
TIMES = 4  # at least as many tokens for each of these numbers; with fewer it would learn the texts by heart
PULL = 1e-3  # towards the weights of the cut, as a share of the mean square of what goes in: directions that no text shows stay


@torch.no_grad()
def fit_to_states(
    student: Bert, teacher: Teacher, encoded: Encoded, layers: Sequence[int], basis: Float[Tensor, "C Cs"]
) -> bool:
    """Fit a student, in place, to the states h·basis of its teacher's ``layers`` (one a student layer) on some texts.

    Of each layer, from the bottom up: the attention's output matrix W and bias by ridge regression, W = (XᵀX + λI)⁻¹Xᵀ(Y − XW₀)
    + W₀ with what goes into it as X, the teacher's sum before its LayerNorm, less the student's residual, as Y, and the cut's
    weights W₀; its LayerNorm's scale and shift, by the regression of each coordinate; then the neurons that say most on
    these texts (the root mean square of each times the length of its output weights), their output matrix as before, and the
    last LayerNorm. Returns False, and leaves the student as it is, where the texts have fewer than ``TIMES`` tokens for each
    input of its widest matrix.
    """
    texts = _some(encoded)
    if int(texts.lengths.sum()) < TIMES * (student.config.intermediate_size + 1):
        return False
    device = basis.device
    batches = [
        {name: value.to(device) for name, value in pad(texts, rows).items()}
        for rows in LengthBuckets(texts.lengths, 32, shuffle=False)
    ]
    with evaluating(student), evaluating(teacher):
        own = student.embeddings
        sums = [_input(own.norm, lambda b=b: own(b["ids"], b["segments"])) for b in batches]
        told = [teacher(b["ids"], b["mask"], b["segments"], keep_hidden=(0,)).hidden_states[0] for b in batches]
        _fit_norm(own.norm, _real(sums, batches), _real(told, batches).to(basis.dtype) @ basis)
        x = [own.norm(s) for s in sums]
        for layer, n in zip(student.layers, layers, strict=True):
            x = _fit_layer(layer, teacher, n, x, batches, basis)
    return True


def _fit_layer(
    layer: EncoderLayer, teacher: Teacher, n: int, x: list[Tensor], batches: list[Batch], basis: Tensor
) -> list[Tensor]:
    """Fit one layer to the teacher's layer n, and return what it now makes of x."""
    keys = [b["mask"][:, None, None, :] for b in batches]

    def seen(module: nn.Module) -> Tensor:  # what goes into a part of the layer at the real tokens
        return _real([_input(module, lambda i=i: layer(x[i], keys[i], False)) for i in range(len(x))], batches)

    told = [_told(teacher, n, b, basis) for b in batches]
    before, between, after, states = (torch.cat(parts) for parts in zip(*(t[:4] for t in told), strict=True))
    source, said = teacher.layers[n - 1], sum(t[4] for t in told).sqrt()
    reads = (source.down.weight.T.to(basis.dtype) @ basis).norm(dim=1)
    _fit_linear(layer.attention.output, seen(layer.attention.output), before - _real(x, batches))
    _fit_norm(layer.attention_norm, seen(layer.attention_norm), between)
    keep_neurons(layer, source, said * reads, basis)
    middle = layer.attention_norm(seen(layer.attention_norm))
    _fit_linear(layer.down, seen(layer.down), after - middle)
    _fit_norm(layer.ffn_norm, seen(layer.ffn_norm), states)
    return [layer(x[i], keys[i], False)[0] for i in range(len(x))]


def keep_neurons(
    layer: EncoderLayer, source: nn.Module | SimpleNamespace, weight: Float[Tensor, "F"], basis: Float[Tensor, "C Cs"]
) -> None:
    """Give the layer's feed-forward part those of the source's neurons whose ``weight`` is largest, read and written in the basis.

    If the source has fewer than the layer, the others of the layer stay as they are.
    """
    keep = weight.topk(min(layer.up.out_features, len(weight))).indices.sort().values
    n, basis = len(keep), basis.to(source.up.weight.dtype)
    layer.up.weight[:n].copy_(source.up.weight[keep] @ basis)
    layer.up.bias[:n].copy_(source.up.bias[keep])
    layer.down.weight[:, :n].copy_(basis.T @ source.down.weight[:, keep])
    layer.down.bias.copy_(source.down.bias @ basis)


def _some(encoded: Encoded) -> Encoded:
    """Return texts spread over all of them, of about ``TOKENS`` tokens in sum."""
    stride = -(-int(encoded.lengths.sum()) // TOKENS)
    return encoded.select(range(0, len(encoded), max(1, stride)))


def _told(teacher: Teacher, n: int, batch: Batch, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return of the real tokens the teacher's layer n before, between and after its two parts, and at its end, in the basis.

    Before and after are sums that a LayerNorm takes; between and end are what it makes of them. The fifth is the sum of squares
    of what each neuron says.
    """
    source, mask = teacher.layers[n - 1], batch["mask"]
    # a layer that serves several times (ALBERT's) is called once for each
    call = sum(other.ffn_norm is source.ffn_norm for other in teacher.layers[: n - 1])
    found = {}
    with contextlib.ExitStack() as stack:
        for part in ("attention_norm", "ffn_norm", "down"):
            found[part] = stack.enter_context(_recorded(getattr(source, part)))
        states = teacher(batch["ids"], mask, batch["segments"], keep_hidden=(n,)).hidden_states[n]
    before, after, said = (found[part][call][mask] for part in ("attention_norm", "ffn_norm", "down"))
    sums = (before, source.attention_norm(before), after, states[mask])
    return *(part.to(basis.dtype) @ basis for part in sums), said.to(basis.dtype).square().sum(0)


def _real(parts: list[Tensor], batches: list[Batch]) -> Float[Tensor, "N X"]:
    """Return the rows of the real tokens of the batches' parts, each (B, T, X) of its own B and T."""
    return torch.cat([part[batch["mask"]] for part, batch in zip(parts, batches, strict=True)])


def _fit_linear(linear: nn.Linear, x: Float[Tensor, "N I"], y: Float[Tensor, "N O"]) -> None:
    """Give a linear map the weights and the bias that come nearest to y, pulled a little towards those that it has."""
    inputs = x.shape[1] + 1
    gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=x.device)
    product = torch.zeros(inputs, y.shape[1], dtype=torch.float64, device=x.device)
    for some, wanted in zip(x.split(4096), y.split(4096), strict=True):  # in float64, of which all at once would be large
        rows = F.pad(some.double(), (0, 1), value=1.0)
        gram += rows.T @ rows
        product += rows.T @ (wanted - linear(some)).double()
    gram.diagonal().add_(PULL * gram.diagonal().mean())
    change = torch.linalg.solve(gram, product)
    linear.weight += change[:-1].T.to(linear.weight.dtype)
    linear.bias += change[-1].to(linear.bias.dtype)


def _fit_norm(norm: nn.LayerNorm, x: Float[Tensor, "N C"], y: Float[Tensor, "N C"]) -> None:
    """Give a LayerNorm the scale and the shift of each coordinate with which what it makes of x comes nearest to y."""
    z = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    spread = z.var(0, correction=0)
    scale = ((z - z.mean(0)) * (y - y.mean(0))).mean(0) / spread.clamp_min(torch.finfo(z.dtype).eps)
    norm.weight.copy_(scale)
    norm.bias.copy_(y.mean(0) - scale * z.mean(0))


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record what goes into a module, call by call."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        yield found
    finally:
        handle.remove()


def _input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what goes into a module while ``run`` runs."""
    with _recorded(module) as found:
        run()
    return found[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode, and put back the mode that it was in."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)
