"""The corpus of stage 1: packed without crossing documents, streamed, mapped from disk, held out, and its errors."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import make_checkpoint

from tinylib import corpus, models, train
from tinylib.checks.general import Ready
from tinylib.errors import UserError, UserNote

CLS, SEP = 101, 102
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Give each test a cache of its own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TINYLIB_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Give a folder with a small tokenizer that knows the ten words."""
    return make_checkpoint(tmp_path_factory.mktemp("corpus") / "base", [" ".join(WORDS)])


def write_txt(path: Path, documents) -> Path:
    path.write_text("\n\n".join("\n".join(sentences) for sentences in documents) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, documents) -> Path:
    rows = [(number, sentence) for number, sentences in enumerate(documents) for sentence in sentences]
    numbers, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"document": pa.array(numbers), "text": pa.array(texts)}), path)
    return path


def some_documents(count: int, offset: int = 0) -> list[list[str]]:
    """Write documents of 1 to 7 sentences of 1 to 10 words, each document's first word telling it."""
    return [
        [" ".join(WORDS[(d + s + w + offset) % 10] for w in range(1 + (3 * d + s) % 10)) for s in range(1 + d % 7)]
        for d in range(count)
    ]


def ids_of(loaded: corpus.Corpus) -> list[list[int]]:
    return [ids.tolist() for ids in loaded.encoded(range(len(loaded))).ids]


# Packing


@st.composite
def token_documents(draw):
    """Draw documents as lists of sentences of token ids, every token of the corpus another number."""
    lengths = draw(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=8))
    numbers = iter(range(1000, 10_000))
    return [[[next(numbers) for _ in range(n)] for n in sentences] for sentences in lengths]


@settings(max_examples=200, deadline=None)
@given(documents=token_documents(), max_length=st.integers(3, 20))
def test_packing_keeps_order_documents_and_length(documents, max_length):
    packed = list(corpus.pack(iter(documents), Ready(CLS, SEP), max_length))
    home = {token: d for d, document in enumerate(documents) for sentence in document for token in sentence}
    assert all(s[0] == CLS and s[-1] == SEP and 3 <= len(s) <= max_length for s in packed)
    assert [token for s in packed for token in s[1:-1]] == list(home), "every token once, in order"
    assert all(len({home[token] for token in s[1:-1]}) == 1 for s in packed), "a sequence crosses documents"


@settings(max_examples=200, deadline=None)
@given(documents=token_documents(), max_length=st.integers(3, 20))
def test_sentences_that_fit_stay_whole_and_sequences_are_filled(documents, max_length):
    packed = list(corpus.pack(iter(documents), Ready(CLS, SEP), max_length))
    room, place = max_length - 2, {token: i for i, s in enumerate(packed) for token in s[1:-1]}
    for document in documents:
        whole = [sentence for sentence in document if sentence]
        for sentence in whole:
            if len(sentence) <= room:
                assert len({place[token] for token in sentence}) == 1, "a short sentence is cut"
        for before, after in zip(whole, whole[1:], strict=False):
            if place[before[-1]] != place[after[0]]:
                assert len(packed[place[before[-1]]]) - 2 + len(after) > room, "it would have fitted"


def test_a_sentence_that_is_too_long_is_cut_into_full_pieces():
    packed = list(corpus.pack(iter([[list(range(1000, 1015)), [1, 2]]]), Ready(CLS, SEP), 8))
    assert [len(s) for s in packed] == [8, 8, 7]
    assert packed[-1] == [CLS, 1012, 1013, 1014, 1, 2, SEP], "the rest is filled up"


def test_a_document_longer_than_a_chunk_is_packed_whole(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 3)
    document = [[1000 + i] for i in range(10)]
    packed = list(corpus.pack(iter([document, [[5]]]), Ready(CLS, SEP), 128))
    assert [t for s in packed for t in s[1:-1]] == [*range(1000, 1010), 5]
    assert packed[-1] == [CLS, 5, SEP]


def test_packing_does_not_read_ahead_of_what_is_asked():
    read = []

    def stream():
        for d in range(100):
            read.append(d)
            yield [[1000 + d]] * 1000

    next(corpus.pack(stream(), Ready(CLS, SEP), 128))
    assert len(read) <= 1 + corpus.CHUNK // 1000


# Loading


