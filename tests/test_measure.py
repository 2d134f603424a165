"""Counts against torch's own counters, sizes against the file system, times against a sleep."""

import time

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinylib import layers
from tinylib.bert import Bert, BertConfig
from tinylib.encoders import Encoder
from tinylib.errors import UserError
from tinylib.measure import (
    Latency,
    compressed_size,
    file_size,
    flops,
    flops_per_token,
    latency,
    parameters,
    peak_memory,
    process_memory,
    summary,
    weight_bytes,
)

SMALL = BertConfig(
    vocab_size=100,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=50,
    max_position_embeddings=40,
)
HEADS = [(None, ()), ("classification", ("bad", "good", "so-so")), ("masked_lm", ())]


@pytest.fixture
def model() -> Bert:
    """Give a small classifier."""
    config = SMALL.replace(head="classification", labels=("bad", "good"))
    return Bert(config, torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(("head", "labels"), HEADS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 40)])
def test_the_formula_counts_what_torch_counts(head, labels, batch, length):
    config = SMALL.replace(head=head, labels=labels)
    ids = torch.zeros(batch, length, dtype=torch.long)
    # Only the unfused attention is made of operations that torch can count on every device.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Bert(config).eval()(ids)
    assert flops(config, length, batch) == counter.get_total_flops()


def test_the_shapes_of_the_course_cost_what_the_paper_says():
    # Jiao et al. 2020, table 1, has 22.5 G for BERT-base and 1.2 G for TinyBERT4. The formula gives that within a
    # twentieth at 128 tokens, a multiply-add as two operations.
    base, tiny = flops(BertConfig.bert_base(), 128) / 1e9, flops(BertConfig.tinybert4(), 128) / 1e9
    assert base == pytest.approx(22.5, rel=0.05)
    assert tiny == pytest.approx(1.2, rel=0.05)


def test_a_tied_weight_counts_once(model):
    assert parameters(model) == sum(t.numel() for t in model.state_dict().values())
    before = parameters(model)
    model.layers[1].up.weight = model.layers[0].up.weight
    assert parameters(model) == before - model.layers[0].up.weight.numel()
    assert weight_bytes(model) == 4 * parameters(model)
    assert weight_bytes(model.half()) == 2 * parameters(model)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(BertConfig.bert_base(), 109.5), (BertConfig.tinybert4(), 14.35), (BertConfig.minilm_l6(), 22.7)],
)
def test_parameters_of_the_known_models(config, millions):
    with torch.device("meta"):
        assert parameters(Bert(config)) / 1e6 == pytest.approx(millions, abs=0.05)


def test_zeros_show_in_the_compressed_size_only(model, tmp_path):
    dense = model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.9] = 0.0
    sparse = model.save_pretrained(tmp_path / "sparse")
    assert file_size(sparse) == file_size(dense)
    weights = [folder / "model.safetensors" for folder in (dense, sparse)]
    assert compressed_size(weights[1]) < 0.35 * compressed_size(weights[0])
    assert compressed_size(weights[0]) > 0.8 * file_size(weights[0])


def test_a_folder_weighs_what_its_files_weigh(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "inner" / "b").write_bytes(b"y" * 24)
    assert file_size(tmp_path) == 1024
    assert file_size(tmp_path / "a") == 1000
    assert compressed_size(tmp_path / "a") < 100


def test_latency_waits_warms_up_and_counts():
    calls = []
    taken = latency(lambda: (calls.append(1), time.sleep(0.005)), repeats=8, warmup=2)
    assert len(calls) == 10
    assert 5 <= taken.median <= taken.p95
    assert str(Latency(1.234, 2.0, 30)) == "1.23 ms (95 % under 2 ms, 30 calls)"


