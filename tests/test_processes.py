"""Several processes are one run: two gloo processes take the steps of one, share data and cache, and resume each other's runs."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import CHILD, ROOT, TEXTS, metrics, place, tiny_distillation  # noqa: F401 (place is a fixture)
from test_train import examples, model

from tinylib import cli, layers, processes, sharing, train
from tinylib.errors import UserError
from tinylib.text import Encoded

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give what two processes wrote, one process after them, and two that go on with what the one has left."""
    folder = tmp_path_factory.mktemp("several")
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    for launch, more in ((LAUNCH, []), ([sys.executable], []), (LAUNCH, ["again"])):
        command = [*launch, str(HERE / "several.py"), str(folder), *more]
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


@pytest.mark.parametrize(("began", "name"), [(2, "resumed-1"), (2, "resumed-2"), (1, "turned-2")])
def test_what_one_or_two_processes_began_another_number_goes_on_with(folder, began, name):
    whole, again = load_file(folder / "scores-1.safetensors"), load_file(folder / f"{name}.safetensors")
    assert largest_difference(whole, again) < 1e-8
    assert not (folder / f"never-{began}.safetensors").exists(), "it was stopped on the way"


# The command line

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

# Python reads it before anything else: each of several processes tells which rows of which batches it took
WITNESS = """
import atexit, json, os
if "RANK" in os.environ:
    from tinylib import train
    rows, take = [], train.Step.__call__
    def told(self, batch, step, epoch):
        rows.extend(batch["rows"].tolist())
        return take(self, batch, step, epoch)
    def tell():
        with open(os.environ["WITNESS"] + "/{RANK} of {WORLD_SIZE}".format_map(os.environ), "w") as file:
            json.dump(sorted(set(rows)), file)
    train.Step.__call__ = told
    atexit.register(tell)
"""


def lines(text: str) -> list[list[str]]:
    """Return the words of each line of a page that starts several processes."""
    found = re.findall(r"^((?:accelerate launch|torchrun) (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", ""), comments=True) for line in found]


def started(line: list[str], *program: str, **environment: str) -> subprocess.Popen:
    """Start another program by the words before the line's own, with the launchers of this Python."""
    python = {"torchrun": ["torch.distributed.run"], "accelerate": ["accelerate.commands.launch"]}
    launcher = line[1 + (line[0] == "accelerate") : line.index("-m")]
    command = [sys.executable, "-m", *python[line[0]], *launcher, *program]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=CHILD | NO_GPU | environment, cwd=ROOT)


def said(process: subprocess.Popen) -> tuple[str, str]:
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    return out, error


README = lines((ROOT / "README.md").read_text(encoding="utf-8"))
LESSON = json.loads((ROOT / "notebooks" / "17_scaling_out.ipynb").read_text(encoding="utf-8"))
TAUGHT = lines("".join("".join(cell["source"]) + "\n" for cell in LESSON["cells"] if cell["cell_type"] == "markdown"))


@pytest.mark.slow
@pytest.mark.parametrize("line", [*README, *TAUGHT], ids=" ".join)
def test_each_line_that_is_taught_starts_as_many_processes_as_it_says(line, tmp_path):
    """Two machines are this one, twice, with a process each."""
    # in one write each: the launcher switches buffers off, and two processes that print share a line
    who = "(os.environ['RANK'] + ' ' + os.environ['WORLD_SIZE'] + os.linesep).encode()"
    (tmp_path / "who.py").write_text(f"import os\nos.write(1, {who})\n")
    number = next(line.index(name) + 1 for name in ("--num_processes", "--nproc-per-node") if name in line)
    line = list(line)
    if "--num_machines" in line and "HOST" in line:
        assert line[number] == "16"
        line[number], line[line.index("HOST")] = "2", "127.0.0.1"
        with socket.create_server(("127.0.0.1", 0)) as free:
            line[line.index("--main_process_port") + 1] = str(free.getsockname()[1])
        machine = line.index("--machine_rank") + 1
        both = [started([*line[:machine], rank, *line[machine + 1 :]], str(tmp_path / "who.py")) for rank in "01"]
    else:
        assert line[number] == "2"
        both = [started(line, str(tmp_path / "who.py"))]
    out = "".join(said(process)[0] for process in both)
    assert sorted(out.split("\n")) == ["", "0 2", "1 2"]


