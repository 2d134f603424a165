"""Every figure function draws on the ax that it is given, returns it, and has a second cue beside colour."""

import inspect
import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from tinylib import plots

RNG = np.random.default_rng(0)
SEEDS = {"labels alone": [0.80, 0.81, 0.79], "soft targets": [0.82, 0.83, 0.82]}
MODEL = {"name": "student", "accuracy": 0.83, "interval": (0.81, 0.85), "megabytes": 57.4}
POINT = {"name": "student", "accuracy": 0.83, "megabytes": 57.4, "milliseconds": 6.0, "parameters": 10**7}
CALLS = {
    "block_diagram": lambda ax: plots.block_diagram(["attention", "+"], ax, skips=[(0, 1)], side={0: "x"}),
    "curves": lambda ax: plots.curves({"loss": [3.0, 2.0, 1.0], "other": [2.0, 2.0, 2.0]}, ax),
    "heatmap": lambda ax: plots.heatmap(np.eye(3), ax, rows="abc", columns="abc", annotate=".1f"),
    "histograms": lambda ax: plots.histograms({"a": RNG.normal(size=50), "b": [1, 2, 3]}, ax),
    "interval_bars": lambda ax: plots.interval_bars({"a": (0.8, 0.7, 0.9), "b": (0.5, 0.4, 0.6)}, ax),
    "layer_losses": lambda ax: plots.layer_losses([{"step": 5, "hidden 1": 0.3}, {"step": 9, "hidden 1": 0.2}], ["hidden"], ax),
    "layer_map": lambda ax: plots.layer_map((1, 3, 4, 6), 6, ax),
    "magnitudes": lambda ax: plots.magnitudes(RNG.normal(size=(20, 30)), 0.5, ax),
    "packed_rows": lambda ax: plots.packed_rows([[("a", 5), ("b", 3)], [("b", 7)]], 10, ax),
    "paired_seeds": lambda ax: plots.paired_seeds(SEEDS, ax),
    "pareto": lambda ax: plots.pareto([POINT], [POINT | {"name": "small", "megabytes": 5.0}], ax),
    "reliability": lambda ax: plots.reliability(RNG.uniform(0.5, 1, 60), RNG.integers(2, size=60), ax),
    "seed_bars": lambda ax: plots.seed_bars(SEEDS, ax),
    "signed_bars": lambda ax: plots.signed_bars({"bad": -2.0, "good": 1.5}, ax),
    "sparsity_curves": lambda ax: plots.sparsity_curves({"global": {0.0: 0.8, 0.5: 0.7}}, ax, chance=0.5),
    "stacked_shares": lambda ax: plots.stacked_shares({"a": {"ffn": 2.0, "rest": 1.0}}, ax, unit=" M"),
    "trade_off": lambda ax: plots.trade_off([MODEL, MODEL | {"name": "teacher", "megabytes": 90.9}], ax),
}


@pytest.fixture(autouse=True)
def no_figures():
    """Begin without figures that another test has left open."""
    plt.close("all")


@pytest.fixture
def ax():
    """Give an ax in the course's style."""
    fig, ax = plots.figure(width=6, height=3)
    yield ax
    plt.close(fig)


def test_every_figure_function_is_tried_here():
    functions = inspect.getmembers(plots, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == plots.__name__ and not n.startswith("_")}
    drawing = {name for name in own if "ax" in inspect.signature(getattr(plots, name)).parameters}
    assert drawing == set(CALLS), "add the new function to CALLS"


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_function_draws_and_returns_its_ax(name, ax):
    assert CALLS[name](ax) is ax
    assert ax.has_data() or ax.texts
    assert plt.get_fignums() == [ax.figure.number], "it draws on the ax it is given and opens no other figure"
    ax.figure.savefig(io.BytesIO(), format="png")


def test_curves_differ_in_line_style_too(ax):
    plots.curves({str(i): [float(i), 1.0] for i in range(6)}, ax)
    assert len({line.get_linestyle() + str(line._dash_pattern) for line in ax.lines}) == 6
    assert len(ax.get_legend().get_texts()) == 6


