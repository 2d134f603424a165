"""The widgets, moved as a learner's browser moves them: by setting the values of their controls."""

import inspect
import itertools
import re
import time
import xml.etree.ElementTree as ET

import ipywidgets
import pytest
import torch

from tinylib import ledger, plots, widgets
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError
from tinylib.text import load_tokenizer

# A moved slider is to be answered in 0.1 s. A test's clock also shows what else runs, so the limit is told in passes of the
# lessons' teacher over the longest sentence that is shown: one takes 16 to 20 ms of a quiet laptop's core.
PASSES, LONGEST = 6, 48


def parts(widget: ipywidgets.VBox) -> tuple[dict[str, ipywidgets.Widget], ipywidgets.HTML]:
    """Give a widget's controls by their labels, and its drawing."""
    *controls, drawing = widget.children
    return {control.description: control for control in controls}, drawing


def parse(drawing: ipywidgets.HTML) -> ET.Element:
    """Parse the drawing strictly; text that was not escaped would break it or add elements."""
    return ET.fromstring(f"<div>{drawing.value}</div>")


def labels(drawing: ipywidgets.HTML) -> list[str]:
    """Give the row labels of a heat map: the tokens."""
    return [e.text for e in parse(drawing).iter("text") if e.get("text-anchor") == "end"]


def patience() -> float:
    """Return how many seconds of computing an answer may take on this machine, as busy as it is."""
    teacher, ids = random_bert(BertConfig.minilm_l6()), torch.arange(LONGEST)[None]
    with torch.inference_mode():
        return PASSES * seconds(lambda: teacher(ids))


def seconds(act) -> float:
    """Measure the computing time of one act of the learner's, the best of three."""
    found = []
    for _ in range(3):
        start = time.thread_time()
        act()
        found.append(time.thread_time() - start)
    return min(found)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm-l6")


