"""Pruning: from a model to one with fewer weights that has recovered from the loss of the others.

Which weights go is in ``masks``, whose names are at hand here too. Zeros make nothing faster: a matrix
product multiplies them like any other number. What makes the matrices smaller, and so the model faster, is in
``structure``: its names are at hand here as well.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tinylib.bert import Bert
from tinylib.distill import Settings, check_labels
from tinylib.encoders import Teacher
from tinylib.errors import UserError
from tinylib.layers import teacher_logits
from tinylib.losses import prediction_loss
from tinylib.masks import (
    Masks,
    bitmask_bytes,
    global_masks,
    head_masks,
    layer_masks,
    load_compressed,
    magnitude_mask,
    prunable,
    random_masks,
    save_compressed,
    sparsity_of,
    whole_count,
    whole_masks,
)  # fmt: skip
from tinylib.structure import (
    Importance,
    Movement,
    magnitude_importance,
    prune_layers,
    prune_neurons,
    restore_heads,
    shrink,
    shrink_vocabulary,
    taylor_importance,
)
from tinylib.tasks import label_loss
from tinylib.text import Encoded, LengthBuckets
from tinylib.train import Batch, Examples, History, LossFn, classification_loss, fit

__all__ = [
    "GradualPruner", "Importance", "Masks", "Movement", "Recovered", "bitmask_bytes", "by_layer", "cubic_sparsity",
    "global_masks", "head_masks", "layer_masks", "learn_structure", "load_compressed", "magnitude_importance",
    "magnitude_mask", "prunable", "prune_and_recover", "prune_by", "prune_heads", "prune_layers", "prune_neurons",
    "random_masks", "recover", "restore_heads", "save_compressed", "sensitivity", "shrink", "shrink_vocabulary",
    "sparsity_of", "taylor_importance", "teacher_loss", "while_distilling", "whole_masks",
]  # fmt: skip


def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Return the share to be removed at a step: fast at first, slow when little is left.

    Zhu and Gupta 2017, eq. 1: s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(n·Δt))³ between ``begin`` = t₀ and
    ``end`` = t₀ + n·Δt; constant outside. Raises UserError unless ``end`` is later than ``begin``.
    """
    if end <= begin:
        raise UserError(f"end={end} must be later than begin={begin}")
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1.0 - progress) ** 3


class GradualPruner:
    """Raise the sparsity along ``cubic_sparsity`` as the ``after_step`` of ``train.fit``.

    The masks are drawn anew every ``every`` steps from ``begin`` to ``end`` and frozen after that.
    ``make(model, sparsity)`` decides the masks: ``global_masks`` (default), ``layer_masks``, …. What is removed never comes
    back where ``make`` ranks by size, since zeros are the smallest; a ``make`` that draws by lot must draw the same lots each time
    (``random_masks`` with a generator of the same seed). Raises UserError if ``every`` is below 1 or ``end`` not later than
    ``begin``.
    """

    def __init__(
        self,
        final: float,
        begin: int,
        end: int,
        every: int = 1,
        make: Callable[[Bert, float], Masks] = global_masks,
    ):
        if every < 1:
            raise UserError(f"every={every} must be at least 1 step")
        cubic_sparsity(begin, begin, end, final)  # refuses an empty schedule now, not at step `begin`
        self.final, self.begin, self.end, self.every, self.make = final, begin, end, every, make
        self.masks: Masks | None = None

    def resume(self, model: nn.Module, step: int) -> None:
        """Take the masks up from the zeros of a checkpoint's model, before a step moves them; ``train.fit`` calls this."""
        if step >= self.begin:
            self.masks = Masks({name: model.get_parameter(name).detach() != 0 for name in self.make(model, 0.0).keep})

    def __call__(self, model: nn.Module, step: int) -> None:
        """Update the masks if this step is one for it, and apply them."""
        if self.masks:  # before ranking: the step just taken moved the removed weights off zero
            self.masks.apply(model)
        due = self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)
        if due or (self.masks is None and step > self.begin):
            # a resumed run finds its zeros again: it ranks as at the last step that was due, when they were the smallest
            last = self.end if step >= self.end else step - (step - self.begin) % self.every
            self.masks = self.make(model, cubic_sparsity(last, self.begin, self.end, self.final))
            self.masks.apply(model)


@dataclass(frozen=True)
class Recovered:
    """A pruned model that has trained on, its masks, and the history of that training."""

    model: Bert
    masks: Masks
    history: History


