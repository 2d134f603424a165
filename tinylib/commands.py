"""The commands behind the command line: each takes its parsed arguments, prints a short table and returns 0.

Inputs are read and checked before anything is written; what is made goes through ``output.output``.
"""

import itertools
import json
import math
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from tinylib import (
    __version__,
    cards,
    course,
    datasets,
    encoders,
    masks,
    measure,
    models,
    output,
    owndata,
    quantize,
    reports,
    tasks,
    train,
)
from tinylib import corpus as corpora
from tinylib import distill as kd
from tinylib import export as exporting
from tinylib import general as stage1
from tinylib import prune as pruning
from tinylib.bert import Bert, BertConfig, read_config
from tinylib.errors import UserError, UserNote
from tinylib.layers import student_config, weights_hash
from tinylib.student import SEEN, automatic_start
from tinylib.text import load_tokenizer, same_vocabulary


def teach(args) -> int:
    """Fine-tune and save a teacher.

    Raises UserError if the base model lacks tokens of its tokenizer or has too few positions for the texts.
    """
    started, reads = time.perf_counter(), (args.base, args.data)
    output.place(args.out, reads)  # before the work, not after it
    reports.check_logs(args)
    prepared, found = _prepare(args, args.base)
    owndata.note(found, args.max_length, _load(args.base, prepared, encoder_only=True).config.max_position_embeddings)
    run = reports.settings(args) | {"data_fingerprint": prepared.fingerprint}
    with output.output(args.out, reads, run, args.resume) as work:
        _save_split(args, work)
        model, history = course.fine_tune(
            prepared, args.base, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
            checkpoint=work / output.CHECKPOINTS / "teach.safetensors",
        )  # fmt: skip
        model.save_pretrained(work)
        more = {"epochs": history.measured, "settings": reports.settings(args), "data": found}
        report = reports.report(args, model, prepared, time.perf_counter() - started, **more)
        reports.publish(args, model, args.base, work, report)
    reports.say(args, report)
    reports.log(args, report, teach=history)
    return 0


def general(args) -> int:
    """Distil a general student from a pretrained teacher, and save it in float16.

    Raises UserError if the teacher lacks tokens of its tokenizer.
    """
    started, reads = time.perf_counter(), (args.teacher, args.corpus)
    output.place(args.out, reads)
    reports.check_logs(args)
    if args.precision:  # else the launcher decides: accelerate launch --mixed_precision bf16
        train.set_precision(args.precision)
    teacher = _load(args.teacher, encoder_only=True).to(course.device())
    _check_tokens(args.teacher, teacher, max(load_tokenizer(args.teacher).get_vocab().values()))  # not the corpus: it may be huge
    names = ("student", "start", "layer_map", "steps", "batch_size", "lr", "max_length", "measure_every", "seed")
    chosen = {name: getattr(args, name) for name in names}
    settings = stage1.Settings().replace(**{k: v for k, v in chosen.items() if v is not None})
    if not args.start:
        start = automatic_start(teacher, student_config(teacher, args.student).hidden_size)
        settings = settings.replace(start="states" if start == "teacher" else start)
    seen = settings.start in SEEN  # it looks at the corpus; what else is wrong with it is seen before that is packed
    student = stage1.first_student(teacher, settings.replace(start="teacher") if seen else settings)
    if settings.max_length > (positions := teacher.config.max_position_embeddings):  # before the corpus is packed, not after
        raise UserError(f"{args.teacher} takes {positions} tokens; give --max-length {positions} or less")
    corpus = corpora.load(args.corpus, args.teacher, args.max_length)
    run = reports.settings(args) | {"teacher_sha256": weights_hash(teacher), "corpus_sha256": corpora.fingerprint(args.corpus)}
    with output.output(args.out, reads, run, args.resume) as work:
        checkpoint = work / output.CHECKPOINTS / "general.safetensors"
        result = stage1.distill_general(
            teacher, corpus, settings, None if seen else student, checkpoint=checkpoint, checkpoint_every=args.checkpoint_every
        )
        machine = f"{course.describe()}, {train.precision()} precision"
        command = cards.command("general", reports.settings(args) | {"out": args.out.name})
        tokens = corpus["train"].tokens
        card = stage1.card_of(result, settings, args.teacher, args.corpus, tokens, machine, command)
        stage1.save(result, teacher, work, card)
        last = result.history.measured[-1]
        report = {
            "parameters": measure.parameters(result.student), "seconds": round(time.perf_counter() - started, 1),
            "bytes": measure.file_size(work / "model.safetensors"), "steps": settings.steps,
            "tokens": corpus["train"].tokens, "validation": last, "tinylib": __version__, "settings": reports.settings(args),
        }  # fmt: skip
        reports.write(work, report)
    reports.say(args, report)
    reports.log(args, report, general=result.history)
    return 0


