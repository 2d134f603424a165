"""A masked-LM head for an encoder that was published without one: train it, measure it, ship what changed.

Masking is BERT's (Devlin et al. 2019, section 3.1): 15 % of the tokens are chosen; of these 80 % become [MASK], 10 % a
random token, 10 % stay. The loss is the cross-entropy at the chosen places only.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from tinylib import cards, models, onednn, options
from tinylib import corpus as corpora
from tinylib.bert import Bert
from tinylib.corpus import Corpus
from tinylib.errors import UserError
from tinylib.stored import first_line, read_json, read_tensors
from tinylib.text import load_tokenizer
from tinylib.train import PRECISIONS, Batch, History, LossFn, fit, loader, set_precision

BASE, CORPUS = "minilm-l6", "corpus"
SHIPPED = {BASE: "minilm-l6-mlm"}  # base -> folder of data/models
DELTA, CARD = "delta.safetensors", "masked_lm.json"
IGNORED = -100  # what F.cross_entropy skips


@dataclass(frozen=True)
class Settings:
    """How the head is trained; the defaults made the shipped one."""

    steps: int = 2400
    batch_size: int = 32
    lr: float = 3e-4
    dropout: float = 0.0  # there is more text than it can learn by heart
    share: float = 0.15  # of the tokens that are chosen
    measure_every: int = 500
    validation: int = 512  # held-out sequences
    seed: int = 0

    def replace(self, **changes) -> "Settings":
        """Return a copy with some fields changed."""
        return replace(self, **changes)


def mask_tokens(
    ids: Int[Tensor, "B T"], allowed: Bool[Tensor, "B T"], mask_id: int, vocab_size: int, share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:  # fmt: skip
    """Return (ids with masks, targets): targets are -100 wherever nothing was chosen.

    ``allowed``: True where a token may be chosen (no padding, no [CLS] or [SEP]). Without ``generator`` the global random
    state is drawn from, which ``train.fit`` keeps and restores.
    """
    draw = lambda: torch.rand(ids.shape, generator=generator).to(ids.device)  # noqa: E731
    chosen = (draw() < share) & allowed
    fate = draw()
    strangers = torch.randint(vocab_size, ids.shape, generator=generator).to(ids.device)
    masked = torch.where(chosen & (fate < 0.8), mask_id, ids)
    masked = torch.where(chosen & (fate >= 0.9), strangers, masked)
    return masked, torch.where(chosen, ids, IGNORED)


def masked_lm_loss(tokenizer, settings: Settings, generator: torch.Generator | None = None) -> LossFn:
    """Return the loss of ``train.fit``: the head runs at the chosen places only, a seventh of the vocabulary's cost."""
    special = torch.tensor(tokenizer.all_special_ids)

    def losses(model: Bert, batch: Batch) -> dict[str, Tensor]:
        ids = batch["ids"]
        allowed = batch["mask"] & ~torch.isin(ids, special.to(ids.device))
        masked, targets = mask_tokens(
            ids, allowed, tokenizer.mask_token_id, model.config.vocab_size, settings.share, generator
        )
        chosen = targets != IGNORED
        logits = model.token_logits(model.encode(masked, batch["mask"], batch["segments"]).hidden[chosen])
        if not len(logits):  # a batch of very short sequences may have no chosen token: nothing to learn from
            return {"masked_lm": sum(p.sum() for p in model.lm_norm.parameters()) * 0.0}
        return {"masked_lm": F.cross_entropy(logits, targets[chosen])}

    return losses


def train_head(
    base: str | Path, tokenizer, corpus: dict[str, Corpus], settings: Settings | None = None, checkpoint: Path | None = None
) -> tuple[Bert, History]:  # fmt: skip
    """Return ``base`` with a trained masked-LM head; its Transformer layers are trained with it, its embeddings are not.

    The word table, which the head reads the words off (tied), stays as it is: so what changed fits into half the file.
    """
    settings = settings or Settings()
    model = Bert.from_pretrained(base, head="masked_lm", generator=torch.Generator().manual_seed(settings.seed))
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    model.set_dropout(settings.dropout)
    measure = lambda m, step: {"step": step} | accuracy(m, tokenizer, corpus["validation"], settings)  # noqa: E731
    history = fit(
        model, loader(corpus["train"], settings.batch_size, seed=settings.seed), masked_lm_loss(tokenizer, settings),
        steps=settings.steps, lr=settings.lr, seed=settings.seed,
        label="masked-LM head", after_epoch=measure, measure_every=settings.measure_every, checkpoint=checkpoint,
        counts=lambda name, batch: int(batch["mask"].sum()),
    )  # fmt: skip
    return model, history