@pytest.fixture
def witness(tmp_path):
    """Give the environment in which several processes tell of their rows, and the function that reads what they told."""
    folder = tmp_path / "witness"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITNESS, encoding="utf-8")

    def told() -> dict[str, list[int]]:
        return {path.name: json.loads(path.read_text()) for path in folder.glob("* of *")}

    path = {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "WITNESS": str(folder)}
    return path | {"TINYLIB_HOME": str(tmp_path / "home")}, told


def shared_rows(told: dict[str, list[int]]) -> list[int]:
    """Return all rows that two processes took, each those that it owns."""
    assert set(told) == {"0 of 2", "1 of 2"}, "both worked"
    own = {name: [row for row in rows if row % 2 == int(name[0])] for name, rows in told.items()}
    # a row of the other's stands in where a batch has none of its own
    assert all(len(rows) > 0.9 * len(told[name]) for name, rows in own.items())
    return sorted(own["0 of 2"] + own["1 of 2"])


@pytest.mark.slow
@pytest.mark.parametrize("line", README[:2], ids=lambda line: line[0])
def test_distill_in_two_processes_is_distill_in_one(place, tmp_path, witness, line):  # noqa: F811
    """The lines of README, with a student that draws no dropout: each process would draw its own."""
    environment, told = witness
    shutil.copytree(place / "base", tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    for name, launch in (("one", ["torchrun", "--standalone", "--nproc-per-node", "1", "-m"]), ("two", line)):
        typed = tiny_distillation(place, tmp_path / name, "--batch-size", "16", "--general", str(tmp_path / "start"))
        typed[typed.index("--student") + 1] = "2x32"
        out, _ = said(started(launch, "-m", "tinylib", *typed, **environment))
        assert out.count("retention") == 1, "only one process speaks"
    rows = told()
    assert rows.pop("0 of 1") == shared_rows(rows)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    # the softmax does not see a key's bias, so its gradient is a rounding alone, which AdamW makes a step of its full rate 1e-4
    keys = {name for name in one if name.endswith("key.bias")}
    assert largest_difference({name: one[name] for name in keys}, {name: two[name] for name in keys}) < 10 * 1e-4
    one, two = ({name: part[name] for name in one if name not in keys} for part in (one, two))
    assert 0 < largest_difference(one, two) < 1e-6, "the sums are taken in another order"
    reports = [metrics(tmp_path / name) for name in ("one", "two")]
    assert reports[0]["examples"] == reports[1]["examples"]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert {path.name for path in tmp_path.iterdir()} == {"witness", "home", "start", "one", "two"}
    assert not any(product.is_dir() for product in (tmp_path / "home").glob("products/teacher-outputs/*"))


@pytest.mark.slow
def test_general_in_two_processes_is_general_in_one(place, tmp_path, witness):  # noqa: F811
    environment, told = witness
    documents = ["\n".join(TEXTS[(d + s) % len(TEXTS)] for s in range(1 + d % 4)) for d in range(100)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    tiny = ["--student", "2x16", "--steps", "12", "--batch-size", "4", "--max-length", "24", "--lr", "5e-3", "--measure-every", "6"]
    typed = ["general", "--teacher", str(place / "base"), "--corpus", str(tmp_path / "text.txt"), *tiny]
    for name, count in (("one", "1"), ("two", "2")):
        launch = ["torchrun", "--standalone", "--nproc-per-node", count, "-m"]
        said(started(launch, "-m", "tinylib", *typed, "--out", str(tmp_path / name), **environment))
    rows = told()
    assert rows.pop("0 of 1") == shared_rows(rows)
    for file in ("model.safetensors", "projections.safetensors"):  # in float16, where a rounding is worth 1e-3 of a number
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name].float(), one[name].float(), rtol=2e-3, atol=1e-5)
        assert sum(int((one[name] == two[name]).sum()) for name in one) > 0.99 * sum(number.numel() for number in one.values())
    one, two = (metrics(tmp_path / name)["validation"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    assert one != two, "the sums are taken in another order"


@pytest.mark.slow
def test_a_mistake_is_said_once_by_two_processes(place, tmp_path):  # noqa: F811
    typed = tiny_distillation(place, tmp_path / "no", "--layer-map", "1,9")
    process = started(README[0], "-m", "tinylib", *typed)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert error.count("must name 2 teacher layers") == 1
    assert not (tmp_path / "no").exists()


# An environment that no launcher made


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is no number of processes"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is no number of processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 means several processes, but there is no RANK and no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 means several processes, but there is no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"}, "RANK='2' is none of the numbers from 0"),
        ({"WORLD_SIZE": "2", "RANK": "first", "MASTER_ADDR": "localhost"}, "RANK='first' is none of the numbers from 0"),
    ],
    ids=lambda value: " ".join("=".join(item) for item in value.items()) if isinstance(value, dict) else "",
)
def test_an_environment_that_makes_no_sense_is_a_sentence(environment, why, monkeypatch, capsys, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["evaluate", "--model", str(tmp_path), "--data", "movie_reviews"]) == 2
    remedy = "unset WORLD_SIZE to run one process, or start several with torchrun or accelerate launch --multi_gpu, which set it"
    found = capsys.readouterr().err
    assert found.startswith(f"tinylib evaluate: {why}")
    assert found.endswith(f"; {remedy}\n")
    assert found.count("\n") == 1
    with pytest.raises(UserError, match="unset WORLD_SIZE"):
        train.fit(model(), train.loader(examples(), 8), train.classification_loss, epochs=1, lr=1e-3)


