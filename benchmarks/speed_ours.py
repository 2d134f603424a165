"""Our side of the speed benchmark, through the package's public functions, and the floor that no loop can go below.

Run by speed.py as ``python speed_ours.py NAME JOB``. ``ours`` and ``ours_cached`` are what distill.distill_intermediate and
distill_prediction do: ``train.fit`` on ``train.loader``'s batches. Without the cache the prediction step runs the teacher
for every batch, which the package never does; it is there to compare like with like.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from speed_meter import Meter
from torch import Tensor
from torch.utils.data import DataLoader

from tinylib import layers, measure, onednn, paging, train
from tinylib.bert import Bert
from tinylib.losses import soft_target_loss
from tinylib.text import Encoded, LengthBuckets
from tinylib.train import Batch, Examples

MANY = 10**6  # steps of the schedule: more than are ever done


class Dealt(LengthBuckets):
    """Batches that ``LengthBuckets`` has made, in a given order: every turn gets short and long ones (``speed.deal``)."""

    def __init__(self, lengths: Tensor, dealt: list[list[int]]):
        super().__init__(lengths, len(dealt[0]))
        self.dealt = dealt

    def __len__(self) -> int:
        return len(self.dealt)

    def _batches(self) -> list[list[int]]:
        return self.dealt


def loader(job: dict) -> DataLoader:
    """Return ``train.loader``'s batches in the order that the job gives."""
    examples = texts(job)
    return DataLoader(examples, batch_sampler=Dealt(examples.lengths, job["dealt"]), collate_fn=examples.collate)


def texts(job: dict) -> Examples:
    """Return the texts as the package holds them."""
    ids = tuple(torch.tensor(row) for row in job["ids"])
    return Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)))


def pair(job: dict) -> tuple[Bert, Bert]:
    """Load teacher and student."""
    return Bert.from_pretrained(job["teacher"]), Bert.from_pretrained(job["student"])


def wanted_layers(job: dict) -> tuple:
    """Return the teacher's layers whose outputs are matched."""
    wanted = layers.Wanted.by(layers.LayerMap(job["layer_map"]), layers.Weights())
    return wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations


def run(job: dict, meter: Meter, model, loss_fn) -> None:
    """Train by ``train.fit``, which stops for the others' turns in ``after_step``."""

    def counted(model, batch: Batch) -> dict[str, Tensor]:
        meter.saw(batch["mask"].sum())
        return loss_fn(model, batch)

    train.fit(model, loader(job), counted, epochs=1, steps=MANY, lr=5e-5, after_step=meter.step)


def ours(job: dict, meter: Meter, cached: bool = False) -> None:
    """Run the intermediate or the prediction step."""
    teacher, student = pair(job)
    {"intermediate": intermediate, "prediction": prediction}[job["step"]](job, meter, teacher, student, cached)


def intermediate(job: dict, meter: Meter, teacher: Bert, student: Bert, cached: bool) -> None:
    """Match embeddings, hidden states and attention scores, as distill.distill_intermediate does."""
    projections = layers.first_projections(teacher, student.config, "random", 0)
    examples, stack, outputs = texts(job), contextlib.ExitStack(), []

    def fill() -> dict:
        os.environ["TINYLIB_HOME"] = f"{job['folder']}/{len(outputs)}"  # else the second one would find the first
        started = time.perf_counter()
        outputs.append(stack.enter_context(layers.teacher_outputs(teacher, examples, *wanted_layers(job))))
        size = layers.TeacherOutputs.bytes_needed(teacher, examples, *wanted_layers(job))
        return {"seconds": time.perf_counter() - started, "bytes": size}

    meter.fill = fill
    meter.ready()
    layer_map = layers.LayerMap(job["layer_map"])
    loss_fn = layers.matching_loss(teacher, layer_map, layers.Weights(), outputs[0] if cached else None)
    with paging.aside(teacher) if cached else contextlib.nullcontext():  # as distill.distill_intermediate does
        run(job, meter, layers.Distiller(student, projections), loss_fn)


def prediction(job: dict, meter: Meter, teacher: Bert, student: Bert, cached: bool) -> None:
    """Learn from the soft targets, as distill.distill_prediction does."""
    examples, targets = texts(job), []

    def fill() -> dict:
        started = time.perf_counter()
        targets.append(train.predict(teacher, examples.encoded, label="teacher logits").clone())
        return {"seconds": time.perf_counter() - started, "bytes": targets[-1].nbytes}

    def losses(model: Bert, batch: Batch) -> dict[str, Tensor]:
        if cached:
            told = targets[0][batch["rows"].cpu()]
        else:
            told = layers.teacher_forward(teacher, batch).logits
        return {"prediction": soft_target_loss(model(batch["ids"], batch["mask"], batch["segments"]).logits, told)}

    meter.fill = fill
    meter.ready()
    with paging.aside(teacher) if cached else contextlib.nullcontext():
        run(job, meter, student, losses)


