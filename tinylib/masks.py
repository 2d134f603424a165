"""Masks: which weights of a model go, how they stay gone, and a file in which they take no room.

A mask is a bool tensor of its weight's shape, True = kept. What is pruned is the 2-D weights of the encoder
layers, where the multiplications are, and on request the word embeddings, where most bytes are. Biases and
LayerNorm stay dense (a hundredth of the parameters, and each moves a whole channel), and so do the pooler and
the classifier, which are small and which every answer passes.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinylib.bert import Bert, _Undrawn, to_hf, tokenizer_in
from tinylib.config import BertConfig
from tinylib.errors import UserError
from tinylib.stored import check_depth, first_line, read_json, read_tensors

COMPRESSED = "pruned.safetensors"
# what reading a file can raise that is missing, cut off or something else
DAMAGE = (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)


def magnitude_mask(weight: Float[Tensor, "*shape"], sparsity: float | int) -> Bool[Tensor, "*shape"]:
    """Return the mask that removes the ``round(sparsity · n)`` weights of smallest magnitude, True = kept.

    Of equal magnitudes the first in memory goes first, so the answer is always the same one. ``sparsity`` is
    a share, 0 ≤ sparsity < 1. Magnitude ranks like the saliency ½·h·w² of LeCun et al. 1989 with one
    curvature h for all weights. Raises UserError for another share, and if the weight to prune holds NaN.
    """
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity={sparsity} must be at least 0 and below 1: it is the share of the weights to remove")
    size = weight.detach().abs().flatten()
    remove = round(sparsity * len(size))
    keep = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    if remove == 0:
        return keep
    if size.isnan().any():
        raise UserError(
            "the weight to prune holds NaN, which has no magnitude; look for the step where training diverged"
        )
    threshold = _kth_smallest(size, remove)
    flat = keep.view(-1)
    flat[size < threshold] = False
    ties = (size == threshold).nonzero().squeeze(-1)
    flat[ties[: remove - int((~flat).sum())]] = False
    return keep


def _kth_smallest(size: Tensor, k: int) -> Tensor:
    """Return the k-th smallest number by selection, not a sort: O(n) and one copy."""
    if size.device.type == "cpu" and size.dtype == torch.float32:  # NumPy's selection takes a third of torch's time
        return torch.from_numpy(np.partition(size.numpy(), k - 1))[k - 1]
    return size.kthvalue(k).values


def prunable(model: Bert, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """Return the weights that may be pruned, by name; with ``embeddings`` the word table too.

    The position and segment tables are small, and every sentence uses them.
    """
    names = ["embeddings.word.weight"] if embeddings else []
    names += [name for name, weight in model.named_parameters() if name.startswith("layers.") and weight.ndim == 2]
    return {name: model.get_parameter(name) for name in names}


def sparsity_of(model: Bert, embeddings: bool = False) -> float:
    """Return the share of exact zeros among the prunable weights."""
    weights = prunable(model, embeddings).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Masks:
    """Hold one mask a weight, True = kept.

    Called with a model (as ``train.fit(after_step=masks)`` does after every optimiser step) it zeroes what is
    removed: the optimiser moves pruned weights too, by their gradient and its momentum, and this puts them
    back.
    """

    def __init__(self, keep: Mapping[str, Bool[Tensor, "*shape"]]):
        self.keep = dict(keep)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the removed weights of a model to zero, in place; raise UserError if the masks are another model's."""
        for name, keep in self.keep.items():
            try:
                weight = model.get_parameter(name)
            except AttributeError:
                raise UserError(
                    f"the masks name {name!r}, which the model does not have; they are another model's"
                ) from None
            if weight.shape != keep.shape:
                shapes = f"{tuple(keep.shape)}, the weight {tuple(weight.shape)}"
                raise UserError(f"the mask of {name} is {shapes}; the masks are another model's")
            if keep.device != weight.device:
                keep = self.keep[name] = keep.to(weight.device)
            weight.masked_fill_(~keep, 0.0)  # not a product: 0 · NaN is NaN, and 0 · (−1) is −0

    def __call__(self, model: nn.Module, step: int = 0) -> None:
        """Apply the masks; the signature of ``train.fit``'s ``after_step``. Raises UserError as ``apply`` does."""
        self.apply(model)

    def sparsity(self) -> float:
        """Return the share of the masked weights that is removed."""
        kept = sum(int(keep.sum()) for keep in self.keep.values())
        masked = sum(keep.numel() for keep in self.keep.values())
        return 1.0 - kept / masked if masked else 0.0

    def by_name(self) -> dict[str, float]:
        """Return the share removed of each weight."""
        return {name: 1.0 - int(keep.sum()) / keep.numel() for name, keep in self.keep.items()}

    def save(self, file: str | Path) -> Path:
        """Write the masks into a safetensors file, one bit a weight."""
        shapes = {name: list(keep.shape) for name, keep in self.keep.items()}
        packed = {name: pack(keep) for name, keep in self.keep.items()}
        save_file(packed, file, metadata={"shapes": json.dumps(shapes)})
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> "Masks":
        """Read what ``save`` wrote; raise UserError if the file is missing, damaged or something else."""
        try:
            with safe_open(file, framework="pt") as stored:
                shapes = json.loads((stored.metadata() or {})["shapes"])
                return cls({n: unpack(stored.get_tensor(n), _shape(shape)) for n, shape in shapes.items()})
        except DAMAGE as error:
            raise UserError(f"{file} holds no masks ({first_line(error)}); save them again with Masks.save") from None


