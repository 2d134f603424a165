"""The course's figures: each function takes data and an ``ax``, draws, and returns the ax.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a second cue (line style, marker, text) always goes
with them. ``show(fig, alt)`` puts a figure on the page with its alt text.
"""

import html
import io
import math
import os
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox, BboxBase

from tinylib import ledger

# Okabe & Ito 2008, "Color Universal Design"; black last, since axes and text use it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

PAGE_DPI = 100  # pixels an inch that a picture takes on the page
SAVED_DPI = 150  # pixels an inch that it holds: sharp in print, and a lesson's file grows by less than a half
# What a page does not show and a screen reader reads (the usual rules for a class "visually hidden").
UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"
WIDEST = 12.0  # inches; a wider figure is scaled down on the page, and its texts with it


def style() -> None:
    """Set the course's look: readable at 1200 pixels and in print."""
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS), font_scale=1.05)
    plt.rcParams.update(
        {"figure.figsize": (8, 4), "figure.dpi": PAGE_DPI, "axes.titlesize": "medium", "axes.titleweight": "bold"}
    )


def figure(rows: int = 1, columns: int = 1, width: float | int = 8.0, height: float | int = 4.0, **options):
    """Return a figure and its axes in the course's style; width and height in inches, for the whole figure."""
    style()
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def outside(fig: Figure) -> list[str]:
    """Return the texts of a figure that reach over its edge, and would be cut, or from one panel into another."""
    fig.canvas.draw()  # the layout is made while drawing
    renderer, drawn = fig.canvas.get_renderer(), []
    draw_text = renderer.draw_text
    # what is really drawn: a figure also holds texts that are not, such as ticks beyond an axis' end
    renderer.draw_text = lambda *args, mtext=None, **more: (drawn.append(mtext), draw_text(*args, mtext=mtext, **more))
    fig.draw(renderer)
    del renderer.draw_text
    panels = {ax: ax.get_window_extent(renderer) for ax in fig.axes}
    found = []
    for text in dict.fromkeys(t for t in drawn if t is not None and t.get_text().strip()):
        box, own = text.get_window_extent(renderer), panels.get(text.axes)
        beyond = box.x0 < -1 or box.y0 < -1 or box.x1 > fig.bbox.x1 + 1 or box.y1 > fig.bbox.y1 + 1
        # panels that share their place (twin axes, insets) share their texts' place too
        others = [p for p in panels.values() if own and p is not own and not _overlap(p, own)]
        if beyond or any(_overlap(box, p) for p in others):
            found.append(text.get_text())
    return found


def _overlap(one: BboxBase, other: BboxBase) -> bool:
    both = Bbox.intersection(one, other)
    return both is not None and both.width > 2 and both.height > 2


def show(fig: Figure, alt: str) -> None:
    """Display a figure as PNG with alt text that says what it shows, and close it.

    JupyterLab and nbconvert leave a picture's alt text in the file, so it follows once more as text that is there for screen
    readers alone.
    While shapes are checked (``TINYLIB_TYPECHECK=1``, as under test) a text that is cut by the frame, a figure without any
    title or one wider than 12 inches raises ValueError.
    """
    from IPython.display import HTML, Image, display
    from PIL import Image as Pillow

    if os.environ.get("TINYLIB_TYPECHECK") == "1":
        _examine(fig)
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=SAVED_DPI)
    wide = round(PAGE_DPI * fig.get_figwidth())
    plt.close(fig)
    # 256 colours look the same in a plot and make the notebook's file two to three times smaller
    Pillow.open(drawn).convert("RGB").quantize(256, dither=Pillow.Dither.NONE).save(small, format="png", optimize=True)
    display(Image(data=small.getvalue(), format="png", alt=alt, width=wide))
    display(HTML(f'<span style="{UNSEEN}">Picture: {html.escape(alt)}</span>'))


