"""Pruning that saves: heads, neurons, layers and word pieces that are taken out of a model, so that its matrices shrink.

``shrink`` removes them by their importance: by magnitude, by a first-order Taylor expansion of the loss, or by movement,
learnt while the model trains. Every layer loses as many heads and neurons as every other, since config.json knows one number
for all of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tinylib import processes, sharing
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.masks import head_sizes, whole_count
from tinylib.text import load_tokenizer
from tinylib.train import Batch, Examples, LossFn, in_parts, loader


@dataclass(frozen=True)
class Importance:
    """What each head and each neuron of each layer is worth; of a layer's, the smallest go first."""

    heads: Float[Tensor, "L H"]
    neurons: Float[Tensor, "L F"]


def magnitude_importance(model: Bert) -> Importance:
    """Return the products of the norms by which a part reads and writes: ‖W_V‖·‖W_O‖ of a head, ‖up‖·‖down‖ of a neuron.

    Biases apart, a part adds at most its product times the norm of its input to the residual stream.
    """
    neurons = [layer.up.weight.detach().norm(dim=1) * layer.down.weight.detach().norm(dim=0) for layer in model.layers]
    return Importance(head_sizes(model), torch.stack(neurons))


class Gates:
    """Multiply the output of each head and each neuron by a number of its own while the ``with`` block runs.

    The numbers are leaves of the graph, (L, B, H) and (L, B, F) with B = ``batch`` or 1, so that ∂L/∂gate is at hand for
    gates that are 0 too.
    """

    def __init__(self, model: Bert):
        self.model, L = model, model.config.num_hidden_layers
        self.sizes = (L, model.config.num_attention_heads), (L, model.config.intermediate_size)
        self.open()

    def open(self, batch: int = 1) -> None:
        """Set every gate to 1, one set an example if ``batch`` says how many there are."""
        device = next(self.model.parameters()).device
        self.heads, self.neurons = (
            torch.ones(L, batch, count, device=device, requires_grad=True) for L, count in self.sizes
        )

    def __enter__(self) -> "Gates":
        self.hooks = []
        for i, layer in enumerate(self.model.layers):
            for module, name in ((layer.attention.output, "heads"), (layer.down, "neurons")):
                self.hooks.append(module.register_forward_pre_hook(self._hook(name, i)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name: str, i: int) -> Callable:
        def multiply(_module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            gates = getattr(self, name)[i]  # (B, count)
            parts = inputs[0].unflatten(-1, (gates.shape[-1], -1))  # (B, T, count, width of a part)
            return ((parts * gates[:, None, :, None].to(parts)).flatten(-2),)

        return multiply


def taylor_importance(model: Bert, examples: Examples, loss_fn: LossFn, batches: int = 16, seed: int = 0) -> Importance:
    """Return by how much the loss would change, to first order, without a part: the mean over texts of |∂L/∂gate| at gate = 1.

    L(gate = 0) − L(gate = 1) ≈ −∂L/∂gate, one derivative for all weights of the part together (Michel et al. 2019, eq. 2;
    Molchanov et al. 2017). Reads ``batches`` batches of 32 texts in evaluation mode, in parts where the memory is too small for
    that; the model stays as it is. Raises UserError for ``batches`` below 1 and for no texts.
    """
    if batches < 1 or not len(examples):
        raise UserError(f"batches={batches} of {len(examples)} texts tell nothing; give at least one text and one batch")
    training, device, gates = model.training, next(model.parameters()).device, Gates(model)
    sums, texts = [torch.zeros(size, device=device) for size in gates.sizes], 0

    def slopes(batch: Batch) -> tuple[Tensor, ...]:
        gates.open(len(batch["rows"]))
        loss = sum(loss_fn(model, {k: v.to(device) for k, v in batch.items()}).values())
        return torch.autograd.grad(loss, [gates.heads, gates.neurons])

    try:
        model.eval()
        with gates:
            for batch, _ in zip(loader(examples, 32, seed=seed), range(batches), strict=False):
                for part, found in in_parts(batch, slopes):
                    B = len(part["rows"])
                    for total, slope in zip(sums, found, strict=True):
                        total += B * slope.abs().sum(1)  # the loss is a mean over the part: B times its slope is one text's own
                    texts += B
    finally:
        model.train(training)
    return Importance(*(total / texts for total in sums))


class Movement:
    """Learn while training which heads and neurons to close: the scores of Sanh et al. 2020, one a part.

    Inside ``with movement:`` a part is multiplied by its gate, 0 for the parts of smallest score. The gate's derivative reaches
    the score as if the step from score to gate were not there (straight-through): S ← S − ∂L/∂gate, so a part that training
    would make larger is worth keeping, however small it is now. Called as ``after_step`` of ``train.fit`` it updates the
    scores and, along ``growth(step)`` in [0, 1], closes a growing share of the parts. Several processes, which must all call it,
    close the same ones. Under float16 the derivatives are those of the scaled loss, which rank alike; those that overflow count
    for nothing, as the step itself does.
    """

    def __init__(self, model: Bert, heads: float, neurons: float, growth: Callable[[int], float]):
        H, F = model.config.num_attention_heads, model.config.intermediate_size
        whole_count(heads, H, "heads"), whole_count(neurons, F, "neurons")
        self.shares, self.growth, self.gates = {"heads": heads, "neurons": neurons}, growth, Gates(model)
        self.scores = {name: torch.zeros_like(getattr(self.gates, name)[:, 0]) for name in self.shares}

    def __enter__(self) -> "Movement":
        self.gates.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.gates.__exit__(*error)

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> None:
        """Take in the step's derivatives and set the gates for the next one."""
        for name, share in self.shares.items():
            gate = getattr(self.gates, name)
            if gate.grad is not None:
                # each process scales its part of the loss up for data parallelism, which averages
                slope = sharing.total(gate.grad[:, 0]) / processes.count()
                if torch.isfinite(slope).all():
                    self.scores[name] -= slope
                gate.grad = None
            for row, scores in zip(gate[:, 0], self.scores[name], strict=True):
                row.fill_(1.0)
                row[scores.argsort(stable=True)[: round(share * self.growth(step) * len(scores))]] = 0.0

    def discard(self) -> None:
        """Forget the derivatives of a step that memory was too small for: the step is begun anew, with fewer texts at a time."""
        self.gates.heads.grad = self.gates.neurons.grad = None

    def importance(self) -> Importance:
        """Return the scores; ``shrink`` with them and the same shares removes exactly the parts that are closed."""
        return Importance(self.scores["heads"], self.scores["neurons"])


def shrink(
    model: Bert, heads: float = 0.0, neurons: float = 0.0, layers: int | Sequence[int] | None = None,
    importance: Importance | None = None,
) -> Bert:  # fmt: skip
    """Return a smaller Bert without a share of each layer's heads and neurons and, with ``layers``, without some layers.

    ``heads`` and ``neurons`` are rounded to whole ones, ``layers`` is as in ``prune_layers``; ``importance`` (of the whole
    model) says which go, ``magnitude_importance`` if None. The result saves and loads as any checkpoint. ``transformers``
    loads it too unless heads were removed: its BERT takes a head's width to be C / H (``restore_heads`` puts zeros in their
    place). Raises UserError for a share that is below 0 or would leave nothing, and for ``layers`` as ``prune_layers`` does.
    """
    importance = importance or magnitude_importance(model)
    L = model.config.num_hidden_layers
    if layers is not None:
        kept = kept_layers(layers, L)
        model = prune_layers(model, kept)
        rows = torch.tensor(kept, device=importance.heads.device) - 1
        importance = Importance(importance.heads[rows], importance.neurons[rows])
    config, state = model.config, model.state_dict()
    H, F, D = config.num_attention_heads, config.intermediate_size, config.head_width
    fewer = {"num_attention_heads": H - whole_count(heads, H, "heads"), "intermediate_size": F - whole_count(neurons, F, "neurons")}
    smaller = _empty_copy(model, **fewer, head_dim=D if fewer["num_attention_heads"] * D != config.hidden_size else None)
    for i in range(config.num_hidden_layers):
        keep = _largest(importance.neurons[i], fewer["intermediate_size"])
        _take(state, f"layers.{i}.up", keep, rows=True)
        _take(state, f"layers.{i}.down", keep, rows=False)
        keep = _largest(importance.heads[i], fewer["num_attention_heads"]).repeat_interleave(D)
        for name in ("query", "key", "value"):
            _take(state, f"layers.{i}.attention.{name}", keep, rows=True)
        _take(state, f"layers.{i}.attention.output", keep, rows=False)
    smaller.load_state_dict(state)
    return smaller


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` largest values; of equal ones the later stay, as in ``Movement``."""
    keep = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    keep[values.argsort(stable=True)[len(values) - count :]] = True
    return keep


def _take(state: dict[str, Tensor], name: str, keep: Tensor, rows: bool) -> None:
    """Keep some rows of a matrix with their biases, or some columns; the bias of the columns' matrix stays whole."""
    weight = state[f"{name}.weight"]
    state[f"{name}.weight"] = weight[keep] if rows else weight[:, keep]
    if rows:
        state[f"{name}.bias"] = state[f"{name}.bias"][keep]


def restore_heads(model: Bert) -> Bert:
    """Return the same function in the layout that ``transformers`` knows: heads of zeros in place of those that were removed.

    The matrices are as large as before, so this is for loading the model elsewhere, not for speed. Raises UserError if whole heads
    cannot fill the model's width.
    """
    config = model.config
    if config.head_dim is None:
        return model
    H, D, C = config.num_attention_heads, config.head_width, config.hidden_size
    if C % D or H * D > C:
        raise UserError(f"{H} heads of {D} columns do not fit the width {C}, so this model has no layout that transformers knows")
    whole = _empty_copy(model, num_attention_heads=C // D, head_dim=None)
    state, lacking = model.state_dict(), C - H * D
    for i in range(config.num_hidden_layers):
        for name in ("query", "key", "value"):
            at = f"layers.{i}.attention.{name}"
            state[f"{at}.weight"] = nn.functional.pad(state[f"{at}.weight"], (0, 0, 0, lacking))
            state[f"{at}.bias"] = nn.functional.pad(state[f"{at}.bias"], (0, lacking))
        at = f"layers.{i}.attention.output.weight"
        state[at] = nn.functional.pad(state[at], (0, lacking))
    whole.load_state_dict(state)
    return whole


def prune_neurons(model: Bert, share: float) -> Bert:
    """Return a smaller Bert without a share of the neurons of each feed-forward network.

    ``round(share · I)`` of I = intermediate_size go. A neuron is a row of ``up`` and a column of ``down``;
    those with the smallest product of the two norms go. Every layer loses as many, since ``config.json``
    knows one intermediate_size, so ``transformers`` loads the result.
    """
    return shrink(model, neurons=share)


def prune_layers(model: Bert, keep: int | Sequence[int]) -> Bert:
    """Return a smaller Bert with only some encoder layers.

    ``keep``: the numbers (1…L) of those that stay, or how many: then the first ones and the last, whose output the
    head was trained to read. (After a full fine-tuning the top layers are missed least, Sajjad et al. 2023.) Raises UserError
    unless ``keep`` is 1 to L, or rising numbers from 1 to L.
    """
    L = model.config.num_hidden_layers
    kept = kept_layers(keep, L)
    smaller = _empty_copy(model, num_hidden_layers=len(kept))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    for i, m in enumerate(kept):
        state |= {f"layers.{i}.{name}": tensor for name, tensor in model.layers[m - 1].state_dict().items()}
    smaller.load_state_dict(state)
    return smaller


def kept_layers(keep: int | Sequence[int], L: int) -> list[int]:
    """Return the numbers (1…L) of the layers that stay: as given, or of a count the first ones and the last.

    Raises UserError as ``prune_layers`` does.
    """
    kept = [*range(1, keep), L][: max(keep, 0)] if isinstance(keep, int) else [int(m) for m in keep]
    if not kept or sorted(set(kept)) != kept or kept[0] < 1 or kept[-1] > L:
        raise UserError(f"keep={keep} must be 1 to {L}, or rising layer numbers from 1 to {L} such as (1, 2, {L})")
    return kept


def _empty_copy(model: Bert, **changes) -> Bert:
    """Return a model of other sizes, on the same device and in the same precision, whose weights are still to be filled in."""
    smaller = Bert(model.config.replace(**changes), torch.Generator()).to(next(model.parameters()))
    smaller.tokenizer_folder = model.tokenizer_folder
    return smaller.train(model.training)


def shrink_vocabulary(model: Bert, texts: Sequence[str], folder: str | Path, least: int = 1) -> Bert:
    """Return a Bert whose word table holds only the pieces that occur in ``texts`` at least ``least`` times.

    The special tokens stay, and so do the pieces of one character: any word of known characters can still be spelt. The
    tokenizer that goes with it is written into ``folder``, from which ``save_pretrained`` copies it. Texts without rare pieces
    are cut, and classified, as before. Raises UserError for no texts, for a model without a tokenizer, and for a tokenizer that is
    not WordPiece.
    """
    if not len(texts):
        raise UserError("there are no texts whose pieces could be counted; give those that the model is to read")
    if model.tokenizer_folder is None:
        raise UserError("the model has no tokenizer of which pieces could be counted; load it with Bert.from_pretrained")
    tokenizer = load_tokenizer(model.tokenizer_folder)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = stored["model"].get("type", "WordPiece")
    if kind != "WordPiece":
        raise UserError(f"{model.tokenizer_folder} holds a {kind} tokenizer; only the vocabulary of a WordPiece can be cut")
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    seen = torch.bincount(torch.tensor([i for row in ids for i in row], dtype=torch.long), minlength=len(tokenizer))
    pieces = stored["model"]["vocab"]
    special = set(tokenizer.all_special_ids) | {token["id"] for token in stored["added_tokens"]}
    single = {i for piece, i in pieces.items() if len(piece.removeprefix("##")) == 1}
    kept = sorted(special | single | set((seen >= least).nonzero().flatten().tolist()))
    place = {old: new for new, old in enumerate(kept)}
    stored["model"]["vocab"] = {piece: place[i] for piece, i in sorted(pieces.items(), key=lambda p: p[1]) if i in place}
    for token in stored["added_tokens"]:
        token["id"] = place[token["id"]]
    for processor in _processors(stored.get("post_processor")):
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [place[i] for i in token["ids"]]
        for part in ("sep", "cls"):  # the older BertProcessing names token and number
            if isinstance(processor.get(part), list):
                processor[part][1] = place[processor[part][1]]
    if stored.get("padding"):
        stored["padding"]["pad_id"] = place[stored["padding"]["pad_id"]]
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.txt",):  # of the old vocabulary
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    smaller = _empty_copy(model, vocab_size=len(kept), pad_token_id=place.get(model.config.pad_token_id))
    state, rows = model.state_dict(), torch.tensor(kept)
    for name in ("embeddings.word.weight", "lm_bias"):
        if name in state:
            state[name] = state[name][rows.to(state[name].device)]
    smaller.load_state_dict(state)
    smaller.tokenizer_folder = folder
    load_tokenizer(folder)  # a file that cannot be read is noticed now
    return smaller


def _processors(stored: dict | None) -> list[dict]:
    """Return what a tokenizer.json says of its post-processor, and of a Sequence's members, which may be Sequences themselves."""
    stored = stored or {}
    return [stored, *(processor for inner in stored.get("processors", []) for processor in _processors(inner))]