def test_what_is_loaded_is_what_was_written(tmp_path, base):
    documents = some_documents(120)
    loaded = corpus.load(write_txt(tmp_path / "a.txt", documents), base, max_length=16)
    tokenizer = corpus.load_tokenizer(base)
    for part in corpus.PARTS:
        wanted = [d for n, d in enumerate(documents) if (n % 50 == 49) == (part == "validation")]
        packed = list(corpus.pack(iter(wanted), tokenizer, 16))
        assert ids_of(loaded[part]) == packed
        assert loaded[part].lengths.tolist() == [len(s) for s in packed]
        assert loaded[part].tokens == sum(len(s) for s in packed)
        words = tokenizer.decode([t for s in packed for t in s], skip_special_tokens=True)
        assert words == " ".join(sentence for document in wanted for sentence in document)


def test_held_out_documents_are_not_in_train(tmp_path, base):
    # each document has one sentence, which no other has
    documents = [[" ".join(WORDS[int(c)] for c in f"{n:03d}")] for n in range(200)]
    loaded = corpus.load(write_txt(tmp_path / "a.txt", documents), base)
    train_part, held_out = ({tuple(s) for s in ids_of(loaded[part])} for part in corpus.PARTS)
    assert len(held_out) == 4
    assert len(train_part) == 196
    assert not train_part & held_out


def test_text_and_parquet_agree(tmp_path, base):
    documents = some_documents(60)
    a = corpus.load(write_txt(tmp_path / "a.txt", documents), base, max_length=12)
    b = corpus.load(write_parquet(tmp_path / "a.parquet", documents), base, max_length=12)
    assert [ids_of(a[part]) for part in corpus.PARTS] == [ids_of(b[part]) for part in corpus.PARTS]


def test_a_folder_is_read_in_the_order_of_names_and_other_files_are_left(tmp_path, base):
    one, two = some_documents(40), some_documents(40, offset=3)
    (tmp_path / "both").mkdir()
    write_parquet(tmp_path / "both" / "b.parquet", two)
    write_txt(tmp_path / "both" / "a.txt", one)
    (tmp_path / "both" / "README.md").write_text("not a corpus", encoding="utf-8")
    whole = write_txt(tmp_path / "whole.txt", one + two)
    assert [p.name for p in corpus.files(tmp_path / "both")] == ["a.txt", "b.parquet"]
    assert list(corpus.documents(corpus.files(tmp_path / "both"))) == list(corpus.documents([whole])) == one + two
    assert set(corpus.fingerprint(tmp_path / "both")) == {"a.txt", "b.parquet"}


def test_files_are_packed_one_by_one_as_one_file_of_all_would_be(tmp_path, base, monkeypatch):
    """Which documents are held out goes on from file to file; a call that was killed has lost no file but the one it was at."""
    documents = some_documents(170)
    whole = corpus.load(write_txt(tmp_path / "whole.txt", documents), base)
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, cut in (("a", slice(20)), ("b", slice(20, 75)), ("c", slice(75, None))):  # the first holds none for validation
        write_txt(folder / f"{name}.txt", documents[cut])
    real, packed = corpus._pack, []

    def killed(path, *rest):
        packed.append(path.name)
        if packed == ["a.txt", "b.txt"]:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(corpus, "_pack", killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.load(folder, base)
    parts = corpus.load(folder, base)
    assert packed == ["a.txt", "b.txt", "b.txt", "c.txt"]
    assert [ids_of(parts[part]) for part in corpus.PARTS] == [ids_of(whole[part]) for part in corpus.PARTS]
    rows = [3, len(parts["train"]) - 1, 0]  # a batch may come from several files
    assert torch.equal(parts["train"].collate(rows)["ids"], whole["train"].collate(rows)["ids"])


def test_a_second_call_maps_what_the_first_one_packed(tmp_path, base, monkeypatch):
    path = write_txt(tmp_path / "a.txt", some_documents(60))
    first = corpus.load(path, base)
    monkeypatch.setattr(corpus, "_pack", lambda *args: pytest.fail("packed again"))
    renamed = path.rename(tmp_path / "renamed.txt")
    assert ids_of(corpus.load(renamed, base)["train"]) == ids_of(first["train"])
    assert len(models.products()) == 1


@pytest.mark.parametrize("share", [0, 0.5, None], ids=["empty", "half", "missing"])
def test_a_damaged_packed_corpus_is_packed_anew_with_a_note(tmp_path, base, cache, share):
    path = write_txt(tmp_path / "a.txt", some_documents(60))
    first = ids_of(corpus.load(path, base)["train"])
    (file,) = cache.rglob("train.arrow")
    file.unlink() if share is None else os.truncate(file, int(share * file.stat().st_size))
    with pytest.warns(UserNote, match=r"train\.arrow in the cache is damaged or missing, so this result is made anew"):
        again = corpus.load(path, base)["train"]
    assert ids_of(again) == first


@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "half"])
def test_one_packed_before_the_cache_had_lists_is_named(tmp_path, base, cache, share):
    path = write_txt(tmp_path / "a.txt", some_documents(60))
    corpus.load(path, base)
    (file,) = cache.rglob("train.arrow")
    (file.parent / models.LIST).unlink()
    corpus.load(path, base)
    os.truncate(file, int(share * file.stat().st_size))
    said = error_of(path, base)
    assert f"the packed corpus {file} is damaged" in said
    assert f"delete {file.parent}, and it is packed anew" in said


