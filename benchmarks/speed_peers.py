"""The other tools of the speed benchmark, each as its users write it: a plain Hugging Face loop, Hugging Face Trainer, TextBrewer.

Run by speed.py as ``python speed_peers.py NAME JOB``; imports nothing of tinylib, which TextBrewer's environment does not
have. All of them draw random batches of the same texts and pad each to its longest text (DataCollatorWithPadding). The step
"intermediate" matches embeddings, hidden states and attention, which transformers gives after the softmax; "prediction" logits.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from speed_meter import Meter
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

MANY = 10**6  # steps of the schedule: more than are ever done, so that no tool ends its run


def models(job: dict) -> tuple[nn.Module, nn.Module]:
    """Load teacher and student; attention weights can be had of the eager kind alone, which is slower, so only where needed."""
    kind = {"attn_implementation": "eager"} if job["step"] == "intermediate" else {}
    teacher, student = (BertForSequenceClassification.from_pretrained(job[name], **kind) for name in ("teacher", "student"))
    return teacher.eval(), student.train()


def batches(job: dict, shuffle: bool = True) -> DataLoader:
    """Return the loader that the library's examples use."""
    rows = [{"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids)} for ids in job["ids"]]
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(job["tokenizer"]))
    return DataLoader(rows, batch_size=job["batch"], shuffle=shuffle, collate_fn=collator)


def projections(teacher: nn.Module, student: nn.Module) -> nn.ModuleList:
    """Return a linear map to the teacher's width for the embeddings and for each layer."""
    widths = student.config.hidden_size, teacher.config.hidden_size
    return nn.ModuleList(nn.Linear(*widths, bias=False) for _ in range(student.config.num_hidden_layers + 1))


def keep(step: str) -> dict:
    """Return what the models are asked for."""
    return {"output_hidden_states": True, "output_attentions": True} if step == "intermediate" else {}


def matching(said, told, maps: nn.ModuleList, layer_map: list[int]) -> dict[str, torch.Tensor]:
    """Return TinyBERT's intermediate losses as plain code has them: means over everything, padding included."""
    hidden = [F.mse_loss(maps[0](said.hidden_states[0]), told.hidden_states[0])]
    attention = []
    for m, n in enumerate(layer_map, start=1):
        hidden.append(F.mse_loss(maps[m](said.hidden_states[m]), told.hidden_states[n]))
        attention.append(F.mse_loss(said.attentions[m - 1], told.attentions[n - 1]))
    return {"embedding": hidden[0], "hidden": sum(hidden[1:]), "attention": sum(attention)}


def soft_targets(said, told) -> dict[str, torch.Tensor]:
    """Return Hinton's loss of the logits, at temperature 1."""
    return {"prediction": F.kl_div(said.logits.log_softmax(-1), told.logits.softmax(-1), reduction="batchmean")}


def losses(job: dict, said, told, maps) -> torch.Tensor:
    """Return the step's loss."""
    parts = matching(said, told, maps, job["layer_map"]) if job["step"] == "intermediate" else soft_targets(said, told)
    return sum(parts.values())


def hf_dynamic(job: dict, meter: Meter) -> None:
    """Run the plain loop."""
    teacher, student = models(job)
    maps, asked, loader = projections(teacher, student), keep(job["step"]), batches(job)
    trained = [*student.parameters(), *(maps.parameters() if job["step"] == "intermediate" else ())]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, MANY // 10, MANY)
    meter.ready()
    while True:
        for batch in loader:
            meter.saw(batch["attention_mask"].sum())
            with torch.no_grad():
                told = teacher(**batch, **asked)
            loss = losses(job, student(**batch, **asked), told, maps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            meter.step()


class Pair(nn.Module):
    """What Trainer trains: the student with its projections."""

    def __init__(self, student: nn.Module, maps: nn.ModuleList):
        super().__init__()
        self.student, self.maps = student, maps


def hf_trainer(job: dict, meter: Meter) -> None:
    """Run Trainer with its own defaults and a loss of one's own."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Distilling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            meter.saw(inputs["attention_mask"].sum())
            asked = keep(job["step"])
            with torch.no_grad():
                told = teacher(**inputs, **asked)
            said = model.student(**inputs, **asked)
            loss = losses(job, said, told, model.maps)
            return (loss, said) if return_outputs else loss

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            meter.step()

    teacher, student = models(job)
    maps = projections(teacher, student) if job["step"] == "intermediate" else nn.ModuleList()
    loader = batches(job)
    arguments = TrainingArguments(
        output_dir=job["folder"], per_device_train_batch_size=job["batch"], max_steps=MANY, learning_rate=5e-5,
        warmup_steps=MANY // 10, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Distilling(
        model=Pair(student, maps), args=arguments, train_dataset=loader.dataset, data_collator=loader.collate_fn,
        callbacks=[Turns()],
    )  # fmt: skip
    meter.ready()
    trainer.train()


def textbrewer_dynamic(job: dict, meter: Meter) -> None:
    """Run TextBrewer's GeneralDistiller."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    teacher, student = models(job)
    loader, intermediate = batches(job), job["step"] == "intermediate"
    as_dict, matches = loader.collate_fn, []
    loader.collate_fn = lambda rows: dict(as_dict(rows))  # it knows plain dictionaries alone
    if intermediate:
        widths = student.config.hidden_size, teacher.config.hidden_size
        for m, n in enumerate([0, *job["layer_map"]]):
            hidden = {"feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": ["linear", *widths]}
            matches.append({"layer_T": n, "layer_S": m} | hidden)
        for m, n in enumerate(job["layer_map"]):  # attention is numbered from the first layer, states from the embeddings
            matches.append({"layer_T": n - 1, "layer_S": m, "feature": "attention", "loss": "attention_mse", "weight": 1})

    def adapt(batch, out):
        if intermediate:
            return {"hidden": out.hidden_states, "attention": out.attentions, "inputs_mask": batch["attention_mask"]}
        return {"logits": out.logits}

    def adapt_teacher(batch, out):
        meter.saw(batch["attention_mask"].sum())
        return adapt(batch, out)

    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    optimizer.register_step_post_hook(meter.step)
    distiller = GeneralDistiller(
        TrainingConfig(device="cpu", output_dir=job["folder"], ckpt_steps=MANY),
        DistillationConfig(temperature=1, intermediate_matches=matches or None), teacher, student, adapt_teacher, adapt,
    )  # fmt: skip
    schedule = {"num_warmup_steps": MANY // 10, "num_training_steps": MANY}
    meter.ready()
    with distiller:
        distiller.train(
            optimizer, loader, num_steps=MANY, scheduler_class=get_linear_schedule_with_warmup, scheduler_args=schedule,
            max_grad_norm=1.0, **keep(job["step"]),
        )  # fmt: skip


@torch.inference_mode()
def transformers_forward(job: dict, meter: Meter) -> None:
    """Run a model's forward pass, again and again."""
    model = BertForSequenceClassification.from_pretrained(job["model"]).eval()
    ids = torch.tensor(job["ids"])
    meter.ready(megabytes=(Path(job["model"]) / "model.safetensors").stat().st_size / 1e6)
    while True:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        meter.step()


CONTESTANTS = {f.__name__: f for f in (hf_dynamic, hf_trainer, textbrewer_dynamic, transformers_forward)}


def main() -> None:
    """Run the contestant that the command line names."""
    name, file = sys.argv[1:]
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    CONTESTANTS[name](job, Meter())


if __name__ == "__main__":
    main()
