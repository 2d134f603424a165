"""Several processes are one run: two gloo processes take the steps of one, share data and cache, and resume each other's runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import CHILD, ROOT, metrics, place, tiny_distillation  # noqa: F401 (place is a fixture)

from tinylib import processes, sharing, train
from tinylib.text import Encoded

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give what two processes wrote, and one process after them."""
    folder = tmp_path_factory.mktemp("several")
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    for launch in (LAUNCH, [sys.executable]):
        command = [*launch, str(HERE / "several.py"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=CHILD | path, cwd=folder, timeout=400)
        assert done.returncode == 0, done.stderr
    return folder


def largest_difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["labels", "scores", "values"])
def test_two_processes_take_the_steps_of_one(folder, kind):
    one, two = (load_file(folder / f"{kind}-{count}.safetensors") for count in (1, 2))
    assert len(one["losses"]) == 3 * 6
    # float64: what is left is the order of the sums; a batch whose parts were weighted as equals would differ by 1e-3
    assert largest_difference(one, two) < 1e-8


def test_two_processes_in_float32_differ_by_rounding_only(folder):
    one, two = (load_file(folder / f"float32-{count}.safetensors") for count in (1, 2))
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_what_two_processes_began_one_or_two_go_on_with(folder, count):
    whole, again = load_file(folder / "scores-1.safetensors"), load_file(folder / f"resumed-{count}.safetensors")
    assert largest_difference(whole, again) < 1e-8
    assert not (folder / "never-2.safetensors").exists(), "it was stopped on the way"


@pytest.mark.slow
def test_the_command_line_in_two_processes(place, tmp_path):  # noqa: F811
    """What README says: accelerate launch -m tinylib distill."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    reports = {}
    for name, start in (("one", [sys.executable, "-m"]), ("two", launch)):
        command = [*start, "tinylib", *tiny_distillation(place, tmp_path / name, "--batch-size", "16")]
        done = subprocess.run(command, capture_output=True, text=True, env=CHILD, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("retention") == 1, "only one process speaks"
        reports[name] = metrics(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    # the student's dropout is drawn by each process for itself, so the runs are alike, not equal
    assert reports["two"]["examples"] == reports["one"]["examples"]
    assert reports["two"]["accuracy"] == pytest.approx(reports["one"]["accuracy"], abs=0.2)
    bad = [*launch, "tinylib", *tiny_distillation(place, tmp_path / "no", "--layer-map", "1,9")]
    done = subprocess.run(bad, capture_output=True, text=True, env=CHILD, cwd=ROOT, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("must name 2 teacher layers") == 1
    assert not (tmp_path / "no").exists()


# One process, which has no other to ask


def test_one_process_owns_all_and_shares_with_nobody(monkeypatch):
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.owned([4, 5, 7]) == [4, 5, 7]
    assert sharing.share(3) is None
    numbers = torch.tensor([1.0, 2.0])
    assert sharing.total(numbers) is numbers
    assert sharing.same(numbers) is numbers
    assert sharing.same_text("é") == "é"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_row_belongs_to_one_process(monkeypatch, count):
    rows, found = [3, 9, 14, 2, 8, 30, 7], []
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for index in range(count):
        monkeypatch.setenv("RANK", str(index))
        own = processes.owned(rows)
        assert sharing.share(31)[rows].tolist() == [row in own for row in rows]
        found += own
    assert sorted(found) == sorted(rows)


def test_a_batch_without_own_rows_has_one_that_stands_in(monkeypatch):
    encoded = Encoded(tuple(torch.tensor([2, 5, 3]) for _ in range(6)), tuple(torch.zeros(3, dtype=torch.long) for _ in range(6)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    batches = train._own_part(train.loader(train.Examples(encoded), 2, shuffle=False))
    assert [batch["rows"].tolist() for batch in batches] == [[0], [3], [4]]
