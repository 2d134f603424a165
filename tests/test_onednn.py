"""oneDNN's products: the same numbers as PyTorch's own, used where they are meant to be and nowhere else."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinylib import layers, onednn, train
from tinylib.bert import Bert
from tinylib.config import BertConfig
from tinylib.text import Encoded

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")), reason="torch has no oneDNN here"
)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def asked(monkeypatch):
    """Count the products that oneDNN is asked for."""
    calls = []
    own = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args[0].shape)
        return own(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (1, 1, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_float64_to_within_rounding(asked, shape, bias):
    x, weight, b = numbers(*shape), numbers(11, 7), numbers(11) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.inference_mode(), onednn.OneDNN():
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.allclose(F.linear(given, weight, b).double(), exact, atol=1e-5)
    assert len(asked) == 2


@needs_onednn
def test_what_is_not_float32_or_has_no_rows_stays_with_pytorch(asked):
    x, weight = numbers(5, 7), numbers(11, 7)
    with torch.inference_mode(), onednn.OneDNN():
        double = F.linear(x.double(), weight.double())
        F.linear(x[0], weight)
        F.linear(x[:0], weight)
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(x, weight)
    assert torch.equal(double, x.double() @ weight.double().T)
    assert not asked


@needs_onednn
@pytest.mark.parametrize(("least", "times"), [(5 * 7 * 11, 2), (5 * 7 * 11 + 1, 0), (onednn.LEAST, 0)])
def test_a_product_with_a_gradient_that_is_too_small_stays_with_pytorch(asked, monkeypatch, least, times):
    monkeypatch.setattr(onednn, "LEAST", least)
    with onednn.OneDNN():
        F.linear(numbers(5, 7), numbers(11, 7).requires_grad_()).sum().backward()
    assert len(asked) == times


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (1, 1, 7)])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_are_those_of_float64_to_within_rounding_and_only_those_wanted(asked, monkeypatch, shape, wanted, turned):
    monkeypatch.setattr(onednn, "LEAST", 1)
    given = numbers(*shape), numbers(11, 7), numbers(11)
    towards = numbers(*shape[:-1], 11)
    found = []
    for dtype, mode in ((torch.float64, nullcontext()), (torch.float32, onednn.OneDNN())):
        x, weight, bias = (one.to(dtype).requires_grad_(want) for one, want in zip(given, wanted, strict=True))
        with mode:
            # turned: a gradient that does not lie row by row in memory, as a transposition further on gives
            y = F.linear(x, weight, bias)
        y.backward(towards.to(dtype).transpose(0, -1).contiguous().transpose(0, -1) if turned else towards.to(dtype))
        found.append([y, x.grad, weight.grad, bias.grad])
    for exact, ours in zip(*found, strict=True):
        assert (exact is None) == (ours is None)
        assert exact is None or (ours.dtype == torch.float32 and torch.allclose(ours.double(), exact, atol=1e-5))
    assert len(asked) == 1 + sum(wanted[:2])


@needs_onednn
def test_a_frozen_input_without_bias_gets_the_weights_gradient(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 1)
    x, weight = numbers(5, 7), numbers(11, 7).requires_grad_()
    with onednn.OneDNN():
        F.linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(11, 7), atol=1e-5)


@needs_onednn
def test_a_gradient_of_a_gradient_is_refused_and_not_wrong(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 1)
    x, weight = numbers(5, 7).requires_grad_(), numbers(11, 7).requires_grad_()
    with onednn.OneDNN():
        (gradient,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_onednn
def test_training_takes_it_forward_and_backward_and_learns_the_same(asked, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 1)
    config = BertConfig.parse("2x24", head="classification", labels=("a", "b"), hidden_dropout_prob=0.1)
    ids = tuple(torch.randint(5, 90, (6,), generator=torch.Generator().manual_seed(n)) for n in range(8))
    texts = train.Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)), torch.arange(8) % 2)
    learnt = {}
    for faster in (True, False):
        monkeypatch.setattr(onednn, "is_faster", lambda faster=faster: faster)
        model = Bert(config, torch.Generator().manual_seed(0))
        history = train.fit(model, train.loader(texts, 4), train.classification_loss, epochs=2, lr=1e-3)
        learnt[faster] = history.losses["loss"]
        if faster:
            # per step 6 products a layer, pooler and classifier: forward, to the input, to the weight
            assert len(asked) == 4 * 3 * (2 * 6 + 2)
    assert len(asked) == 4 * 3 * (2 * 6 + 2)
    assert learnt[True] == pytest.approx(learnt[False], rel=1e-4)
    assert learnt[True][0] != learnt[True][-1]


@needs_onednn
def test_a_teacher_says_the_same_with_it_and_without(asked, monkeypatch):
    teacher = Bert(BertConfig.parse("2x24", head="classification", labels=("a", "b")), torch.Generator().manual_seed(0)).eval()
    ids = torch.arange(24).view(3, 8) + 5
    batch = {"ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), "segments": None}
    said = {}
    for faster in (True, False):
        monkeypatch.setattr(onednn, "is_faster", lambda faster=faster: faster)
        said[faster] = layers.teacher_forward(teacher, batch, hidden=(0, 1, 2), scores=(1, 2))
    assert len(asked) == 2 * 6 + 2  # six products a layer, pooler and classifier: once, not twice
    for kind in ("hidden_states", "scores"):
        for layer, value in getattr(said[True], kind).items():
            assert torch.allclose(value, getattr(said[False], kind)[layer], atol=1e-5)
    assert torch.allclose(said[True].logits, said[False].logits, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_its_products_are_counted_as_pytorchs_own_are(shape):
    x, weight = numbers(*shape), numbers(11, 7)
    for bias in (None, numbers(11)):
        counted = []
        for mode in (onednn.OneDNN(), nullcontext()):
            with torch.inference_mode(), FlopCounterMode(display=False) as counter, mode:
                F.linear(x, weight, bias)
            counted.append(counter.get_total_flops())
        assert counted == [2 * x.numel() * 11] * 2  # 2 operations for each multiply-add


@needs_onednn
def test_so_are_those_of_the_gradients(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 1)
    counted = []
    for mode in (onednn.OneDNN(), nullcontext()):
        x, weight = numbers(5, 7).requires_grad_(), numbers(11, 7).requires_grad_()
        with FlopCounterMode(display=False) as counter, mode:
            F.linear(x, weight).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted == [3 * 2 * 5 * 7 * 11] * 2


@pytest.mark.parametrize(("n", "whole", "unit"), [(1, 1, 1), (16, 16, 2), (17, 16, 2), (800, 768, 64), (2047, 1920, 128)])
def test_rows_are_rounded_to_an_eighth_of_an_octave(n, whole, unit):
    assert onednn._whole(n) == (whole, unit)


def test_eight_shapes_stand_between_a_number_of_rows_and_its_double():
    for low in (64, 1024):
        assert len({onednn._whole(n)[0] for n in range(low, 2 * low)}) == 8
    assert all(n - n // 8 <= onednn._whole(n)[0] <= n for n in range(1, 5000))


@needs_onednn
@pytest.mark.parametrize("rows", [1, 16, 33, 100, 127])
@pytest.mark.parametrize(("width", "out"), [(7, 11), (11, 7)])  # one pads the rows, the other computes what is left over
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_left_over_of_the_rounded_rows_counts_too(asked, monkeypatch, rows, width, out, bias):
    monkeypatch.setattr(onednn, "LEAST", 1)
    given = numbers(rows, width), numbers(out, width), *([numbers(out)] if bias else [])
    found = []
    for dtype, mode in ((torch.float64, nullcontext()), (torch.float32, onednn.OneDNN())):
        own = [one.to(dtype).requires_grad_() for one in given]
        with mode:
            y = F.linear(*own)
        y.backward(numbers(rows, out).to(dtype))
        found.append([y, *(one.grad for one in own)])
    for exact, ours in zip(*found, strict=True):
        assert ours.shape == exact.shape
        assert torch.allclose(ours.double(), exact, atol=1e-4)
    whole, unit = onednn._whole(rows)
    up = whole if whole == rows else whole + unit  # what is padded is padded to the next rounded number and no further
    assert [shape[0] for shape in asked] == [up if width < out else whole, whole if width < out else up, out]


MANY_SHAPES = """
import torch, torch.nn.functional as F
from tinylib import onednn
torch.set_num_threads(1)
weight, held = torch.randn(64, 64), []
with torch.inference_mode(), onednn.OneDNN():
    for start in (32, 2000):  # the second time nothing but new shapes
        for n in range(start, start + 1500):
            F.linear(torch.zeros(n, 64), weight)
        held.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
print((held[1] - held[0]) / 1e6)
"""


@needs_onednn
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_shapes_do_not_fill_the_memory():
    done = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # 1000 MB and more if every shape were compiled and kept


@pytest.mark.parametrize(
    ("vendor", "capability", "wanted"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False), ("", "DEFAULT", False)],
)
def test_it_is_chosen_by_the_processor_so_that_a_resumed_run_chooses_alike(monkeypatch, vendor, capability, wanted):
    monkeypatch.setattr(onednn, "_processor", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    onednn.is_faster.cache_clear()
    try:
        assert onednn.is_faster() is wanted
        assert isinstance(onednn.products(torch.device("cpu")), onednn.OneDNN if wanted else nullcontext)
        assert isinstance(onednn.products(torch.device("cuda")), nullcontext)  # beside a GPU it would only cost time
    finally:
        onednn.is_faster.cache_clear()
