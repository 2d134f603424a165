"""The model card (README.md) of a folder that a command writes: what was made of what, on which data, how, and how good it is.

The page is Hugging Face's: YAML front matter, then Markdown. Names of files, labels and data are the user's, and whatever they
hold must neither break a table nor become HTML, Markdown or YAML: in the front matter they go through ``huggingface_hub``'s
YAML writer, on the page through ``plain``.
"""

import html
import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from tinylib import models

FILE = "README.md"
LONGEST = 200  # characters of a user's text that a card shows
MARKS = re.compile(r"([\\`*_\[\]|~$])")  # what Markdown, GitHub's and Hugging Face's too, may read as a sign inside a line
UNKNOWN = "unknown"
TITLES = {
    "teach": "fine-tuned from", "distill": "distilled from", "prune": "pruned from",
}  # fmt: skip
FIGURES = {  # of metrics.json, in the card's words
    "accuracy": "accuracy", "f1": "F1 (macro)", "precision": "precision (macro)", "recall": "recall (macro)",
    "pearson": "Pearson correlation", "spearman": "Spearman correlation", "rmse": "root of the mean squared error",
    "teacher_accuracy": "the teacher's accuracy", "teacher_score": "the teacher's score",
    "teacher_pearson": "the teacher's Pearson correlation", "teacher_spearman": "the teacher's Spearman correlation",
    "teacher_rmse": "the teacher's root of the mean squared error", "dense_accuracy": "accuracy before pruning",
    "dense_pearson": "Pearson correlation before pruning", "retention": "retention (share of the teacher's)",
    "sparsity": "share of the weights removed",
}  # fmt: skip


def one_line(text: object, longest: int = LONGEST) -> str:
    """Return a text on one line, without control, direction and format characters, cut at ``longest`` of the others."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))
    line = " ".join("".join(kept).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def plain(text: object, longest: int = LONGEST) -> str:
    """Return Markdown that shows a user's text as it is, on one line, in a table or out of it: nothing in it is a sign.

    It must not begin a line, where more is a sign ("# ", "- ", "1. ").
    """
    shown = html.escape(MARKS.sub(r"\\\1", one_line(text, longest)))
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;")  # else GitHub makes a link of it


def table(head: list[str], rows: list[list[object]]) -> str:
    """Return a Markdown table of cells that are shown as they are."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def command(name: str, given: Mapping[str, object]) -> str:
    """Return the command line that gives these options; None and False are left out, a tuple is a list with commas."""
    words = ["tinylib", name]
    for option, value in given.items():
        if value is None or value is False:
            continue
        words.append("--" + option.replace("_", "-"))
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple | list) else str(value))
    return shlex.join(words)


def licence_of(folder: str | Path) -> str:
    """Return the licence of a model as its card's front matter, NOTICE or LICENSE names it, as an identifier; or "unknown"."""
    folder = Path(folder)
    try:
        told = (metadata_load(folder / FILE) or {}).get("license") if (folder / FILE).is_file() else None
    except Exception:  # a card that is no YAML says nothing
        told = None
    if isinstance(told, str) and re.fullmatch(r"[\w.\-]{1,40}", told):
        return told.lower()
    for name, pattern in (("NOTICE", r"(?m)^License: ([\w.\-]{1,40})$"), ("LICENSE", r"(?s)\A.{0,200}?(MIT|Apache) License")):
        if (folder / name).is_file():
            found = re.search(pattern, (folder / name).read_text(encoding="utf-8", errors="replace"))
            if found:
                return {"MIT": "mit", "Apache": "apache-2.0"}.get(found[1], found[1].lower())
    return UNKNOWN


def card(name: str, kind: str, source: str, report: Mapping, given: Mapping[str, object], own_heads: bool = False) -> str:
    """Return the page for a model of ``tinylib teach``, ``distill`` or ``prune`` (``kind``).

    ``name``: the folder's; ``source``: the model that it was made of, as it was given; ``report``: what metrics.json holds;
    ``given``: the command's options; ``own_heads``: whether it has heads as no BERT of transformers' has them.
    """
    licence, revision = licence_of(models.resolve(source)), models.revision_of(source)
    scores = "pearson" in report
    made = f"{TITLES[kind]} {plain(source)}{f' (revision {revision})' if revision else ''}, on the data {plain(given['data'])}"
    words = "a regression: it gives each text a score" if scores else f"a classifier of {len(report['labels'])} labels"
    parts = [
        f"---\n{_front_matter(name, kind, source, report, given, licence, own_heads)}---",
        f"# {plain(name)}",
        f"An encoder {made}, by tinylib {plain(report['tinylib'])}; {words}.",
        _measured(report),
        size(report),
        _data(report, given),
        "## How it was made",
        shown(command(kind, given)),
        table(["setting", "value"], [[option, value] for option, value in report["settings"].items() if value is not None]),
        _use(scores, own_heads, report["data"].get("pairs", False)),
        "## Licence",
        f"{licence_sentence(licence, source)} The data may have terms of its own.",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, *args) -> None:
    """Write a card (the first arguments of ``card``) into a folder that holds the model."""
    (folder / FILE).write_text(card(*args, own_heads=_own_heads(folder)), encoding="utf-8")


def _own_heads(folder: Path) -> bool:
    """Tell whether a folder's model is a BERT from which heads were removed, which transformers cannot load."""
    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    width = told.get("head_dim") if told.get("model_type") == "bert" else None
    return width is not None and width * told["num_attention_heads"] != told["hidden_size"]


