"""The folder that a command writes, whole or not at all; an older one goes only for a whole new one.

A run works in ``.NAME.unfinished`` beside it, with its lock, its settings and its checkpoints. The result is put onto the disk
and renamed first, and only then do these three go: at every moment a run goes on from its last step, or its result is there.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from tinylib import processes
from tinylib.errors import UserError, UserNote
from tinylib.masks import COMPRESSED
from tinylib.models import expanded, is_full_disk, sync, sync_all, unwritable
from tinylib.stored import read_json

CHECKPOINTS, RUN, LOCK = "checkpoints", "run.json", ".lock"  # of a run: in its working folder, and they go last in its result
# What the commands write. A folder that holds anything else is not replaced.
OURS = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json", "metrics.json", "data", "compressed", "projections.safetensors", "general.json",
    "README.md", "model.onnx", "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model",
    "spm.model", "bpe.codes",
}  # fmt: skip
INSIDE = {  # the folders among them, and what they hold
    "data": {"train.parquet", "validation.parquet", "test.parquet"},
    "compressed": OURS - {"data", "compressed"} | {COMPRESSED},
    CHECKPOINTS: {"*.safetensors", "*.tmp"},
}


def place(folder: str | os.PathLike, reads: Sequence[str | os.PathLike] = ()) -> Path:
    """Return the absolute path of an output folder, or say why nothing can be written there.

    ``reads`` are the command's inputs: none of them may lie inside the folder, which is replaced at the end.
    Raises UserError if one does, if the folder is a file or holds files that no command has written, and if it cannot be
    replaced as a whole.
    """
    shown, folder = folder, expanded(folder).resolve()  # a link is followed: its target is replaced
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {shown} is a file; name a folder")
    if os.path.ismount(folder) or folder in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--out {shown} cannot be replaced as a whole; name a new folder inside it")
    for source in reads:
        read = expanded(source).resolve()
        if read.exists() and (read == folder or folder in read.parents):
            raise UserError(f"--out {shown} holds {source}, which this command reads; name another folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found and ((other := _stranger(folder)) or "metrics.json" not in found):
        raise UserError(f"--out {shown} holds other files ({other or found[0]}); name a new folder, so that none is lost")
    return folder


def _stranger(folder: Path) -> str | None:
    """Return the name of a file in a result's folder that no command writes there, or None."""
    # a process that was killed after it had renamed its working folder has left these
    known = OURS | ({CHECKPOINTS, RUN, LOCK} if (folder / LOCK).exists() else set())
    for path in sorted(folder.iterdir()):
        inside = INSIDE.get(path.name)
        if path.name not in known or path.is_dir() != (inside is not None):
            return path.name
        for file in sorted(path.iterdir()) if inside else ():
            if file.is_dir() or not any(fnmatch(file.name, name) for name in inside):
                return f"{path.name}/{file.name}"
    return None


def _refuse_strangers(shown: str | os.PathLike, work: Path, old: Path) -> None:
    """Raise UserError if what has a working folder's name, or a replaced one's, is somebody else's: both are emptied."""
    other = None
    with contextlib.suppress(FileNotFoundError):  # another process has just done its work
        if work.is_dir() and not any((work / mark).exists() for mark in (LOCK, RUN)):
            other = next(iter(sorted(work.iterdir())), None)
        if old.exists() and not old.is_dir():
            other = old
        elif old.exists() and (name := _stranger(old)) and (old / name).exists():
            other = old / name
    if other is not None:
        raise UserError(f"{other} lies where the work for --out {shown} is done; move it away, or name another folder")