def distill(args) -> int:
    """Distil and save a student.

    Raises UserError if the teacher has no head for the data's labels, or if the general student's labels or vocabulary are
    not the teacher's, or its shape or start another than what is asked for.
    """
    started, reads = time.perf_counter(), [s for s in (args.teacher, args.data, args.general, args.unlabelled) if s]
    if args.general and args.start not in (None, "general"):
        raise UserError(f"--start {args.start} and --general {args.general} are two starts; give one of them")
    output.place(args.out, reads)
    reports.check_logs(args)
    prepared, found = _prepare(args, args.teacher)
    if args.precision:  # else the launcher decides: accelerate launch --mixed_precision bf16
        train.set_precision(args.precision)
    more_texts = owndata.unlabelled(args.unlabelled, prepared) if args.unlabelled else None
    teacher, on_validation = _teacher(args, prepared)
    owndata.note(found, args.max_length, teacher.config.max_position_embeddings)
    student, projections = _general(args, teacher) if args.general else (None, None)
    args.student = _shape(args, student)
    chosen = {
        "start": args.start, "layer_map": args.layer_map, "epochs_intermediate": args.epochs_intermediate,
        "epochs_prediction": args.epochs_prediction, "student": args.student, "temperature": args.temperature,
        "batch_size": args.batch_size, "seed": args.seed, "augment": args.augment,
        "cache_gb": args.cache_gb, "cache_dtype": args.cache_dtype,
    }  # fmt: skip
    settings = course.settings_for(args.data).replace(**{k: v for k, v in chosen.items() if v is not None})
    run = reports.settings(args) | {"data_fingerprint": prepared.fingerprint, "teacher_sha256": weights_hash(teacher)}
    if more_texts:
        found |= {"unlabelled": more_texts.found}
        run |= {"unlabelled_sha256": more_texts.found["sha256"]}
    with output.output(args.out, reads, run, args.resume) as work:
        _save_split(args, work)
        steps = work / output.CHECKPOINTS
        examples = course.augmented(prepared, settings.augment, args.teacher, args.max_length, settings.seed)
        if more_texts:
            examples = owndata.with_unlabelled(examples, more_texts, args.teacher, args.max_length)
        pruner = pruning.while_distilling(args.sparsity, examples, settings) if args.sparsity else None
        result = kd.distill(
            teacher, examples, settings, student=student, projections=projections, folder=steps, after_step=pruner
        )
        result.student.save_pretrained(work)
        told = tasks.figures(prepared.labels["test"], train.predict(teacher, prepared.encoded["test"], shared=True), args.data)
        applied = reports.settings(args) | asdict(settings) | {"precision": train.precision()}  # what was not asked for too
        more = {"settings": applied, "data": found, "teacher_on_validation": on_validation}
        more |= {f"teacher_{name}": value for name, value in told.items()}
        report = reports.report(args, result.student, prepared, time.perf_counter() - started, **more)
        judged = next(name for name in ("score", "pearson", "accuracy") if name in told)  # the task's own figure, if it has one
        report["retention"] = report[judged] / told[judged] if told[judged] else None
        if pruner:
            masks.save_compressed(result.student, work / "compressed")
            report["sparsity"] = masks.sparsity_of(result.student)
        reports.publish(args, result.student, args.teacher, work, report)
    reports.say(args, report)
    reports.log(args, report, intermediate=result.intermediate, prediction=result.prediction)
    return 0