def _examine(fig: Figure) -> None:
    """Raise ValueError for a figure that a reader could not use as it stands."""
    if cut := outside(fig):
        raise ValueError(f"these texts reach over the figure's edge or into another panel: {cut}; make the figure larger")
    titles = [fig.get_suptitle(), *(ax.get_title(place) for ax in fig.axes for place in ("left", "center", "right"))]
    if not any(title.strip() for title in titles):
        raise ValueError("the figure has no title: say above a panel, or with fig.suptitle, what is to be seen")
    if fig.get_figwidth() > WIDEST:
        raise ValueError(f"the figure is {fig.get_figwidth():g} inches wide, more than {WIDEST:g}: take fewer panels a row")


def curves(series: Mapping[str, Sequence[float]], ax: Axes, x: Sequence[float] | None = None) -> Axes:
    """Draw named curves over common x values (over 1, 2, … if none are given); colour and line style tell them apart."""
    for i, (name, values) in enumerate(series.items()):
        at = np.arange(1, len(values) + 1) if x is None else x
        ax.plot(at, values, color=COLOURS[i % 8], linestyle=LINES[i % 6], linewidth=2, label=name)
    if len(series) > 1:
        ax.legend()
    return ax


def heatmap(
    values,
    ax: Axes,
    rows: Sequence[str | int] | None = None,
    columns: Sequence[str | int] | None = None,
    annotate: str | None = None,
    **options,
) -> Axes:
    """Draw a matrix, light = large; ``annotate`` is the format of the numbers written into the cells (".2f")."""
    options = {"cmap": "cividis", "cbar": False, "square": True} | options
    sns.heatmap(
        np.asarray(values), ax=ax, annot=annotate is not None, fmt=annotate or "",
        xticklabels=columns if columns is not None else "auto", yticklabels=rows if rows is not None else "auto", **options,
    )  # fmt: skip
    ax.tick_params(axis="y", rotation=0)
    return ax


def seed_bars(groups: Mapping[str, Sequence[float]], ax: Axes, percent: bool = True) -> Axes:
    """Draw the mean of each group as a bar, every seed as a dot on it, and the mean in figures above it."""
    for i, values in enumerate(groups.values()):
        shown = np.asarray(values, dtype=float) * (100 if percent else 1)
        ax.bar(
            i, shown.mean(), color=COLOURS[i % 8], alpha=0.75, hatch=("", "//", "..", "xx")[i % 4], edgecolor="white"
        )
        ax.plot([i] * len(shown), shown, "o", color="black", markersize=5)
        ax.annotate(f"{shown.mean():.1f}", (i, shown.max()), xytext=(0, 6), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(groups)), list(groups))
    return ax


def trade_off(rows: Sequence[Mapping], ax: Axes, x: str = "megabytes", label: str = "size of the file (MB)") -> Axes:
    """Draw models as points, accuracy in percent over size; each row has name, accuracy, interval (low, high) and ``x``."""
    widest = max(row[x] for row in rows)
    for i, row in enumerate(rows):
        low, high = row["interval"]
        error = [[100 * (row["accuracy"] - low)], [100 * (high - row["accuracy"])]]
        look = {"color": COLOURS[i % 8], "marker": MARKERS[i % 6], "markersize": 9, "capsize": 4, "linestyle": ""}
        ax.errorbar(row[x], 100 * row["accuracy"], yerr=error, **look)
        # to the left where the interval of a slightly larger model would cross the name
        left = any(0 < other[x] - row[x] < 0.3 * widest for other in rows)
        place = {"xytext": (-9 if left else 9, 9), "ha": "right" if left else "left"}
        ax.annotate(row["name"], (row[x], 100 * row["accuracy"]), textcoords="offset points", **place)
    ax.set_xlim(0, 1.35 * widest)
    ax.set(xlabel=label, ylabel="test accuracy (%)")
    return ax


