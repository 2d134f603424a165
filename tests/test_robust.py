"""A run that is killed, told to stop, short of memory or disk, or finds its checkpoint damaged: it goes on, to the same weights."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import CHILD, ROOT, metrics, place, tiny_distillation  # noqa: F401 (place is a fixture)
from test_train import Killed, examples, killed_at, measure, model, run, same

from tinylib import checkpoint, cli, distill, interrupt, models, output, stored, train
from tinylib.errors import UserError, UserNote

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX's")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Kills


def command(typed: list[str]) -> None:
    """Run the command line in a process of its own, silently."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.exit(cli.main(typed))


def progress(checkpoints: Path) -> tuple[str, int]:
    """Return the step of distillation that has the newest checkpoint of a run, and how far it is in there."""
    for name in ("prediction", "intermediate"):
        done = []
        for file in checkpoints.glob(f"{name}*.safetensors"):
            with contextlib.suppress(OSError, RuntimeError), safe_open(file, framework="pt") as stored:  # it may just be renamed
                done.append(json.loads(stored.metadata()["run"])["step"])
        if done:
            return name, max(done)
    return "", 0


def wait_for_another(checkpoints: Path, last: tuple[str, int], process) -> float:
    """Wait until a process has saved a later step than the last one, and return the time."""
    end = time.monotonic() + 120
    while progress(checkpoints) == last and process.exitcode is None and time.monotonic() < end:
        time.sleep(0.005)
    return time.monotonic()


@posix
@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["0.6"])
def test_twelve_kills_at_random_moments_change_nothing(place, tmp_path, sparsity):  # noqa: F811
    """SIGKILL, which no process can answer, twelve times in one distillation, resumed each time.

    Each comes at a random moment after the run has saved itself, so that every one finds work done and leaves some undone.
    """
    context = multiprocessing.get_context("forkserver")
    slow = "accelerate", "torch._dynamo"  # what a run imports as it goes, in two thirds of its time to the first step
    context.set_forkserver_preload(["tinylib.commands", "test_robust", *slow])
    long = ["--epochs-intermediate", "8", "--epochs-prediction", "32", "--batch-size", "32", "--sparsity", sparsity]
    typed = [*tiny_distillation(place, tmp_path / "whole"), *long]
    whole = context.Process(target=command, args=(typed,))
    whole.start()
    started = wait_for_another(tmp_path / ".whole.unfinished" / output.CHECKPOINTS, ("", 0), whole)
    whole.join()
    assert whole.exitcode == 0
    pace = (time.monotonic() - started) / 40  # seconds from one checkpoint to the next
    typed[typed.index(str(tmp_path / "whole"))] = str(tmp_path / "out")
    chance, states = random.Random(0), [("", 0)]
    steps = tmp_path / ".out.unfinished" / output.CHECKPOINTS
    while len(states) <= 12:
        process = context.Process(target=command, args=([*typed, *["--resume"][: len(states) - 1]],))
        process.start()
        wait_for_another(steps, states[-1], process)
        time.sleep(chance.uniform(0, 2 * pace))
        assert process.exitcode is None, "it had ended by itself"
        process.kill()
        process.join()
        assert not (tmp_path / "out").exists(), "nothing half-written has the name of the result"
        states.append(progress(steps))
    assert states == sorted(set(states)), "each went on from where the one before it had come to"
    assert {name for name, _ in states[1:]} == {"intermediate", "prediction"}, "both steps were killed"
    last = context.Process(target=command, args=([*typed, "--resume"],))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert metrics(tmp_path / "whole")["accuracy"] == metrics(tmp_path / "out")["accuracy"]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@posix
