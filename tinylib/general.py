"""General distillation, the first stage of TinyBERT: a pretrained teacher's layers, matched on unlabelled text.

The losses are the intermediate ones (embedding, hidden, attention; Jiao et al. 2020, eqs. 7 to 9); the prediction loss is
left out (section 3.2, a footnote). What comes out knows no task yet: a head is put on it when a task is known.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from tinylib import cards, measure, models, onednn
from tinylib import corpus as corpora
from tinylib.bert import Bert, BertConfig
from tinylib.checkpoint import steps_done
from tinylib.encoders import Encoder, Teacher
from tinylib.errors import UserError
from tinylib.layers import (
    Distiller,
    LayerMap,
    Projections,
    Weights,
    choose_map,
    counts_of,
    first_projections,
    fitting,
    matching_loss,
    student_config,
)
from tinylib.stored import first_line, read_json, read_tensors
from tinylib.student import FEW, SEEN, automatic_start, cut_head, new_student, states_basis, unseeing
from tinylib.text import Encoded, same_vocabulary
from tinylib.train import History, fit, loader

SHIPPED = {"4x312": "general-4x312"}  # shape -> folder of data/models
PROJECTIONS, CARD = "projections.safetensors", "general.json"


@dataclass(frozen=True)
class Settings:
    """How a student is distilled in general; the defaults made the shipped one."""

    student: str = "4x312"
    start: str = "teacher"  # see student.new_student; "general": student.automatic_start; "states", "fitted": of the corpus
    layer_map: tuple[int, ...] | None = None  # None: LayerMap.uniform
    weights: Weights = Weights()
    steps: int = 3600
    batch_size: int = 32
    lr: float = 1e-3
    dropout: float = 0.0  # of the student; there is more text than it can learn by heart
    max_length: int = 128  # as the paper's (section 4.2)
    measure_every: int = 500
    validation: int = 256  # held-out sequences that the validation losses are measured on
    seed: int = 0

    def replace(self, **changes) -> "Settings":
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Result:
    """A general student, its projections and the run's history, whose ``measured`` holds the validation losses."""

    student: Bert
    projections: Projections
    history: History


def first_student(
    teacher: Teacher, settings: Settings, basis: Float[Tensor, "C Cs"] | None = None, texts: Encoded | None = None
) -> Bert:
    """Return the student that the settings ask for, untrained; raise UserError for one that this teacher cannot have.

    texts, basis: ``first_texts`` and ``first_basis``, without which none starts at "states" or "fitted".
    """
    shape = student_config(teacher, settings.student)
    layer_map = choose_map(teacher.config, shape, settings.layer_map)
    shape = shape.replace(hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout)
    start = automatic_start(teacher, shape.hidden_size) if settings.start == "general" else settings.start
    return new_student(teacher, shape, layer_map, start, torch.Generator().manual_seed(settings.seed), basis, texts)


def first_texts(settings: Settings, corpus: dict[str, corpora.Corpus]) -> Encoded | None:
    """Return the sequences, spread over the corpus, that a start at "states" or "fitted" looks at; None for the other starts."""
    if settings.start not in SEEN:
        return None
    some = corpus["train"].spread(FEW)
    return some.encoded(range(len(some)))


def first_basis(teacher: Teacher, settings: Settings, texts: Encoded | None) -> Float[Tensor, "C Cs"] | None:
    """Return the basis of a start that looks at texts (``student.states_basis``); None without them."""
    if texts is None:
        return None
    shape = student_config(teacher, settings.student)
    layer_map = choose_map(teacher.config, shape, settings.layer_map)
    return states_basis(teacher, texts, (0, *layer_map), shape.hidden_size)