def _front_matter(
    name: str, kind: str, source: str, report: Mapping, given: Mapping, licence: str, own_heads: bool
) -> str:  # fmt: skip
    figure = "pearson" if "pearson" in report else "accuracy"
    result = EvalResult(
        task_type="text-classification", dataset_type="text-classification", dataset_name=_named(given["data"]),
        dataset_split=report["split"], metric_type="pearsonr" if figure == "pearson" else figure, metric_value=report[figure],
    )  # fmt: skip
    tag = {"teach": "fine-tuned", "distill": "knowledge-distillation", "prune": "pruned"}[kind]
    return front(
        licence, source, [tag], pipeline_tag="text-classification",
        metrics=[result.metric_type], model_name=_named(name), eval_results=[result],
        library_name=None if own_heads else "transformers",  # which loads none of these
    )  # fmt: skip


def front(licence: str, source: str, tags: list[str], **more) -> str:
    """Return a card's front matter in YAML, without the lines around it; ``more`` goes to ``huggingface_hub.ModelCardData``.

    ``source``: the model that it was made of, as it was given.
    """
    # the hub links a base model by its name there; a folder has none
    hub = re.fullmatch(r"([\w.\-]+/[\w.\-]+)(@\S+)?", source)
    base = hub[1] if hub and not Path(source).exists() else None
    if source in models.SHIPPED:
        base = models.SHIPPED[source].hub
    more = {"library_name": "transformers"} | more
    return ModelCardData(license=licence, base_model=base, tags=["tinylib", *tags], **more).to_yaml() + "\n"


def _named(text: object) -> str:
    # YAML shows any text, but who reads the file as HTML should find no tag in it either
    return re.sub("[<>]", " ", one_line(text)).strip() or "unnamed"


def _measured(report: Mapping) -> str:
    rows = []
    for name, words in FIGURES.items():
        if report.get(name) is None:
            continue
        low, high = report.get(f"{name}_interval_95") or (None, None)
        rows.append([words, f"{report[name]:.4f}", "" if low is None else f"{low:.4f} to {high:.4f}"])
    if "score" in report:
        rows.insert(1, [report["metric"], f"{report['score']:.4f}", ""])
    told = f"## Measured on the {plain(report['split'])} split, {report['examples']:,} texts"
    return f"{told}\n\n{table(['figure', 'value', '95 % interval (bootstrap over texts)'], rows)}"


def size(report: Mapping) -> str:
    """Return the part of a card that tells parameters, bytes and latency (``measure.Measured.report``)."""
    time = report["latency"]
    rows = [["parameters", f"{report['parameters']:,}"], ["file", f"{report['bytes']:,} bytes"]]
    if "bytes_compressed" in report:
        rows.append(["file in compressed/", f"{report['bytes_compressed']:,} bytes"])
    one = f"{time['median_ms']:.2f} ms (95 % of {time['repeats']} calls under {time['p95_ms']:.2f} ms)"
    machine = f"{time['device']}, {time['threads']} thread{'s' * (time['threads'] != 1)}"
    rows.append([f"one text of {time['tokens']} tokens, {machine}", one])
    return f"## Size and speed\n\n{table(['what', 'how much'], rows)}"


def _data(report: Mapping, given: Mapping) -> str:
    found, splits = report["data"], list(report["data"]["rows"])
    rows: list[list[object]] = [["texts", *(f"{found['rows'][split]:,}" for split in splits)]]
    if "classes" in found:
        rows += [[f"of class {name}", *(f"{found['classes'][s][name]:,}" for s in splits)] for name in found["classes"]["train"]]
    else:
        spread = [f"{s['lowest']:g} to {s['highest']:g}, mean {s['mean']:.3g}" for s in found["scores"].values()]
        rows.append(["scores", *spread])
    rows.append([f"cut at {given['max_length']} tokens", *(f"{found['truncated'][split]:,}" for split in splits)])
    rows.append(["in train too", *(found["repeated_in_train"].get(split, "") for split in splits)])
    told = f"The data {plain(given['data'])}, sha256 of its content {plain(report['data_fingerprint'])}."
    if more := found.get("unlabelled"):
        source = f"{plain(given['unlabelled'])} (sha256 {plain(more['sha256'])})"
        told += f" {more['used']:,} texts of {source} without labels, which the teacher labelled, served as well."
    return f"## Data\n\n{told}\n\n{table(['', *splits], rows)}"


def shown(line: str) -> str:
    """Show a command line: as code if nothing in it can end a block of code or look like HTML, else as text."""
    return f"    {line}" if re.fullmatch(r"[\w ./:=,@+\-']+", line) else plain(line, longest=10_000)


def _use(scores: bool, own_heads: bool, pairs: bool) -> str:
    folder, before = "THIS FOLDER", ""
    if own_heads:
        folder = "ANOTHER FOLDER"
        line = f'    tinylib export --model "THIS FOLDER" --format hf --out "{folder}"'
        why = "Heads were removed from this model, and transformers loads only a BERT with all of its heads: put zeros in place."
        before = f"{why}\n\n{line}\n\nWhat that writes is loaded as any other:\n\n"
    more = ', function_to_apply="none"' if scores else ""
    said = "\n\nThe number is the score itself, without a softmax or sigmoid." if scores else ""
    call = f'pipeline("text-classification", model="{folder}"{more})'
    text = '{"text": "a text", "text_pair": "another"}' if pairs else '"a text"'
    code = f"    from transformers import pipeline\n\n    {call}({text})"
    return f"## How to use it\n\n{before}{code}{said}"


def licence_sentence(licence: str, source: str) -> str:
    """Return what a card says of a licence, one that ``licence_of`` has found."""
    if licence == UNKNOWN:
        return f"unknown: see the model that it was made of, {plain(source)}."
    return f"{plain(licence)}, as the model that it was made of, {plain(source)}."