# What a run with another number of processes has left


def left_by(monkeypatch, tell, counts) -> None:
    """Leave in the cache what runs of so many processes leave that were stopped."""
    for count in counts:
        for index in range(count):
            monkeypatch.setenv("WORLD_SIZE", str(count))
            monkeypatch.setenv("RANK", str(index))
            monkeypatch.setenv("MASTER_ADDR", "localhost")
            with tell(keep=True):
                pass
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("when", ["at the end of the step", "of a step that had ended"])
def test_one_process_drops_the_outputs_that_others_have_left(monkeypatch, tmp_path, when):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    teacher, data = model(seed=8).eval(), examples()

    def tell(keep=False, hidden=(0, 2)):
        return layers.teacher_outputs(teacher, data, hidden, (2,), keep=keep)

    left_by(monkeypatch, tell, (2, 3))
    with tell(keep=True, hidden=(1,)):
        pass
    cache = tmp_path / "products" / "teacher-outputs"
    recipes = [json.loads(file.read_text()) for file in cache.glob("*/recipe.json")]
    assert sorted(recipe.get("process", []) for recipe in recipes) == [[], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    (cache / "odd").mkdir()
    (cache / "odd" / "recipe.json").write_text("{")
    if when == "at the end of the step":
        with tell():
            pass
    else:
        layers.drop_outputs(teacher, data, (0, 2), (2,))
    assert len(list(cache.glob("[!.]*"))) == 2, "another run's outputs and what is none of ours stay"
    assert (cache / "odd").is_dir()


def test_of_two_processes_each_drops_its_own_outputs(monkeypatch, tmp_path):
    """The other may still be at work with its own."""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    teacher, data = model(seed=8).eval(), examples()
    left_by(monkeypatch, lambda keep: layers.teacher_outputs(teacher, data, (0, 2), (2,), keep=keep), (1, 2, 3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    layers.drop_outputs(teacher, data, (0, 2), (2,))
    recipes = [json.loads(file.read_text()) for file in tmp_path.glob("products/teacher-outputs/*/recipe.json")]
    assert [recipe["process"] for recipe in recipes] == [[0, 2]]


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
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for index in range(count):
        monkeypatch.setenv("RANK", str(index))
        own = processes.owned(rows)
        assert sharing.share(31)[rows].tolist() == [row in own for row in rows]
        found += own
    assert sorted(found) == sorted(rows)


def test_a_batch_without_own_rows_has_one_that_stands_in(monkeypatch):
    encoded = Encoded(tuple(torch.tensor([2, 5, 3]) for _ in range(6)), tuple(torch.zeros(3, dtype=torch.long) for _ in range(6)))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    batches = train._own_part(train.loader(train.Examples(encoded), 2, shuffle=False))
    assert [batch["rows"].tolist() for batch in batches] == [[0], [3], [4]]
