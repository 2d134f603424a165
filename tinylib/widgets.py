"""The lessons' live pictures: ipywidgets controls above a drawing that follows them.

``explorer(draw, **controls)`` is the frame: it calls ``draw`` with the controls' values and shows the HTML
that comes back. The drawings are small SVGs written as text, since a moved slider should be answered within
a tenth of a second; ``picture`` takes a figure of ``plots`` where that is quick enough. Whatever a learner
typed is escaped before it becomes HTML.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from tinylib import ledger, plots
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.text import encode

MAX_TOKENS = 48  # a heat map of more has labels too small to read
MAX_CHARACTERS = 2000  # more than MAX_TOKENS words hold; a pasted book would take the tokenizer seconds
PALETTE = [tuple(round(255 * c) for c in colormaps["cividis"](i)[:3]) for i in range(256)]
# without a tooltip of its own a control shows "null" under the mouse
FORM = {"layout": {"width": "640px", "max_width": "100%"}, "style": {"description_width": "110px"}, "tooltip": ""}


def explorer(draw: Callable[..., str], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Return the controls with the drawing below them, made anew by ``draw(name=value, …)`` on every change.

    ``draw`` returns HTML. A UserError that it raises is shown as its sentence in the drawing's place.
    """
    drawing = ipywidgets.HTML(tooltip="")

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
    """Return a sentence as HTML, marked as a status for screen readers."""
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
    width, height, parts = _map_parts(weights, rows, columns)
    return _svg(width, height, alt, parts)


