"""The folder that a command writes, whole or not at all; an older one goes only for a whole new one."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from tinylib import processes
from tinylib.errors import UserError
from tinylib.models import expanded, is_full_disk

CHECKPOINTS, RUN, LOCK = "checkpoints", "run.json", ".lock"  # in the working folder only
# What the commands write. A folder that holds anything else is not replaced.
OURS = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json", "metrics.json", "data", "compressed", "projections.safetensors", "general.json",
    "README.md", "model.onnx", "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model",
    "spm.model", "bpe.codes",
}  # fmt: skip


def place(folder: str | os.PathLike, reads: Sequence[str | os.PathLike] = ()) -> Path:
    """Return the absolute path of an output folder, or say why nothing can be written there.

    ``reads`` are the command's inputs: none of them may lie inside the folder, which is replaced at the end.
    Raises UserError if one does, if the folder is a file or holds other files, and if it cannot be replaced as a whole.
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
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and (found - OURS or "metrics.json" not in found):
        other = sorted(found - OURS or found)[0]
        raise UserError(f"--out {shown} holds other files ({other}); name a new folder, so that none is lost")
    return folder


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
    resumed or had other settings, and if the disk is full or cannot be written to.
    """
    if not processes.is_main():
        with tempfile.TemporaryDirectory(prefix="tinylib-") as nowhere:
            yield Path(nowhere)
        return
    shown, folder = folder, place(folder, reads)
    work, old = (folder.parent / f".{folder.name}.{state}" for state in ("unfinished", "old"))
    new_parents = [path for path in folder.parents if not path.exists()]
    with _sentences(shown, work):
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
            for name in (CHECKPOINTS, RUN):
                _remove(work / name)
            _replace(folder, work, old, lock)
            replaced = True
    finally:
        # once replaced, a working folder is another process's
        if not replaced and work.exists() and not (any(work.glob(f"{CHECKPOINTS}/*.safetensors"))):
            shutil.rmtree(work, ignore_errors=True)
            for path in new_parents:
                with contextlib.suppress(OSError):  # not empty: others write there too
                    path.rmdir()
        lock.release()


def _prepare(work: Path, run: dict | None, resume: bool, shown) -> None:
    """Leave in the working folder the checkpoints that are to be resumed, and nothing else."""
    told = json.loads(json.dumps(run))  # as it reads after having been stored
    if any(work.glob(f"{CHECKPOINTS}/*.safetensors")):
        if not resume:
            remedy = f"go on with --resume, or delete {work} to start over"
            raise UserError(f"an interrupted run into {shown} is there; {remedy}")
        stored = json.loads((work / RUN).read_text(encoding="utf-8")) if (work / RUN).exists() else {}
        if other := sorted(name for name in {*stored, *told} if stored.get(name) != told.get(name)):
            was = ", ".join(f"{name} was {stored.get(name)}, is {told.get(name)}" for name in other)
            raise UserError(f"--resume: the run into {shown} had other settings ({was}); repeat the old ones")
    for path in work.iterdir():
        if path.name != LOCK and not (run and path.name == CHECKPOINTS):
            _remove(path)
    (work / CHECKPOINTS).mkdir(exist_ok=True)
    (work / RUN).write_text(json.dumps(told), encoding="utf-8")


def _replace(folder: Path, work: Path, old: Path, lock: FileLock) -> None:
    shutil.rmtree(old, ignore_errors=True)
    try:
        (work / LOCK).unlink()
    except PermissionError:  # Windows removes no open file
        lock.release()
        (work / LOCK).unlink(missing_ok=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(work, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _sentences(shown: str | os.PathLike, work: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            remedy = "free some space or name a folder on another disk"
            raise UserError(f"the disk of --out {shown} is full; {remedy}") from error
        # The path tells the output's own trouble from that of a file that the command reads.
        about, name = Path(str(getattr(error, "filename", None) or "")), work.name.removesuffix(".unfinished")
        own = [work, work.with_name(f"{name}.old"), work.with_name(name[1:])]
        if isinstance(error, OSError) and error.filename and any(p in (about, *about.parents) or about in p.parents for p in own):
            why = error.strerror or error
            raise UserError(f"--out {shown} cannot be written ({why}); name another place") from error
        raise