@contextlib.contextmanager
def output(
    folder: str | os.PathLike, reads: Sequence[str | os.PathLike] = (), run: dict | None = None,
    resume: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """Yield a working folder beside ``folder``; when all went well it takes ``folder``'s place.

    After any failure ``folder`` is as it was and the working folder is gone, unless ``run`` is given and
    there are checkpoints in it: then ``resume`` finds them. ``run`` is what decides the result, as plain
    JSON: a run is resumed with the same one only. Of several processes the main one writes; the others get a folder that is
    thrown away. Raises UserError as ``place`` does, while another process writes there, for an unfinished run that is not
    resumed, had other settings or lost the file that tells them, for a working folder of somebody else's, and if the disk is
    full or cannot be written to.
    """
    if not processes.is_main():
        with tempfile.TemporaryDirectory(prefix="tinylib-") as nowhere:
            yield Path(nowhere)
        return
    shown, folder = folder, place(folder, reads)
    work, old = (folder.parent / f".{folder.name}.{state}" for state in ("unfinished", "old"))
    new_parents = [path for path in folder.parents if not path.exists()]
    with _sentences(shown, work):
        _refuse_strangers(shown, work, old)
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            remedy = "wait, or name another folder"
            raise UserError(f"--out {shown} is being written by another process; {remedy}") from None
    replaced = False
    try:
        with _sentences(shown, work):
            if old.exists() and not folder.exists():  # killed between the two steps of a replacement
                os.replace(old, folder)
            _prepare(work, run, resume, shown)
            yield work
            _replace(folder, work, old, lock)
            replaced = True
        _tidy(shown, folder, old)
    finally:
        # once replaced, a working folder is another process's
        if not replaced and work.exists() and not _has_checkpoints(work):
            _discard(work)
            for path in new_parents:
                with contextlib.suppress(OSError):  # not empty: others write there too
                    path.rmdir()
        lock.release()


def _has_checkpoints(work: Path) -> bool:
    return any(work.glob(f"{CHECKPOINTS}/*.safetensors"))


def _prepare(work: Path, run: dict | None, resume: bool, shown: str | os.PathLike) -> None:
    """Leave in the working folder the checkpoints that are to be resumed with their settings, and nothing else."""
    told = json.loads(json.dumps(run))  # as it reads after having been stored
    goes_on = _has_checkpoints(work)
    if goes_on:
        if not resume:
            remedy = f"go on with --resume, or delete {work} to start over"
            raise UserError(f"an interrupted run into {shown} is there; {remedy}")
        stored = _settings_of(work)
        if other := sorted(name for name in {*stored, *told} if stored.get(name) != told.get(name)):
            was = ", ".join(f"{name} was {stored.get(name)}, is {told.get(name)}" for name in other)
            raise UserError(f"--resume: the run into {shown} had other settings ({was}); repeat the old ones")
    kept = {LOCK, CHECKPOINTS, RUN} if goes_on else {LOCK}
    for path in work.iterdir():
        if path.name not in kept:
            _remove(path)
    (work / CHECKPOINTS).mkdir(exist_ok=True)
    if run is not None and not goes_on:
        aside = work / f"{RUN}.tmp"
        aside.write_text(json.dumps(told), encoding="utf-8")
        sync(aside)
        os.replace(aside, work / RUN)


def _settings_of(work: Path) -> dict:
    """Return the settings of an interrupted run; raise UserError if the file that tells them is missing or damaged."""
    remedy = f"they cannot be compared, so delete {work} to start over"
    try:
        return read_json(work / RUN, remedy)
    except FileNotFoundError:
        raise UserError(f"--resume: {work / RUN} with the settings of that run is missing; {remedy}") from None


def _replace(folder: Path, work: Path, old: Path, lock: FileLock) -> None:
    """Put the result onto the disk and rename it, with the lock, the settings and the checkpoints still in it."""
    sync_all(work, leave={CHECKPOINTS})
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "nt":  # Windows renames no folder that holds an open file
        lock.release()
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(work, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise


def _tidy(shown: str | os.PathLike, folder: Path, old: Path) -> None:
    """Take out of a renamed result what its run alone needed, and delete the result that it has replaced."""
    with contextlib.suppress(OSError):
        sync(folder.parent)
    for name in (CHECKPOINTS, RUN, LOCK):  # the lock last: with it the others are known as ours
        with contextlib.suppress(OSError):
            _remove(folder / name)
    with contextlib.suppress(OSError):
        if old.exists() and (other := _stranger(old)):
            what = f"{other} came into --out {shown} during the run"
            warnings.warn(f"{what} and was kept with the former result: move {old} away", UserNote, stacklevel=2)
        else:
            shutil.rmtree(old, ignore_errors=True)


def _discard(work: Path) -> None:
    """Delete a working folder, its lock last: should this be cut short, the rest is known as ours."""
    with contextlib.suppress(OSError):
        for path in work.iterdir():
            if path.name != LOCK:
                _remove(path)
    shutil.rmtree(work, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _sentences(shown: str | os.PathLike, work: Path) -> Iterator[None]:
    try:
        yield
    except UserError:  # said already, of whatever disk it was
        raise
    except Exception as error:
        if is_full_disk(error):
            remedy = "free some space or name a folder on another disk"
            raise UserError(f"the disk of --out {shown} is full; {remedy}") from error
        # The path tells the output's own trouble from that of a file that the command reads.
        about, name = Path(str(getattr(error, "filename", None) or "")), work.name.removesuffix(".unfinished")
        own = [work, work.with_name(f"{name}.old"), work.with_name(name[1:])]
        if isinstance(error, OSError) and error.filename and any(p in (about, *about.parents) or about in p.parents for p in own):
            raise unwritable(shown, error) from error
        raise