@pytest.mark.slow
def test_sigterm_saves_then_stops(place, tmp_path):  # noqa: F811
    typed = [*tiny_distillation(place, tmp_path / "out"), "--epochs-prediction", "40", "--batch-size", "8"]
    base = [sys.executable, "-m", "tinylib"]
    process = subprocess.Popen([*base, *typed], cwd=ROOT, env=CHILD, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    file = tmp_path / ".out.unfinished" / output.CHECKPOINTS / "prediction.safetensors"
    end = time.monotonic() + 240
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)  # into an epoch
    process.terminate()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == interrupt.EXIT_CODE == 143
    assert said.rpartition("\r")[2].strip().endswith("stopped; teach, general and distill go on with --resume")
    with safe_open(file, framework="pt") as stored:
        step = json.loads(stored.metadata()["run"])["step"]
    assert cli.main([*typed, "--resume"]) == 0
    typed[typed.index(str(tmp_path / "out"))] = str(tmp_path / "whole")
    done = subprocess.run([*base, *typed], cwd=ROOT, env=CHILD, capture_output=True)
    assert done.returncode == 0
    assert 0 < step < 40 * 20
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_sigterm_in_a_training_waits_for_the_step_and_saves(tmp_path):
    whole, stopped, steps = model(), model(), []
    run(whole, epochs=3)
    options = {"epochs": 3, "checkpoint": tmp_path / "run.safetensors"}

    def tell(own, step):
        steps.append(step)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with interrupt.listening(), pytest.raises(interrupt.Stopped):
        run(stopped, **options, after_step=tell)
    assert steps[-1] == 9, "the step after the signal is its last"
    resumed = model()
    run(resumed, **options, after_step=lambda own, step: steps.append(step))
    assert steps == list(range(1, 19)), "no step is lost and none taken twice"
    assert same(whole, resumed)


def told_to_stop_after(last: int):
    def after_step(own, step):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return after_step


def test_sigterm_in_an_epoch_s_last_step_keeps_the_epoch_s_figures(tmp_path):
    told = run(model(), epochs=3, after_epoch=measure)
    options = {"epochs": 3, "checkpoint": tmp_path / "run.safetensors", "after_epoch": measure}
    with interrupt.listening(), pytest.raises(interrupt.Stopped):
        run(model(), **options, after_step=told_to_stop_after(5))
    steps = []
    found = run(model(), **options, after_step=lambda own, step: steps.append(step))
    assert steps == list(range(7, 19)), "step 6 was the last of its epoch"
    assert (found.losses, found.measured) == (told.losses, told.measured)


@pytest.mark.parametrize("last", [17, 18], ids=["before the last step", "in it"])
def test_sigterm_at_the_end_of_a_run_is_answered_when_it_has_ended(tmp_path, last):
    told = run(model(), epochs=3, after_epoch=measure)
    options = {"epochs": 3, "checkpoint": tmp_path / "run.safetensors", "after_epoch": measure}
    with interrupt.listening(), pytest.raises(interrupt.Stopped):
        run(model(), **options, after_step=told_to_stop_after(last))
    steps = []
    found = run(model(), **options, after_step=lambda own, step: steps.append(step))
    assert steps == [], "it had been saved"
    assert (found.losses, found.measured) == (told.losses, told.measured)


def test_sigterm_outside_a_training_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(interrupt.Stopped), interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not interrupt.asked()


