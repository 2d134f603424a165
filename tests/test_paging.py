"""Weights set aside on the disk: the same numbers all the time, less memory meanwhile, nothing left behind."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylib import models, paging
from tinylib.bert import Bert
from tinylib.config import BertConfig


def small() -> Bert:
    config = BertConfig.parse("2x24", head="classification", labels=("a", "b"))
    return Bert(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_a_model_answers_as_before_while_it_is_aside_and_after(cache):
    model, ids = small(), torch.arange(12).view(2, 6)
    model.classifier.weight.data = model.classifier.weight.data.T.contiguous().T  # not contiguous: stays where it is
    before, weights = model(ids).logits, {name: p.clone() for name, p in model.named_parameters()}
    addresses = {p.data_ptr() for name, p in model.named_parameters() if name != "classifier.weight"}
    with paging.aside(model, least=1):
        assert not addresses & {p.data_ptr() for p in model.parameters()}
        assert torch.equal(model(ids).logits, before)
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert not list(cache.iterdir())  # gone already: a run that is killed leaves nothing
    assert torch.equal(model(ids).logits, before)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("layers."))


def test_it_comes_back_after_an_error(cache):
    model = small()
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(KeyError), paging.aside(model, least=1):
        raise KeyError
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_small_model_and_a_disk_without_room_change_nothing(cache, monkeypatch):
    model = small()
    addresses = [p.data_ptr() for p in model.parameters()]
    with paging.aside(model):
        assert [p.data_ptr() for p in model.parameters()] == addresses
    monkeypatch.setattr(models, "cache_folder", lambda: cache / "not there")
    with paging.aside(model, least=1):
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_a_disk_that_fills_up_gets_its_room_back_at_once_and_the_weights_stay(cache, monkeypatch):
    model = small()
    addresses = [p.data_ptr() for p in model.parameters()]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "memmap", full)
    with paging.aside(model, least=1):
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert not list(cache.iterdir())


def test_what_checkpoints_may_need_is_left_to_them(cache, monkeypatch):
    model = small()
    size, addresses = sum(p.nbytes for p in model.parameters()), [p.data_ptr() for p in model.parameters()]
    for spare, stays in ((-1, True), (0, False)):
        free = paging.SPARE * size + spare
        monkeypatch.setattr(paging.shutil, "disk_usage", lambda folder, free=free: types.SimpleNamespace(free=free))
        with paging.aside(model, least=1):
            assert ([p.data_ptr() for p in model.parameters()] == addresses) is stays


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_a_large_model_is_free_meanwhile(tmp_path):
    code = """
import torch
from pathlib import Path
from tinylib import paging
from tinylib.paging import release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

model = torch.nn.Linear(5000, 6000)  # 120 MB
release_freed_memory()
before = resident()
with paging.aside(model):
    release_freed_memory()
    print(before - resident())
print(before - resident())
"""
    home = os.environ | {"TINYLIB_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    meanwhile, after = map(int, done.stdout.split())
    assert meanwhile > 100e6
    assert abs(after) < 20e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dropped_tensors_leave_no_holes():
    code = """
import random
from pathlib import Path

import torch

from tinylib.paging import release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

release_freed_memory()
random.seed(0)
torch.ones(8_000_000)  # 32 MB: what is freed raises the limit above which glibc, left to itself, maps a block
kept, before = [], resident()
for _ in range(12):  # batches whose tensors differ in size, and after each something small that stays
    large = []
    for _ in range(8):
        large.append(torch.ones(random.randrange(1_100_000, 6_000_000)))
        kept.append(torch.ones(20_000))
    del large
print(resident() - before - sum(t.nbytes for t in kept))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10e6


@pytest.mark.parametrize(
    ("tokens", "when"),
    [
        ({}, [0, 50, 100]),
        ({20: 1599, 30: 1600, 85: 2000}, [0, 30, 80, 85, 135]),
        ({30: 1700, 31: 1700, 33: 1600, 39: 1700, 60: 1600}, [0, 30, 60, 110]),  # memory went back a moment ago
        ({30: 1600, 31: 1700, 33: 1700}, [0, 30, 31, 81, 131]),  # but not for so large a batch
        (dict.fromkeys(range(140), 1900), [0, 50, 100]),  # all are large: what one freed fits the next
    ],
)
def test_memory_goes_back_every_fifty_batches_and_before_the_largest(monkeypatch, tokens, when):
    given = []
    monkeypatch.setattr(paging, "release_freed_memory", lambda: given.append(batch))
    releases = paging.Releases(2000)
    for batch in range(140):
        releases.before(tokens.get(batch, 500))
    assert given == when


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process' memory is told by /proc")
def test_pages_of_a_file_that_was_written_or_read_are_not_kept(tmp_path):
    def held() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    size, part = 50_000_000, 5_000_000
    numbers = np.tile(np.arange(1000, dtype=np.float16), part // 1000)
    before = held()
    written = np.memmap(tmp_path / "numbers", np.float16, "w+", shape=(size,))
    for start in range(0, size, part):
        written[start : start + part] = numbers
    assert held() > before + 80
    paging.forget_pages(written, np.empty(0))
    assert held() < before + 20
    written.flush()
    read = np.memmap(tmp_path / "numbers", np.float16, "r", shape=(size,))
    for start in range(0, size, part):
        assert np.array_equal(read[start : start + part], numbers)
        paging.forget_pages(read)
        assert held() < before + 40
    assert written[-1] == 999
