"""The commands behind the command line: each takes its parsed arguments, prints a short table and returns 0.

Inputs are read and checked before anything is written; what is made goes through ``output.output``.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tinylib import __version__, course, datasets, masks, measure, metrics, models, output, quantize, train
from tinylib import corpus as corpora
from tinylib import distill as kd
from tinylib import export as exporting
from tinylib import general as stage1
from tinylib import prune as pruning
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.text import load_tokenizer


def teach(args) -> int:
    """Fine-tune and save a teacher."""
    started, reads = time.perf_counter(), (args.base, args.data)
    output.place(args.out, reads)  # before the work, not after it
    prepared = _prepare(args, args.base)
    _load(args.base, prepared)
    run = _settings(args) | {"data_fingerprint": prepared.fingerprint}
    with output.output(args.out, reads, run, args.resume) as work:
        _save_split(args, work)
        model, history = course.fine_tune(
            prepared, args.base, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
            checkpoint=work / output.CHECKPOINTS / "teach.safetensors",
        )  # fmt: skip
        model.save_pretrained(work)
        more = {"epochs": history.measured, "settings": _settings(args)}
        report = _report(args, model, prepared, time.perf_counter() - started, **more)
        _finish(work, report)
    _say(args, report)
    return 0


def general(args) -> int:
    """Distil a general student from a pretrained teacher, and save it in float16."""
    started, reads = time.perf_counter(), (args.teacher, args.corpus)
    output.place(args.out, reads)
    if args.precision:  # else the launcher decides: accelerate launch --mixed_precision bf16
        train.set_precision(args.precision)
    teacher = _load(args.teacher).to(course.device())
    names = ("student", "start", "layer_map", "steps", "batch_size", "lr", "max_length", "measure_every", "seed")
    chosen = {name: getattr(args, name) for name in names}
    settings = stage1.Settings().replace(**{k: v for k, v in chosen.items() if v is not None})
    student = stage1.first_student(teacher, settings)
    corpus = corpora.load(args.corpus, args.teacher, args.max_length)
    with output.output(args.out, reads, _settings(args), args.resume) as work:
        checkpoint = work / output.CHECKPOINTS / "general.safetensors"
        result = stage1.distill_general(
            teacher, corpus, settings, student, checkpoint=checkpoint, checkpoint_every=args.checkpoint_every
        )
        machine = f"{course.describe()}, {train.precision()} precision"
        chosen = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in _settings(args).items() if v is not None)
        command = f"tinylib general {chosen} --out {args.out.name}"
        tokens = corpus["train"].tokens
        card = stage1.card_of(result, settings, args.teacher, args.corpus, tokens, machine, command)
        stage1.save(result, teacher, work, card)
        last = result.history.measured[-1]
        report = {
            "parameters": measure.parameters(result.student), "seconds": round(time.perf_counter() - started, 1),
            "bytes": measure.file_size(work / "model.safetensors"), "steps": settings.steps,
            "tokens": corpus["train"].tokens, "validation": last, "tinylib": __version__, "settings": _settings(args),
        }  # fmt: skip
        _finish(work, report)
    _say(args, report)
    return 0


def distill(args) -> int:
    """Distil and save a student."""
    started, reads = time.perf_counter(), [s for s in (args.teacher, args.data, args.general) if s]
    output.place(args.out, reads)
    prepared = _prepare(args, args.teacher)
    if args.precision:  # else the launcher decides: accelerate launch --mixed_precision bf16
        train.set_precision(args.precision)
    teacher = _classifier(args.teacher, prepared)
    student, projections = _general(args, teacher) if args.general else (None, None)
    chosen = {
        "start": args.start, "layer_map": args.layer_map, "epochs_intermediate": args.epochs_intermediate,
        "epochs_prediction": args.epochs_prediction, "student": args.student, "temperature": args.temperature,
        "batch_size": args.batch_size, "seed": args.seed, "augment": args.augment,
    }  # fmt: skip
    settings = course.settings_for(args.data).replace(**{k: v for k, v in chosen.items() if v is not None})
    run = _settings(args) | {"data_fingerprint": prepared.fingerprint}
    with output.output(args.out, reads, run, args.resume) as work:
        _save_split(args, work)
        steps = work / output.CHECKPOINTS
        examples = course.augmented(prepared, settings.augment, args.teacher, args.max_length, settings.seed)
        pruner = pruning.while_distilling(args.sparsity, examples, settings) if args.sparsity else None
        result = kd.distill(
            teacher, examples, settings, student=student, projections=projections, folder=steps, after_step=pruner
        )
        result.student.save_pretrained(work)
        truth, told = prepared.labels["test"], train.predict(teacher, prepared.encoded["test"]).argmax(-1)
        applied = _settings(args) | asdict(settings) | {"precision": train.precision()}  # what was not asked for too
        more = {"settings": applied, "teacher_accuracy": metrics.accuracy(truth, told)}
        report = _report(args, result.student, prepared, time.perf_counter() - started, **more)
        report["retention"] = report["accuracy"] / report["teacher_accuracy"]
        if "score" in report:
            report["teacher_score"] = metrics.of_task(args.data)[1](truth, told)
            report["retention"] = report["score"] / report["teacher_score"] if report["teacher_score"] else None
        if pruner:
            masks.save_compressed(result.student, work / "compressed")
            report["sparsity"] = masks.sparsity_of(result.student)
        _finish(work, report)
    _say(args, report)
    return 0


def prune(args) -> int:
    """Prune, recover and save a model."""
    started, reads = time.perf_counter(), [s for s in (args.model, args.data, args.teacher) if s]
    output.place(args.out, reads)
    prepared = _prepare(args, args.model)
    dense = _classifier(args.model, prepared)
    teacher = _classifier(args.teacher, prepared) if args.teacher else None
    if teacher:
        _same_vocabulary(args.model, args.teacher)
    more = {"settings": _settings(args), "dense_accuracy": course.score(dense, prepared)}
    with output.output(args.out, reads) as work:
        _save_split(args, work)
        model = pruning.prune_by(
            args.method, dense, prepared.examples("train"), args.sparsity, teacher=teacher,
            epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        )  # fmt: skip
        model.save_pretrained(work)
        masks.save_compressed(model, work / "compressed")
        report = _report(args, model, prepared, time.perf_counter() - started, **more)
        report |= {
            "method": args.method,
            "sparsity": _removed(dense, model, embeddings=False),
            "sparsity_with_word_table": _removed(dense, model, embeddings=True),
            "bytes": measure.file_size(work / "model.safetensors"),
            "bytes_compressed": measure.file_size(work / "compressed" / masks.COMPRESSED),
        }
        _finish(work, report)
    _say(args, report)
    return 0


def evaluate(args) -> int:
    """Measure a classifier on a split."""
    started = time.perf_counter()
    prepared = _prepare(args, args.model)
    report = _report(args, _classifier(args.model, prepared), prepared, 0.0, args.split)
    report["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report, indent=2, ensure_ascii=False)) if args.json else _table(report)
    return 0


FLOAT_ERROR = 1e-2  # of a logit: far above what another order of float32's sums gives, below what a mistake does


def export(args) -> int:
    """Write the model in another layout, load that again and hold it against the model."""
    started, reads = time.perf_counter(), [s for s in (args.model, args.data) if s]
    output.place(args.out, reads)
    if args.format != "hf":
        exporting.package("onnx"), exporting.package("onnxruntime")  # before the work, not after it
    prepared = _prepare(args, args.model) if args.data else None
    model = _classifier(args.model, prepared) if prepared else _load(args.model)
    if model.tokenizer_folder is None:
        raise UserError(f"{args.model} has no tokenizer; add its tokenizer.json or vocab.txt to the folder")
    with output.output(args.out, reads) as work:
        file, written = _write(args.format, model, work)
        report = {
            "model": str(args.model), "format": args.format, "bytes": measure.file_size(file), "tinylib": __version__,
            "parameters": measure.parameters(model), "random_difference": exporting.difference_on_random(model, written),
        }  # fmt: skip
        if args.format in ("hf", "onnx") and not report["random_difference"] < FLOAT_ERROR:
            raise RuntimeError(f"the export answers otherwise than {args.model}: {report['random_difference']}")
        if prepared:
            compared = exporting.compare(model, written, prepared, progress=True)
            report |= asdict(compared) | {"split": "test", "data_fingerprint": prepared.fingerprint}
        report["seconds"] = round(time.perf_counter() - started, 1)
        _finish(work, report)
    _say(args, report)
    return 0


def _write(layout: str, model, folder: Path):
    """Write a model in a layout; return the file with the weights, and what a user of the folder would load."""
    if layout == "hf":
        pruning.restore_heads(model).save_pretrained(folder)
        return folder / "model.safetensors", Bert.from_pretrained(folder)
    file = exporting.to_onnx(model, folder)
    if layout == "onnx-int8":
        quantize.dynamic_int8(file, file)
    if layout == "onnx-int4":
        quantize.weight_only(file, file)
    return file, exporting.Onnx(folder)


def fetch(args) -> int:
    """Fill the cache with a shipped model."""
    folder = models.fetch(args.model)
    print(f"{args.model} is in the cache: {folder}")
    return 0


def _prepare(args, base):
    """Load the data and tokenize it for the model ``base``."""
    return course.prepare(args.data, base=base, max_length=args.max_length, seed=args.seed)


def _load(source, prepared=None):
    """Load a model in either layout, dense or compressed; with ``prepared``, one that knows its tokens."""
    folder = models.resolve(source)
    dense = (folder / "model.safetensors").exists() or not (folder / masks.COMPRESSED).exists()
    model = Bert.from_pretrained(folder) if dense else masks.load_compressed(folder)
    if prepared:
        highest = max(int(ids.max()) for split in prepared.encoded.values() for ids in split.ids)
        if highest >= model.config.vocab_size:
            why = f"the tokenizer gives token {highest}, but the model has {model.config.vocab_size}"
            raise UserError(f"{source}: {why}; the two are not of one model, copy both again")
    return model


def _classifier(source, prepared):
    """Load a model that must be a classifier of these labels."""
    model = _load(source, prepared)
    if model.config.head != "classification":
        remedy = f"fine-tune it first: tinylib teach --base {source}"
        raise UserError(f"{source} has no classification head; {remedy}")
    known, asked = tuple(model.config.labels), tuple(prepared.names)
    numbers = tuple(map(str, range(len(known))))  # labels that are numbers only are in the model's order
    unnamed = known == tuple(f"LABEL_{n}" for n in numbers) and len(asked) == len(known)
    if not (asked in (known, numbers) or unnamed):
        why = f"knows the labels {', '.join(known)}, but the data has {', '.join(asked)} (in this order)"
        remedy = f"number the data's labels 0 to {len(known) - 1} in the model's order"
        raise UserError(f"{source} {why}; {remedy}, or use a model of the same task")
    return model.to(course.device())


def _general(args, teacher):
    """Load the student of general distillation, with the teacher's classes and tokenizer, and its projections if it has any."""
    _same_vocabulary(args.general, args.teacher)
    if (args.general / stage1.CARD).is_file():
        return stage1.load(args.general, teacher)
    start = torch.Generator().manual_seed(args.seed)
    student = Bert.from_pretrained(args.general, labels=teacher.config.labels, generator=start)
    student.tokenizer_folder = teacher.tokenizer_folder
    return student, None