def pareto(own: Sequence[Mapping], behind: Sequence[Mapping], ax: Axes, cost: str = "megabytes") -> Axes:
    """Draw the ledger's models as numbered points, accuracy over a cost (log scale), and the front of those not beaten.

    ``own``: filled where on the front, hollow where another model is cheaper and no less accurate. ``behind``: the course's,
    small and grey. The legend names the numbers.
    """
    number, best = ledger.numbers(own, behind), ledger.front(own, cost)
    ends = [min(row[cost] for row in [*own, *behind]) / 1.5, max(row[cost] for row in [*own, *behind]) * 1.5]
    for row in behind:
        ax.plot(row[cost], 100 * row["accuracy"], "o", color="0.75", markersize=6, zorder=1)
    if best:
        at, up = zip(*((row[cost], 100 * row["accuracy"]) for row in best), strict=True)
        ax.plot([*at, ends[1]], [*up, up[-1]], drawstyle="steps-post", color=COLOURS[0], linewidth=1.5, zorder=2)
    for row in own:
        unbeaten = row in best
        fill = {"color": COLOURS[0]} if unbeaten else {"markerfacecolor": "white", "markeredgecolor": COLOURS[1]}
        ax.plot(row[cost], 100 * row["accuracy"], "o" if unbeaten else "s", markersize=15, zorder=3, **fill)
    named = {row["name"] for row in own}
    for together in _coinciding([*own, *(row for row in behind if row["name"] not in named)], cost):
        first, point = together[0], (together[0][cost], 100 * together[0]["accuracy"])
        mine = first["name"] in named
        said = [str(number[row["name"]]) for row in together]
        look = {"textcoords": "offset points", "va": "center", "fontsize": 9, "zorder": 4}
        if mine:  # the number stands in the marker, of the others that it hides beside it
            ax.annotate(said.pop(0), point, xytext=(0, 0), ha="center", color="white" if first in best else "black", **look)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # the front may pass here
        place = {"xytext": (11, 0), "ha": "left"} if mine else {"xytext": (0, 10), "ha": "center"}
        if said:
            ink = "black" if together[-1]["name"] in named else "0.35"
            ax.annotate(", ".join(sorted(said, key=int)), point, color=ink, bbox=box, **place, **look)
    names = [plt.Line2D([], [], linestyle="", label=f"{n}  {name}") for name, n in number.items()]
    legend = ax.legend(handles=names, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False, handlelength=0)
    for text, name in zip(legend.get_texts(), number, strict=True):
        text.set_color("black" if name in named else "0.35")
    ax.set(xscale="log", xlim=ends, xlabel=ledger.COSTS[cost], ylabel="test accuracy (%)")
    ax.margins(y=0.12)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return ax


def _coinciding(rows: Sequence[Mapping], cost: str) -> list[list[Mapping]]:
    """Group models whose points lie within half a marker of the first one's: 12 % of the cost, half a point of accuracy."""
    groups: list[list[Mapping]] = []
    for row in rows:
        near = lambda group, row=row: (  # noqa: E731
            abs(math.log10(group[0][cost] / row[cost])) < 0.05 and abs(group[0]["accuracy"] - row["accuracy"]) < 0.005
        )
        found = next(filter(near, groups), None)
        groups.append([row]) if found is None else found.append(row)
    return groups