def _map_parts(
    weights: Float[Tensor, "T S"], rows: Sequence[str], columns: Sequence[str], room: int = 620
) -> tuple[int, int, list[str]]:
    """Return width, height and elements of a heat map whose cells share ``room`` pixels."""
    T, S = weights.shape
    size = max(13, min(30, room // max(T, S)))
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
    return margin + S * size + 1, margin + T * size + 1, parts


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

    def shown(tokens: list[str], weights: list[dict[int, Tensor]], layer: int, head: int) -> tuple[str, str]:
        chosen = weights[0][layer][head - 1]
        caption = (
            f"Layer {layer}, head {head}. Row: the token that asks. Column: the token it looks at. "
            f"The brightest cell is {chosen.max():.2f}."
        )
        alt = f"Attention weights of layer {layer}, head {head}, for {len(tokens)} tokens."
        return caption, heat_map(chosen, tokens, tokens, alt)

    return _attention_widget([model], tokenizer, sentence, shown)


def attention_pair_explorer(
    teacher: Bert, student: Bert, tokenizer, layer_map: Sequence[int],
    sentence: str = "The film was not good, but the actors were.",
) -> ipywidgets.VBox:  # fmt: skip
    """Show where a head of the student looks beside the same head of the teacher layer g(m) that it learns from.

    Row = the token that asks. The sentence says which share of its weight a row of the student would have to move, on
    average, to look where the teacher does: half the sum of the differences, 0 = the same, 1 = at other tokens altogether.
    """

    def shown(tokens: list[str], weights: list[dict[int, Tensor]], layer: int, head: int) -> tuple[str, str]:
        n = layer_map[layer - 1]
        ours, theirs = weights[0][layer][head - 1], weights[1][n][head - 1]
        apart = (ours - theirs).abs().sum(-1).mean().item() / 2
        parts, across, down = [], 0, 0
        for name, chosen in ((f"student, layer {layer}", ours), (f"teacher, layer {n}", theirs)):
            width, height, cells = _map_parts(chosen, tokens, tokens, room=280)
            parts.append(f'<g transform="translate({across} 20)">{"".join(cells)}</g>')
            parts.append(_label(f"{name}, head {head}", across + width // 2, 10, 13, "middle"))
            across, down = across + width + 24, height + 20
        alt = f"Attention of head {head}: student layer {layer} beside teacher layer {n}; a share of {apart:.2f} looks elsewhere."
        learns = f"the student's layer {layer} learns from the teacher's layer {n}"
        if len(weights[0][layer]) != len(weights[1][n]):
            counts = f"{len(weights[0][layer])} heads and {len(weights[1][n])}"
            learns = f"{learns}, which have {counts}: it is means of groups of heads that are compared in training"
        caption = (
            f"Head {head}: {learns}. On average a row of the student would "
            f"have to move {apart:.0%} of its weight to look where the teacher looks."
        )
        return caption, _svg(across, down, alt, parts)

    return _attention_widget([student, teacher], tokenizer, sentence, shown)


def _attention_widget(models: Sequence[Bert], tokenizer, sentence: str, shown: Callable) -> ipywidgets.VBox:
    """Let the learner choose a sentence, a layer of the first model and a head that all have.

    ``shown(tokens, weights, layer, head)`` gives the caption and the picture; ``weights`` holds each model's, by layer.
    """
    limit = min(MAX_TOKENS, *(model.config.max_position_embeddings for model in models))

    @lru_cache(maxsize=16)
    def look(text: str):
        too_long = len(encode(tokenizer, [text], max_length=limit + 1).ids[0]) > limit
        ids = encode(tokenizer, [text], max_length=limit).ids[0]
        return tokenizer.convert_ids_to_tokens(ids.tolist()), [_every_weight(model, ids) for model in models], too_long

    def draw(text: str, layer: int, head: int) -> str:
        tokens, weights, too_long = look(" ".join(text[:MAX_CHARACTERS].split()))
        if len(tokens) <= tokenizer.num_special_tokens_to_add():
            return note("There is no word to look at yet: type a sentence above and press Enter.")
        caption, drawing = shown(tokens, weights, layer, head)
        if too_long:
            caption += f" Your sentence has more than {limit} tokens; the picture shows the first {limit}."
        return note(caption) + drawing

    heads = min(model.config.num_attention_heads for model in models)
    return explorer(
        draw,
        # not on every letter: half a word means nothing to the model
        text=ipywidgets.Text(sentence, description="Your sentence", continuous_update=False, **FORM),
        layer=ipywidgets.IntSlider(1, 1, models[0].config.num_hidden_layers, description="Layer", **FORM),
        head=ipywidgets.IntSlider(1, 1, heads, description="Head", **FORM),
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
        width=ipywidgets.SelectionSlider(options=widths, value=64, description="D", readout=False, **FORM),
        scaled=ipywidgets.Checkbox(False, description="divide by √D", **FORM),
    )


# -- lesson 05: pruning ---------------------------------------------------------


def pruning_explorer(weights: Float[Tensor, "*shape"], curve: Mapping[float, float]) -> ipywidgets.VBox:
    """Show which weights a threshold removes, and what accuracy is left at that sparsity.

    ``curve`` holds measured accuracies, sparsity -> share of right answers; between them the drawing interpolates.
    """
    size = weights.detach().abs().flatten()
    size = size[:: max(1, len(size) // 200_000)].sort().values.cpu()  # a sample draws the same picture
    reach = size[int(0.999 * (len(size) - 1))].item()
    counts = torch.histc(size, 60, 0.0, reach)
    counts = (counts / counts.max()).tolist()
    known = sorted(curve)

    def draw(percent: int) -> str:
        threshold = reach * percent / 100
        sparsity = float(torch.searchsorted(size, threshold, right=True)) / len(size) if percent else 0.0
        accuracy = _between(sparsity, known, [curve[s] for s in known])
        text = f"Threshold {threshold:.3f}: {sparsity:.0%} of the weights are removed. "
        inside = known[0] <= sparsity <= known[-1]
        text += f"Accuracy about {accuracy:.0%}." if inside else "No accuracy was measured there."
        parts = _threshold_parts(counts, percent / 100) + _curve_parts(curve, sparsity, accuracy if inside else None)
        return note(text) + _svg(660, 250, text, parts)

    slider = ipywidgets.IntSlider(20, 0, 100, description="Threshold (%)", **FORM)
    return explorer(draw, percent=slider)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate linearly between measured points, constant outside."""
    right = next((i for i, known in enumerate(xs) if known >= x), len(xs) - 1)
    left = max(right - 1, 0)
    share = 0.0 if xs[right] == xs[left] else (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + min(max(share, 0.0), 1.0) * (ys[right] - ys[left])


def _threshold_parts(counts: Sequence[float], cut: float) -> list[str]:
    # removed bars are hollow, kept ones full: a second cue beside the colour
    parts, width = [], 300 / len(counts)
    for i, count in enumerate(counts):
        gone = (i + 0.5) / len(counts) <= cut
        fill = f'fill="none" stroke="{plots.COLOURS[1]}"' if gone else f'fill="{plots.COLOURS[0]}"'
        height = 190 * count
        place = f'x="{10 + i * width:.1f}" y="{210 - height:.1f}" width="{width - 1:.1f}" height="{height:.1f}"'
        parts.append(f"<rect {place} {fill}/>")
    x = 10 + 300 * cut
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="12" y2="210" stroke="currentColor" stroke-dasharray="5 3"/>')
    return [*parts, _label("magnitude of a weight: hollow = removed", 160, 235, 12, "middle")]


def _curve_parts(curve: Mapping[float, float], sparsity: float, accuracy: float | None) -> list[str]:
    place = lambda s, a: (370 + 270 * s, 210 - 190 * a)  # noqa: E731
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(s, curve[s]) for s in sorted(curve)))
    parts = [f'<polyline points="{points}" fill="none" stroke="{plots.COLOURS[0]}" stroke-width="2"/>']
    for a in (0.0, 0.5, 1.0):
        y = round(place(0, a)[1])
        parts.append(f'<line x1="370" x2="640" y1="{y}" y2="{y}" stroke="grey" stroke-width="0.5"/>')
        parts.append(_label(f"{a:.0%}", 364, y, 12, "end"))
    if accuracy is not None:
        x, y = place(sparsity, accuracy)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{plots.COLOURS[1]}" stroke="currentColor"/>')
    return [*parts, _label("accuracy over the share removed, 0 to 100 %", 505, 235, 12, "middle")]


# -- lesson 04: the distillation loss ------------------------------------------


def temperature_explorer(
    teacher_logits: Float[Tensor, " K"], student_logits: Float[Tensor, " K"], names: Sequence[str]
) -> ipywidgets.VBox:
    """Show one example's softened probabilities, the entropy, and the student's gradient as T moves.

    Raises UserError unless each class has one name.
    """
    if len(names) != len(teacher_logits):
        raise UserError(f"{len(teacher_logits)} logits but {len(names)} names; name each class once")
    highest = math.log(len(names))

    def draw(temperature: float) -> str:
        teacher, student = ((z / temperature).softmax(-1) for z in (teacher_logits, student_logits))
        entropy = torch.special.entr(teacher).sum().item()
        gap = (student - teacher).norm().item()
        text = (
            f"T = {temperature:.3g}: the teacher's entropy is {entropy:.2f} of {highest:.2f} nats. "
            f"Size of the student's gradient: {gap / temperature:.4f} without T², {gap * temperature:.3f} with it."
        )
        return note(text) + _pairs(teacher.tolist(), student.tolist(), names, f"Teacher and student. {text}")

    slider = ipywidgets.FloatLogSlider(
        value=1.0, base=10, min=-0.5, max=2, step=0.05, readout_format=".3g", description="T", **FORM
    )
    return explorer(draw, temperature=slider)


def _pairs(teacher: Sequence[float], student: Sequence[float], names: Sequence[str], alt: str) -> str:
    """Return two thin bars a class as SVG: the teacher's filled, the student's an outline."""
    first, second = plots.COLOURS[:2]
    parts = [
        f'<rect x="120" y="2" width="14" height="10" fill="{first}"/>',
        _label("teacher", 140, 8, 13, "start"),
        f'<rect x="230" y="3" width="14" height="8" fill="none" stroke="{second}" stroke-width="2"/>',
        _label("student", 250, 8, 13, "start"),
    ]
    for i, (name, p, q) in enumerate(zip(names, teacher, student, strict=True)):
        y, wide, other = 28 * i + 22, round(380 * p), round(380 * q)
        outline = f'fill="none" stroke="{second}" stroke-width="2"'
        parts += [
            _label(name, 110, y + 11, 13, "end"),
            f'<rect x="120" y="{y}" width="{wide}" height="11" fill="{first}"/>',
            f'<rect x="120" y="{y + 13}" width="{other}" height="8" {outline}/>',
            _label(f"{p:.3f} | {q:.3f}", 128 + max(wide, other), y + 11, 12, "start"),
        ]
    return _svg(640, 28 * len(names) + 26, alt, parts)


# -- lesson 02: positions ------------------------------------------------------


def position_explorer(length: int = 48, width: int = 64) -> ipywidgets.VBox:
    """Show how alike position t is to every other, for a slowest clock that turns faster or slower."""

    def draw(t: int, base: int) -> str:
        rate = float(base) ** (-torch.arange(0, width, 2) / width)
        alike = torch.cos((torch.arange(length) - t)[:, None] * rate).mean(1)  # p_t·p_s / p_t·p_t
        near = alike[[s for s in (t - 1, t + 1) if 0 <= s < length]].mean()
        text = (
            f"Position {t}, base {base}: its neighbours are {near:.2f} alike, "
            f"position {length - 1} is {alike[-1]:.2f} alike."
        )
        return note(text) + _strip(alike.tolist(), t, text)

    bases = [10, 100, 1000, 10000, 100000]
    return explorer(
        draw,
        t=ipywidgets.IntSlider(10, 0, length - 1, description="position t", **FORM),
        base=ipywidgets.SelectionSlider(options=bases, value=10000, description="base", readout=False, **FORM),
    )


def _strip(values: Sequence[float], marked: int, alt: str) -> str:
    parts = [f'<line x1="0" x2="{12 * len(values)}" y1="110" y2="110" stroke="currentColor"/>']
    for s, value in enumerate(values):
        height, fill = round(100 * abs(value)), plots.COLOURS[1 if s == marked else 0]
        top = 110 - height if value >= 0 else 110
        parts.append(f'<rect x="{12 * s + 1}" y="{top}" width="10" height="{height}" fill="{fill}"/>')
        if s % 8 == 0:
            parts.append(_label(str(s), 12 * s + 6, 160, 12, "middle"))
    return _svg(12 * len(values) + 10, 170, alt, parts)


# -- lesson 06: TinyBERT's losses -----------------------------------------------


def layer_map_explorer(distances: Mapping[str, Float[Tensor, "M N"]], chosen: Sequence[int]) -> ipywidgets.VBox:
    """Show a layer map of the learner's own, and the losses that it gives.

    ``distances`` holds matrices by name; row m − 1, column n − 1 = the distance between student layer m and teacher
    layer n. ``chosen`` is the map to begin with, one teacher layer a student layer.
    """
    M, N = next(iter(distances.values())).shape

    def draw(**layers: int) -> str:
        g = [layers[f"layer_{m}"] for m in range(1, M + 1)]
        said = []
        for name, matrix in distances.items():
            total = sum(matrix[m, n - 1].item() for m, n in enumerate(g))
            said.append(f"{name} {total:.2f} (no map gives less than {matrix.min(1).values.sum().item():.2f})")
        text = f"g = {tuple(g)}: {', '.join(said)}."
        if g != sorted(g):
            text += " A later student layer learns from an earlier teacher layer."
        if N not in g:
            text += f" The teacher's last layer, {N}, teaches nobody."
        return note(text) + _map_picture(g, N, f"Student layers 1 to {M} learn from teacher layers {g}.")

    sliders = {
        f"layer_{m}": ipywidgets.IntSlider(n, 1, N, description=f"Layer {m} from", **FORM)
        for m, n in enumerate(chosen, start=1)
    }
    return explorer(draw, **sliders)


def _map_picture(g: Sequence[int], N: int, alt: str) -> str:
    """Return teacher layers above, student layers below and lines between, as SVG."""
    spread = lambda count: [40 + round(560 * i / max(count - 1, 1)) for i in range(count)]  # noqa: E731
    teacher, student = spread(N), spread(len(g))
    line = f'stroke="{plots.COLOURS[0]}" stroke-width="3"'
    parts = [
        f'<line x1="{x}" y1="108" x2="{teacher[n - 1]}" y2="42" {line}/>' for x, n in zip(student, g, strict=True)
    ]
    for xs, y, letter, busy in ((teacher, 30, "T", set(g)), (student, 120, "S", set(range(1, len(g) + 1)))):
        for i, x in enumerate(xs, start=1):
            fill = plots.COLOURS[5] if i in busy else "none"  # hollow: teaches nobody
            parts.append(f'<circle cx="{x}" cy="{y}" r="17" fill="{fill}" stroke="currentColor"/>')
            parts.append(_label(f"{letter}{i}", x, y + 1, 13, "middle", ' fill="black"' if i in busy else ""))
    return _svg(640, 150, alt, parts)


# -- lessons 09 and 10: size, latency, accuracy ----------------------------------


def pareto_explorer(own: Sequence[Mapping], behind: Sequence[Mapping] = ()) -> ipywidgets.VBox:
    """Show the ledger's models over a cost, and the cheapest one that is at least as accurate as asked.

    ``own``, ``behind``: rows of ``ledger.rows`` and ``ledger.course_rows``; of models in both, the learner's row counts.
    Raises UserError if there are no rows.
    """
    named = {row["name"] for row in own}
    models = [*own, *(row for row in behind if row["name"] not in named)]
    if not models:
        raise UserError("the ledger has no models of this data yet; run the cells above, which add some")
    number = ledger.numbers(own, behind)
    low, high = (100 * f(row["accuracy"] for row in models) for f in (min, max))

    def draw(cost: str, least: float) -> str:
        fitting = [row for row in models if 100 * row["accuracy"] >= least]
        best = min(fitting, key=lambda row: (row[cost], -row["accuracy"]), default=None)
        if best is None:
            text = f"No model has {least:.1f} %: the best has {high:.1f} %."
        else:
            what = {"megabytes": f"{best['megabytes']:.3g} MB", "milliseconds": f"{best['milliseconds']:.3g} ms"}
            price = what.get(cost, f"{best['parameters'] / 1e6:.3g} M parameters")
            text = f"At least {least:.1f} %: cheapest is {number[best['name']]}, {best['name']}, with {price} "
            text += f"and {100 * best['accuracy']:.1f} %. {len(models) - len(fitting)} of {len(models)} models are too inaccurate."
        parts = _ledger_parts(models, named, number, best, ledger.front(models, cost), cost, least)
        return note(text) + _svg(760, max(300, 30 + 17 * len(models)), text, parts)

    costs = {name: key for key, name in ledger.COSTS.items()}
    choice = ipywidgets.SelectionSlider(options=list(costs.items()), description="Cost", **FORM)
    floor = ipywidgets.FloatSlider(
        (low + high) / 2, min=math.floor(low), max=math.ceil(high), step=0.1, readout_format=".1f", description="At least (%)",
        **FORM,
    )  # fmt: skip
    return explorer(draw, cost=choice, least=floor)


def _ledger_parts(
    models: Sequence[Mapping], own: set[str], number: Mapping[str, int], best: Mapping | None, front: Sequence[Mapping],
    cost: str, least: float,
) -> list[str]:  # fmt: skip
    """Return points over the cost's logarithm, the front as stairs, the floor as a dashed line, and the names beside them."""
    logs = [math.log(row[cost]) for row in models]
    left, right = min(logs) - 0.25, max(logs) + 0.25
    bottom, top = (f(row["accuracy"] for row in models) for f in (min, max))
    bottom, top = bottom - 0.1 * (top - bottom) - 0.005, top + 0.1 * (top - bottom) + 0.005
    across = lambda row: 45 + 405 * (math.log(row[cost]) - left) / (right - left)  # noqa: E731
    up = lambda accuracy: 255 - 245 * (accuracy - bottom) / (top - bottom)  # noqa: E731
    parts = ['<rect x="45" y="10" width="405" height="245" fill="none" stroke="grey"/>']
    for accuracy in (bottom, (bottom + top) / 2, top):
        parts.append(_label(f"{accuracy:.0%}", 40, round(up(accuracy)), 12, "end"))
    for row in (min(models, key=lambda r: r[cost]), max(models, key=lambda r: r[cost])):
        parts.append(_label(f"{row[cost]:.3g}", round(across(row)), 266, 12, "middle"))
    parts.append(_label(f"{ledger.COSTS[cost]}, logarithmic", 248, 284, 12, "middle"))
    corners = [(across(row), up(row["accuracy"])) for row in front]
    ends = [*(x for x, _ in corners[1:]), 450.0]
    stairs = [f"{x:.1f},{y:.1f} {end:.1f},{y:.1f}" for (x, y), end in zip(corners, ends, strict=True)]
    parts.append(f'<polyline points="{" ".join(stairs)}" fill="none" stroke="{plots.COLOURS[0]}" stroke-width="1.5"/>')
    y = min(max(up(least / 100), 10), 255)
    parts.append(f'<line x1="45" x2="450" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-dasharray="5 3"/>')
    for row in sorted(models, key=lambda row: row is best):  # the chosen one on top
        x, y = across(row), up(row["accuracy"])
        fill = plots.COLOURS[1] if row is best else plots.COLOURS[0] if row["name"] in own else "grey"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{11 if row is best else 9}" fill="{fill}"/>')
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="middle" dominant-baseline="central" fill="white"'
        parts.append(f"<text {place}>{number[row['name']]}</text>")
    for i, row in enumerate(sorted(models, key=lambda row: number[row["name"]])):
        mark = "→ " if row is best else "\u00a0\u00a0"
        parts.append(_label(f"{mark}{number[row['name']]} {row['name']}", 462, 18 + 17 * i, 12, "start"))
    return parts
