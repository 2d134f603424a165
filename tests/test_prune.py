"""Pruning: masks against torch.nn.utils.prune, schedules, recovery, the small file, models that shrink."""

import copy
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.utils import prune as oracle

from tinylib import distill, prune
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError
from tinylib.masks import COMPRESSED, pack, unpack
from tinylib.text import Encoded
from tinylib.train import Examples, classification_loss, fit, loader

SHARES = st.floats(0.0, 0.99)
quick = settings(max_examples=40, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> Bert:
    config = BertConfig(
        vocab_size=120, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, head="classification", labels=("bad", "good"),
    )  # fmt: skip
    return Bert(config, seeded()).eval()


@pytest.fixture
def examples() -> Examples:
    g = seeded(1)
    ids = tuple(torch.randint(1, 120, (4 + n % 7,), generator=g) for n in range(48))
    return Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)), torch.arange(48) % 2)


def modules_of(model: Bert) -> list[tuple[torch.nn.Module, str]]:
    return [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in prune.prunable(model)]


# -- masks ---------------------------------------------------------------------


@quick
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), sparsity=SHARES, seed=st.integers(0, 999))
def test_a_mask_is_that_of_torch(rows, columns, sparsity, seed):
    layer = torch.nn.Linear(columns, rows)
    torch.nn.init.normal_(layer.weight, generator=seeded(seed))
    mask = prune.magnitude_mask(layer.weight, sparsity)
    oracle.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(mask, layer.weight_mask.bool())


@quick
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60), sparsity=SHARES,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_the_count_is_exact_and_ties_go_in_order(values, sparsity, dtype):
    weight = torch.tensor(values, dtype=dtype)
    mask = prune.magnitude_mask(weight, sparsity)
    order = np.argsort(np.abs(values), kind="stable")
    wanted = np.ones(len(values), dtype=bool)
    wanted[order[: round(sparsity * len(values))]] = False
    assert mask.dtype == torch.bool
    assert mask.tolist() == wanted.tolist()


@quick
@given(a=SHARES, b=SHARES, scale=st.floats(0.1, 10), seed=st.integers(0, 999))
def test_a_mask_is_nested_and_blind_to_sign_and_scale(a, b, scale, seed):
    weight = torch.randn(7, 5, generator=seeded(seed))
    low, high = sorted((a, b))
    assert (prune.magnitude_mask(weight, high) <= prune.magnitude_mask(weight, low)).all()
    assert torch.equal(prune.magnitude_mask(weight, a), prune.magnitude_mask(-weight, a))
    # in double, where the factor makes no new ties
    assert torch.equal(prune.magnitude_mask(weight.double(), a), prune.magnitude_mask(scale * weight.double(), a))


