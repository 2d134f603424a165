"""The output folder under a kill at any moment, a full disk and damaged settings: no run is lost, and no file that is not ours."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from test_train import model, run

from tinylib import checkpoint, models, output, train
from tinylib.errors import UserError, UserNote

posix = pytest.mark.skipif(sys.platform == "win32", reason="os.fork and SIGKILL are POSIX's")
RUNS = {"lr": 0.1}


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(work, content="new"):
    (work / "metrics.json").write_text(json.dumps({"is": content}))


def content(folder) -> str:
    return json.loads((folder / "metrics.json").read_text())["is"]


def refusal(folder, **options) -> str:
    """Open an output folder that must not be opened and give the sentence."""
    with pytest.raises(UserError) as caught:
        output.output(folder, **options).__enter__()
    return str(caught.value)


def interrupted(folder):
    """Leave an interrupted run with a checkpoint; give its working folder."""
    context = output.output(folder, run=RUNS)
    work = context.__enter__()
    (work / output.CHECKPOINTS / "step.safetensors").write_text("kept")
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    return work


def killed_at(number: int, folder, begin=False) -> bool:
    """Resume a run and kill it before its n-th change of names at the end (``begin``: in all); tell whether it came to that."""
    pid = os.fork()
    if not pid:
        calls = 0

        def counted(real):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        def count():
            for name in ("replace", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))

        code = 1
        with contextlib.suppress(BaseException):
            if begin:
                count()
            with output.output(folder, run=RUNS, resume=True) as work:
                fill(work)
                if not begin:
                    count()
            code = 0
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@posix
@pytest.mark.parametrize("begin", [False, True], ids=["as it ends", "from its beginning"])
@pytest.mark.parametrize("older", [False, True], ids=["new", "in the place of another"])
def test_killed_at_any_change_of_names_a_run_goes_on_or_its_result_is_there(tmp_path, older, begin):
    went_on, there = 0, 0
    for number in range(1, 60):
        case = tmp_path / str(number)
        if older:
            with output.output(case / "out") as work:
                fill(work, "old")
        interrupted(case / "out")
        if not killed_at(number, case / "out", begin):
            break
        result = [content(case / name) for name in ("out", ".out.old") if (case / name / "metrics.json").exists()]
        if "new" in result:
            there += 1
        else:
            assert result == ["old"] * older
            with output.output(case / "out", run=RUNS, resume=True) as work:
                assert (work / output.CHECKPOINTS / "step.safetensors").read_text() == "kept"
                assert not (work / "metrics.json").exists()
                fill(work)
            went_on += 1
        assert content(case / "out") == "new"
        with output.output(case / "out", run=RUNS) as work:  # what the kill has left is no stranger's
            fill(work, "newer")
        assert files(case) == {"out"}
        assert files(case / "out") == {"metrics.json"}
    assert went_on >= 1
    assert there >= 3
    assert number < 59


def test_a_result_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replace, sync = [], os.replace, models.sync
    monkeypatch.setattr(models, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(output.os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    with output.output(tmp_path / "out") as work:
        fill(work)
        (work / "compressed").mkdir()
        (work / "compressed" / "config.json").write_text("{}")
    assert {"metrics.json", "config.json", "compressed"} <= set(done[: done.index("renamed")])
    assert content(tmp_path / "out") == "new"


def test_a_resumed_run_leaves_the_file_of_its_settings_alone(tmp_path):
    work = interrupted(tmp_path / "out")
    before = (work / output.RUN).stat()
    with pytest.raises(RuntimeError), output.output(tmp_path / "out", run=RUNS, resume=True):
        raise RuntimeError
    after = (work / output.RUN).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_settings_that_the_disk_has_no_room_for_leave_no_half_of_them(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "sync", full)
    said = refusal(tmp_path / "out", run=RUNS)
    assert "the disk of --out" in said
    assert "is full; free some space" in said
    assert files(tmp_path) == set()


@pytest.mark.parametrize("harm", ["", '{"lr": 0', "[1]", "null", "\xff", "missing", "a folder"])
def test_damaged_settings_of_an_interrupted_run_are_a_sentence(tmp_path, harm):
    work = interrupted(tmp_path / "out")
    file = work / output.RUN
    if harm in ("missing", "a folder"):
        file.unlink()
        if harm == "a folder":
            file.mkdir()
    else:
        file.write_bytes(harm.encode("latin-1"))
    for _ in range(2):
        said = refusal(tmp_path / "out", run=RUNS, resume=True)
        assert str(file) in said
        assert f"delete {work} to start over" in said
        assert (work / output.CHECKPOINTS / "step.safetensors").read_text() == "kept"
    shutil.rmtree(work)
    with output.output(tmp_path / "out", run=RUNS, resume=True) as work:
        fill(work)


# Files of others


def result(folder, *more):
    folder.mkdir(parents=True)
    fill(folder, "old")
    for name in ("data/train.parquet", "compressed/pruned.safetensors", "compressed/vocab.txt", *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


OTHERS = [
    "data/precious.csv", "data/more/train.parquet", "compressed/thesis.txt", "README.md/notes.txt", "checkpoints/x.safetensors",
    "run.json", ".lock/x",
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_with_another_s_files_is_not_replaced(tmp_path, other):
    if other == "data/more/train.parquet":
        (result(tmp_path / "out") / "data" / "more").mkdir()
    folder = tmp_path / "out" if (tmp_path / "out").exists() else result(tmp_path / "out")
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_text("precious")
    said = refusal(folder)
    assert "holds other files (" in said
    assert other.split("/")[0] in said
    assert (folder / other).read_text() == "precious"
    assert files(tmp_path) == {"out"}


def test_a_folder_of_ours_is_replaced_with_all_that_is_in_it(tmp_path):
    result(tmp_path / "out", "data/validation.parquet", "data/test.parquet", "compressed/config.json", "README.md")
    with output.output(tmp_path / "out") as work:
        fill(work)
    assert files(tmp_path / "out") == {"metrics.json"}


@pytest.mark.parametrize("state", ["unfinished", "old"])
def test_a_working_folder_of_somebody_else_is_left_alone(tmp_path, state):
    mine = tmp_path / f".out.{state}" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    for resume in (False, True):
        said = refusal(tmp_path / "out", run=RUNS, resume=resume)
        assert f"{mine} lies where the work for --out {tmp_path / 'out'} is done; move it away" in said
    assert mine.read_text() == "precious"
    assert files(tmp_path) == {f".out.{state}"}


def test_a_file_that_comes_into_the_old_folder_during_the_run_is_kept_with_it(tmp_path):
    result(tmp_path / "out")
    context = output.output(tmp_path / "out")
    fill(context.__enter__())
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.warns(UserNote, match=r"thesis.txt came into --out .* and was kept with the former result: move .*\.out\.old away"):
        context.__exit__(None, None, None)
    assert content(tmp_path / "out") == "new"
    assert (tmp_path / ".out.old" / "thesis.txt").read_text() == "precious"
    assert "thesis.txt lies where the work for --out" in refusal(tmp_path / "out")


# Checkpoints


def test_a_newest_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(tmp_path, monkeypatch):
    file, read = tmp_path / "run.safetensors", checkpoint._read
    run(model(), epochs=2, checkpoint=file)
    older = tmp_path / "run.1.safetensors"
    shutil.copy(file, older)

    def broken(path):
        if path == file:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", broken)
    good = older.read_bytes()
    own = model()
    optimizer = torch.optim.AdamW(own.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    kept = checkpoint.Checkpoint(file, own, optimizer, schedule, train.History())
    with pytest.warns(UserNote, match=r"run\.safetensors cannot be read \(.*Input/output error\): going on from the one before"):
        step = kept.load()
    assert step == 12
    kept.save(step + 1)
    assert older.read_bytes() == good, "the damaged one does not take the good one's place"
    monkeypatch.undo()
    assert checkpoint.steps_done(file) == 13
    kept.save(step + 2)
    assert checkpoint.steps_done(older) == 13


def test_a_full_disk_of_another_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(UserError, match="the disk of the cache"), output.output(tmp_path / "out"):
        raise UserError(f"the disk of the cache is full ({os.strerror(errno.ENOSPC)}): set TINYLIB_HOME")
    with pytest.raises(UserError, match=f"the disk of --out {tmp_path / 'out'} is full"), output.output(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