@pytest.mark.parametrize("change", ["text", "length", "tokenizer"])
def test_another_text_length_or_tokenizer_is_packed_anew(tmp_path, base, change):
    path = write_txt(tmp_path / "a.txt", some_documents(60))
    first = ids_of(corpus.load(path, base, max_length=16)["train"])
    if change == "text":
        write_txt(path, some_documents(60, offset=1))
    elif change == "tokenizer":
        base = make_checkpoint(tmp_path / "other", ["quite other words stand here"])
    assert ids_of(corpus.load(path, base, max_length=20 if change == "length" else 16)["train"]) != first


def test_batches_are_padded_and_carry_their_rows(tmp_path, base):
    loaded = corpus.load(write_txt(tmp_path / "a.txt", some_documents(60)), base, max_length=16)["train"]
    seen = []
    for batch in train.loader(loaded, 8, seed=1):
        assert batch["mask"].sum(1).tolist() == loaded.lengths[batch["rows"]].tolist()
        for row, ids, mask in zip(batch["rows"].tolist(), batch["ids"], batch["mask"], strict=True):
            assert torch.equal(ids[mask], loaded.encoded([row]).ids[0])
            assert (ids[~mask] == loaded.pad_id).all()
            seen.append(row)
    assert sorted(seen) == list(range(len(loaded)))