def test_a_mask_leaves_the_weight_and_its_layout_alone():
    weight = torch.randn(6, 4, requires_grad=True)
    before = weight.detach().clone()
    turned = prune.magnitude_mask(weight.T, 0.5)
    assert torch.equal(turned, prune.magnitude_mask(weight.T.contiguous(), 0.5))
    assert torch.equal(weight, before)
    assert not turned.requires_grad
    assert prune.magnitude_mask(torch.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(sparsity):
    with pytest.raises(UserError, match="at least 0 and below 1"):
        prune.magnitude_mask(torch.randn(4), sparsity)


def test_a_weight_that_is_nan_is_refused():
    with pytest.raises(UserError, match="NaN"):
        prune.magnitude_mask(torch.tensor([1.0, float("nan")]), 0.5)


def test_what_can_be_pruned_is_the_matrices_of_the_layers(model):
    names = list(prune.prunable(model))
    assert len(names) == 6 * 3
    assert all(name.startswith("layers.") and name.endswith(".weight") for name in names)
    assert not any("norm" in name for name in names)
    assert set(prune.prunable(model, embeddings=True)) - set(names) == {"embeddings.word.weight"}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_global_masks_are_those_of_torch(model, sparsity):
    masks = prune.global_masks(model, sparsity)
    oracle.global_unstructured(modules_of(model), pruning_method=oracle.L1Unstructured, amount=sparsity)
    for name, keep in masks.keep.items():
        assert torch.equal(keep, model.get_submodule(name.removesuffix(".weight")).weight_mask.bool())


def test_layer_masks_remove_the_same_share_everywhere_and_global_ones_do_not(model):
    with torch.no_grad():
        model.layers[0].up.weight.mul_(3)
    even, together = prune.layer_masks(model, 0.5).by_name(), prune.global_masks(model, 0.5).by_name()
    assert set(even.values()) == {0.5}
    assert together["layers.0.up.weight"] < 0.25 < 0.5 < together["layers.1.up.weight"]
    assert prune.global_masks(model, 0.5).sparsity() == pytest.approx(0.5, abs=1e-3)


def test_layer_masks_take_a_share_for_each_weight(model):
    masks = prune.layer_masks(model, {"layers.0.up.weight": 0.25})
    assert masks.by_name() == {"layers.0.up.weight": 0.25}
    with pytest.raises(UserError, match="pooler.weight"):
        prune.layer_masks(model, {"pooler.weight": 0.5})


def test_the_whole_model_is_pruned_by_the_same_share_in_the_table_and_in_the_layers(model):
    masks = prune.whole_masks(model, 0.5)
    masks.apply(model)
    assert masks.by_name()["embeddings.word.weight"] == pytest.approx(0.5, abs=1e-3)
    assert prune.sparsity_of(model) == pytest.approx(0.5, abs=1e-3)
    assert prune.sparsity_of(model, embeddings=True) == pytest.approx(0.5, abs=1e-3)


def test_random_masks_have_the_count_but_not_the_choice(model):
    masks = prune.random_masks(model, 0.5, seeded(3))
    again = prune.random_masks(model, 0.5, seeded(3))
    small = prune.layer_masks(model, 0.5)
    for name, keep in masks.keep.items():
        assert torch.equal(keep, again.keep[name])
        assert int(keep.sum()) == int(small.keep[name].sum())
        assert 0.4 < (keep == small.keep[name]).float().mean() < 0.6


def test_lots_of_one_seed_are_nested_so_that_a_growing_share_removes_for_good(model):
    pruner = prune.GradualPruner(0.8, begin=0, end=4, make=lambda model, share: prune.random_masks(model, share, seeded(3)))
    pruner(model, 0)
    for step in range(1, 5):
        before = pruner.masks
        pruner(model, step)
        assert all((keep <= before.keep[name]).all() for name, keep in pruner.masks.keep.items())
    assert pruner.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_no_masks_remove_nothing():
    assert prune.Masks({}).sparsity() == 0


def test_masks_survive_training_and_the_rest_moves(model, examples):
    masks = prune.global_masks(model, 0.8)
    masks.apply(model)
    before = {name: weight.detach().clone() for name, weight in prune.prunable(model).items()}
    fit(model, loader(examples, 8), classification_loss, epochs=2, lr=1e-2, after_step=masks)
    for name, weight in prune.prunable(model).items():
        assert (weight[~masks.keep[name]] == 0).all()
        assert (weight != before[name])[masks.keep[name]].any()
    assert prune.sparsity_of(model) == pytest.approx(masks.sparsity())


def test_without_masks_the_optimiser_brings_the_zeros_back(model, examples):
    prune.global_masks(model, 0.8).apply(model)
    fit(model, loader(examples, 8), classification_loss, epochs=1, lr=1e-2)
    assert prune.sparsity_of(model) < 0.1


def test_masks_clear_nan_and_leave_no_negative_zero(model):
    masks = prune.global_masks(model, 0.5)
    name, keep = next(iter(masks.keep.items()))
    with torch.no_grad():
        model.get_parameter(name)[~keep] = -1.0
    model.get_parameter(name).data[~keep] = float("nan")
    masks.apply(model)
    assert (model.get_parameter(name)[~keep] == 0).all()
    assert not torch.signbit(model.get_parameter(name)[~keep]).any()


def test_masks_of_another_model_are_refused(model):
    wider = Bert(model.config.replace(intermediate_size=48), seeded())
    with pytest.raises(UserError, match="another model"):
        prune.global_masks(wider, 0.5).apply(model)
    with pytest.raises(UserError, match=r"layers\.9"):
        prune.Masks({"layers.9.up.weight": torch.ones(2, 2, dtype=torch.bool)}).apply(model)


# -- files ---------------------------------------------------------------------


@quick
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_packing_is_undone_by_unpacking(shape, seed):
    keep = torch.rand(tuple(shape), generator=seeded(seed)) < 0.5
    assert torch.equal(unpack(pack(keep), tuple(shape)), keep)


def test_masks_are_saved_in_one_bit_a_weight(model, tmp_path):
    masks = prune.global_masks(model, 0.6, embeddings=True)
    file = masks.save(tmp_path / "masks.safetensors")
    loaded = prune.Masks.load(file)
    assert all(torch.equal(loaded.keep[name], keep) for name, keep in masks.keep.items())
    bits = sum(keep.numel() for keep in masks.keep.values())
    assert bits / 8 <= file.stat().st_size <= bits / 8 + 200 * len(masks.keep)  # 200: a header's entry


@pytest.mark.parametrize("shape", [[10**12, [[]]], [-8, -1], [2.0, 4], ["8"], [None], [True, 8], 8, None])
def test_a_shape_that_is_none_is_refused_before_memory_is_taken(shape, tmp_path):
    file = tmp_path / "masks.safetensors"
    save_file({"w": pack(torch.ones(8, dtype=torch.bool))}, file, metadata={"shapes": json.dumps({"w": shape})})
    with pytest.raises(UserError, match="is no shape"):
        prune.Masks.load(file)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_without_masks_is_refused(tmp_path, content):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="holds no masks"):
        prune.Masks.load(file)
    file.write_bytes(content)
    with pytest.raises(UserError, match="holds no masks"):
        prune.Masks.load(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_small_file_has_the_size_of_the_formula_and_loses_nothing(model, tmp_path, dtype, sparsity):
    prune.global_masks(model, sparsity, embeddings=True).apply(model)
    prune.save_compressed(model, tmp_path, dtype)
    bits = 8 * dtype.itemsize
    expected = 0
    for tensor in model.state_dict().values():
        zeros = (tensor.to(dtype) == 0).double().mean().item()
        expected += min(tensor.numel() * bits // 8, prune.bitmask_bytes(tensor.numel(), zeros, bits))
    size = (tmp_path / COMPRESSED).stat().st_size
    header = size - expected
    assert 0 < header < 250 * len(model.state_dict())
    loaded = prune.load_compressed(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
        assert loaded.state_dict()[name].dtype == torch.float32


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt")])
def test_the_small_file_s_tokenizer_is_found_again(model, tmp_path, names):
    (tmp_path / "own").mkdir()
    for name in names:
        (tmp_path / "own" / name).write_text("{}")
    model.tokenizer_folder = tmp_path / "own"
    assert prune.load_compressed(prune.save_compressed(model, tmp_path / "small")).tokenizer_folder == tmp_path / "small"
    model.tokenizer_folder = None
    assert prune.load_compressed(prune.save_compressed(model, tmp_path / "none")).tokenizer_folder is None


def test_loading_a_small_file_loads_no_compiler(model, tmp_path):
    prune.save_compressed(model, tmp_path)
    code = f"""
import sys
from tinylib import prune
prune.load_compressed({str(tmp_path)!r})
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_formula():
    assert prune.bitmask_bytes(80, 0.5, 32) == 10 + 40 * 4
    assert prune.bitmask_bytes(81, 0.0, 16) == 11 + 81 * 2
    million = 1_000_000
    assert prune.bitmask_bytes(million, 0.5, 32) / (4 * million) == pytest.approx(1 / 32 + 0.5)
    assert prune.bitmask_bytes(million, 0.5, 16) / (4 * million) == pytest.approx(1 / 32 + 0.25)


def test_the_plain_layout_is_as_large_as_before_and_still_read(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    prune.global_masks(model, 0.9).apply(model)
    model.save_pretrained(tmp_path / "zeros")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "zeros")]
    assert sizes[0] == sizes[1]
    assert prune.sparsity_of(Bert.from_pretrained(tmp_path / "zeros")) == prune.sparsity_of(model)


def test_a_damaged_small_file_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="no whole model"):
        prune.load_compressed(tmp_path)
    prune.global_masks(model, 0.5).apply(model)
    prune.save_compressed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(UserError, match="no whole model"):
        prune.load_compressed(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / COMPRESSED).read_bytes()
    (tmp_path / COMPRESSED).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no whole model"):
        prune.load_compressed(tmp_path)
    with pytest.raises(UserError, match="float16"):
        prune.save_compressed(model, tmp_path, torch.int8)


# -- schedules and recovery ----------------------------------------------------


@quick
@given(
    step=st.integers(-5, 200), begin=st.integers(0, 50), length=st.integers(1, 100),
    final=SHARES, initial=SHARES,
)  # fmt: skip
def test_the_cubic_schedule_stays_between_its_ends_and_moves_one_way(step, begin, length, final, initial):
    s = prune.cubic_sparsity(step, begin, begin + length, final, initial)
    later = prune.cubic_sparsity(step + 1, begin, begin + length, final, initial)
    assert min(initial, final) - 1e-12 <= s <= max(initial, final) + 1e-12
    assert (later - s) * (final - initial) >= -1e-12
    if step <= begin:
        assert s == pytest.approx(initial)
    if step >= begin + length:
        assert s == final


def test_the_cubic_schedule_by_hand():
    assert prune.cubic_sparsity(50, 0, 100, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    with pytest.raises(UserError, match="later than begin"):
        prune.cubic_sparsity(0, 10, 10, 0.5)


def test_the_gradual_pruner_raises_the_sparsity_and_then_holds_it(model, examples):
    pruner = prune.GradualPruner(0.8, begin=2, end=14, every=4)
    seen, masks = [], []

    def watch(trained, step):
        pruner(trained, step)
        seen.append(prune.sparsity_of(trained))
        masks.append(pruner.masks and dict(pruner.masks.keep))

    fit(model, loader(examples, 8), classification_loss, epochs=3, lr=1e-2, after_step=watch)
    wanted = [prune.cubic_sparsity(t, 2, 14, 0.8) for t in (2, 6, 10, 14)]
    assert [round(s, 3) for s in dict.fromkeys(seen)] == pytest.approx([round(s, 3) for s in wanted], abs=2e-3)
    assert all(a is b for a, b in zip(masks[13].values(), masks[17].values(), strict=True)), "frozen at the end"
    for earlier, later in ((5, 9), (9, 13)):
        for name, keep in masks[later].items():
            assert (keep <= masks[earlier][name]).all(), "what is removed never comes back"


def test_a_run_that_starts_late_has_masks_at_once(model):
    pruner = prune.GradualPruner(0.8, begin=0, end=10, every=5)
    pruner(model, 23)  # a resumed run
    assert prune.sparsity_of(model) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(UserError, match="every=0"):
        prune.GradualPruner(0.8, 0, 10, every=0)


@pytest.mark.parametrize("dies_at", [6, 8])
def test_a_gradual_run_resumes_exactly_though_kept_weights_fall_below_removed_ones(model, examples, tmp_path, dies_at):
    def run(dies_at=None, **options):
        own, calls = copy.deepcopy(model), []

        def loss(trained, batch):
            calls.append(1)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return classification_loss(trained, batch)

        pruner = prune.GradualPruner(0.6, begin=1, end=13, every=4)
        # a step of Adam moves a removed weight by about the rate, above which many kept ones are not
        fit(own, loader(examples, 8), loss, epochs=3, lr=3e-2, after_step=pruner, **options)
        return own, pruner

    whole, pruner = run()
    options = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(dies_at, **options)
    resumed, again = run(**options)
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())
    assert all(torch.equal(keep, again.masks.keep[name]) for name, keep in pruner.masks.keep.items())


@pytest.mark.parametrize("gradual", [False, True])
def test_prune_and_recover_works_on_a_copy(model, examples, gradual):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = prune.prune_and_recover(model, examples, 0.7, epochs=2, batch_size=8, gradual=gradual, lr=1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert prune.sparsity_of(found.model) == pytest.approx(0.7, abs=1e-3)
    assert found.masks.sparsity() == pytest.approx(0.7, abs=1e-3)
    assert len(found.history.losses["loss"]) == 12


def test_recovery_on_soft_targets_comes_nearer_to_the_teacher(model, examples):
    teacher_loss = prune.teacher_loss(model, examples)
    found = prune.prune_and_recover(model, examples, 0.6, teacher_loss, epochs=6, batch_size=8, lr=3e-3)
    losses = found.history.losses["prediction"]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_steps_stop_an_epoch_and_keep_the_rows(model, examples):
    found = prune.prune_and_recover(model, examples, 0.5, steps=2, epochs=2, batch_size=8)
    assert len(found.history.losses["loss"]) == 4
    with pytest.raises(UserError, match="6 batches"):
        prune.prune_and_recover(model, examples, 0.5, steps=7, batch_size=8)


def test_the_seed_of_a_recovery_decides_its_dropout_too(model, examples):
    one = Examples(examples.encoded.select([0]), examples.labels[:1])  # the order cannot differ
    first, again, other = (prune.recover(copy.deepcopy(model), one, seed=seed).losses["loss"] for seed in (0, 0, 1))
    assert first == again != other


def test_no_epochs_prune_only(model, examples):
    found = prune.prune_and_recover(model, examples, 0.5, epochs=0, gradual=True)
    assert prune.sparsity_of(found.model) == pytest.approx(0.5, abs=1e-3)


def test_sensitivity_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = prune.sensitivity(model, prune.sparsity_of, [0.0, 0.5], prune.by_layer(model))
    assert list(found) == ["layer 1", "layer 2", "layer 3"]
    assert all(row[0] == 0 and row[1] == pytest.approx(1 / 6, abs=1e-3) for row in found.values())
    assert len(prune.sensitivity(model, prune.sparsity_of, [0.5])) == 18

    def broken(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune.sensitivity(model, broken, [0.5])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_weights_of_the_eleventh_layer_are_not_taken_for_the_second_s(model):
    deep = Bert(model.config.replace(num_hidden_layers=11), seeded())
    assert [len(names) for names in prune.by_layer(deep).values()] == [6] * 11


# -- structure -----------------------------------------------------------------


def run(model: Bert) -> torch.Tensor:
    return model(torch.arange(1, 10)[None]).logits


def test_neurons_that_do_nothing_can_go_without_a_trace(model, tmp_path):
    g = seeded(5)
    dead = torch.randperm(40, generator=g)[:10]
    with torch.no_grad():
        for layer in model.layers:
            layer.down.weight[:, dead] = 0
    smaller = prune.prune_neurons(model, 0.25)
    assert smaller.config.intermediate_size == 30
    assert smaller.layers[0].up.weight.shape == (30, 24)
    torch.testing.assert_close(run(smaller), run(model))
    agrees_with_transformers(smaller, tmp_path)


def agrees_with_transformers(model: Bert, folder) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(model.save_pretrained(folder)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(torch.arange(1, 10)[None]).logits, run(model), atol=1e-5, rtol=0)


def test_neurons_keep_their_bias(model):
    with torch.no_grad():
        for layer in model.layers:
            layer.up.bias.normal_(generator=seeded(6))
            layer.down.weight[:, ::2] = 0
    torch.testing.assert_close(run(prune.prune_neurons(model, 0.5)), run(model))


@pytest.mark.parametrize(("keep", "layers"), [(2, (1, 3)), ((1, 2), (1, 2)), (3, (1, 2, 3)), (1, (3,))])
def test_layers_that_stay_are_the_ones_named(model, tmp_path, keep, layers):
    smaller = prune.prune_layers(model, keep)
    assert smaller.config.num_hidden_layers == len(smaller.layers) == len(layers)
    for layer, m in zip(smaller.layers, layers, strict=True):
        assert torch.equal(layer.up.weight, model.layers[m - 1].up.weight)
    agrees_with_transformers(smaller, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, (), (3, 1), (1, 1), (0, 1), (2, 4)])
def test_layers_that_do_not_exist_are_refused(model, keep):
    with pytest.raises(UserError, match="from 1 to 3"):
        prune.prune_layers(model, keep)


def test_a_pruned_head_adds_nothing(model):
    with torch.no_grad():
        for layer in model.layers:  # a bias of the values must not come through either
            layer.attention.value.bias.normal_(generator=seeded(7))
            layer.attention.value.weight[:6] = 0.01 * layer.attention.value.weight[:6]  # head 1 is the smallest
    pruned = prune.prune_heads(model, 0.25)
    attention = pruned.layers[0].attention
    assert (attention.output.weight[:, :6] == 0).all()
    assert (attention.output.weight[:, 6:] != 0).all()
    assert all((getattr(attention, n).weight[:6] == 0).all() for n in ("query", "key", "value"))
    before = run(pruned)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            for layer in pruned.layers:
                getattr(layer.attention, name).weight[:6] = 1.0
    torch.testing.assert_close(run(pruned), before)
    assert prune.sparsity_of(model) < 0.01, "the model given is not touched"


@pytest.mark.parametrize("share", [-0.1, 0.99, 1.0])
def test_nothing_is_left_without_a_single_neuron_or_head(model, share):
    for function in (prune.prune_neurons, prune.prune_heads):
        with pytest.raises(UserError, match="share"):
            function(model, share)


@pytest.mark.parametrize("share", [-0.1, float("nan")])
def test_a_share_below_zero_is_not_called_one_of_all(share):
    with pytest.raises(UserError, match="must be at least 0: it is the share of the heads to remove"):
        prune.whole_count(share, 2, "heads")


@quick
@given(of=st.integers(1, 5000))
def test_the_share_that_is_advised_is_taken(of):
    with pytest.raises(UserError, match="share below") as refused:
        prune.whole_count(1.0, of, "neurons")
    advised = float(str(refused.value).rpartition(" ")[2])
    assert prune.whole_count(advised - 1e-9, of, "neurons") >= of - 2 - of // 1000


@pytest.mark.parametrize("method", ["magnitude", "heads", "neurons", "layers"])
def test_each_method_prunes_and_recovers(model, examples, method):
    teacher = model if method == "layers" else None
    found = prune.prune_by(method, model, examples, 0.5, teacher=teacher, epochs=1, batch_size=8, seed=1)
    sizes = (found.config.intermediate_size, found.config.num_hidden_layers)
    assert sizes == {"neurons": (20, 3), "layers": (40, 1)}.get(method, (40, 3))
    zeros = prune.sparsity_of(found)
    assert zeros == pytest.approx(0.5 if method == "magnitude" else 0, abs=1e-2)
    assert found.config.num_attention_heads == (2 if method == "heads" else 4)
    assert run(found).shape == (1, 2)


@pytest.mark.parametrize("method", ["magnitude", "heads", "layers"])
def test_the_temperature_decides_what_is_learnt_from_a_teacher(model, examples, method):
    given = {"teacher": model, "epochs": 1, "batch_size": 8, "lr": 1e-3}
    one, two = (run(prune.prune_by(method, model, examples, 0.5, temperature=T, **given)) for T in (1.0, 3.0))
    assert not torch.equal(one, two)


def test_a_teacher_of_another_order_of_labels_is_refused(model, examples):
    teacher = copy.deepcopy(model)
    model.config, teacher.config = (model.config.replace(labels=names) for names in (("bad", "good"), ("good", "bad")))
    with pytest.raises(UserError, match="labels are bad, good, the teacher's good, bad"):
        prune.prune_by("magnitude", model, examples, 0.5, teacher=teacher)


def test_an_unknown_method_and_a_share_of_all_layers_are_refused(model, examples):
    with pytest.raises(UserError, match="magnitude, heads, neurons, layers"):
        prune.prune_by("lottery", model, examples, 0.5)
    with pytest.raises(UserError, match="3 layers"):
        prune.prune_by("layers", model, examples, 0.9)


# -- the lesson's widget -------------------------------------------------------


def test_the_explorer_follows_the_threshold():
    from tinylib.widgets import pruning_explorer

    box = pruning_explorer(torch.linspace(-1, 1, 2001), {0.0: 0.9, 0.5: 0.8, 0.9: 0.5})
    slider, drawing = box.children
    slider.value = 0
    assert "0% of the weights are removed. Accuracy about 90%" in drawing.value
    slider.value = 25
    assert "25% of the weights are removed. Accuracy about 85%" in drawing.value
    slider.value = 100
    assert "No accuracy was measured there" in drawing.value


# -- while distilling ----------------------------------------------------------


def test_pruning_while_distilling_ends_at_the_sparsity_and_resumes_exactly(model, examples, tmp_path, monkeypatch):
    teacher = Bert(model.config, seeded(5)).eval()
    told = distill.Settings(epochs_intermediate=0, epochs_prediction=2, batch_size=4, lr_prediction=1e-3)  # 24 steps
    monkeypatch.setattr(distill, "fit", functools.partial(distill.fit, checkpoint_every=5))

    def run(folder=None, dies_at=None):
        grow = prune.while_distilling(0.6, examples, told)
        assert grow.end == 16, "two thirds of the steps"

        def after_step(student, step):
            if step == dies_at:
                raise KeyboardInterrupt
            grow(student, step)

        student = copy.deepcopy(model)
        return distill.distill(teacher, examples, told, student=student, folder=folder, after_step=after_step).student

    whole = run()
    assert prune.sparsity_of(whole) == pytest.approx(0.6, abs=0.001)
    assert prune.sparsity_of(model) == 0, "the student given is pruned, the one it was copied from is not"
    for dies_at in (8, 18):  # while the masks grow, and after
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(dies_at), dies_at)
        resumed = run(tmp_path / str(dies_at))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (dies_at, name)


def test_pruning_while_distilling_needs_time_to_grow(examples):
    short = distill.Settings(epochs_prediction=0)
    with pytest.raises(UserError, match="needs a prediction step of two batches or more"):
        prune.while_distilling(0.5, examples, short)