def prune(args) -> int:
    """Prune, recover and save a model.

    Raises UserError if the model is no BERT with a head for the data's labels, or if the teacher's labels or vocabulary are
    others.
    """
    started, reads = time.perf_counter(), [s for s in (args.model, args.data, args.teacher) if s]
    output.place(args.out, reads)
    prepared, found = _prepare(args, args.model)
    dense = _bert(args.model, _classifier(args.model, prepared), "pruned")
    teacher = _classifier(args.teacher, prepared) if args.teacher else None
    if teacher:
        _same_vocabulary(args.model, args.teacher)
        _same_labels(args.model, dense.config, teacher.config, "give a teacher of the same labels in the same order")
    owndata.note(found, args.max_length, dense.config.max_position_embeddings)
    before = tasks.figures(prepared.labels["test"], train.predict(dense, prepared.encoded["test"]))
    judged = next(iter(before))
    more = {"settings": reports.settings(args), "data": found, f"dense_{judged}": before[judged]}
    with output.output(args.out, reads) as work:
        _save_split(args, work)
        model = pruning.prune_by(
            args.method, dense, prepared.examples("train"), args.sparsity, teacher=teacher,
            epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        )  # fmt: skip
        model.save_pretrained(work)
        masks.save_compressed(model, work / "compressed")
        report = reports.report(args, model, prepared, time.perf_counter() - started, **more)
        report |= {
            "method": args.method,
            "sparsity": _removed(dense, model, embeddings=False),
            "sparsity_with_word_table": _removed(dense, model, embeddings=True),
            "bytes": measure.file_size(work / "model.safetensors"),
            "bytes_compressed": measure.file_size(work / "compressed" / masks.COMPRESSED),
        }
        reports.publish(args, model, args.model, work, report)
    reports.say(args, report)
    return 0


def evaluate(args) -> int:
    """Measure a classifier on a split. Raises UserError if the model has no head for the data's labels."""
    started = time.perf_counter()
    prepared, found = _prepare(args, args.model)
    model = _classifier(args.model, prepared)
    owndata.note(found, args.max_length, model.config.max_position_embeddings)
    report = reports.report(args, model, prepared, 0.0, args.split, data=found)
    report["seconds"] = round(time.perf_counter() - started, 1)
    print(_json(report)) if args.json else reports.table(report)
    return 0