def test_spread_takes_sequences_from_everywhere(tmp_path, base):
    loaded = corpus.load(write_txt(tmp_path / "a.txt", some_documents(60)), base, max_length=16)["train"]
    few, ids = loaded.spread(5), ids_of(loaded)
    assert ids_of(few) == [ids[i * len(ids) // 5] for i in range(5)]
    assert few.lengths.tolist() == [len(s) for s in ids_of(few)]
    assert ids_of(loaded.spread(10_000)) == ids


# Memory

MEASURE = """
import resource, sys
from tinylib import corpus
for name in ("warm", "small", "large"):
    packed = corpus.load(f"{sys.argv[1]}/{name}.txt", sys.argv[2])["train"]
    assert int(packed.encoded([len(packed) // 2]).lengths[0]) > 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is read from the resource module")
def test_memory_stays_flat_however_large_the_corpus(tmp_path, base):
    """Pack 2 MB and then 10 MB in a process of its own: its peak of memory must not follow the text."""
    document = [[" ".join(WORDS)] * 25]  # 1.2 kB
    for name, count in (("warm", 100), ("small", 1_600), ("large", 8_000)):
        write_txt(tmp_path / f"{name}.txt", document * count + [[name]])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TINYLIB_TYPECHECK": "0"}
    line = [sys.executable, "-c", MEASURE, str(tmp_path), str(base)]
    done = subprocess.run(line, env=env | {"TOKENIZERS_PARALLELISM": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warm, small, large = map(int, done.stdout.split())
    assert (tmp_path / "large.txt").stat().st_size > 9_500_000
    assert large - small < 5_000_000, f"the peak rose from {small:,} to {large:,} bytes"


# Errors


def error_of(source, base, max_length=128) -> str:
    with pytest.raises(UserError) as caught:
        corpus.load(source, base, max_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_empty_source_is_named(tmp_path, base):
    assert "nowhere does not exist: give a folder" in error_of(tmp_path / "nowhere", base)
    (tmp_path / "empty").mkdir()
    assert "empty holds no .txt or .parquet files" in error_of(tmp_path / "empty", base)
    (tmp_path / "table.csv").write_text("a,b\n", encoding="utf-8")
    assert "table.csv holds no .txt or .parquet files" in error_of(tmp_path / "table.csv", base)


@pytest.mark.parametrize("content", ["", "\n\n\n", "one two\nthree\n"], ids=["nothing", "blank lines", "one document"])
def test_too_few_documents_are_refused_and_nothing_stays(tmp_path, base, cache, content):
    path = tmp_path / "few.txt"
    path.write_text(content, encoding="utf-8")
    assert "few.txt" in (said := error_of(path, base))
    assert "too few documents" in said
    assert "empty line between" in said
    assert not list(cache.rglob("*.arrow"))


def test_wrong_columns_are_named(tmp_path, base):
    pq.write_table(pa.table({"sentence": ["one"], "document": [0]}), tmp_path / "a.parquet")
    said = error_of(tmp_path / "a.parquet", base)
    assert "a.parquet lacks the columns document and text" in said


def test_a_damaged_parquet_file_is_named(tmp_path, base):
    whole = write_parquet(tmp_path / "a.parquet", some_documents(60)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut.parquet cannot be read" in error_of(tmp_path / "cut.parquet", base)


def test_text_that_is_not_utf8_is_refused(tmp_path, base):
    (tmp_path / "a.txt").write_bytes(b"one two\n\n" * 60 + "caf\xe9\n".encode("latin-1"))
    said = error_of(tmp_path / "a.txt", base)
    assert "a.txt is not UTF-8" in said
    assert f"at byte {9 * 60 + 3}" in said, "counted from the beginning of the file"
    assert "save it as UTF-8" in said


def test_a_text_without_empty_lines_is_taken_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST", 10)
    lines = [f"sentence number {n}" for n in range(25)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    write_parquet(tmp_path / "a.parquet", [lines])
    for name in ("a.txt", "a.parquet"):
        parts = list(corpus.documents([tmp_path / name]))
        assert [len(part) for part in parts] == [10, 10, 5], name
        assert sum(parts, []) == lines


def test_a_length_without_room_is_refused(tmp_path, base):
    assert "max_length=2 leaves no room" in error_of(write_txt(tmp_path / "a.txt", some_documents(60)), base, 2)


# The shipped corpus


def test_the_shipped_corpus_is_clean_enough():
    paths = corpus.files("corpus")
    assert all(path.suffix == ".parquet" for path in paths)
    assert models.sha256_of(paths[0]) == corpus.fingerprint("corpus")[paths[0].name]
    for path in paths:
        first = next(corpus.documents([path]))
        assert first
        assert all(sentence.strip() == sentence for sentence in first)


def test_a_byte_order_mark_and_the_line_ends_of_old_macs_are_no_text(tmp_path):
    lines = ["one two", "three", "", "four"]
    whole = [["one two", "three"], ["four"]]
    ends = ((b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"", "\r"), (b"\xef\xbb\xbf", "\r"), (b"", "\r\r\n"))
    for number, (mark, end) in enumerate(ends):
        path = tmp_path / f"{number}.TXT"
        path.write_bytes(mark + end.join(lines).encode() + end.encode())
        assert list(corpus.documents([path])) == whole
    (tmp_path / "folder.txt").mkdir()
    assert [path.name for path in corpus.files(tmp_path)] == [f"{number}.TXT" for number in range(5)]


def test_a_sentence_of_any_length_is_cut_into_full_pieces_and_a_rest(base):
    tokenizer = corpus.load_tokenizer(base)
    for count in range(0, 14):
        sentence = " ".join(WORDS[i % 10] for i in range(count))
        packed = list(corpus.pack(iter([["one", sentence]]), tokenizer, 6))
        inner = [ids[1:-1] for ids in packed]
        assert sum(inner, []) == tokenizer.encode("one " + sentence, add_special_tokens=False)
        assert all(len(ids) <= 4 for ids in inner)
        assert all(len(ids) == 4 for ids in inner[1:-1])
