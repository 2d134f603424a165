"""What the lessons share: the tier's sizes, the prepared data, and the teacher and student that lessons take from the cache.

A lesson never needs another to have run: what is not in the cache is made here, with a progress bar, and kept.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinylib import augment, datasets, distill, encoders, general, ledger, mlm, models, tasks
from tinylib.bert import Bert
from tinylib.datasets import fingerprint, label_names
from tinylib.errors import UserError
from tinylib.stored import read_tensors
from tinylib.text import Encoded, encode, load_tokenizer
from tinylib.train import Examples, History, fit, loader, predict


@dataclass(frozen=True)
class Tier:
    """The sizes that differ between a laptop and a GPU; every lesson reads them from here."""

    name: str
    base: str  # the pretrained model that becomes the teacher
    data: str
    teacher_epochs: int
    teacher_lr: float
    settings: distill.Settings  # the distillation of lesson 09
    batch_size: int = 32
    max_length: int = 64
    pair_length: int = 64  # of two texts together; the paper's are 64 and 128 (section 4.2)
    masked_lm: str = "minilm-l6"  # the model that augments (mlm.shipped)


LAPTOP = Tier(
    "laptop", "minilm-l6", "movie_reviews", teacher_epochs=3, teacher_lr=5e-5,
    settings=distill.Settings(),
)  # fmt: skip
GPU = Tier(
    "gpu", "bert-base-uncased", "glue/sst2", teacher_epochs=3, teacher_lr=2e-5,
    # Jiao et al. 2020, section 4.2: batch 32, 20 + 3 epochs, learning rates 5e-5 and 3e-5, N_a = 20
    settings=distill.Settings(
        augment=20, epochs_intermediate=20, lr_intermediate=5e-5, epochs_prediction=3, lr_prediction=3e-5
    ),
    pair_length=128, masked_lm="bert-base-uncased",
)  # fmt: skip
PART = 500  # texts augmented at a time; a run that is killed loses no more
TIERS = {tier.name: tier for tier in (LAPTOP, GPU)}
# Where GLUE's tasks differ from these: epochs in the paper (section 4.2), copies in its code's data_augmentation.py.
PAPER_EPOCHS = {"mnli": 10, "qqp": 10, "qnli": 10, "cola": 50}
PAPER_COPIES = {"cola": 30, "mrpc": 30, "rte": 30, "stsb": 30, "mnli": 10, "qqp": 10}


def tier() -> Tier:
    """Return the tier that TINYLIB_TIER names; without it, gpu where CUDA is there, else laptop.

    Raises UserError for an unknown name.
    """
    name = os.environ.get("TINYLIB_TIER") or ("gpu" if torch.cuda.is_available() else "laptop")
    if name not in TIERS:
        raise UserError(f"TINYLIB_TIER={name!r} is not one of {', '.join(TIERS)}; unset it to let the machine decide")
    return TIERS[name]


def settings_for(data: str | Path) -> distill.Settings:
    """Return the tier's settings for a data set: on a GPU the paper's for each task of GLUE, without copies for other data."""
    sizes, (folder, _, task) = tier(), str(data).partition("/")
    usual = sizes.settings
    if folder != "glue":
        return usual.replace(augment=0)
    if sizes.name != "gpu":
        return usual
    task = datasets.FROM_HALF.get(task, (task,))[0]
    return usual.replace(
        epochs_intermediate=PAPER_EPOCHS.get(task, usual.epochs_intermediate),
        augment=PAPER_COPIES.get(task, usual.augment),
    )


def device() -> torch.device:
    """Return the device that the lessons compute on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> str:
    """Return one line for the top of a lesson: version, tier, device, threads."""
    from tinylib import __version__

    threads = torch.get_num_threads()
    return f"tinylib {__version__} · tier {tier().name} · device {device().type} · {threads} CPU thread{'s' * (threads != 1)}"


@dataclass(frozen=True)
class Prepared:
    """A data set ready for a model: texts, token ids and labels of each split."""

    texts: dict[str, list[str]]
    pairs: dict[str, list[str]] | None  # the second texts, of a task on pairs
    encoded: dict[str, Encoded]
    labels: dict[str, Tensor]
    names: tuple[str, ...]  # label names, in the order of the label numbers; of scores (float labels) the one name "score"
    fingerprint: str
    data: str = ""  # as it was asked for: of a task of GLUE the metric depends on it
    max_length: int = 0  # where the texts were cut

    def examples(self, split: str = "train") -> Examples:
        """Return a split as ``train.loader`` wants it."""
        return Examples(self.encoded[split], self.labels[split])


def prepare(
    data: str | Path | None = None, base: str | Path | None = None, max_length: int | None = None, seed: int = 0
) -> Prepared:
    """Load a data set and tokenize it for a model; without arguments, the tier's own."""
    sizes = tier()
    data = sizes.data if data is None else data
    loaded = datasets.load(data, seed=seed)
    tokenizer = load_tokenizer(sizes.base if base is None else base)
    texts = {split: list(rows["text"]) for split, rows in loaded.items()}
    pairs = {split: list(rows["text_pair"]) for split, rows in loaded.items() if "text_pair" in rows.column_names}
    length = max_length or cut_at(pairs)
    encoded = {split: encode(tokenizer, own, pairs.get(split), max_length=length) for split, own in texts.items()}
    labels = {split: torch.tensor(rows["label"]) for split, rows in loaded.items()}
    names = tuple(label_names(loaded))
    return Prepared(texts, pairs or None, encoded, labels, names, fingerprint(loaded), str(data), length)


