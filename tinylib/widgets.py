"""The lessons' live pictures: ipywidgets controls above a drawing that follows them.

``explorer(draw, **controls)`` is the frame: it calls ``draw`` with the controls' values and shows the HTML
that comes back. The drawings are small SVGs written as text, since a moved slider should be answered within
a tenth of a second; ``picture`` takes a figure of ``plots`` where that is quick enough. Whatever a learner
typed is escaped before it becomes HTML.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from tinylib import plots
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.text import encode

MAX_TOKENS = 48  # a heat map of more has labels too small to read
MAX_CHARACTERS = 2000  # more than MAX_TOKENS words hold; a pasted book would take the tokenizer seconds
PALETTE = [tuple(round(255 * c) for c in colormaps["cividis"](i)[:3]) for i in range(256)]
FORM = {"layout": {"width": "640px", "max_width": "100%"}, "style": {"description_width": "110px"}}


def explorer(draw: Callable[..., str], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Return the controls with the drawing below them, made anew by ``draw(name=value, …)`` on every change.

    ``draw`` returns HTML. A UserError that it raises is shown as its sentence in the drawing's place.
    """
    drawing = ipywidgets.HTML()

    def redraw(_change=None) -> None:
        try:
            drawing.value = draw(**{name: control.value for name, control in controls.items()})
        except UserError as error:
            drawing.value = note(str(error))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), drawing])


def note(sentence: str) -> str:
    """Return a sentence as HTML; a screen reader reads it out when it changes."""
    return f'<p role="status" style="max-width: 640px">{escape(sentence)}</p>'


