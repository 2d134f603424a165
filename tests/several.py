"""What each of one or two processes runs for test_processes.py: ``python several.py FOLDER``; the main one writes into FOLDER.

Two processes leave a run that was stopped behind, and one process goes on with it and leaves one of its own, with which two go
on: ``python several.py FOLDER again``.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_train import examples, model

from tinylib import distill, layers, processes, sharing, train

FOLDER, COUNT = Path(sys.argv[1]), processes.count()
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LEFT = FOLDER / "left.safetensors"


class Killed(Exception):
    """Stands for whatever ends a process."""


def kill(own, step):
    if step == 11:
        raise Killed


def losses(kind: str, own, data):
    """Return what is trained, its loss function and its counts."""
    if kind == "labels":
        return own, train.classification_loss, train.texts
    teacher, layer_map, weights = model(seed=8).eval(), layers.LayerMap((1, 2)), distill.Weights(attention_on=kind)
    pair = layers.Distiller(own, layers.Projections(16, 16, 2, generator=torch.Generator().manual_seed(1)))
    wanted = layers.Wanted.by(layer_map, weights)
    cached = layers.TeacherOutputs(teacher, data, wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations)
    held = sum(length > 0 for length in cached.lengths)
    assert held == len(processes.owned(range(len(data)))), "a process keeps its own texts' outputs only"
    return pair, layers.matching_loss(teacher, layer_map, weights, cached), layers.counts_of(weights)


def run(name: str, kind: str, dtype: torch.dtype, checkpoint: Path | None = None, after_step=None) -> None:
    """Train three epochs and save weights, losses and logits."""
    torch.set_default_dtype(dtype)
    data = examples(45)  # batches of 8: the last one of an epoch holds 5, three of one process and two of the other
    own = model(**PLAIN)
    trained, loss, counts = losses(kind, own, data)
    history = train.fit(
        trained, train.loader(data, 8, seed=5), loss, counts=counts, epochs=3, lr=1e-3, seed=3, after_step=after_step,
        checkpoint=checkpoint, checkpoint_every=4,
    )  # fmt: skip
    logits = train.predict(own, data.encoded, shared=True)
    assert torch.equal(sharing.same(logits), logits), "every process has the whole table"
    if processes.is_main():
        told = {"logits": logits, "losses": torch.tensor(history.losses["loss"])}
        save_file(told | trained.state_dict(), FOLDER / f"{name}-{COUNT}.safetensors")


torch.set_num_threads(1)
if sys.argv[2:] == ["again"]:
    run("turned", "scores", torch.float64, FOLDER / "own-1.safetensors")
    processes.stop()
    sys.exit()
for kind in ("labels", "scores", "values"):
    run(kind, kind, torch.float64)
run("float32", "scores", torch.float32)
own = FOLDER / f"own-{COUNT}.safetensors"
try:
    run("never", "scores", torch.float64, own, kill)
except Killed:
    processes.wait()
if COUNT == 2:
    if processes.is_main():
        shutil.copy(own, LEFT)
    processes.wait()
    run("resumed", "scores", torch.float64, own)
else:
    run("resumed", "scores", torch.float64, LEFT)
processes.stop()
tasks = Path("/proc/self/task")  # Linux only
left = [name for task in tasks.iterdir() if "gloo" in (name := (task / "comm").read_text())] if tasks.exists() else []
assert not left, f"threads that can abort Python's end: {left}"
