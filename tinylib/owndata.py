"""What there is to know of one's own data and teacher before a run: counts for metrics.json, notes for the user, extra texts.

What cannot be used at all is refused where it is read (``files``, ``datasets``). Here stands what can be used and should be
known: classes of unequal size, texts that were cut, texts that stand in two splits, a teacher that has nothing to teach.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tinylib import metrics, models, tasks
from tinylib.course import Prepared
from tinylib.datasets import contradictions, repeats
from tinylib.errors import UserError, UserNote
from tinylib.files import Rows, read_texts
from tinylib.text import Encoded, encode, load_tokenizer
from tinylib.train import Examples

LARGEST_CLASS = 0.8  # of train; with more, always naming that class looks like a good model
SMALLEST_CLASS = 10  # texts in train; of fewer nothing is learnt, and the measured figures say nothing of that class
CUT = 0.05  # of a split's texts; when more are cut at --max-length, the user is told
LEVEL, FEW = 0.05, 30  # of the test that a teacher must pass, and the validation texts without which it decides nothing


def examine(prepared: Prepared) -> dict:
    """Return, for metrics.json, what each split has: rows, pairs or not, classes or scores, cut texts, texts of train."""
    found: dict = {"rows": {split: len(labels) for split, labels in prepared.labels.items()}, "pairs": prepared.pairs is not None}
    if prepared.labels["train"].is_floating_point():
        found["scores"] = {split: _spread(labels) for split, labels in prepared.labels.items()}
    else:
        counts = {split: Counter(labels.tolist()) for split, labels in prepared.labels.items()}
        found["classes"] = {split: {n: count[i] for i, n in enumerate(prepared.names)} for split, count in counts.items()}
    keys = {split: _keys(texts, (prepared.pairs or {}).get(split)) for split, texts in prepared.texts.items()}
    return found | {
        "truncated": {split: encoded.truncated for split, encoded in prepared.encoded.items()},
        "repeated_in_train": repeats(keys),
        "contradictions_in_train": len(contradictions(keys["train"], prepared.labels["train"].tolist())),
    }


def _spread(labels: Tensor) -> dict[str, float]:
    mean, spread = metrics.mean_and_spread(labels)
    return {"mean": mean, "spread": spread, "lowest": float(labels.min()), "highest": float(labels.max())}


def _keys(texts: list[str], pairs: list[str] | None) -> list[str]:
    return Rows("", [], texts, pairs, []).keys()


def note(found: dict, max_length: int, positions: int) -> None:
    """Tell the user (`UserNote`) of classes of unequal size and of cut texts; ``positions``: the tokens that the model can take."""
    for sentence in (*_imbalance(found), *_cut(found, max_length, positions)):
        warnings.warn(sentence, UserNote, stacklevel=2)


def _imbalance(found: dict) -> list[str]:
    counts = {name: count for name, count in found.get("classes", {}).get("train", {}).items()}
    if not counts:
        return []
    said, rows = [], sum(counts.values())
    largest, smallest = max(counts, key=counts.get), min(counts, key=counts.get)
    if counts[largest] > LARGEST_CLASS * rows:
        share = f"{counts[largest]:,} of {rows:,} texts of train ({counts[largest] / rows:.0%}) are of class {largest!r}"
        said.append(f"{share}: judge by f1, not by accuracy, which naming that class alone would raise as high")
    if counts[smallest] < SMALLEST_CLASS:
        few = f"class {smallest!r} has {counts[smallest]} texts in train, fewer than {SMALLEST_CLASS}"
        said.append(f"{few}: add some, or leave the class out")
    return said


def _cut(found: dict, max_length: int, positions: int) -> list[str]:
    cut, rows = found["truncated"], found["rows"]
    if not any(cut[split] > CUT * rows[split] for split in rows):
        return []
    told = ", ".join(f"{cut[split]:,} of {rows[split]:,} of {split} ({cut[split] / rows[split]:.0%})" for split in rows)
    remedy = f"give a greater --max-length (this model takes {positions})" if positions > max_length else "shorten them"
    return [f"texts longer than --max-length {max_length} were cut: {told}; {remedy}"]


# Extra texts


@dataclass(frozen=True)
class Unlabelled:
    """Texts (and pairs) without labels for the teacher to label, and what was counted while they were read."""

    texts: list[str]
    pairs: list[str] | None
    found: dict


def unlabelled(path: str | Path, prepared: Prepared) -> Unlabelled:
    """Read extra texts for the student to learn from (``files.read_texts``); those of validation and test are dropped.

    So are those that train has already, and repeats. ``found`` counts them for metrics.json. Raises UserError for a file that
    cannot be used: of pairs where the data has single texts or the reverse, or one of which nothing is left.
    """
    path = models.expanded(path)
    if not path.is_file():
        raise UserError(f"--unlabelled {path} is no file: give a .txt file of one text a line, or a table with a column text")
    rows = read_texts(path)
    if prepared.pairs and rows.pairs is None:
        raise UserError(f"--unlabelled {path} has no column text_pair, which the data has: give pairs, as a table")
    if not prepared.pairs and rows.pairs is not None:
        raise UserError(f"--unlabelled {path} has a column text_pair, which the data lacks: delete it")
    seen = {}
    for split in ("train", "validation", "test"):  # a text of two splits counts where it must not be learnt
        seen |= dict.fromkeys(_keys(prepared.texts[split], (prepared.pairs or {}).get(split)), split)
    kept, dropped = [], Counter()
    for i, key in enumerate(rows.keys()):
        if key in seen:
            dropped[seen[key]] += 1
            continue
        seen[key] = "repeated"
        kept.append(i)
    found = {"rows": len(rows.texts), "used": len(kept), "sha256": models.sha256_of(path), "repeated": dropped["repeated"]}
    found |= {f"in_{split}": dropped[split] for split in ("train", "validation", "test")}
    if not kept:
        raise UserError(f"--unlabelled {path}: all of its {len(rows.texts)} texts are in the data already: give others")
    if held_out := dropped["validation"] + dropped["test"]:
        told = f"{held_out} of {len(rows.texts)} texts are in validation or test ({dropped['test']} in test)"
        warnings.warn(f"--unlabelled {path}: {told}; they were left out", UserNote, stacklevel=2)
    kept_rows = rows.take(kept)
    return Unlabelled(kept_rows.texts, kept_rows.pairs, found)


def with_unlabelled(examples: Examples, more: Unlabelled, base: str | Path, max_length: int) -> Examples:
    """Return the examples with texts without labels behind them (``tasks.without_labels``), tokenized for ``base``."""
    made = encode(load_tokenizer(base), more.texts, more.pairs, max_length=max_length)
    own = examples.encoded
    both = Encoded(own.ids + made.ids, own.segments + made.segments, own.pad_id)
    return Examples(both, torch.cat([examples.labels, tasks.without_labels(examples.labels, len(made))]))


# The teacher


def check_teacher(
    source: str | Path, labels: Tensor, logits: Float[Tensor, "N K"], names: tuple[str, ...], allow: bool = False
) -> dict[str, float]:
    """Refuse a teacher that knows nothing, by its answers on the validation split; return the figures, for metrics.json.

    A classifier's accuracy must be above the share of the most frequent class. With at least ``FEW`` texts it must also be
    above what chance gives, by a one-sided exact binomial test at the 5 % level: chance is the agreement that answers of the
    same frequencies would have if they did not depend on the text (Cohen 1960). A regression's Pearson correlation must be
    above 0, with ``FEW`` texts by the one-sided test. With ``allow`` a UserNote says what else a UserError would. A split of
    one text, or of one label or score, decides nothing, which a UserNote says.
    """
    judge = _check_classes if logits.shape[1] > 1 else _check_scores
    figures, why = judge(labels, logits, names)
    if why and len(labels.unique()) == 1:
        what = "has one text only" if len(labels) == 1 else f"has one {'label' if logits.shape[1] > 1 else 'score'} only"
        said = f"the validation split {what}, so it does not decide whether the teacher {source} has anything to teach"
        warnings.warn(f"{said}; give it texts of several", UserNote, stacklevel=2)
    elif why:
        said = f"the teacher {source} has nothing to teach: on the {len(labels)} texts of validation {why}"
        if not allow:
            raise UserError(f"{said}; fine-tune it on this data first (tinylib teach), or go on with --allow-weak-teacher")
        warnings.warn(f"{said}; going on, as --allow-weak-teacher asks", UserNote, stacklevel=2)
    return figures


def _check_classes(labels: Tensor, logits: Tensor, names: tuple[str, ...]) -> tuple[dict[str, float], str]:
    from scipy.stats import binomtest  # SciPy's statistics take half a second to import

    told, n = tasks.told(logits), len(labels)
    accuracy, K = metrics.accuracy(labels, told), logits.shape[1]
    true, said = (torch.bincount(x, minlength=K).double() / n for x in (labels, told))
    majority, chance, right = float(true.max()), float(true @ said), round(accuracy * n)
    p = float(binomtest(right, n, chance, alternative="greater").pvalue)
    figures = {"accuracy": accuracy, "majority_share": majority, "p_value": p}
    share = f"the largest class's share {majority:.1%}"
    if accuracy <= majority:
        why = f"its accuracy is {accuracy:.1%}, not above {share}"
        below = binomtest(right, n, chance, alternative="less").pvalue < LEVEL
        return figures, why + (_other_order(labels, told, names) if below else "")
    if n >= FEW and p >= LEVEL:
        return figures, f"its accuracy of {accuracy:.1%} is no more than luck (p = {p:.2f}), beside {share}"
    return figures, ""


def _other_order(labels: Tensor, told: Tensor, names: tuple[str, ...]) -> str:
    """Say in which order of its labels the teacher would be right, if there is one that makes it better."""
    from scipy.optimize import linear_sum_assignment

    table = metrics.confusion(labels, told, classes=len(names))
    true, said = linear_sum_assignment(table, maximize=True)
    best = table[true, said].sum() / table.sum()
    order = [names[true[list(said).index(k)]] for k in range(len(names))]
    return f", below chance: are its labels in another order? as {', '.join(order)} it would reach {best:.1%}"


def _check_scores(labels: Tensor, logits: Tensor, names: tuple[str, ...]) -> tuple[dict[str, float], str]:
    from scipy.stats import pearsonr

    told = tasks.told(logits).double()
    found, n = metrics.pearson(labels, told), len(labels)
    constant = n < 3 or not np.ptp(labels.numpy()) or not np.ptp(told.numpy())
    p = 1.0 if constant else float(pearsonr(labels.double().numpy(), told.numpy(), alternative="greater").pvalue)
    figures = {"pearson": found, "p_value": p}
    if found <= 0:
        turned = "; its scores run the other way: is a high one a low one elsewhere?" if p > 1 - LEVEL and n >= FEW else ""
        return figures, f"its Pearson correlation with the labels is {found:.2f}, not above 0{turned}"
    if n >= FEW and p >= LEVEL:
        return figures, f"its Pearson correlation of {found:.2f} with the labels is no more above 0 than luck gives (p = {p:.2f})"
    return figures, ""