def pack(keep: Bool[Tensor, "*shape"]) -> Tensor:
    """Return a mask as bytes, eight weights each."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy()))


def _shape(found) -> tuple[int, ...]:
    """Return what JSON says of a shape, if it is one: a list in the place of a number, times 10¹², would fill the memory."""
    if not (isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)):
        raise ValueError(f"{found} is no shape")
    return tuple(found)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    """Return the mask of the given shape that ``pack`` packed."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or len(packed) != -(-count // 8):
        raise ValueError(f"{tuple(packed.shape)} {packed.dtype} is no mask of {shape}")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).reshape(shape)


def layer_masks(model: Bert, sparsity: float | Mapping[str, float], embeddings: bool = False) -> Masks:
    """Return masks that remove the same share of every weight matrix, or of each its ``sparsity[name]``.

    Raises UserError for a name that is no prunable weight's, and as ``magnitude_mask`` does.
    """
    weights = prunable(model, embeddings)
    if isinstance(sparsity, Mapping):
        if unknown := sorted(set(sparsity) - set(weights)):
            raise UserError(f"{unknown[0]!r} is not a weight that can be pruned; those are {', '.join(weights)}")
        return Masks({name: magnitude_mask(weights[name], share) for name, share in sparsity.items()})
    return Masks({name: magnitude_mask(weight, sparsity) for name, weight in weights.items()})


def global_masks(model: Bert, sparsity: float, embeddings: bool = False) -> Masks:
    """Return masks with one threshold for all weight matrices: ``sparsity`` is the share of them together.

    Raises UserError as ``magnitude_mask`` does.
    """
    weights = prunable(model, embeddings)
    together = magnitude_mask(torch.cat([w.detach().flatten() for w in weights.values()]), sparsity)
    parts = together.split([w.numel() for w in weights.values()])
    return Masks({name: part.reshape(w.shape).clone() for (name, w), part in zip(weights.items(), parts, strict=True)})


def whole_masks(model: Bert, sparsity: float) -> Masks:
    """Return masks for the whole model: one threshold for the encoder layers, and the word table's own.

    The table is looked up, not multiplied, and its numbers are of another scale: under one threshold with the
    layers, that scale and not the use of a weight would decide where the zeros go. Raises UserError as
    ``magnitude_mask`` does.
    """
    table = {"embeddings.word.weight": magnitude_mask(model.embeddings.word.weight, sparsity)}
    return Masks(table | global_masks(model, sparsity).keep)


def random_masks(model: Bert, sparsity: float, generator: torch.Generator, embeddings: bool = False) -> Masks:
    """Return the control: masks that remove the same share of every weight matrix, drawn by lot.

    Raises UserError unless 0 ≤ sparsity < 1.
    """
    lots = {name: torch.rand(w.shape, generator=generator) for name, w in prunable(model, embeddings).items()}
    return Masks({name: magnitude_mask(lot, sparsity) for name, lot in lots.items()})


def head_sizes(model: Bert) -> Float[Tensor, "L H"]:
    """Return ‖W_V‖·‖W_O‖ of each head, its rows of value and columns of output.

    Biases apart, a head adds at most this product times the norm of its input.
    """
    H, found = model.config.num_attention_heads, []
    for layer in model.layers:
        value = layer.attention.value.weight.detach().unflatten(0, (H, -1)).flatten(1).norm(dim=1)
        output = layer.attention.output.weight.detach().unflatten(1, (H, -1)).norm(dim=(0, 2))
        found.append(value * output)
    return torch.stack(found)