def _same_vocabulary(one, other) -> None:
    if load_tokenizer(one).get_vocab() != load_tokenizer(other).get_vocab():
        remedy = "use two models with one vocabulary"
        raise UserError(f"the tokenizers of {one} and {other} number their tokens differently; {remedy}")


def _save_split(args, folder: Path) -> None:
    """Write the split of a single file beside the result, so that others can measure on the same texts."""
    if Path(args.data).expanduser().is_file():
        datasets.save(datasets.load(args.data, seed=args.seed), folder / "data")


def _removed(dense, pruned, embeddings: bool) -> float:
    """Return the share of the dense model's weight matrices that the pruned one lacks or holds as zeros."""
    left = sum(int(weight.count_nonzero()) for weight in masks.prunable(pruned, embeddings).values())
    return 1.0 - left / sum(weight.numel() for weight in masks.prunable(dense, embeddings).values())


def _report(args, model, prepared, seconds: float, split: str = "test", **more) -> dict:
    """Measure a classifier on a split: the content of metrics.json. A GLUE task has its own metric's ``score`` beside accuracy."""
    truth = prepared.labels[split]
    told = train.predict(model, prepared.encoded[split], label=f"measuring on {split}").argmax(-1)
    metric, measured = metrics.of_task(args.data)
    if metric != "accuracy":
        more = {"metric": metric, "score": measured(truth, told)} | more
    scores = metrics.classification_report(truth, told)
    low, high = metrics.bootstrap_interval(truth, told)
    return {
        "accuracy": scores["accuracy"], "accuracy_interval_95": [low, high], "precision": scores["precision"],
        "recall": scores["recall"], "f1": scores["f1"], "split": split, "examples": len(truth),
        "parameters": measure.parameters(model), "seconds": round(seconds, 1),
        "labels": list(model.config.labels), "data_fingerprint": prepared.fingerprint, "tinylib": __version__,
        **more,
    }  # fmt: skip


def _finish(folder: Path, report: dict) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")


def _settings(args) -> dict:
    """Return what the command was asked for, as JSON can hold it."""
    hidden = ("command", "out", "resume", "json")  # what does not decide the result
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in hidden}


def _say(args, report: dict) -> None:
    print(f"{args.command}: {args.out}")
    _table(report)


def _table(report: dict) -> None:
    names = (
        "accuracy", "f1", "teacher_accuracy", "score", "teacher_score", "dense_accuracy", "model_accuracy", "agreement",
        "largest_difference", "random_difference", "retention", "sparsity", "parameters", "bytes", "bytes_compressed",
        "seconds",
    )  # fmt: skip
    for name in (n for n in names if report.get(n) is not None):
        value = report[name]
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.{1 if name == 'seconds' else 4}f}"
        shown = f"{value:.2g}" if name.endswith("_difference") else shown
        print(f"  {name.replace('_', ' '):<18}{shown:>14}")