def interval_bars(groups: Mapping[str, tuple[float, float, float]], ax: Axes) -> Axes:
    """Draw (value, low, high) of each group as a horizontal bar in per cent with its interval and figures."""
    for i, ends in enumerate(groups.values()):
        value, low, high = (100 * end for end in ends)
        ax.barh(i, value, color=COLOURS[i % 8], alpha=0.75, hatch=("", "//", "..", "xx")[i % 4], edgecolor="white")
        error = [[value - low], [high - value]]
        ax.errorbar(value, i, xerr=error, color="black", capsize=5, linewidth=1.5)
        ax.annotate(f"{value:.1f}", (high, i), xytext=(8, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()  # the first group on top
    ax.grid(axis="y", visible=False)
    return ax


def reliability(confidence, right, ax: Axes, bins: int = 5, label: str | None = None, index: int = 0) -> Axes:
    """Draw how often predictions of like confidence are right; on the diagonal, confidence can be believed.

    ``confidence`` and ``right`` (0 or 1) are one number a text; each point holds the same number of texts.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    if not index:
        low = np.floor(10 * confidence.min()) / 10
        ax.plot([low, 1], [low, 1], color="grey", linewidth=1)
        ax.set(xlabel="confidence: the largest probability", ylabel="share that is right")
    ax.plot(
        [confidence[rows].mean() for rows in parts], [right[rows].mean() for rows in parts],
        color=COLOURS[index % 8], linestyle=LINES[index % 6], marker=MARKERS[index % 6], linewidth=2, label=label,
    )  # fmt: skip
    return ax


def histograms(groups: Mapping, ax: Axes, bins: Sequence | int = 20) -> Axes:
    """Draw the outline of each group's histogram (name -> numbers); the legend gives its mean."""
    for i, (name, values) in enumerate(groups.items()):
        values = np.asarray(values, dtype=float)
        look = {"color": COLOURS[i % 8], "linestyle": LINES[i % 6], "linewidth": 2}
        ax.hist(values, bins=bins, histtype="step", label=f"{name}, mean {values.mean():.0f}", **look)
    ax.legend()
    return ax


def signed_bars(values: Mapping[str, float], ax: Axes) -> Axes:
    """Draw named values as horizontal bars; colour and hatching tell those below zero from the others."""
    for name, value in values.items():
        low = int(value < 0)
        ax.barh(name, value, color=COLOURS[low], hatch="//" if low else "", edgecolor="white", alpha=0.85)
    ax.axvline(0, color="black", linewidth=1)
    ax.grid(axis="y", visible=False)
    return ax


def magnitudes(weights, threshold: float, ax: Axes, bins: int = 80) -> Axes:
    """Draw the distribution of weights with those of magnitude up to ``threshold`` marked as removed."""
    weights = np.asarray(weights, dtype=float).ravel()
    reach = np.quantile(np.abs(weights), 0.999)  # a few outliers would squeeze the rest into one bar
    edges = np.linspace(-reach, reach, bins + 1)
    gone = np.abs(weights) <= threshold
    names = [f"removed, {gone.mean():.0%}", f"kept, {1 - gone.mean():.0%}"]
    look = {"stacked": True, "color": [COLOURS[1], COLOURS[0]], "label": names}
    _, _, (removed, _) = ax.hist([weights[gone], weights[~gone]], edges, **look)
    for bar in removed:
        bar.set(hatch="//", alpha=0.7)
    for side in (-threshold, threshold):
        ax.axvline(side, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="weight", yticks=[])
    ax.legend()
    return ax


def sparsity_curves(series: Mapping[str, Mapping[float, float]], ax: Axes, chance: float | None = None) -> Axes:
    """Draw accuracy over the share of weights removed, name -> {sparsity: accuracy}, both in per cent."""
    for i, (name, points) in enumerate(series.items()):
        look = {"color": COLOURS[i % 8], "linestyle": LINES[i % 6], "marker": MARKERS[i % 6]}
        at = sorted(points)
        ax.plot([100 * s for s in at], [100 * points[s] for s in at], linewidth=2, label=name, **look)
    if chance is not None:
        ax.axhline(100 * chance, color="grey", linewidth=1)
        ax.annotate("guessing", (0, 100 * chance), xytext=(0, 4), textcoords="offset points", color="dimgrey")
    ax.set(xlabel="weights removed (%)", ylabel="accuracy (%)")
    ax.legend()
    return ax


def paired_seeds(groups: Mapping[str, Sequence[float]], ax: Axes, percent: bool = True) -> Axes:
    """Draw each seed as a line from group to group, and each group's mean as a bar across with its figure.

    Runs that share a seed share their start and the order of the data, so the slope of a line is what the
    method changed for that seed.
    """
    values = np.asarray(list(groups.values()), dtype=float) * (100 if percent else 1)
    at = np.arange(len(groups))
    for seed, line in enumerate(values.T):
        cue = {"color": COLOURS[seed % 8], "linestyle": LINES[seed % 6], "marker": MARKERS[seed % 6]}
        ax.plot(at, line, label=f"seed {seed}", **cue)
    for x, mean in zip(at, values.mean(axis=1), strict=True):
        ax.plot([x - 0.12, x + 0.12], [mean, mean], color="black", linewidth=3)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}  # the lines pass behind it
        ax.annotate(f"mean {mean:.1f}", (x + 0.15, mean), va="center", bbox=box)
    ax.set(xticks=at, xticklabels=list(groups), xlim=(-0.4, len(groups) - 0.4))
    ax.legend(loc="best")
    return ax


def block_diagram(
    boxes: Sequence[str], ax: Axes, skips: Sequence[tuple[int, int]] = (), side: Mapping[int, str] | None = None
) -> Axes:
    """Draw a layer as boxes from bottom to top, a box "+" as a circle.

    skips: (i, j) leads what enters box i past the boxes between to the "+" at j; side: what box i gets from outside.
    """
    fills = {"LayerNorm": COLOURS[4], "attention": COLOURS[5], "feed": COLOURS[2], "MLP": COLOURS[2]}
    drawn = []
    for i, text in enumerate(boxes):
        fill = next((colour for word, colour in fills.items() if word in text), "white")
        shape = "circle,pad=0.15" if text == "+" else "round,pad=0.4"
        box = ax.text(0, i, text, ha="center", va="center", fontsize=11,
                      bbox={"boxstyle": shape, "facecolor": fill, "edgecolor": "black"})  # fmt: skip
        drawn.append(box.get_bbox_patch())
    for i, box in enumerate(drawn):
        _arrow(ax, (0, i - 1 if i else -0.75), (0, i), drawn[i - 1] if i else None, box)
    _arrow(ax, (0, len(boxes) - 1), (0, len(boxes) - 0.3), drawn[-1])
    for i, j in skips:
        ax.plot([0, -1.15, -1.15], [i - 0.5, i - 0.5, j], color="black", linewidth=1.3, zorder=1)
        _arrow(ax, (-1.15, j), (0, j), end=drawn[j])
    for i, text in (side or {}).items():
        ax.text(1.1, i, text, va="center", fontsize=10)
        _arrow(ax, (1.07, i), (0, i), end=drawn[i])
    ax.set(xlim=(-1.5, 2.3 if side else 1.5), ylim=(-0.9, len(boxes) - 0.1))
    ax.axis("off")
    return ax


def _arrow(ax: Axes, start: tuple, end_at: tuple, begin=None, end=None) -> None:
    """Draw an arrow between two points; one in a box begins or ends at that box's edge, however large it is drawn."""
    look = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    # after the boxes, whose places are known once they are drawn
    ax.annotate("", end_at, start, arrowprops=look | {"patchA": begin, "patchB": end}, zorder=4)


def stacked_shares(rows: Mapping[str, Mapping[str, float]], ax: Axes, unit: str = "") -> Axes:
    """Draw one bar of 100 % a row, cut into named parts; each piece shows its own amount, the row's end the sum."""
    for y, parts in enumerate(rows.values()):
        total, left = sum(parts.values()), 0.0
        for i, (part, amount) in enumerate(parts.items()):
            width = 100 * amount / total
            ax.barh(
                y, width, left=left, color=COLOURS[i % 8], alpha=0.75, hatch=("", "//", "..", "xx")[i % 4],
                edgecolor="white", label=part if y == 0 else None,
            )  # fmt: skip
            if width > 6:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                ax.text(left + width / 2, y, f"{amount:.1f}{unit}", ha="center", va="center", bbox=box)
            left += width
        ax.text(101, y, f"{total:.1f}{unit}", va="center", fontweight="bold")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set(xlim=(0, 112), xlabel="share (%)")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=4, frameon=False)
    return ax