@pytest.mark.alone
def test_peak_memory_sees_an_array_that_is_gone_again():
    def use_and_drop() -> None:
        block = torch.ones(30_000_000)  # 120 MB
        time.sleep(0.5)
        del block

    # A heap full of holes, as a long session has it: freed blocks, each too small for a mapping of its
    # own, which lie side by side and would serve the array from pages that are resident already. (glibc
    # keeps blocks of this size in the heap once it has seen one freed, hence the first line.)
    torch.ones(7_000_000)
    blocks = [torch.ones(5_000_000) for _ in range(12)]
    del blocks[:-1]  # the last one stays: free memory at the end of the heap would go back by itself
    assert 100e6 < peak_memory(use_and_drop) < 300e6


@pytest.mark.alone
def test_memory_is_the_gpu_s_of_a_function_that_runs_there_and_else_the_process_s(monkeypatch):
    held = {"is_available": True, "is_initialized": True, "reset_peak_memory_stats": None, "memory_allocated": 100}
    for name, told in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda told=told: told)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 107)
    assert peak_memory(lambda: None) == 7
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    assert peak_memory(lambda: (torch.ones(30_000_000), time.sleep(0.2))) > 50e6


def test_the_operations_of_another_encoder_are_those_that_torch_counts():
    sizes = {name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.AutoConfig.for_model(
        "deberta-v2", **sizes, intermediate_size=50, relative_attention=True, pos_att_type=["c2p", "p2c"], pad_token_id=0
    )
    model = Encoder(transformers.AutoModel.from_config(config)).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 10, dtype=torch.long))
    measured = summary(model, length=10, batch=2, repeats=1, warmup=0)
    assert measured.gigaflops == counter.get_total_flops() / 1e9 > 1.1 * flops(model.config, 10, 2) / 1e9


def test_the_summary_is_a_row_of_the_table(model):
    model.train()
    measured = summary(model, length=10, batch=2, repeats=3, warmup=1)
    assert model.training
    assert measured.parameters == parameters(model)
    assert measured.gigaflops == flops(model.config, 10, 2) / 1e9
    row = measured.row(model="small", accuracy=0.9)
    assert list(row) == ["model", "accuracy", "parameters (M)", "size (MB)", "GFLOPs", "latency (ms)"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: flops(SMALL, 0), "length=0"),
        (lambda: file_size("no/such/folder"), "does not exist"),
        (lambda: latency(lambda: None, repeats=0), "repeats=0"),
    ],
)
def test_a_mistake_gets_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


@pytest.mark.alone
def test_the_busy_time_counts_every_thread_and_no_waiting():
    asleep = latency(lambda: time.sleep(0.02), repeats=5, warmup=0)
    assert asleep.cpu < 10 < asleep.median
    assert len(asleep.times) == 5
    assert sorted(asleep.times)[2] == asleep.median
    x = torch.randn(300, 300)
    busy = latency(lambda: [x @ x for _ in range(20)], repeats=5)
    assert busy.cpu > 0.3 * min(busy.times)


def test_a_fresh_process_tells_its_own_peak():
    small = process_memory("pass")
    large = process_memory("x = bytearray(100_000_000); del x")
    assert 90e6 < large - small < 120e6
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        process_memory("1 / 0")


def test_the_operations_of_matching_are_those_that_torch_counts():
    """The student's forward pass with a projection of its embeddings and of each layer, and the teacher's."""
    teacher, student = BertConfig(60, 24, 3, 4, 48, 40), BertConfig(60, 16, 2, 4, 32, 40, head="classification", labels=("a", "b"))
    T = 10
    ids = torch.randint(60, (1, T), generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(0)
    one, two = Bert(teacher, random).eval(), Bert(student.replace(head=None, labels=()), random).eval()
    maps = layers.Projections(16, 24, 2, generator=random).maps
    found = []

    def matched():
        states = two(ids, keep_hidden=(0, 1, 2)).hidden_states
        return [linear(states[m]) for m, linear in enumerate(maps)]

    for run in (lambda: one(ids), matched):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        found.append(counter.get_total_flops() / T)
    assert list(flops_per_token(teacher, student, T)) == found
    assert list(flops_per_token(teacher.replace(head="masked_lm"), student, T)) == found, "no loss reads a masked LM's head"