def unpadded(job: dict) -> list[Tensor]:
    """Return a batch for each of the dealt ones, every text of their mean length: no padding, and as many tokens."""
    lengths, source = texts(job).lengths.float(), torch.Generator().manual_seed(0)
    shapes = [(len(rows), round(lengths[rows].mean().item())) for rows in job["dealt"]]
    return [torch.randint(1000, 30000, shape, generator=source) for shape in shapes]


def repeat(job: dict, meter: Meter, step: Callable[[Tensor], object]) -> None:
    """Take one step after the other."""
    batches = unpadded(job)
    meter.ready()
    while True:
        for ids in batches:
            meter.saw(ids.numel())
            step(ids)
            meter.step()


def floor_teacher(job: dict, meter: Meter) -> None:
    """Run the teacher forward alone."""
    teacher = Bert.from_pretrained(job["teacher"])
    repeat(job, meter, lambda ids: layers.teacher_forward(teacher, {"ids": ids, "mask": None, "segments": None}))


def floor_student(job: dict, meter: Meter) -> None:
    """Run the student forward and backward on the simplest loss, and the optimiser: no clipping, schedule or record."""
    student = Bert.from_pretrained(job["student"]).train()
    optimizer = train.adamw(student, 5e-5)

    def step(ids: Tensor) -> None:
        with onednn.products(ids.device):
            loss = student(ids).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    repeat(job, meter, step)


def floor_matching(job: dict, meter: Meter) -> None:
    """Run the same with projections and intermediate losses, against numbers that lie ready in memory."""
    teacher, student = pair(job)
    layer_map, config = layers.LayerMap(job["layer_map"]), teacher.config
    both = layers.Distiller(student, layers.first_projections(teacher, student.config, "random", 0)).train()
    optimizer, wanted = train.adamw(both, 5e-5), layers.Wanted.by(layer_map, layers.Weights())
    del teacher
    longest = max(max(map(len, job["ids"])), 1)
    most = job["batch"] * longest * max(config.hidden_size, config.num_attention_heads * longest)
    numbers = torch.randn(most, generator=torch.Generator().manual_seed(0))

    def ready(*shape: int) -> Tensor:
        return numbers[: torch.Size(shape).numel()].view(shape)

    def step(ids: Tensor) -> None:
        (B, T), H = ids.shape, config.num_attention_heads
        told = layers.BertOutput(
            numbers, None, dict.fromkeys(wanted.teacher_hidden, ready(B, T, config.hidden_size)),
            dict.fromkeys(wanted.teacher_scores, ready(B, H, T, T)),
        )  # fmt: skip
        with onednn.products(ids.device):
            said = student(ids, keep_hidden=wanted.hidden, keep_scores=wanted.scores)
            parts = layers.intermediate_losses(said, told, None, layer_map, both.projections, layers.Weights())
        sum(parts.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    repeat(job, meter, step)


@torch.inference_mode()
def torch_forward(job: dict, meter: Meter) -> None:
    """Run a model's forward pass in PyTorch, again and again."""
    forward(Bert.from_pretrained(job["model"]), job, meter)


def onnx_forward(job: dict, meter: Meter) -> None:
    """Run an ONNX file in ONNX Runtime, again and again."""
    from tinylib import export

    forward(export.Onnx(job["model"], threads=job["threads"]), job, meter)


def forward(model, job: dict, meter: Meter) -> None:
    """Call a model on the job's one batch."""
    ids = torch.tensor(job["ids"])
    mask, segments = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    meter.ready(megabytes=measure.file_size(weights_file(job["model"])) / 1e6)
    while True:
        model(ids, mask, segments)
        meter.step()


def weights_file(source: str) -> Path:
    """Return the file with a model's weights."""
    return Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)


CONTESTANTS: dict[str, Callable[[dict, Meter], None]] = {
    "ours": ours, "ours_cached": partial(ours, cached=True), "floor_teacher": floor_teacher, "floor_student": floor_student,
    "floor_matching": floor_matching, "torch_forward": torch_forward, "onnx_forward": onnx_forward,
}  # fmt: skip


def main() -> None:
    """Run the contestant that the command line names."""
    name, file = sys.argv[1:]
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    CONTESTANTS[name](job, Meter())


if __name__ == "__main__":
    main()
