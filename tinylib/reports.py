"""What a command says of its result: metrics.json, the model card, TensorBoard's log, and the short table at the end."""

import json
import warnings
from pathlib import Path

from tinylib import __version__, cards, logs, measure, processes, tasks, train
from tinylib.course import Prepared
from tinylib.encoders import Teacher
from tinylib.errors import UserError, UserNote
from tinylib.history import History


def report(args, model, prepared: Prepared, seconds: float, split: str = "test", **more) -> dict:
    """Measure a model on a split: the content of metrics.json. A GLUE task has its own metric's ``score`` beside accuracy."""
    logits = train.predict(model, prepared.encoded[split], label=f"measuring on {split}", shared=True)
    return {
        **tasks.report(prepared.labels[split], logits, args.data), "split": split, "examples": len(logits),
        "parameters": measure.parameters(model), "seconds": round(seconds, 1),
        "labels": list(model.config.labels), "data_fingerprint": prepared.fingerprint, "tinylib": __version__,
        **more,
    }  # fmt: skip


def publish(args, model: Teacher, source: str | Path, work: Path, found: dict) -> None:
    """Add what the model costs to the report ``found``, and write metrics.json and the model card into ``work``.

    source: the model that this one was made of, as the user named it.
    """
    costs = measure.summary(model, length=min(32, model.config.max_position_embeddings))
    found["bytes"] = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    found["latency"] = costs.report()
    write(work, found)
    given = {k: v for k, v in vars(args).items() if k not in ("command", "resume", "json", "tensorboard")}
    cards.write(work, args.out.name, args.command, str(source), found, given)


def check_logs(args) -> None:
    """Refuse, before the work, a --tensorboard folder that cannot be written."""
    if args.tensorboard:
        logs.check(args.tensorboard, args.out)


def log(args, found: dict, **histories: History) -> None:
    """Write a finished run's log for TensorBoard, if that was asked for."""
    if args.tensorboard and processes.is_main():
        try:
            logs.write(logs.check(args.tensorboard, args.out), histories, found)
        except UserError as error:  # the model is made: what fails now is no failure of the command
            warnings.warn(str(error), UserNote, stacklevel=2)
        else:
            print(f"  TensorBoard: tensorboard --logdir {args.tensorboard}")


def write(folder: Path, found: dict) -> None:
    """Write a report as metrics.json."""
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")


def settings(args) -> dict:
    """Return what the command was asked for, as JSON can hold it."""
    # what does not decide the result
    hidden = ("command", "out", "resume", "json", "tensorboard", "allow_weak_teacher", "checkpoint_every")
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in hidden}


def say(args, found: dict) -> None:
    """Print where a command wrote, and its table."""
    print(f"{args.command}: {args.out}")
    table(found)


def table(found: dict) -> None:
    """Print the figures of a report that a user looks for."""
    names = (
        "accuracy", "f1", "teacher_accuracy", "score", "teacher_score", "dense_accuracy", "model_accuracy", "pearson", "spearman",
        "rmse", "teacher_pearson", "dense_pearson", "model_pearson", "agreement", "largest_difference", "random_difference",
        "retention", "sparsity", "parameters", "bytes", "bytes_compressed", "seconds",
    )  # fmt: skip
    for name in (n for n in names if found.get(n) is not None):
        value = found[name]
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.{1 if name == 'seconds' else 4}f}"
        shown = f"{value:.2g}" if name.endswith("_difference") else shown
        print(f"  {name.replace('_', ' '):<18}{shown:>14}")