def test_the_stop_button_leaves_a_model_that_can_be_used_and_trained_on(tmp_path):
    """JupyterLab's stop button raises KeyboardInterrupt wherever the cell is."""
    whole, own, calls = model(), model(), []
    run(whole, epochs=3)

    def loss(own, batch):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return train.classification_loss(own, batch)

    before = torch.get_rng_state()
    options = {"epochs": 3, "lr": 5e-3, "seed": 3, "checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 4}
    with pytest.raises(KeyboardInterrupt):
        train.fit(own, train.loader(examples(), 8, seed=5), loss, **options)
    assert not own.training
    assert all(p.grad is None and torch.isfinite(p).all() for p in own.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    again = model()
    train.fit(again, train.loader(examples(), 8, seed=5), train.classification_loss, **options)
    assert same(whole, again)


# Damaged checkpoints


def flip(file: Path) -> None:
    """Turn one bit in the middle of the numbers, as a dying disk does; the file's form stays right."""
    raw = bytearray(file.read_bytes())
    raw[-len(raw) // 4] ^= 0x10
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def stopped_run(file: Path, kill: int = 11) -> None:
    with pytest.raises(Killed):
        run(model(), epochs=3, checkpoint=file, checkpoint_every=2, after_epoch=measure, after_step=killed_at(kill))


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_the_last_good_checkpoint_takes_a_damaged_one_s_place(tmp_path, harm):
    file = tmp_path / "run.safetensors"
    stopped_run(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.1.safetensors", "run.safetensors"]
    harm(file)
    whole, resumed, steps = model(), model(), []
    told = run(whole, epochs=3, after_epoch=measure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(
            resumed, epochs=3, checkpoint=file, checkpoint_every=2, after_epoch=measure,
            after_step=lambda own, step: steps.append(step),
        )  # fmt: skip
    said = [str(note.message) for note in caught if note.category is UserNote]
    if harm is not Path.unlink:  # a kill between two renames leaves none of the newest name, which is no damage
        assert len(said) == 1
        assert re.search(r"run\.safetensors is damaged \(.*\): going on from the one before it, of step 8$", said[0])
    else:
        assert said == []
    assert steps[0] == 9
    assert same(whole, resumed)
    assert (found.losses, found.measured) == (told.losses, told.measured)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"], "a finished run needs one"


@pytest.mark.parametrize(("kill", "kept"), [(11, [10, 8]), (13, [12, 10])])
@pytest.mark.filterwarnings("ignore::tinylib.errors.UserNote")
def test_after_a_damaged_checkpoint_two_good_ones_are_kept_again(tmp_path, kill, kept):
    """The first one saved takes the damaged one's place, and moves on from there as any other."""
    file, older = tmp_path / "run.safetensors", tmp_path / "run.1.safetensors"
    stopped_run(file)  # of steps 10 and 8
    flip(file)
    stopped_run(file, kill)
    assert [json.loads(load_run(path)["run"])["step"] for path in (file, older)] == kept


def load_run(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_two_damaged_checkpoints_are_a_sentence(tmp_path):
    file = tmp_path / "run.safetensors"
    stopped_run(file)
    for path in tmp_path.iterdir():
        flip(path)
    with pytest.raises(UserError, match=r"run\.safetensors is damaged .*its content is not what was written.*delete it"):
        run(model(), epochs=3, checkpoint=file)
    assert len(list(tmp_path.iterdir())) == 2, "nothing is thrown away without being asked"


def test_a_gradient_that_is_no_number_is_never_saved(tmp_path):
    file, calls = tmp_path / "run.safetensors", []

    def loss(own, batch):
        calls.append(1)
        good = train.classification_loss(own, batch)["labels"]
        # the square root's slope at 0 is infinite: a finite loss whose gradient is not
        return {"labels": good + (0.0 * own.classifier.bias.sum()).abs().sqrt() if len(calls) == 9 else good}

    says = r"training: the gradient's norm is nan at step 8 of epoch 1; lower lr=0\.005"
    with pytest.raises(UserError, match=says):
        train.fit(model(), train.loader(examples(), 8), loss, epochs=3, lr=5e-3, checkpoint=file, checkpoint_every=1)
    stored = load_file(file)
    assert all(torch.isfinite(value.float()).all() for value in stored.values())
    again = model()
    history = train.fit(again, train.loader(examples(), 8), train.classification_loss, epochs=3, lr=5e-3, checkpoint=file)
    assert len(history.losses["loss"]) == 18, "it goes on from the last good state"


# No room


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, tmpfs):
    small = tmpfs(size="600k")  # one checkpoint takes about 100 kB, the filler the rest
    file, filler = small / "run.safetensors", small / "filler"

    def fill(own, step):
        if step == 8:
            free = shutil.disk_usage(small).free
            filler.write_bytes(bytes(max(0, free - 20_000)))

    with pytest.raises(UserError, match=r"run\.safetensors cannot be written \(.*\); free some space there, and go on from"):
        run(model(), epochs=3, checkpoint=file, checkpoint_every=2, after_step=fill)
    filler.unlink()
    assert {path.suffix for path in small.iterdir()} == {".safetensors"}
    whole, resumed = model(), model()
    run(whole, epochs=3)
    run(resumed, epochs=3, checkpoint=file)
    assert same(whole, resumed)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, tmpfs):
    with pytest.raises(UserError, match=r"cannot be written \(.*Read-only file system.*\)"):
        run(model(), checkpoint=tmpfs("ro") / "run.safetensors")


def test_a_cache_deleted_underneath_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    settings = distill.Settings(epochs_intermediate=3, epochs_prediction=0, start="random", batch_size=8)
    students, deleted = [], []
    for delete in (False, True):

        def after_epoch(own, epoch, delete=delete):
            if delete and epoch == 0:
                deleted.extend(models.cache_folder().glob("products/*/*"))
                shutil.rmtree(models.cache_folder())
            return {}

        teacher = model(seed=4).eval()
        students.append(model(seed=5))
        distill.distill_intermediate(teacher, students[-1], examples(), settings, after_epoch=after_epoch)
    assert deleted, "there was something to delete"
    assert same(*students)


LIMITED = """
import resource, sys, warnings
import torch
from test_train import examples, model
from tinylib import train
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
size = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 600}
g = torch.Generator().manual_seed(0)
ids = tuple(torch.randint(12, 30, (500,), generator=g) for _ in range(16))
encoded = train.Encoded(ids, tuple(torch.zeros_like(row) for row in ids))
data = train.Examples(encoded, torch.arange(16) % 2)
own = model(**size)
def losses(own, batch):
    out = own(batch["ids"], batch["mask"], batch["segments"], keep_scores=(1, 2))
    return {"labels": torch.nn.functional.cross_entropy(out.logits, batch["labels"]),
            "scores": 1e-3 * out.scores[2].square().mean()}
train.fit(model(), train.loader(examples(), 8), train.classification_loss, epochs=1, lr=1e-3)  # what is loaded at first use
room = int(sys.argv[1])
if room:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
warnings.simplefilter("always")
history = train.fit(own, train.loader(data, 16), losses, epochs=2, lr=1e-3, warmup=0.0)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
train.Checkpoint(train.Path(sys.argv[2]), own, torch.optim.SGD(own.parameters()), None, history).save(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are told apart on Linux")
def test_a_memory_that_is_too_small_halves_the_batch_and_keeps_the_step(tmp_path):
    """A limit of the operating system's on this process's memory, and a batch that needs more."""
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    results = []
    for room in (0, 260_000_000):
        file = tmp_path / f"{room}.safetensors"
        command = [sys.executable, "-c", LIMITED, str(room), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=CHILD | path, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        says = r"the memory is full at 16 texts of 500 tokens; going on with (\d+) at a time .* --batch-size (\d+)"
        told = re.search(says, done.stderr)
        assert (told is not None) == (room > 0), done.stderr
        results.append(load_file(file))
    assert told[1] == told[2]
    assert int(told[1]) in (8, 4, 2, 1)
    for name in results[0]:
        if name.startswith("model."):
            torch.testing.assert_close(results[0][name], results[1][name], atol=1e-8, rtol=1e-6)


def test_a_text_that_alone_is_too_long_for_the_memory_is_an_error():
    def loss(own, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="allocate memory"):
            train.fit(model(), train.loader(examples(), 8), loss, epochs=1, lr=1e-3)
    said = [str(note.message) for note in caught if note.category is UserNote]
    assert [re.search(r"going on with (\d)", note)[1] for note in said] == ["4", "2", "1"]


def with_room_for(texts: int, own) -> list[int]:
    """Have a model find the memory full at more texts than so many; return the list of the numbers that it was asked for."""
    asked = []

    def full(_, inputs):
        asked.append(len(inputs[0]))
        if len(inputs[0]) > texts:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    own.register_forward_pre_hook(full)
    return asked


def test_predictions_halve_a_batch_that_the_memory_is_too_small_for():
    own, data = model().eval(), examples(21)
    wanted = train.predict(own, data.encoded, batch_size=16)
    asked = with_room_for(3, own)
    torch.testing.assert_close(train.predict(own, data.encoded, batch_size=16), wanted)
    assert asked == [16, 8, 4, 2, 2, 4, 2, 2, 8, 4, 2, 2, 4, 2, 2, 5, 3, 2]
    with_room_for(0, own)
    with pytest.raises(RuntimeError, match="allocate memory"):
        train.predict(own, data.encoded)


def test_the_teacher_s_outputs_halve_a_batch_that_the_memory_is_too_small_for():
    teacher, data = model().eval(), examples(21)
    wanted = distill.TeacherOutputs(teacher, data, (0, 2), (1, 2))
    asked = with_room_for(6, teacher)
    found = distill.TeacherOutputs(teacher, data, (0, 2), (1, 2))
    assert asked == [21, 11, 6, 5, 10, 5, 5]
    for rows in ([0, 5, 20], list(range(21))):
        one, two = (outputs.batch(rows, 12, torch.device("cpu")) for outputs in (wanted, found))
        for kind in ("hidden_states", "scores"):
            for layer, states in getattr(one, kind).items():
                torch.testing.assert_close(getattr(two, kind)[layer], states, atol=2e-3, rtol=2e-3)  # float16's last digit


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_is_the_batch(parts):
    """Sizes that parts of unequal lengths must not change: the losses, and the weights after them."""
    results = []
    for cuts in (1, parts):
        teacher = model(seed=8).eval()
        own = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        pair = distill.Distiller(own, distill.Projections(16, 16, 2, generator=torch.Generator().manual_seed(1)).double())
        weights, layer_map = distill.Weights(), distill.LayerMap((1, 2))
        loss = distill.matching_loss(teacher.double(), layer_map, weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Step, "parts", cuts, raising=False)
            original = train.Step.__init__

            def init(self, *args, cuts=cuts, original=original):
                original(self, *args)
                self.parts = cuts

            patch.setattr(train.Step, "__init__", init)
            counts = distill.counts_of(weights)
            history = train.fit(pair, train.loader(examples(45), 8), loss, counts=counts, epochs=2, lr=1e-3, warmup=0.0)
        results.append((history.losses, [p.detach() for p in pair.parameters()]))
    for name in results[0][0]:
        assert results[0][0][name] == pytest.approx(results[1][0][name], abs=1e-9)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-6)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    run(model(), epochs=1, checkpoint=file)
    content = file.read_bytes()
    told = (
        (PermissionError(13, "Permission denied"), UserError, "cannot be read .*Permission denied"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), RuntimeError, "allocate memory"),
    )
    for error, kind, says in told:
        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "safe_open", fail)
            with pytest.raises(kind, match=says):
                run(model(), epochs=2, checkpoint=file)
        assert file.read_bytes() == content
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        for read in (stored.read_json, stored.read_tensors, stored.tensor_names):
            with pytest.raises(UserError, match="run.safetensors cannot be read \\(Permission denied\\)"):
                read(file)


def test_the_header_of_a_checkpoint_does_not_grow_with_the_run(tmp_path):
    """A header of safetensors may be 100 MB long: the losses of a million steps would not fit."""
    sizes, whole = [], model()
    for epochs in (1, 4):
        run(whole := model(), epochs=epochs, checkpoint=tmp_path / f"{epochs}.safetensors")
        with safe_open(tmp_path / f"{epochs}.safetensors", "pt") as file:
            sizes.append(len(json.dumps(file.metadata())))
    assert abs(sizes[1] - sizes[0]) < 100
    history = run(resumed := model(), epochs=4, checkpoint=tmp_path / "4.safetensors")
    assert len(history.losses["loss"]) == 24
    assert same(whole, resumed)


def test_a_checkpoint_of_an_older_version_keeps_its_losses(tmp_path):
    """It held them in its header."""
    file = tmp_path / "run.safetensors"
    before = run(model(), epochs=1, checkpoint=file)
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["run"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if not name.startswith("losses.")}  # noqa: SIM118
    run_text = json.dumps(said | {"losses": before.losses})
    sums = {"sha256": checkpoint._digest(tensors), "sha256_run": hashlib.sha256(run_text.encode()).hexdigest()}
    save_file(tensors, file, metadata={"run": run_text} | sums)
    assert run(model(), epochs=1, checkpoint=file).losses == before.losses