def distill_general(
    teacher: Teacher,
    corpus: dict[str, corpora.Corpus],
    settings: Settings | None = None,
    student: Bert | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
) -> Result:
    """Train a student's layers to be like the pretrained teacher's on the corpus's train part (section 3.2, general distillation).

    Every ``measure_every`` steps the history gets the losses on held-out text by layer: {"step": …, "embedding 0": …,
    "hidden 1": …, "attention 1": …, …}. With ``checkpoint`` (a file name) a second call goes on where the first one stopped,
    to the same weights. Raises UserError for ``settings.weights`` that are all 0.
    """
    settings = settings or Settings()
    weights = fitting(teacher, settings.weights, say=True)
    if not (weights.embedding or weights.hidden or weights.attention):
        raise UserError("the weights are all 0, so general distillation teaches nothing; give at least one")
    if steps_done(checkpoint):  # which holds the trained ones: the basis, half a minute's work, is not needed again
        settings = settings.replace(start=unseeing(settings.start))
    texts = first_texts(settings, corpus)
    basis = first_basis(teacher, settings, texts)
    student = student or first_student(teacher, settings, basis, texts)
    layer_map = choose_map(teacher.config, student.config, settings.layer_map)
    student.to(next(teacher.parameters()).device)
    pair = Distiller(student, first_projections(teacher, student.config, settings.start, settings.seed, basis))
    train, held_out = corpus["train"], corpus["validation"]

    def measure(pair: Distiller, step: int) -> dict[str, float]:
        return {"step": step} | validation_losses(teacher, pair, held_out, layer_map, settings)

    history = fit(
        pair, loader(train, settings.batch_size, seed=settings.seed),
        matching_loss(teacher, layer_map, weights), counts=counts_of(weights),
        steps=settings.steps, lr=settings.lr, seed=settings.seed,
        label="general distillation", after_epoch=measure, measure_every=settings.measure_every, checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    return Result(student, pair.projections, history)


@torch.inference_mode()
def validation_losses(
    teacher: Teacher, pair: Distiller, held_out: corpora.Corpus, layer_map: LayerMap, settings: Settings
) -> dict[str, float]:
    """Return each unweighted loss by layer over ``settings.validation`` held-out sequences (``Corpus.spread``).

    Each is the mean of the batches' losses, a batch counting by its real tokens.
    """
    chosen = held_out.spread(settings.validation)
    loss = matching_loss(teacher, layer_map, Weights(), by_layer=True)
    device, sums, count = next(pair.parameters()).device, {}, 0
    for batch in loader(chosen, settings.batch_size, shuffle=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        n = int(batch["mask"].sum())
        count += n
        with onednn.products(device):
            losses = loss(pair, batch)
        for (name, m), value in losses.items():
            sums[f"{name} {m}"] = sums.get(f"{name} {m}", 0.0) + n * value.item()
    return {name: total / count for name, total in sums.items()}


def save(result: Result, teacher: Teacher, folder: Path, card: dict) -> None:
    """Write a general student in float16: a bare encoder, its projections, the tokenizer and the card (general.json)."""
    usual = {name: getattr(BertConfig, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    # seeded: a student of a masked LM has no pooler, and the same run must write the same file
    bare = Bert(result.student.config.replace(head=None, labels=(), **usual), torch.Generator().manual_seed(0))
    bare.load_state_dict({n: t for n, t in result.student.state_dict().items() if n in bare.state_dict()}, strict=False)
    bare.tokenizer_folder = result.student.tokenizer_folder
    bare.save_pretrained(folder, dtype=torch.float16)
    maps = {f"{m}": linear.weight.detach().cpu().half() for m, linear in enumerate(result.projections.maps)}
    save_file(maps, folder / PROJECTIONS)
    costs = measure.summary(bare, length=min(32, bare.config.max_position_embeddings))
    card = {
        "teacher": _sizes(teacher.config), "licence": cards.licence_of(teacher.tokenizer_folder or folder),
        "parameters": costs.parameters, "bytes": measure.file_size(folder / "model.safetensors"), "latency": costs.report(),
    } | card  # fmt: skip
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: dict) -> str:
    """Return the card as a page: what the student is, the command that made it, and its validation losses."""
    names = [name for name in card["validation"][0] if name != "step"]
    lines = ["| step | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in card["validation"]:
        lines.append(f"| {row['step']} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    s = card["settings"]
    rows = "\n".join(lines)
    return f"""---
{cards.front(card["licence"], card["made_from"], ["knowledge-distillation"], pipeline_tag="feature-extraction")}---

# A general student: {s["student"]}, distilled from {cards.plain(card["made_from"])}

An encoder without a task, the result of TinyBERT's stage 1 (general distillation: embedding, hidden and attention losses, no
prediction loss). Put a head on it and go on with stage 2: `tinylib distill --general FOLDER …`. Weights in float16, the
projections to the teacher's width in {PROJECTIONS}, everything said here as numbers in {CARD}.

Made by

    {cards.one_line(card["command"], 2000)}

on {card["machine"]}, in {card["seconds"]:,} s: {s["steps"]:,} steps of {s["batch_size"]}
sequences of at most {s["max_length"]} tokens, seed {s["seed"]}, out of a corpus of {card["corpus_tokens"]:,} tokens
({", ".join(map(cards.plain, card["corpus"]))}). Its start: `{s["start"]}`.

Losses on held-out text by layer, every λ = 1:

{rows}

{cards.size(card)}

## Licence

{cards.licence_sentence(card["licence"], card["made_from"])}
"""


def load(folder: Path, teacher: Teacher, generator: torch.Generator | None = None) -> tuple[Bert, Projections]:
    """Return the general student with the task teacher's head, cut to size through the last projection, and its projections.

    Raises UserError if the student was distilled from a teacher of other sizes, or if a file of the folder is missing, damaged or
    of another model.
    """
    generator = generator or torch.Generator().manual_seed(0)  # draws what neither the folder nor the teacher holds of the head
    told = card(folder)
    if told["teacher"] != _sizes(teacher.config):
        raise UserError(
            f"{folder} was distilled from a teacher of other sizes ({told['teacher']}) than this one "
            f"({_sizes(teacher.config)}); run tinylib general with this teacher's encoder"
        )
    student = Bert.from_pretrained(folder, head=teacher.config.head, labels=teacher.config.labels or None, generator=generator)
    student.tokenizer_folder = teacher.tokenizer_folder
    try:
        maps = read_tensors(folder / PROJECTIONS, "copy the folder again")
        projections = Projections(student.config.hidden_size, teacher.config.hidden_size, student.config.num_hidden_layers)
        projections.load_state_dict({f"maps.{m}.weight": t.float() for m, t in maps.items()})
    except RuntimeError as error:  # other names or shapes
        raise UserError(f"{folder / PROJECTIONS} is of another model ({first_line(error)}); copy the folder again") from None
    # the student's states s stand for the teacher's W·s, so the teacher's head reads them through W
    cut_head(student, teacher, projections.maps[-1].weight.detach())
    return student.train(), projections


def card(folder: Path) -> dict:
    """Return what the card of a general student says: teacher's sizes, settings, corpus, curve.

    Raises UserError if it is missing or damaged.
    """
    try:
        told = read_json(Path(folder) / CARD)
        if isinstance(told.get("teacher"), dict):
            return told
    except (OSError, ValueError):
        pass
    raise UserError(f"{folder} holds no general student ({CARD} is missing or damaged); make one: tinylib general")


def shipped_for(teacher: Teacher, student: BertConfig) -> Path | None:
    """Return the folder of the shipped general student for this teacher and student shape, or None where there is none.

    It fits a BERT of its teacher's sizes and vocabulary. Raises UserError if that student's card is damaged.
    """
    if isinstance(teacher, Encoder):
        return None
    name = SHIPPED.get(f"{student.num_hidden_layers}x{student.hidden_size}")
    folder = models.shipped_folder() / name if name else None
    fits = folder is not None and (folder / CARD).is_file() and card(folder)["teacher"] == _sizes(teacher.config)
    if fits and teacher.tokenizer_folder:  # equal sizes are no proof: word 1000 may be another word
        fits = same_vocabulary(folder, teacher.tokenizer_folder)
    return folder if fits else None


def fingerprint(shape: str, teacher: str) -> str | None:
    """Return the sha256 of the shipped general student of this shape and pretrained teacher, or None where there is none."""
    if shape not in SHIPPED:
        return None
    folder = models.shipped_folder() / SHIPPED[shape]
    return models.sha256_of(folder / "model.safetensors") if card(folder)["made_from"] == teacher else None


def _sizes(config: BertConfig) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: getattr(config, name) for name in names}


def card_of(
    result: Result, settings: Settings, teacher: str, corpus: str, tokens: int, machine: str, command: str
) -> dict:
    """Return the card's content: what made the student, and its validation losses as they went."""
    return {
        "made_from": teacher, "command": command, "settings": asdict(settings),
        "corpus": corpora.fingerprint(corpus), "corpus_tokens": tokens,
        "seconds": round(result.history.seconds), "machine": machine, "validation": result.history.measured,
    }  # fmt: skip