def cut_at(pairs: dict | None) -> int:
    """Return at how many tokens the tier cuts a text, or a pair of them."""
    return tier().pair_length if pairs else tier().max_length


def recode(prepared: Prepared, tokenizer, max_length: int | None = None) -> Prepared:
    """Return the same texts in the word pieces of another tokenizer, row by row."""
    length = max_length or prepared.max_length or cut_at(prepared.pairs)
    told = {s: encode(tokenizer, texts, (prepared.pairs or {}).get(s), length) for s, texts in prepared.texts.items()}
    return replace(prepared, encoded=told, max_length=length)


def augmented(
    prepared: Prepared, copies: int, base: str | Path | None = None, max_length: int | None = None, seed: int = 0
) -> Examples:
    """Return the train split and ``copies`` augmented copies of each of its texts (``augment``), tokenized for ``base``.

    The copies come from the cache; the first time they are made, minutes on two cores, and a run that is killed meanwhile goes on
    where it stopped. Their labels are the originals',
    which a replaced word may have made wrong: distillation does not read them, the teacher says what it thinks of each copy.
    """
    train, sizes = prepared.examples("train"), tier()
    if not copies:
        return train
    rows = _copies(prepared, augment.AugmentSettings(copies=copies), sizes.masked_lm, seed)
    texts, pairs = [row["text"] for row in rows], [row["text_pair"] for row in rows] if prepared.pairs else None
    tokenizer = load_tokenizer(base or sizes.base)
    made = encode(tokenizer, texts, pairs, max_length=max_length or prepared.max_length or cut_at(prepared.pairs))
    both = Encoded(train.encoded.ids + made.ids, train.encoded.segments + made.segments, made.pad_id)
    return Examples(both, torch.cat([train.labels, train.labels.repeat_interleave(copies)]))