def picture(fig: Figure, alt: str) -> str:
    """Return a figure as HTML with alt text, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    plots.plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _svg(width: int, height: int, alt: str, parts: Sequence[str]) -> str:
    # currentColor: black labels on a light theme, white ones on a dark theme
    size = f'width="{width}" height="{height}"'
    return (
        f'<svg role="img" aria-label="{escape(alt)}" {size} font-family="monospace" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def _label(text: str, x: int, y: int, font: int, anchor: str, more: str = "") -> str:
    place = f'x="{x}" y="{y}" font-size="{font}" text-anchor="{anchor}" dominant-baseline="middle"'
    return f"<text {place}{more}>{escape(text)}</text>"


def heat_map(weights: Float[Tensor, "T S"], rows: Sequence[str], columns: Sequence[str], alt: str) -> str:
    """Return a matrix of weights as SVG: dark = none, bright = most; hover to see a number."""
    T, S = weights.shape
    size = max(13, min(30, 620 // max(T, S)))
    font = min(14, size - 1)
    margin = 12 + round(0.62 * font * max(map(len, (*rows, *columns))))  # 0.62: a monospace letter's width
    parts = [
        f'<rect x="{margin}" y="{margin}" width="{S * size}" height="{T * size}" fill="rgb{PALETTE[0]}"/>',
        *_cells(weights, rows, columns, margin, size),
    ]
    for t, name in enumerate(rows):
        parts.append(_label(name, margin - 5, margin + t * size + size // 2, font, "end"))
    for s, name in enumerate(columns):
        x = margin + s * size + size // 2
        turned = f' transform="rotate(-90 {x} {margin - 5})"'
        parts.append(_label(name, x, margin - 5, font, "start", turned))
    return _svg(margin + S * size + 1, margin + T * size + 1, alt, parts)


def _cells(
    weights: Float[Tensor, "T S"], rows: Sequence[str], columns: Sequence[str], margin: int, size: int
) -> list[str]:
    largest = max(weights.max().item(), 1e-9)
    asks, looked_at = [escape(name) for name in rows], [escape(name) for name in columns]
    cells = []
    for t, row in enumerate(weights.tolist()):
        for s, weight in enumerate(row):
            if weight < 0.01:  # as dark as the background
                continue
            x, y, share = margin + s * size, margin + t * size, weight / largest
            number = ""
            if size >= 20 and weight >= 0.1:  # a second cue beside the colour, where it fits
                ink, shown = "black" if share > 0.5 else "white", f"{weight:.1f}".removeprefix("0")
                number = (
                    f'<text x="{x + size // 2}" y="{y + size // 2 + 4}" font-size="11" text-anchor="middle" '
                    f'fill="{ink}">{shown}</text>'
                )
            cells.append(
                f"<g><title>{asks[t]} looks at {looked_at[s]}: {weight:.2f}</title>"
                f'<rect x="{x}" y="{y}" width="{size}" height="{size}" '
                f'fill="rgb{PALETTE[round(255 * share)]}"/>{number}</g>'
            )
    return cells


def bars(values: Sequence[float], names: Sequence[str], alt: str, largest: float = 1.0) -> str:
    """Return horizontal bars as SVG, each with its name before it and its number behind it."""
    parts = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y, width = 24 * i + 4, round(380 * value / largest)
        parts.append(_label(name, 110, y + 9, 13, "end"))
        parts.append(f'<rect x="120" y="{y}" width="{width}" height="18" fill="{plots.COLOURS[0]}"/>')
        parts.append(_label(f"{value:.2f}", 126 + width, y + 9, 13, "start"))
    return _svg(560, 24 * len(names) + 8, alt, parts)


# -- lesson 01: attention ------------------------------------------------------


def head_explorer(
    model: Bert, tokenizer, sentence: str = "The film was not good, but the actors were."
) -> ipywidgets.VBox:
    """Show where each head of a model looks in a sentence of the learner's own.

    Row = the token that asks, column = the token it looks at; each row sums to 1. The model runs once a
    sentence (after Enter, or on leaving the box); the sliders for layer and head only redraw.
    """
    limit = min(MAX_TOKENS, model.config.max_position_embeddings)

    @lru_cache(maxsize=16)
    def look(text: str):
        too_long = len(encode(tokenizer, [text], max_length=limit + 1).ids[0]) > limit
        ids = encode(tokenizer, [text], max_length=limit).ids[0]
        return tokenizer.convert_ids_to_tokens(ids.tolist()), _every_weight(model, ids), too_long

    def draw(text: str, layer: int, head: int) -> str:
        tokens, weights, too_long = look(" ".join(text[:MAX_CHARACTERS].split()))
        if len(tokens) <= tokenizer.num_special_tokens_to_add():
            return note("There is no word to look at yet: type a sentence above and press Enter.")
        shown = weights[layer][head - 1]
        caption = (
            f"Layer {layer}, head {head}. Row: the token that asks. Column: the token it looks at. "
            f"The brightest cell is {shown.max():.2f}."
        )
        if too_long:
            caption += f" Your sentence has more than {limit} tokens; the picture shows the first {limit}."
        alt = f"Attention weights of layer {layer}, head {head}, for {len(tokens)} tokens."
        return note(caption) + heat_map(shown, tokens, tokens, alt)

    return explorer(
        draw,
        # not on every letter: half a word means nothing to the model
        text=ipywidgets.Text(sentence, description="Your sentence", continuous_update=False, **FORM),
        layer=ipywidgets.IntSlider(1, 1, model.config.num_hidden_layers, description="Layer", **FORM),
        head=ipywidgets.IntSlider(1, 1, model.config.num_attention_heads, description="Head", **FORM),
    )


@torch.inference_mode()
def _every_weight(model: Bert, ids: Tensor) -> dict[int, Tensor]:
    training = model.training
    model.eval()  # dropout would draw another picture each time
    every = range(1, model.config.num_hidden_layers + 1)
    scores = model(ids[None].to(next(model.parameters()).device), keep_scores=every).scores
    model.train(training)
    return {m: scores[m][0].softmax(-1).cpu() for m in every}  # one sentence alone has no padding to mask


def scale_explorer(keys: int = 8, seed: int = 0) -> ipywidgets.VBox:
    """Show what a softmax makes of q·k for longer and longer random vectors, divided by √D or not."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1024, generator=g), torch.randn(keys, 1024, generator=g)

    def draw(width: int, scaled: bool) -> str:
        scores = k[:, :width] @ q[:width] / (math.sqrt(width) if scaled else 1.0)
        p = scores.softmax(0)
        entropy = torch.special.entr(p).sum().item() / math.log(2)
        gradient = (p.diag() - p.outer(p)).norm().item()
        text = (
            f"D = {width}: the scores run from {scores.min():.1f} to {scores.max():.1f}. "
            f"Entropy of the weights: {entropy:.2f} of {math.log2(keys):.2f} bits. "
            f"Gradient through the softmax: {gradient:.4f}."
        )
        names = [f"key {i + 1}" for i in range(keys)]
        return note(text) + bars(p.tolist(), names, f"The weights of {keys} keys. {text}")

    widths = [2**i for i in range(1, 11)]
    return explorer(
        draw,
        width=ipywidgets.SelectionSlider(options=widths, value=64, description="D", **FORM),
        scaled=ipywidgets.Checkbox(False, description="divide by √D", **FORM),
    )