def test_bars_differ_in_hatching_too(ax):
    plots.seed_bars(SEEDS, ax)
    assert len({patch.get_hatch() for patch in ax.patches}) == 2
    assert "82.3" in [text.get_text() for text in ax.texts]


def test_the_reliability_points_hold_equally_many_texts(ax):
    confidence = np.linspace(0.5, 1.0, 100)
    plots.reliability(confidence, confidence > 0.9, ax, bins=5)
    at, share = ax.lines[-1].get_data()
    assert at == pytest.approx([confidence[i : i + 20].mean() for i in range(0, 100, 20)])
    assert share == pytest.approx([0, 0, 0, 0, 1])


def test_the_palette_stays_apart_in_grey_or_in_hue():
    # Okabe and Ito's colours: for any two, some channel differs by a fifth at least.
    for one, two in itertools.combinations(plots.COLOURS, 2):
        assert max(abs(a - b) for a, b in zip(to_rgb(one), to_rgb(two), strict=True)) > 0.2, (one, two)


def test_show_displays_a_picture_with_its_alt_text_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    fig, ax = plots.figure(width=8, height=4)
    plots.curves({"loss": [1.0, 0.5]}, ax).set_title("It falls")
    plots.show(fig, "The loss falls.")
    assert shown[1].data.endswith(">Picture: The loss falls.</span>"), "for screen readers: JupyterLab drops alt texts"
    data, metadata = shown[0]._repr_mimebundle_()
    assert metadata["image/png"] == {"alt": "The loss falls.", "width": 800}, "as wide on the page as the figure says"
    assert Image.open(io.BytesIO(shown[0].data)).size == (1200, 600), "finer than the page, for print"
    assert not plt.fignum_exists(fig.number)


def test_a_figure_without_a_title_or_wider_than_a_page_is_refused_under_test(monkeypatch):
    monkeypatch.setenv("TINYLIB_TYPECHECK", "1")
    monkeypatch.setattr("IPython.display.display", lambda picture: None)
    fig, axes = plots.figure(1, 2, width=6, height=3)
    with pytest.raises(ValueError, match="no title"):
        plots.show(fig, "alt")
    axes[1].set_title("left", loc="left")
    plots.show(fig, "one panel's title is enough")
    fig, _ = plots.figure(width=12, height=3)
    fig.suptitle("as wide as a page")
    plots.show(fig, "alt")
    fig, _ = plots.figure(width=12.5, height=3)
    fig.suptitle("wider")
    with pytest.raises(ValueError, match="12.5 inches"):
        plots.show(fig, "alt")
    monkeypatch.delenv("TINYLIB_TYPECHECK")
    plots.show(fig, "a learner's own figure may be as they like")


def test_a_models_name_crosses_no_other_models_interval(ax):
    sizes = {"teacher": 90.9, "student": 57.4, "student, 60% pruned": 47.1}
    plots.trade_off([MODEL | {"name": name, "megabytes": size} for name, size in sizes.items()], ax)
    ax.figure.canvas.draw()
    for name in ax.texts:
        box = name.get_window_extent().transformed(ax.transData.inverted())
        assert not any(box.x0 <= size <= box.x1 for size in sizes.values()), name.get_text()


def test_a_text_that_is_cut_or_reaches_into_another_panel_is_found_and_refused_under_test(monkeypatch):
    fig, axes = plots.figure(1, 2, width=6, height=3)
    axes[0].set(title="fits", xlabel="x", ylabel="y")
    axes[1].twinx().set_ylabel("a second axis")
    assert plots.outside(fig) == []
    axes[0].set_title("a title that is far too long for the panel that it stands above, reaching over the next")
    fig.text(0.9, 0.01, "cut by the frame")
    assert len(plots.outside(fig)) == 2
    monkeypatch.setenv("TINYLIB_TYPECHECK", "1")
    with pytest.raises(ValueError, match="cut by the frame"):
        plots.show(fig, "alt")
    plt.close(fig)


def test_ticks_beyond_the_ends_of_an_axis_are_not_taken_for_cut_texts(ax):
    ax.plot([1, 2], [3, 4])
    ax.set(xlim=(1.4, 1.6), xticks=[0, 1.5, 40])
    assert plots.outside(ax.figure) == []