def layer_map(chosen: Sequence[int], teacher_layers: int, ax: Axes, ends: bool = False) -> Axes:
    """Draw teacher and student as columns of layers, an arrow from each teacher layer to the one that learns from it.

    chosen: the teacher layer of each student layer, from the lowest; ends: draw the logits too. The student is
    stretched to the teacher's height; teacher layers that teach nobody are hollow.
    """
    top, M = teacher_layers + ends, len(chosen)
    pairs = {0: 0} | dict(enumerate(chosen, start=1)) | ({M + 1: top} if ends else {})
    place = {0: {n: n for n in range(top + 1)}, 2: {m: m * top / (M + ends) for m in pairs}}
    boxes = {}
    for x, heights in place.items():
        for n, y in heights.items():
            name = "embeddings" if n == 0 else "logits" if ends and n == len(heights) - 1 else f"layer {n}"
            busy = x == 2 or n in pairs.values()
            look = {"facecolor": COLOURS[4 if x else 5] if busy else "white", "linestyle": "-" if busy else "--"}
            box = {"boxstyle": "round,pad=0.3", "edgecolor": "black"} | look
            text = ax.text(x, y, f"{name:^10}", ha="center", va="center", fontsize=9, family="monospace", bbox=box)
            boxes[x, n] = text.get_bbox_patch()
        ax.text(x, top + 0.75, "student" if x else "teacher", ha="center", fontweight="bold")
    for m, n in pairs.items():
        _arrow(ax, (0, n), (2, place[2][m]), boxes[0, n], boxes[2, m])
    ax.set(xlim=(-0.7, 2.7), ylim=(-0.5, top + 1.1))
    ax.axis("off")
    return ax


