"""The whole job without a notebook (`make distill`): teach, distil, prune, evaluate; a table, a figure and a JSON file."""

import argparse
import json
import sys
import time
from pathlib import Path

from tinylib import course, measure, metrics, models, options, plots, train
from tinylib import prune as pruning
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.masks import save_compressed

COLUMNS = ("model", "accuracy", "95 % interval", "retention", "parameters (M)", "file (MB)", "latency (ms)")


def row(
    name: str,
    model: Bert,
    prepared: course.Prepared,
    folder: Path,
    reference: float | None = None,
    packed: bool = False,
) -> dict:
    """Save a model and measure it on the test split: accuracy with interval, file size, latency of one sentence of 32 tokens.

    ``packed`` stores the zeros of a pruned model compactly (``masks.save_compressed``), values in float32.
    """
    import torch

    save_compressed(model, folder, torch.float32) if packed else model.save_pretrained(folder)
    truth = prepared.labels["test"]
    told = train.predict(model, prepared.encoded["test"]).argmax(-1)
    accuracy = metrics.accuracy(truth, told)
    costs = measure.summary(model)
    weights = next(folder.glob("*.safetensors"))
    return {
        "name": name, "accuracy": accuracy, "interval": metrics.bootstrap_interval(truth, told),
        "retention": accuracy / (reference or accuracy), "parameters": costs.parameters,
        "megabytes": measure.file_size(weights) / 1e6, "milliseconds": costs.latency.median,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        low, high = r["interval"]
        cells = (
            r["name"], f"{r['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{r['retention']:.1%}", f"{r['parameters'] / 1e6:.1f}",
            f"{r['megabytes']:.1f}", f"{r['milliseconds']:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(out: Path, seed: int = 0, sparsity: float = 0.5, epochs: int = 1) -> list[dict]:
    """Make (or take from the cache) teacher and student, prune the student, measure all three and write the results."""
    prepared = course.prepare()
    print(course.describe())
    teacher = course.teacher(prepared)
    rows = [row("teacher", teacher, prepared, out / "teacher")]
    student = course.student(prepared, seed)
    rows.append(row("student", student, prepared, out / "student", rows[0]["accuracy"]))
    examples = prepared.examples("train")
    pruned = pruning.prune_and_recover(
        student,
        examples,
        sparsity,
        pruning.teacher_loss(teacher, examples),
        epochs=epochs,
        lr=1e-4,
        seed=seed,
        gradual=True,
    )
    rows.append(
        row(f"student, {sparsity:.0%} pruned", pruned.model, prepared, out / "pruned", rows[0]["accuracy"], packed=True)
    )
    settings = {"seed": seed, "sparsity": sparsity, "data": prepared.fingerprint, "tier": course.tier().name}
    (out / "metrics.json").write_text(
        json.dumps({"settings": settings, "models": rows}, indent=2) + "\n", encoding="utf-8"
    )
    (out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    fig, ax = plots.figure(width=8, height=4.5)
    plots.trade_off(rows, ax)
    share = rows[1]["retention"]
    ax.set_title(
        f"The student keeps {share:.1%} of its teacher's accuracy in {rows[1]['megabytes'] / rows[0]['megabytes']:.0%} of the file"
    )
    fig.savefig(out / "trade_off.png", dpi=150)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the job from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tinylib.job", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/movie_reviews"))
    parser.add_argument("--seed", type=options.seed, default=0)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        models.make_folder(args.out)
        rows = run(args.out, args.seed)
    except UserError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    took = f"{time.perf_counter() - started:.0f} s"
    print(f"\n{table(rows)}\n\n{args.out}: three models, metrics.json, table.md, trade_off.png ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
