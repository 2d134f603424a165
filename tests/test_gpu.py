"""What runs beside a GPU, on a machine without one (``pretend_gpu``): each command's models and data lie on it, none is left
behind, and the numbers are those of a run without it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pretend_gpu
import pytest
import torch
from test_cli import LABELS, TEXTS, make_checkpoint, write_csv
from torch.nn import functional as F

from tinylib import bert, cli, train

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


# The stand-in refuses what a GPU refuses: else the tests after these could not fail.


def test_a_tensor_lies_where_it_was_put_and_what_is_made_of_it_beside_it():
    with pretend_gpu.present():
        there = torch.arange(6.0, device="cuda").view(2, 3)
        for made in (there, there.T, there[0], there + 1, there.double(), there.sum(), torch.zeros_like(there), there.new_ones(2)):
            assert made.device == GPU
            assert made.is_cuda
        back = there.cpu()
        for made in (back, there.to("cpu"), torch.ones(2), torch.zeros(2).to(back), torch.zeros_like(there, device="cpu")):
            assert made.device == CPU
        assert torch.ones(2, device="meta").device.type == "meta"
        back[0, 0] = 7
        assert there[0, 0] == 0, "a copy on the CPU is no view"
        layer = torch.nn.Linear(3, 2).to("cuda")
        before = layer.weight.detach().clone()
        layer(there).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()
        assert layer.weight.grad.device == before.device == GPU
        assert not torch.equal(before, layer.weight)
        here = torch.ones(3, requires_grad=True)
        (here.to("cuda") * 2).sum().backward()
        assert (here.grad.tolist(), here.grad.device) == ([2, 2, 2], CPU), "a gradient comes back to its tensor's device"
    assert torch.ones(3).device == CPU
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda here, there: here + there,
        lambda here, there: here @ there,
        lambda here, there: F.embedding(torch.tensor([0]), there),
        lambda here, there: torch.where(here > 0, there, there),
        lambda here, there: here[torch.tensor([0], device="cuda")],
        lambda here, there: here + there.sum(),  # the CPU's number beside a GPU's tensor is allowed, the reverse is not
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.index_select(0, torch.tensor([0])),
    ],
)  # fmt: skip
def test_tensors_of_two_devices_are_refused(mistake):
    with pretend_gpu.present():
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="on the same device"):
            mistake(here, there)
        there[torch.tensor([0])] += there.sum() * torch.tensor(2.0)  # indices and single numbers may be the CPU's


def test_numpy_and_a_generator_of_the_cpu_are_refused():
    with pretend_gpu.present():
        there, generator = torch.ones(2, device="cuda"), torch.Generator()
        for read in (torch.Tensor.numpy, np.asarray):
            with pytest.raises(TypeError, match="use Tensor.cpu"):
                read(there)
        for draw in (lambda: there.normal_(generator=generator), lambda: torch.rand(2, generator=generator, device="cuda")):
            with pytest.raises(RuntimeError, match="device type for generator"):
                draw()
        assert there.cpu().numpy().tolist() == [1, 1]


# The package


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Give a folder with a base model and texts; runs have caches of their own and learn on the laptop's settings."""
    monkeypatch.setenv("TINYLIB_TIER", "laptop")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_checkpoint(tmp_path / "base", TEXTS)
    write_csv(tmp_path / "films.csv", zip(TEXTS, LABELS, strict=True))
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 3), encoding="utf-8")  # an empty line between documents
    return tmp_path


COMMANDS = (
    "teach --base base --data films.csv --out teacher --epochs 5 --lr 5e-3 --batch-size 16",
    "general --teacher base --corpus text.txt --student 2x16 --steps 4 --batch-size 4 --max-length 16 --out general",
    "distill --teacher teacher --data films.csv --student 2x16 --out student --epochs-intermediate 2 --epochs-prediction 1",
    "distill --teacher teacher --data films.csv --student 2x16 --out other --epochs-intermediate 1 --epochs-prediction 1 "
    "--cache-gb 0 --sparsity 0.5 --layer-map 1,2 --general general",
    "distill --teacher teacher --data films.csv --student 2x16 --out fitted --epochs-intermediate 1 --epochs-prediction 1 "
    "--start fitted",
    "prune --model teacher --data films.csv --sparsity 0.5 --method magnitude --out magnitude",
    "prune --model teacher --data films.csv --sparsity 0.5 --method heads --out heads",
    "prune --model teacher --data films.csv --sparsity 0.5 --method neurons --out neurons",
    "prune --model teacher --data films.csv --sparsity 0.5 --method layers --out layers",
    "evaluate --model student --data films.csv",
    "export --model student --format onnx-int8 --out onnx --data films.csv",
    "export --model student --format hf --out hf --data films.csv",
)


def test_every_command_computes_on_the_gpu_what_it_computes_without_one(place, monkeypatch):
    learnt_on, answered_on = set(), set()
    learn, answer = train.Losses.forward, bert.Bert.forward

    def losses(self, batch):
        learnt_on.update(parameter.device for parameter in self.parameters())
        return learn(self, batch)

    def outputs(self, ids, *args, **more):
        answered_on.add(ids.device)
        return answer(self, ids, *args, **more)

    monkeypatch.setattr(train.Losses, "forward", losses)
    monkeypatch.setattr(bert.Bert, "forward", outputs)
    figures = {}
    for device in (CPU, GPU):
        (place / device.type).mkdir()
        for name in ("base", "films.csv", "text.txt"):
            (place / device.type / name).symlink_to(place / name)
        monkeypatch.chdir(place / device.type)
        monkeypatch.setenv("TINYLIB_HOME", str(place / device.type / "cache"))
        learnt_on.clear()
        answered_on.clear()
        with pretend_gpu.present() if device == GPU else contextlib.nullcontext():
            for typed in COMMANDS:
                assert cli.main(typed.split()) == 0, typed
        assert learnt_on == {device}
        assert device in answered_on
        figures[device.type] = {
            path.parent.name: {
                name: value
                for name, value in json.loads(path.read_text(encoding="utf-8")).items()
                if isinstance(value, int | float) and name != "seconds"
            }
            for path in sorted(Path.cwd().glob("*/metrics.json"))
        }
    assert len(figures["cpu"]) == len(COMMANDS) - 1, "all but evaluate write figures"
    for name, told in figures["cpu"].items():
        assert figures["cuda"][name] == pytest.approx(told, rel=1e-3, abs=1e-5), name
