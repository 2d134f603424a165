"""Scaled dot-product attention, multi-head attention, masks and sinusoidal positions (Vaswani et al. 2017).

Shapes throughout the package: B batch, T query length, S key length, H heads, D head width, C model width.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tinylib.errors import UserError


def attention_scores(q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H T S"]:
    """Return q·kᵀ/√D, the scores before mask and softmax (Vaswani et al. 2017, eq. 1).

    TinyBERT matches these rather than the probabilities (Jiao et al. 2020, eq. 7).
    """
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T S"]]:
    """Mix the values by softmax(q·kᵀ/√D) and return the mixture and the weights (Vaswani et al. 2017, eq. 1).

    ``mask`` broadcasts to (B, H, T, S); True = may look. A query that may look nowhere gets weights and
    output of zero, as ``F.scaled_dot_product_attention`` gives it, instead of NaN. Raises UserError if the
    mask is not boolean.
    """
    _check_mask(mask)
    weights = attention_weights(attention_scores(q, k), mask)
    return weights @ v, weights


def attention_weights(
    scores: Float[Tensor, "B H T S"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "B H T S"]:
    """Return the softmax of the scores over the keys that the mask lets be seen; zeros where it hides them all."""
    if mask is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    some = mask.any(dim=-1, keepdim=True)  # softmax over nothing but -inf is 0/0
    # asked on the small mask, since filling is one more pass over the large weights
    return weights if bool(some.all()) else weights.masked_fill(~some, 0.0)


def float32_precision() -> str:
    """Return how products of float32 are computed in this process: "highest", or "high" or "medium" where they may be rounded.

    It is PyTorch's own answer, which is an error once a backend's precision was set by itself
    (``torch.backends.….fp32_precision``, as ``transformers`` does for TF32); then it is read off those of the backends.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        found = {backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)}
        return "medium" if "bf16" in found else "high" if found - {"ieee", "none"} else "highest"


def _check_mask(mask: Tensor | None) -> None:
    # PyTorch would add a mask of floats to the scores: 0 and 1, as tokenizers give them, would hide nothing
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(f"mask is {mask.dtype} but must be torch.bool, True = may look; write mask.bool()")


def causal_mask(length: int, device: torch.device | None = None) -> Bool[Tensor, "T T"]:
    """Return the mask under which position t looks at positions 0…t only; True = may look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padding_mask(lengths: Int[Tensor, " B"], length: int) -> Bool[Tensor, "B T"]:
    """Return which of ``length`` positions hold a real token; True = real."""
    return torch.arange(length, device=lengths.device)[None, :] < lengths[:, None]


def sinusoidal_positions(length: int, width: int) -> Float[Tensor, "T C"]:
    """Return sin(t/10000^(2i/C)) in column 2i, its cosine in column 2i+1 (Vaswani et al. 2017, sec. 3.5).

    Raises UserError for an odd ``width``.
    """
    if width % 2:
        raise UserError(
            f"width={width} must be even, since each frequency takes a sine and a cosine; "
            f"try width={width + 1}"
        )
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class MultiHeadAttention(nn.Module):
    """Attend with H heads of width D = C/H, or ``head_width``, and mix their outputs (Vaswani et al. 2017, section 3.2.2).

    Raises UserError if the heads do not divide the width and no head_width is given, and for sizes below 1.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, head_width: int | None = None):
        super().__init__()
        if heads < 1 or width < 1:
            raise UserError(f"width={width} and heads={heads} must both be at least 1")
        if head_width is not None and head_width < 1:
            raise UserError(f"head_width={head_width} must be at least 1, or left out for width / heads")
        if head_width is None and width % heads:
            fitting = heads * math.ceil(width / heads)
            raise UserError(f"width={width} must be a multiple of heads={heads}; try width={fitting}")
        self.heads, self.dropout = heads, dropout
        inner = heads * (width // heads if head_width is None else head_width)  # C, unless heads were removed
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)

    def split(self, x: Float[Tensor, "B T HD"]) -> Float[Tensor, "B H T D"]:
        """Cut the columns into heads: head h reads columns h·D…(h+1)·D."""
        B, T, inner = x.shape
        return x.view(B, T, self.heads, inner // self.heads).transpose(1, 2)

    def value_relations(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B H T T"]:
        """Return v·vᵀ/√D, how alike the values of each head are, before mask and softmax (Wang et al. 2020, eq. 6)."""
        v = self.split(self.value(x))
        return attention_scores(v, v)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S C"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        keep_scores: bool = False,
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H T S"] | None]:
        """Return the output and, if asked for, the scores before mask and softmax.

        Queries come from ``x``, keys and values from ``memory`` (from ``x`` itself if None: self-attention).
        The mixing is ``attend``'s, in PyTorch's fused kernel, which never holds the (T, S) matrix, or step by
        step where that is faster (``_step_by_step``). Raises UserError if the mask is not boolean.
        """
        _check_mask(mask)
        memory = x if memory is None else memory
        q, k, v = self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))
        p = self.dropout if self.training else 0.0
        scores = attention_scores(q, k) if keep_scores else None
        if self._step_by_step(q, keep_scores):
            weights = attention_weights(attention_scores(q, k) if scores is None else scores, mask)
            mixed = F.dropout(weights, p) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.output(mixed.transpose(1, 2).flatten(2)), scores

    def _step_by_step(self, q: Tensor, keep_scores: bool) -> bool:
        # In training the fused kernel would compute the scores, which are at hand, a second time. And where a CPU may
        # round products to bfloat16, or computes in it, the kernel's many small ones pay for it: 31 ms against 6 (B 32,
        # T 57, 12 heads).
        rounded = float32_precision() != "highest" or q.dtype == torch.bfloat16
        return (self.training and keep_scores) or (rounded and q.device.type == "cpu")