def head_masks(model: Bert, share: float) -> Masks:
    """Return masks that remove ``round(share · H)`` heads of each layer.

    A head is D rows of query, key and value and D columns of output. Those go that ``head_sizes`` finds smallest.
    Raises UserError for a share that is below 0 or would leave no head.
    """
    H = model.config.num_attention_heads
    whole_count(share, H, "heads")
    keep = {}
    for i, (layer, sizes) in enumerate(zip(model.layers, head_sizes(model), strict=True)):
        attention = layer.attention
        kept = magnitude_mask(sizes, share)
        rows = kept.repeat_interleave(model.config.head_width)[:, None].expand_as(attention.value.weight)
        for name in ("query", "key", "value"):
            keep[f"layers.{i}.attention.{name}.weight"] = rows.clone()
        keep[f"layers.{i}.attention.output.weight"] = rows.T.clone()
    return Masks(keep)


def whole_count(share: float, of: int, what: str) -> int:
    """Return how many of ``of`` things a share is; raise UserError for a share below 0, and if none would be left."""
    if not share >= 0.0:  # NaN too
        raise UserError(f"share={share} must be at least 0: it is the share of the {what} to remove")
    if share >= 1.0 or round(share * of) == of:
        below = math.floor(10_000 * (1 - 0.5 / of)) / 10_000  # rounded down: what is advised must be taken
        raise UserError(f"share={share} would remove all {of} {what}; keep at least one: share below {below:g}")
    return round(share * of)


def bitmask_bytes(count: int, sparsity: float, value_bits: int = 32) -> int:
    """Return the bytes of ``count`` weights stored as one bit each and the values of those kept."""
    return math.ceil(count / 8) + (count - round(sparsity * count)) * value_bits // 8


def save_compressed(model: Bert, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a pruned model small: of a matrix with zeros, one bit a weight and the values kept.

    safetensors keeps a zero in as many bytes as any number, so pruning alone saves nothing. Here n weights of
    sparsity s take n/8 + (1 − s)·n·b/8 bytes, b = 16 or 32 bits a value (``dtype``): at s = 0.5 that is 53 %
    of dense float32 with b = 32 and 28 % with b = 16. Tensors for which this is no gain (as a rule biases and
    LayerNorm) are stored dense in ``dtype``. ``load_compressed`` reads it; for ``Bert.from_pretrained`` and
    ``transformers`` use ``save_pretrained``. Raises UserError for another ``dtype`` than float16 and float32.
    """
    if dtype not in (torch.float16, torch.float32):
        raise UserError(f"dtype={dtype} must be torch.float16 or torch.float32")
    folder, tensors = model.save_without_weights(folder), {}
    for name, tensor in model.state_dict().items():
        value, name = tensor.detach().cpu().to(dtype).contiguous(), to_hf(name)
        keep = value != 0  # in the stored precision: float16 rounds what is below 3e-8 to zero
        packed = bitmask_bytes(value.numel(), float((~keep).double().mean()), 8 * dtype.itemsize)
        if packed < value.numel() * dtype.itemsize:
            tensors |= {f"{name}.mask": pack(keep), f"{name}.values": value[keep]}
        else:
            tensors[name] = value
    save_file(tensors, folder / COMPRESSED, metadata={"format": "pt"})
    return folder


def _dense(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Return one weight of a compressed file in float32."""
    plain = stored.get(name, stored.get(f"{name}.values"))
    if plain is None or not plain.is_floating_point():
        raise ValueError(f"{name} is missing or holds no weights")
    if name in stored:
        if plain.shape != shape:
            raise ValueError(f"{name} is {tuple(plain.shape)}, and config.json asks for {shape}")
        return plain.float()
    keep = unpack(stored[f"{name}.mask"], shape)  # eight weights a byte: the file bounds what is taken here
    weight = torch.zeros(shape)
    weight[keep] = plain.float()
    return weight


def load_compressed(folder: str | Path) -> Bert:
    """Read what ``save_compressed`` wrote into an ordinary model in float32.

    Raises UserError if a file of it is missing, damaged or of another model.
    """
    folder = Path(folder)
    try:
        stored = read_tensors(folder / COMPRESSED)
        config = BertConfig.from_dict(read_json(folder / "config.json"))
        check_depth("config.json", config.num_hidden_layers, stored)
        with torch.device("meta"), _Undrawn():  # shapes alone: the file must fill them before any memory is taken
            shapes = {name: tuple(tensor.shape) for name, tensor in Bert(config).state_dict().items()}
        state = {name: _dense(stored, to_hf(name), shape) for name, shape in shapes.items()}
        model = Bert(config)
        model.load_state_dict(state)
    except DAMAGE as error:
        why = first_line(error)
        raise UserError(f"{folder} holds no whole model of save_compressed ({why}); save it again") from None
    model.tokenizer_folder = tokenizer_in(folder)
    return model.eval()