def packed_rows(rows: Sequence[Sequence[tuple[str, int]]], length: int, ax: Axes) -> Axes:
    """Draw sequences of ``length`` positions as rows of named pieces, (name, tokens) each; what is left over is padding."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row))
    drawn = set()
    for y, row in enumerate(rows):
        left = 0
        for name, tokens in row:
            i = names.index(name)
            look = {"color": COLOURS[i % 8], "hatch": ("", "//", "..", "xx")[i % 4], "edgecolor": "white", "alpha": 0.8}
            ax.barh(y, tokens, left=left, label=None if name in drawn else name, **look)
            drawn.add(name)
            left += tokens
        ax.barh(y, length - left, left=left, color="white", edgecolor="grey", linestyle="--", zorder=0)
    padding = 1 - sum(tokens for row in rows for _, tokens in row) / (length * len(rows))
    ax.set(
        xlim=(0, length),
        yticks=range(len(rows)),
        yticklabels=range(1, len(rows) + 1),
        xlabel="position",
        ylabel="sequence",
    )
    ax.set_title(f"{len(rows)} sequences, {padding:.0%} padding")
    ax.invert_yaxis()
    ax.grid(visible=False)
    return ax


def layer_losses(rows: Sequence[Mapping[str, float]], kinds: Sequence[str], ax: Axes) -> Axes:
    """Draw losses over the steps, a line a layer, on a logarithmic axis; rows are {"step": …, "hidden 1": …} of a run.

    ``kinds`` are the losses wanted ("hidden"); colour, line style and marker tell the layers apart, 0 being the embeddings.
    """
    steps = [row["step"] for row in rows]
    for name in rows[0]:
        kind, _, layer = name.partition(" ")
        if kind in kinds:
            m = int(layer)
            look = {"color": COLOURS[m % 8], "linestyle": LINES[m % 6], "marker": MARKERS[m % 6], "markersize": 5}
            label = f"layer {m}" if m else "embeddings"
            ax.plot(steps, [row[name] for row in rows], label=label, markevery=max(1, len(rows) // 8), **look)
    ax.set(yscale="log", xlabel="step", ylabel="loss on held-out text")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # plain figures: left to itself the axis writes 2 × 10⁻¹
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize="small", loc="upper right")  # losses fall
    return ax