def _json(report: dict) -> str:
    """Return a report as JSON that standard output can write: what its encoding lacks is escaped as JSON does it."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(report, indent=2)
    return text


STATIC = "onnx-int8-static"
FLOAT_ERROR = 1e-2  # of a logit: far above what another order of float32's sums gives, below what a mistake does


def export(args) -> int:
    """Write the model in another layout, load that again and hold it against the model.

    Raises UserError if the model is no BERT or has no tokenizer, if data is given and it has no head for its labels, and if
    none is given for a layout that needs texts.
    """
    started, reads = time.perf_counter(), [s for s in (args.model, args.data) if s]
    output.place(args.out, reads)
    if args.format == STATIC and not args.data:
        raise UserError(f"--format {STATIC} fixes ranges on the training texts of --data; give it, or take --format onnx-int8")
    if args.format != "hf":
        exporting.package("onnx"), exporting.package("onnxruntime")  # before the work, not after it
    prepared = _prepare(args, args.model)[0] if args.data else None
    model = _classifier(args.model, prepared) if prepared else _load(args.model)
    model = _bert(args.model, model, "exported")
    if model.tokenizer_folder is None:
        raise UserError(f"{args.model} has no tokenizer; add its tokenizer.json or vocab.txt to the folder")
    load_tokenizer(model.tokenizer_folder)  # it is copied: a damaged one must not be
    with output.output(args.out, reads) as work:
        file, written = _write(args.format, model, work, prepared)
        report = {
            "model": str(args.model), "format": args.format, "bytes": measure.file_size(file), "tinylib": __version__,
            "parameters": measure.parameters(model), "random_difference": exporting.difference_on_random(model, written),
        }  # fmt: skip
        if not math.isfinite(report["random_difference"]) or (
            args.format in ("hf", "onnx") and report["random_difference"] >= FLOAT_ERROR
        ):
            raise RuntimeError(f"the export answers otherwise than {args.model}: {report['random_difference']}")
        if prepared:
            compared = exporting.compare(model, written, prepared, progress=True)
            report |= asdict(compared) | {"split": "test", "data_fingerprint": prepared.fingerprint}
        report["seconds"] = round(time.perf_counter() - started, 1)
        reports.write(work, report)
    reports.say(args, report)
    return 0


def _write(layout: str, model, folder: Path, prepared: course.Prepared | None):
    """Write a model in a layout; return the file with the weights, and what a user of the folder would load.

    ``STATIC`` fixes its ranges on training texts of ``prepared``.
    """
    if layout == "hf":
        pruning.restore_heads(model).save_pretrained(folder)
        return folder / "model.safetensors", Bert.from_pretrained(folder)
    file = exporting.to_onnx(model, folder)
    if layout == "onnx-int8":
        quantize.dynamic_int8(file, file)
    if layout == STATIC:
        batches = train.loader(prepared.examples("train"), 32, seed=0)
        quantize.static_int8(file, file, itertools.islice(batches, 10))  # some hundred texts are enough
    if layout == "onnx-int4":
        quantize.weight_only(file, file)
    return file, exporting.Onnx(folder)


def fetch(args) -> int:
    """Fill the cache with a shipped model."""
    folder = models.fetch(args.model)
    print(f"{args.model} is in the cache: {folder}")
    return 0


def _prepare(args, base):
    """Load the data and tokenize it for the model ``base``; return it with what there is to know of it (``owndata.examine``)."""
    prepared = course.prepare(args.data, base=base, max_length=args.max_length, seed=args.seed)
    args.max_length = args.max_length or course.cut_at(prepared.pairs)
    return prepared, owndata.examine(prepared)


def _load(source, prepared=None, encoder_only=False):
    """Load a model in either layout, dense or compressed; with ``prepared``, one that knows its tokens.

    ``encoder_only``: a head that is not known here is no obstacle, and left out.
    """
    folder = models.resolve(source)
    dense = (folder / "model.safetensors").exists() or not (folder / masks.COMPRESSED).exists()
    try:
        model = encoders.load(folder) if dense else masks.load_compressed(folder)
    except UserError:
        if not (encoder_only and dense):
            raise
        model = encoders.load(folder, labels=())  # what else was wrong is still wrong
    if prepared:
        # the padding token too: a batch holds it even if no text does
        highest = max(max(split.pad_id, *(int(ids.max()) for ids in split.ids)) for split in prepared.encoded.values())
        _check_tokens(source, model, highest)
        longest, positions = max(map(_longest, prepared.encoded.values())), model.config.max_position_embeddings
        if longest > positions:
            raise UserError(f"{source} takes {positions} tokens, but a text has {longest}; give --max-length {positions} or less")
    return model


def _check_tokens(source, model, highest: int) -> None:
    """Refuse a tokenizer that gives numbers beyond the model's word table."""
    if highest >= model.config.vocab_size:
        why = f"the tokenizer gives token {highest}, but the model has {model.config.vocab_size}"
        raise UserError(f"{source}: {why}; the two are not of one model, copy both again")


def _longest(encoded) -> int:
    return max(map(len, encoded.ids))


def _classifier(source, prepared):
    """Load a model that must be a classifier of these labels, in their order, or a regression where they are scores."""
    model = _load(source, prepared)
    remedy = f"fine-tune it first: tinylib teach --base {source}"
    if not model.config.outputs:
        raise UserError(f"{source} has no classification head; {remedy}")
    known, asked = tuple(model.config.labels), tuple(prepared.names)
    if (len(known) == 1) != (len(asked) == 1):
        one, other = (f"gives the classes {', '.join(known)}", "scores") if len(asked) == 1 else ("gives scores", "classes")
        raise UserError(f"{source} {one}, but the labels of the data are {other}; {remedy}")
    numbers = tuple(map(str, range(len(known))))  # labels that are numbers only are in the model's order
    if not (asked in (known, numbers) or len(asked) == 1 or (model.config.unnamed and len(asked) == len(known))):
        why = f"knows the labels {', '.join(known)}, but the data has {', '.join(asked)} (in this order)"
        remedy = f"number the data's labels 0 to {len(known) - 1} in the model's order"
        raise UserError(f"{source} {why}; {remedy}, or use a model of the same task")
    return model.to(course.device())