class FirstBatches(LengthBuckets):
    """Yield only the first ``steps`` batches of each epoch.

    Raises UserError for ``steps`` below 1 or above an epoch's batches.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, steps: int):
        super().__init__(lengths, batch_size, seed=seed)
        if not 1 <= steps <= (most := super().__len__()):
            raise UserError(f"steps={steps} must be between 1 and an epoch's {most} batches; or give epochs")
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def _batches(self) -> list[list[int]]:
        return super()._batches()[: self.steps]


def teacher_loss(teacher: Teacher, examples: Examples, temperature: float = 1.0, seen: Encoded | None = None) -> LossFn:
    """Return a ``loss_fn`` that compares logits with the teacher's, which are computed once a text.

    ``seen``: the same texts in the teacher's own word pieces, where the student's vocabulary is another. Raises UserError if
    they are not as many texts as the student's.
    """
    seen = examples.encoded if seen is None else seen
    if len(seen) != len(examples):
        raise UserError(f"the teacher sees {len(seen)} texts and the student {len(examples)}; encode the same texts for both")
    targets = teacher_logits(teacher, seen)

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["ids"], batch["mask"], batch["segments"]).logits
        wanted = targets[batch["rows"].cpu()].to(logits.device)
        return {"prediction": prediction_loss(logits, wanted, temperature)}

    return losses


def recover(
    model: Bert, examples: Examples, loss_fn: LossFn = classification_loss, *, epochs: int = 1,
    lr: float = 5e-5, steps: int | None = None, batch_size: int = 32, seed: int = 0,
    label: str = "recovering", after_step=None, after_epoch=None,
) -> History:  # fmt: skip
    """Train a pruned model on, in place; ``steps`` stops each epoch after so many batches.

    Raises UserError for ``steps`` below 1 or above an epoch's batches.
    """
    batches = _batches(examples, batch_size, seed, steps)
    return fit(
        model, DataLoader(examples, batch_sampler=batches, collate_fn=examples.collate), loss_fn,
        epochs=epochs, lr=lr, seed=seed, label=label, after_step=after_step, after_epoch=after_epoch,
    )  # fmt: skip


def _batches(examples: Examples, batch_size: int, seed: int, steps: int | None) -> LengthBuckets:
    lengths = examples.encoded.lengths
    if steps is None:
        return LengthBuckets(lengths, batch_size, seed=seed)
    return FirstBatches(lengths, batch_size, seed, steps)


def prune_and_recover(
    model: Bert, examples: Examples, sparsity: float, loss_fn: LossFn = classification_loss, *,
    epochs: int = 1, steps: int | None = None, gradual: bool = False,
    make: Callable[[Bert, float], Masks] = global_masks, batch_size: int = 32, seed: int = 0, **training,
) -> Recovered:  # fmt: skip
    """Prune a copy of a model and train what is left; the model given stays as it is.

    loss_fn: ``train.classification_loss`` (labels) or ``teacher_loss(teacher, examples)`` (soft targets).
    gradual: raise the sparsity over the first two thirds of the run (``GradualPruner``), not all at once.
    make: ``global_masks``, ``layer_masks``, ``whole_masks``, ``head_masks``, or a function of yours.
    steps and the rest: as in ``recover``.
    Raises UserError for ``steps`` as ``recover`` does, and for a ``sparsity`` that ``make`` refuses.
    """
    model = copy.deepcopy(model)
    total = epochs * len(_batches(examples, batch_size, seed, steps))
    if gradual and total > 1:
        pruner = _growing(sparsity, total, make)
    else:
        pruner = make(model, sparsity)
        pruner.apply(model)
    run = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed}
    history = recover(model, examples, loss_fn, after_step=pruner, **run, **training)
    return Recovered(model, pruner.masks if isinstance(pruner, GradualPruner) else pruner, history)


def learn_structure(
    model: Bert, examples: Examples, loss_fn: LossFn, *, heads: float = 0.0, neurons: float = 0.0, epochs: int = 1,
    steps: int | None = None, batch_size: int = 32, seed: int = 0, **training,
) -> tuple[Bert, History]:  # fmt: skip
    """Train a copy of a model while ``Movement`` closes a growing share of its heads and neurons; return it without them.

    The share grows along ``cubic_sparsity`` over the first two thirds of the run, and the last third recovers. With
    ``teacher_loss`` the structure is learnt while distilling. Raises UserError for ``steps`` as ``recover`` does,
    and for a share that is below 0 or would leave no head or no neuron.
    """
    model = copy.deepcopy(model)
    total = epochs * len(_batches(examples, batch_size, seed, steps))
    end = max(1, 2 * total // 3)
    movement = Movement(model, heads, neurons, lambda step: cubic_sparsity(step, 0, end, 1.0))
    run = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed}
    with movement:
        history = recover(model, examples, loss_fn, after_step=movement, **run, **training)
    return shrink(model, heads, neurons, importance=movement.importance()), history


def while_distilling(
    sparsity: float, examples: Examples, settings: Settings, make: Callable[[Bert, float], Masks] = global_masks
) -> GradualPruner:
    """Return the ``after_step`` of ``distill.distill`` under which the masks grow over two thirds of the prediction step.

    The teacher's soft targets are the loss all the while, so that the student recovers from each cut as it learns.
    Raises UserError if that step has fewer than two batches.
    """
    total = settings.epochs_prediction * len(LengthBuckets(examples.lengths, settings.batch_size))
    if total < 2:
        raise UserError("pruning while distilling needs a prediction step of two batches or more; give it an epoch")
    return _growing(sparsity, total, make)


def _growing(sparsity: float, total: int, make: Callable[[Bert, float], Masks]) -> GradualPruner:
    """Let masks grow in ten parts over two thirds of ``total`` steps; the last third recovers."""
    end = 2 * total // 3
    return GradualPruner(sparsity, begin=0, end=end, every=max(1, end // 10), make=make)


def sensitivity(
    model: Bert,
    evaluate: Callable[[Bert], float],
    levels: Sequence[float],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[float]]:
    """Return ``evaluate(model)`` with one group of weights pruned to each level and all others left whole.

    ``groups`` names lists of weights (default: each prunable weight alone; ``by_layer(model)`` for whole
    layers). The model is as before afterwards, even if ``evaluate`` raises.
    """
    groups = groups or {name: [name] for name in prunable(model)}
    found: dict[str, list[float]] = {}
    for group, names in tqdm(groups.items(), desc="sensitivity", leave=False):
        whole = {name: model.get_parameter(name).detach().clone() for name in names}
        found[group] = []
        for level in levels:
            try:
                Masks({name: magnitude_mask(weight, level) for name, weight in whole.items()}).apply(model)
                found[group].append(evaluate(model))
            finally:
                with torch.no_grad():
                    for name, weight in whole.items():
                        model.get_parameter(name).copy_(weight)
    return found


def by_layer(model: Bert) -> dict[str, list[str]]:
    """Return the names of the prunable weights of each encoder layer, for ``sensitivity``."""
    names = list(prunable(model))
    return {f"layer {i + 1}": [n for n in names if n.startswith(f"layers.{i}.")] for i in range(len(model.layers))}


def prune_heads(model: Bert, share: float) -> Bert:
    """Return a copy with ``round(share · H)`` heads of each layer zeroed.

    To keep them so, recover with ``prune_and_recover(…, make=head_masks)``. Nothing is smaller or faster: ``shrink`` takes
    heads out for real.
    """
    pruned = copy.deepcopy(model)
    head_masks(model, share).apply(pruned)
    return pruned


def prune_by(
    method: str, model: Bert, examples: Examples, sparsity: float, *, teacher: Teacher | None = None,
    temperature: float = 1.0, **training,
) -> Bert:  # fmt: skip
    """Prune by "magnitude", "heads", "neurons" or "layers", recover, and return the new model.

    ``sparsity`` is the share of weights, heads, neurons or layers to remove (of layers, those below the last; of heads and
    neurons, those of smallest ``taylor_importance``). All but magnitude return a smaller model. With a
    ``teacher`` the recovery learns from its soft targets, else from the labels. ``training``: as in
    ``recover``. Raises UserError for another ``method``, for a ``sparsity`` that is below 0 or would leave nothing, and for a
    teacher of other labels or of another order of them.
    """
    if teacher:
        check_labels(teacher, model)
    loss_fn = teacher_loss(teacher, examples, temperature) if teacher else label_loss(model.config)
    if method == "magnitude":
        return prune_and_recover(model, examples, sparsity, loss_fn, make=whole_masks, **training).model
    if method in ("heads", "neurons"):
        smaller = shrink(model, **{method: sparsity}, importance=taylor_importance(model, examples, loss_fn))
    elif method == "layers":
        L = model.config.num_hidden_layers
        smaller = prune_layers(model, L - whole_count(sparsity, L, "layers"))
    else:
        raise UserError(f"method={method!r} is not one of magnitude, heads, neurons, layers")
    recover(smaller, examples, loss_fn, **training)
    return smaller