def _copies(prepared: Prepared, settings: augment.AugmentSettings, masked_lm: str, seed: int) -> list[dict]:
    recipe = {"data": prepared.fingerprint, "settings": asdict(settings), "model": mlm.fingerprint(masked_lm), "seed": seed}
    recipe["vectors"] = augment.WordVectors.fingerprint()
    sides = {"text": prepared.texts["train"]} | ({"text_pair": prepared.pairs["train"]} if prepared.pairs else {})
    places = [(side, first) for side, texts in sides.items() for first in range(0, len(texts), PART)]
    parts = [{**recipe, "side": side, "first": first, "count": PART} for side, first in places]

    def make(folder: Path) -> None:
        model, tokenizer = mlm.shipped(masked_lm).to(device()), load_tokenizer(masked_lm)
        # one generator for both sides, as in augment_pairs: equal texts would change alike
        words, random = augment.WordVectors.load(), torch.Generator().manual_seed(seed)
        fitting = replace(settings, max_length=min(settings.max_length, model.config.max_position_embeddings))
        copies: dict[str, list[str]] = {side: [] for side in sides}
        for part in parts:
            texts, first = sides[part["side"]], part["first"]
            piece = texts[first : first + PART]
            label = f"augmenting texts {first + 1:,} to {first + len(piece):,} of {len(texts):,}"

            def make_part(place: Path, piece=piece, label=label) -> None:
                own = augment.augment(piece, model, tokenizer, words, fitting, random, label=label)
                (place / "copies.json").write_text(json.dumps([text for some in own for text in some]), encoding="utf-8")
                save_file({"random": random.get_state()}, place / "random.safetensors")

            stored = models.product("augmented-part", part, make_part)
            copies[part["side"]] += json.loads((stored / "copies.json").read_text(encoding="utf-8"))
            random.set_state(read_tensors(stored / "random.safetensors")["random"])
        lines = [json.dumps(dict(zip(copies, row, strict=True)), ensure_ascii=False) for row in zip(*copies.values(), strict=True)]
        (folder / "copies.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    stored = models.product("augmented", recipe, make) / "copies.jsonl"
    for part in parts:  # what a run that was killed would go on from
        models.take_away(models.cache_folder() / "products" / "augmented-part" / models.product_key(part))
    try:  # split at line ends alone: a text may hold other characters that str.splitlines breaks at
        rows = [json.loads(line) for line in stored.read_text(encoding="utf-8").split("\n") if line]
    except ValueError:
        rows = []
    if len(rows) != settings.copies * len(prepared.texts["train"]):  # made when the cache had no lists of its files
        raise UserError(f"{stored} is damaged; delete {stored.parent}, and the copies are made anew")
    return rows


def score(model: Bert | encoders.Encoder, prepared: Prepared, split: str = "test") -> float:
    """Return the figure that the task is judged by on a split (``tasks.score``): accuracy, unless GLUE says otherwise."""
    return tasks.score(prepared.labels[split], predict(model, prepared.encoded[split]), prepared.data)


def fine_tune(
    prepared: Prepared,
    base: str | Path,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 32,
    seed: int = 0,
    checkpoint=None,
):
    """Fine-tune a pretrained model on the labels; return it with the run's history.

    The loss is the cross-entropy, of scores the mean squared error in units of their spread (``tasks.standard_units``).
    """
    start = torch.Generator().manual_seed(seed)
    model = encoders.load(base, labels=prepared.names, generator=start)
    measure = lambda m, epoch: {"validation": score(m, prepared, "validation")}  # noqa: E731
    encoded = prepared.encoded["train"]
    with tasks.standard_units(model, encoded, prepared.labels["train"]) as labels:
        history = fit(
            model, loader(Examples(encoded, labels), batch_size, seed=seed), tasks.label_loss(model.config), epochs=epochs,
            lr=lr, seed=seed, label="fine-tuning the teacher", after_epoch=measure, checkpoint=checkpoint,
        )  # fmt: skip
    return model, history


def teacher(prepared: Prepared | None = None, seed: int = 0) -> Bert:
    """Return the tier's fine-tuned teacher from the cache; the first time, make it (minutes on two cores)."""
    return Bert.from_pretrained(_teacher_folder(prepared or prepare(), seed)).to(device())


def teacher_history(prepared: Prepared | None = None, seed: int = 0) -> History:
    """Return what the run that made the cached teacher did; without a cached teacher, make it first."""
    stored = _teacher_folder(prepared or prepare(), seed) / "history.json"
    return History(**json.loads(stored.read_text(encoding="utf-8")))


def _teacher_folder(prepared: Prepared, seed: int) -> Path:
    sizes = tier()
    recipe = {
        "base": sizes.base, "data": prepared.fingerprint, "epochs": sizes.teacher_epochs, "lr": sizes.teacher_lr,
        "batch_size": sizes.batch_size, "max_length": prepared.max_length, "seed": seed,
    }  # fmt: skip

    def make(folder: Path) -> None:
        print("no fine-tuned teacher in the cache yet: making it once, 4 to 11 minutes on two cores")
        model, history = fine_tune(
            prepared,
            sizes.base,
            epochs=sizes.teacher_epochs,
            lr=sizes.teacher_lr,
            batch_size=sizes.batch_size,
            seed=seed,
        )
        model.save_pretrained(folder)
        (folder / "history.json").write_text(json.dumps(asdict(history)), encoding="utf-8")

    return models.product("teacher", recipe, make)


def student(prepared: Prepared | None = None, seed: int = 0) -> Bert:
    """Return the distilled student of lesson 09 from the cache; the first time, make it (about ten minutes on two cores)."""
    sizes = tier()
    prepared = prepared or prepare()
    settings = sizes.settings.replace(seed=seed)

    def make(folder: Path) -> None:
        print("no distilled student in the cache yet: making it once, about 10 minutes on two cores")
        result = distill.distill(teacher(prepared), augmented(prepared, settings.augment, seed=seed), settings)
        result.student.save_pretrained(folder)

    return Bert.from_pretrained(models.product("student", recipe(prepared, settings), make)).to(device())


def keep_student(made: Bert, prepared: Prepared, settings: distill.Settings) -> None:
    """Put a student that a lesson has just distilled into the cache, where ``student`` finds it instead of making it anew."""
    # a lesson that began to make the same one is not waited for
    models.product("student", recipe(prepared, settings), lambda folder: made.save_pretrained(folder), wait=False)


def recipe(prepared: Prepared, settings: distill.Settings) -> dict:
    """Return what decides a distillation by the tier's teacher: data, settings, and the models that these settings use."""
    told = {"base": tier().base, "data": prepared.fingerprint, "settings": asdict(settings)}
    if prepared.max_length != cut_at(prepared.pairs):
        told["max_length"] = prepared.max_length
    if settings.start == "general":
        told["general"] = general.fingerprint(settings.student, tier().base) or "states"  # what it falls back to
    if settings.augment:
        told |= {"masked_lm": mlm.fingerprint(tier().masked_lm), "vectors": augment.WordVectors.fingerprint()}
    return told


def run_folder(name: str, settings: distill.Settings, prepared: Prepared) -> Path:
    """Return the cache's folder for the checkpoints of a lesson's run, one for each data set, teacher and settings."""
    key = hashlib.sha256(json.dumps(recipe(prepared, settings), sort_keys=True).encode()).hexdigest()[:16]
    folder = models.cache_folder() / "runs" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def enter(rows: Sequence[dict], lesson: str, data: str | None = None) -> None:
    """Write measured models (``ledger.entry``, ``job.row``) into the learner's Pareto ledger; data: the tier's own if None."""
    ledger.add(rows, lesson, data or tier().data, tier().name)


def entered() -> tuple[list[dict], list[dict]]:
    """Return the ledger's rows of the tier's data: the learner's, and those that ship with the course."""
    where = tier().data, tier().name
    return ledger.rows(*where), ledger.course_rows(*where)