def _teacher(args, prepared):
    """Load the teacher of a distillation and hold it against the validation split; return it with what that gave."""
    teacher = _classifier(args.teacher, prepared)
    answers = train.predict(teacher, prepared.encoded["validation"], shared=True)
    found = owndata.check_teacher(
        args.teacher, prepared.labels["validation"], answers, prepared.names, allow=args.allow_weak_teacher
    )
    if teacher.config.unnamed:  # the student is told the names that its teacher was never given
        teacher.config = teacher.config.replace(labels=prepared.names)
    return teacher, found


def _same_labels(source, config: BertConfig, teacher: BertConfig, remedy: str) -> None:
    """Refuse a model whose labels have names, and other ones or in another order than its teacher's."""
    if not (config.unnamed or teacher.unnamed or config.labels == teacher.labels):
        why = f"knows the labels {', '.join(config.labels)}, its teacher {', '.join(teacher.labels)} (in this order)"
        raise UserError(f"{source} {why}; {remedy}")


def _bert(source, model, done: str):
    """Return the model if it is a BERT: what prunes and exports works on its parts."""
    if isinstance(model, encoders.Encoder):
        remedy = f"distil a student from it first: tinylib distill --teacher {source}"
        raise UserError(f"{source} is a {model.kind!r} model, and only a BERT can be {done}; {remedy}")
    return model


def _general(args, teacher):
    """Load the student of general distillation, with the teacher's classes and tokenizer, and its projections if it has any."""
    folder = models.expanded(args.general)
    _same_vocabulary(folder, args.teacher)
    if (folder / stage1.CARD).is_file():
        return stage1.load(folder, teacher, torch.Generator().manual_seed(args.seed))
    own = BertConfig.from_dict(read_config(folder), where=str(folder / "config.json"))
    if own.outputs:
        _same_labels(args.general, own, teacher.config, "start from an encoder without a task, or from one of the same labels")
    start = torch.Generator().manual_seed(args.seed)
    student = Bert.from_pretrained(folder, labels=teacher.config.labels, generator=start)
    student.tokenizer_folder = teacher.tokenizer_folder
    return student, None


def _shape(args, student: Bert | None) -> str | None:
    """Return the shape that the student is to have: the general student's own where it starts from one, else what is asked for."""
    if student is None:
        return args.student or kd.Settings.student
    sizes = student.config
    shape = f"{sizes.num_hidden_layers}x{sizes.hidden_size}"
    asked = BertConfig.parse(args.student) if args.student else sizes
    if (asked.num_hidden_layers, asked.hidden_size) != (sizes.num_hidden_layers, sizes.hidden_size):
        raise UserError(f"--student {args.student} is not the shape of --general {args.general}, which is {shape}; leave it out")
    return shape


def _same_vocabulary(one, other) -> None:
    if not same_vocabulary(one, other):
        remedy = "use two models with one vocabulary"
        raise UserError(f"the tokenizers of {one} and {other} number their tokens differently; {remedy}")


def _save_split(args, folder: Path) -> None:
    """Write the split of a single file beside the result, so that others can measure on the same texts."""
    if models.expanded(args.data).is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserNote)  # said when it was loaded for the work
            datasets.save(datasets.load(args.data, seed=args.seed), folder / "data")


def _removed(dense, pruned, embeddings: bool) -> float:
    """Return the share of the dense model's weight matrices that the pruned one lacks or holds as zeros."""
    left = sum(int(weight.count_nonzero()) for weight in masks.prunable(pruned, embeddings).values())
    return 1.0 - left / sum(weight.numel() for weight in masks.prunable(dense, embeddings).values())