@torch.inference_mode()
def accuracy(
    model: Bert, tokenizer, held_out: Corpus, settings: Settings, tops: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """Return how often the true token of a [MASK] is the most probable one (top 1) and among the ten (top 10).

    Every chosen place becomes [MASK]; the same places at every call.
    """
    random, chosen_rows = torch.Generator().manual_seed(0), held_out.spread(settings.validation)
    special, device = torch.tensor(tokenizer.all_special_ids), next(model.parameters()).device
    hits, count, loss = dict.fromkeys(tops, 0), 0, 0.0
    for batch in tqdm(loader(chosen_rows, settings.batch_size, shuffle=False), desc="filling masks", leave=False):
        ids = batch["ids"]
        places = (torch.rand(ids.shape, generator=random) < settings.share) & batch["mask"] & ~torch.isin(ids, special)
        masked = torch.where(places, tokenizer.mask_token_id, ids).to(device)
        with onednn.products(device):
            hidden = model.encode(masked, batch["mask"].to(device), batch["segments"].to(device)).hidden
            logits, truth = model.token_logits(hidden[places.to(device)]).cpu(), ids[places]
        best = logits.topk(max(tops), dim=-1).indices
        for top in tops:
            hits[top] += int((best[:, :top] == truth[:, None]).any(-1).sum())
        loss += float(F.cross_entropy(logits, truth, reduction="sum"))
        count += len(truth)
    if not count:
        raise UserError(f"the {len(chosen_rows)} held-out sequences are too short to mask a token of; give a larger corpus")
    return {f"top {top}": hits[top] / count for top in tops} | {"loss": loss / count, "masks": count}


def save_delta(model: Bert, base: str, folder: Path, card: dict) -> None:
    """Write in float16 what training changed: every tensor outside the embeddings. ``load_delta`` puts it onto ``base``."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {n: t.detach().cpu().half().contiguous() for n, t in model.state_dict().items() if not n.startswith("embeddings.")}
    save_file(changed, folder / DELTA)
    card = {"base": base} | card
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: dict) -> str:
    """Return the card as a page: what was trained, the command that did it, and the accuracy on held-out masks as it went."""
    rows = "\n".join(
        f"| {row['step']} | {row['top 1']:.1%} | {row['top 10']:.1%} | {row['loss']:.2f} |" for row in card["validation"]
    )
    s = card["settings"]
    base = cards.plain(card["base"])
    ours = card["base"] in SHIPPED and "corpus_from" not in card  # as the shipped heads were made
    load = f'shipped("{base}")' if ours else 'load("THIS FOLDER")'
    given = {"base": None if card["base"] == BASE else card["base"], "corpus": card.get("corpus_from"), "steps": s["steps"]}
    licence = "Licence: that of the base and of the corpus."
    if ours:
        start = f"Licence: Apache-2.0, as {models.SHIPPED[card['base']].hub}, from which it starts."
        licence = f"{start} Of the corpus, `snli` is CC BY-SA 4.0."
    command = cards.command("mlm", given | {"seed": s["seed"], "precision": card["precision"], "out": "FOLDER"})
    return f"""# A masked-LM head for {base}

{base} was published without a masked-LM head. {DELTA} holds one, and the Transformer layers that were trained with it,
in float16; the embeddings, the word table among them, are {base}'s own. `tinylib.mlm.{load}` puts
the two together; data augmentation fills blanks with it. Everything said here stands as numbers in {CARD}.

Made by

{cards.shown(command.replace("tinylib mlm", "python -m tinylib.mlm", 1))}

in {card["seconds"]:,} s: {s["steps"]:,} steps of {s["batch_size"]} sequences, learning rate {s["lr"]:g},
{s["share"]:.0%} of the tokens chosen (Devlin et al. 2019, section 3.1), dropout {s["dropout"]:g}, out of the corpus
({", ".join(map(cards.plain, card["corpus"]))}).

{licence}

On held-out text, every chosen token covered by [MASK]:

| step | right at first | among the first ten | loss (nats) |
|---|---|---|---|
{rows}
"""


def load(folder: Path) -> Bert:
    """Return the base model with the trained layers and the masked-LM head of a delta folder.

    Raises UserError if a file of the folder is missing, damaged or of another model.
    """
    damaged = f"{folder} holds no masked-LM head ({{}}); copy the folder again".format
    try:
        base, changed = str(read_json(folder / CARD)["base"]), read_tensors(folder / DELTA)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(damaged(first_line(error))) from None
    model = Bert.from_pretrained(base, head="masked_lm")
    try:
        model.load_state_dict(model.state_dict() | {n: t.float() for n, t in changed.items()})
    except RuntimeError as error:  # another model's names or shapes
        raise UserError(damaged(first_line(error))) from None
    return model.eval()


def shipped(base: str = "minilm-l6") -> Bert:
    """Return the shipped base model with its masked-LM head; any other name or folder must have a head of its own.

    Raises UserError if the shipped head is missing or damaged, and for another model without one.
    """
    if base in SHIPPED:
        return load(_delta_folder(base))
    model = Bert.from_pretrained(base)
    if model.config.head != "masked_lm":  # a new one would fill blanks at random
        raise UserError(f"{base} has no masked-LM head, and augmentation fills blanks with it; name a BertForMaskedLM")
    return model


def card(base: str = "minilm-l6") -> dict | None:
    """Return what the card of the shipped head says (settings, corpus, accuracy as it went); None for a model with its own.

    Raises UserError if the shipped head is missing.
    """
    if base not in SHIPPED:
        return None
    return json.loads((_delta_folder(base) / CARD).read_text(encoding="utf-8"))


def fingerprint(base: str) -> str:
    """Return what tells one masked LM from another: the sha256 of the shipped delta, or the name.

    Raises UserError if that delta is missing.
    """
    return models.sha256_of(_delta_folder(base) / DELTA) if base in SHIPPED else base


def _delta_folder(base: str) -> Path:
    folder = models.shipped_folder() / SHIPPED[base]
    if not (folder / DELTA).is_file():
        raise UserError(
            f"augmentation fills blanks, and {base} has no masked-LM head yet; train one, which takes an hour or more: "
            f"python -m tinylib.mlm --out {folder}"
        )
    return folder


def main(argv: list[str] | None = None) -> int:
    """Train a masked-LM head on a corpus; called again after an interruption it goes on from its last checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m tinylib.mlm", description=main.__doc__)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--corpus", default=CORPUS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=options.count, default=Settings.steps)
    parser.add_argument("--seed", type=options.seed, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="highest")
    args = parser.parse_args(argv)
    set_precision(args.precision)
    settings = Settings(steps=args.steps, seed=args.seed)
    new = not os.path.exists(args.out)  # without an error for a name that no file can have
    try:
        models.make_folder(args.out)  # before the training, not after
        tokenizer, corpus = load_tokenizer(args.base), corpora.load(args.corpus, args.base)
        told = {"settings": asdict(settings), "corpus": corpora.fingerprint(args.corpus), "precision": args.precision}
        key = hashlib.sha256(json.dumps([args.base, told], sort_keys=True).encode()).hexdigest()[:16]
        checkpoint = models.cache_folder() / "runs" / f"mlm-{key}.safetensors"
        model, history = train_head(args.base, tokenizer, corpus, settings, checkpoint)
        if args.corpus != CORPUS:
            told["corpus_from"] = args.corpus
        save_delta(model, args.base, args.out, told | {"seconds": round(history.seconds), "validation": history.measured})
    except UserError as error:
        with contextlib.suppress(OSError):
            if new:
                args.out.rmdir()
        print(f"mlm: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {history.measured[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