@pytest.fixture(scope="module")
def small():
    """Give a small BERT with MiniLM's vocabulary."""
    config = BertConfig.parse("2x24", intermediate_size=32, num_attention_heads=3, max_position_embeddings=64)
    return Bert(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def explorer(small, tokenizer):
    return widgets.head_explorer(small, tokenizer, "The film was not good.")


def test_the_drawing_shows_the_tokens_of_the_sentence(explorer):
    _, drawing = parts(explorer)
    assert labels(drawing) == ["[CLS]", "the", "film", "was", "not", "good", ".", "[SEP]"]
    assert parse(drawing).find("svg").get("role") == "img"
    assert "layer 1, head 1" in parse(drawing).find("svg").get("aria-label")


def test_the_weights_are_the_models(small, tokenizer, explorer):
    controls, drawing = parts(explorer)
    controls["Layer"].value, controls["Head"].value = 2, 3
    ids = torch.tensor([tokenizer("The film was not good.")["input_ids"]])
    weights = small(ids, keep_scores=[2]).scores[2][0, 2].softmax(-1)
    shown = [float(e.text.rsplit(" ", 1)[1]) for e in parse(drawing).iter("title")]
    assert len(shown) == 64
    assert shown == pytest.approx(weights.flatten().tolist(), abs=0.006)


def test_the_sliders_cover_the_models_layers_and_heads(explorer):
    controls, _ = parts(explorer)
    assert (controls["Layer"].min, controls["Layer"].max) == (1, 2)
    assert (controls["Head"].min, controls["Head"].max) == (1, 3)


def test_each_slider_redraws_and_a_repeated_setting_gives_the_same_picture(explorer):
    controls, drawing = parts(explorer)
    first = drawing.value
    controls["Head"].value = 2
    second = drawing.value
    controls["Layer"].value = 2
    assert len({first, second, drawing.value}) == 3
    controls["Layer"].value, controls["Head"].value = 1, 1
    assert drawing.value == first


def test_a_sentence_is_escaped(explorer):
    controls, drawing = parts(explorer)
    controls["Your sentence"].value = "<img src=x onerror=alert(1)> & \"quotes' </svg><script>"
    assert not {e.tag for e in parse(drawing).iter()} - {"div", "p", "svg", "rect", "text", "g", "title"}
    assert "<" in labels(drawing)
    assert "&" in labels(drawing)


@pytest.mark.parametrize("text", ["", "   ", "\t\n", "\u200b", "\x00"])
def test_an_empty_sentence_is_answered_by_a_sentence(explorer, text):
    controls, drawing = parts(explorer)
    controls["Your sentence"].value = "something"
    controls["Your sentence"].value = text
    assert "type a sentence" in drawing.value
    assert "<svg" not in drawing.value
    controls["Layer"].value = 2  # a slider moved meanwhile does no harm
    controls["Your sentence"].value = "A film."
    assert labels(drawing)[1:-1] == ["a", "film", "."]


def test_a_long_sentence_is_cut_and_says_so(explorer):
    controls, drawing = parts(explorer)
    controls["Your sentence"].value = "film " * 46
    assert "more than" not in drawing.value
    controls["Your sentence"].value = "film " * 47
    assert f"more than {widgets.MAX_TOKENS} tokens" in drawing.value
    assert len(labels(drawing)) == widgets.MAX_TOKENS
    controls["Your sentence"].value = "film " * 1_000_000
    assert len(labels(drawing)) == widgets.MAX_TOKENS


def test_a_model_of_few_positions_is_not_asked_for_more(tokenizer):
    config = BertConfig.parse("1x12", intermediate_size=8, max_position_embeddings=6)
    controls, drawing = parts(widgets.head_explorer(Bert(config), tokenizer, "one two three four five six"))
    assert len(labels(drawing)) == 6
    assert "more than 6 tokens" in drawing.value


def test_words_that_no_vocabulary_knows_are_shown(explorer):
    controls, drawing = parts(explorer)
    controls["Your sentence"].value = "映画 🎬 كان film"
    assert labels(drawing)[0] == "[CLS]"
    assert "[UNK]" in labels(drawing)


def test_the_model_keeps_its_mode_and_gets_no_gradient(small, tokenizer):
    small.train()
    _, drawing = parts(widgets.head_explorer(small, tokenizer, "A film."))
    _, again = parts(widgets.head_explorer(small, tokenizer, "A film."))
    assert small.training
    assert drawing.value == again.value, "dropout must not act in a picture"
    assert all(p.grad is None for p in small.parameters())
    small.eval()


@pytest.mark.alone
def test_a_moved_slider_is_answered_at_once(tokenizer):
    explorer = widgets.head_explorer(Bert.from_pretrained("minilm-l6"), tokenizer, "film " * 46)
    controls, _ = parts(explorer)
    layers = iter(range(2, 7))
    assert seconds(lambda: setattr(controls["Layer"], "value", next(layers))) < patience()
    texts = iter("abcdef")
    new = seconds(
        lambda: setattr(controls["Your sentence"], "value", f"The film was {next(texts)}, not good.")
    )
    assert new < patience()


def test_the_sentence_is_read_after_enter_only_and_every_control_has_a_label(explorer):
    controls, _ = parts(explorer)
    assert controls["Your sentence"].continuous_update is False
    # what ipywidgets itself makes reachable by Tab and the arrow keys, and nothing else
    usable = ipywidgets.Text | ipywidgets.IntSlider | ipywidgets.SelectionSlider | ipywidgets.Checkbox
    for widget in (explorer, widgets.scale_explorer()):
        found, _ = parts(widget)
        assert all(isinstance(control, usable) and label for label, control in found.items())


def test_scaling_keeps_the_softmax_from_choosing_one_key():
    controls, drawing = parts(widgets.scale_explorer())
    controls["D"].value = 1024

    def entropy() -> float:
        return float(re.search(r"weights: ([\d.]+) of 3\.00 bits", drawing.value)[1])

    plain = entropy()
    controls["divide by √D"].value = True
    assert plain < 0.5 < 1.5 < entropy()
    assert len(parse(drawing).findall("svg/rect")) == 8


def test_a_users_error_is_shown_as_its_sentence():
    def draw(size: int) -> str:
        if size > 3:
            raise UserError("size=4 is more than <3>; take less")
        return widgets.note(f"size {size}")

    slider = ipywidgets.IntSlider(1, 0, 5, description="size")
    _, drawing = parts(widgets.explorer(draw, size=slider))
    slider.value = 4
    assert parse(drawing).find("p").text == "size=4 is more than <3>; take less"
    slider.value = 2
    assert parse(drawing).find("p").text == "size 2"


def test_a_figure_becomes_a_picture_with_alt_text():
    plots.plt.close("all")  # what another test has left open
    fig, ax = plots.figure()
    ax.plot([1, 2])
    html = widgets.picture(fig, 'a line, "rising" & <short>')
    image = ET.fromstring(html.replace('">', '"/>'))
    assert image.get("alt") == 'a line, "rising" & <short>'
    assert image.get("src").startswith("data:image/png;base64,iVBOR")
    assert not plots.plt.get_fignums()


def test_a_layer_map_shows_its_losses_and_what_is_odd_about_it():
    distances = {"hidden loss": torch.arange(12.0).reshape(2, 6), "attention loss": torch.ones(2, 6)}
    controls, drawing = parts(widgets.layer_map_explorer(distances, (3, 6)))
    assert list(controls) == ["Layer 1 from", "Layer 2 from"]
    assert "hidden loss 13.00 (no map gives less than 6.00), attention loss 2.00" in drawing.value
    assert "teaches nobody" not in drawing.value
    controls["Layer 2 from"].value = 1
    text = parse(drawing).find("p").text
    assert "g = (3, 1): hidden loss 8.00" in text
    assert "an earlier teacher layer" in text
    assert "last layer, 6, teaches nobody" in text
    circles = parse(drawing).findall("svg/circle")
    assert [c.get("fill") for c in circles].count("none") == 4, "teacher layers that teach nobody are hollow"
    assert len(parse(drawing).findall("svg/line")) == 2


# -- lesson 07: teacher and student side by side --------------------------------------------------------------


@pytest.fixture
def pair(small, tokenizer):
    other = Bert(small.config, torch.Generator().manual_seed(1)).eval()
    return small, other, widgets.attention_pair_explorer(small, other, tokenizer, (2, 1), "The film was not good.")


def test_the_student_stands_beside_the_layer_that_it_learns_from(pair, tokenizer):
    teacher, student, widget = pair
    controls, drawing = parts(widget)
    controls["Layer"].value, controls["Head"].value = 2, 3
    ids = tokenizer("The film was not good.", return_tensors="pt")["input_ids"]
    ours = student(ids, keep_scores=(2,)).scores[2][0, 2].softmax(-1)
    theirs = teacher(ids, keep_scores=(1,)).scores[1][0, 2].softmax(-1)
    apart = (ours - theirs).abs().sum(-1).mean().item() / 2
    assert f"move {apart:.0%} of its weight" in drawing.value
    assert "student, layer 2, head 3" in drawing.value
    assert "teacher, layer 1, head 3" in drawing.value
    assert len(labels(drawing)) == 2 * ids.shape[1], "the tokens stand beside both"


def test_a_model_beside_itself_moves_nothing(small, tokenizer):
    _, drawing = parts(widgets.attention_pair_explorer(small, small, tokenizer, (1, 2), "The film."))
    assert "move 0% of its weight" in drawing.value


@pytest.mark.alone
def test_the_pair_answers_an_empty_sentence_and_a_slider_at_once(pair):
    controls, drawing = parts(pair[2])
    before = drawing.value
    assert seconds(lambda: setattr(controls["Head"], "value", 3 - controls["Head"].value)) < patience()
    assert drawing.value != before
    controls["Your sentence"].value = "  "
    assert "type a sentence" in drawing.value
    controls["Your sentence"].value = "film " * 80
    assert "the picture shows the first 48" in drawing.value


# -- every explorer, at the size that it has in its lesson ------------------------------------------------------


def random_bert(config: BertConfig) -> Bert:
    """Give a model of a real size with random weights, which cost as much as learnt ones."""
    return Bert(config, torch.Generator().manual_seed(0)).eval()


def course_size(name: str) -> ipywidgets.VBox:
    """Make an explorer with inputs as large as its lesson's; only the sentence is the longest that is shown."""
    g = torch.Generator().manual_seed(0)
    shipped = "general-4x312"  # the tokenizer comes with the course
    if name == "head_explorer":
        return widgets.head_explorer(random_bert(BertConfig.minilm_l6()), load_tokenizer(shipped), "film " * 46)
    if name == "attention_pair_explorer":
        pair = random_bert(BertConfig.minilm_l6()), random_bert(BertConfig.tinybert4())
        return widgets.attention_pair_explorer(*pair, load_tokenizer(shipped), (2, 3, 5, 6), "film " * 46)
    if name == "temperature_explorer":
        return widgets.temperature_explorer(*torch.randn(2, 10, generator=g), [str(digit) for digit in range(10)])
    if name == "pruning_explorer":
        curve = {share / 10: 0.9 - share / 25 for share in range(10)}
        return widgets.pruning_explorer(torch.randn(10_616_832, generator=g), curve)  # all matrices of MiniLM-L6's layers
    if name == "layer_map_explorer":
        distances = torch.rand(2, 4, 6, generator=g)
        return widgets.layer_map_explorer(dict(zip(("hidden loss", "attention loss"), distances, strict=True)), (2, 3, 5, 6))
    if name == "pareto_explorer":
        return widgets.pareto_explorer([], ledger.course_rows("movie_reviews", "laptop"))
    return getattr(widgets, name)()  # the lessons give the others no inputs


def places(control: ipywidgets.Widget):
    """Give values that a control can be moved to, each another than the one before."""
    if isinstance(control, ipywidgets.Text):
        return (f"The film was {letter} " + "film " * 40 for letter in "abcdefgh")  # none that was seen before
    if isinstance(control, ipywidgets.Checkbox):
        return itertools.cycle([not control.value, control.value])
    if isinstance(control, ipywidgets.SelectionSlider):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return itertools.cycle([next(value for value in values if value != control.value), control.value])
    if isinstance(control, ipywidgets.FloatLogSlider):
        return itertools.cycle([control.base**control.max, control.base**control.min])
    return itertools.cycle([control.max, control.min] if control.value != control.max else [control.min, control.max])


EXPLORERS = sorted(name for name, _ in inspect.getmembers(widgets, inspect.isfunction) if name.endswith("_explorer"))


@pytest.mark.alone
@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_of_every_explorer_is_answered_at_once(name):
    controls, drawing = parts(course_size(name))
    taken = {}
    for label, control in controls.items():
        before, values = drawing.value, places(control)
        control.value = next(values)
        assert drawing.value != before, f"{label} moves nothing"
        taken[label] = seconds(lambda control=control, values=values: setattr(control, "value", next(values)))
    print(name, {label: f"{1000 * t:.0f} ms" for label, t in taken.items()}, f"of {1000 * patience():.0f}")
    assert max(taken.values()) < patience(), taken
