"""Measure the speed of distillation and of its products beside other tools (`make bench`); write results.json and README's table.

BERT-base teaches a student of 4 layers, 312 wide; weights are random, of the true sizes. Every contestant is a process of its
own that takes turns with the others: A B C … A B C …, so that a change of the machine's pace meets all of them. Speeds are real
tokens a second, told as texts of the mean length; ratios are of two contestants in one round, their median over the rounds.
TextBrewer gets an environment of its own in tinylib's cache folder, made once (some minutes, about 1.3 GB).
Options: --quick (tiny shapes, to see that it runs), --only NAME …, --out FILE, --threads 2, --rounds 5, --steps 4.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speed_report import RACES, STEPS, summary, table, write_table

FOLDER = Path(__file__).resolve().parent
FILE, README = FOLDER / "results.json", "README.md"
SST2_MEAN = 24.6  # tokens of a training text of SST-2, the usual lengths of such a comparison
BUSY = 0.15  # share of the processors' time that others may take before the figures are called noisy

NAMES = [*dict.fromkeys(name for race in RACES.values() for name in race), "augmentation"]
PEERS = "hf_dynamic", "hf_trainer", "textbrewer_dynamic", "transformers_forward"


@dataclass(frozen=True)
class Settings:
    """Sizes of everything; ``QUICK`` is there to see that it runs."""

    teacher: str = "bert_base"
    student: str = "4x312"
    batch: int = 32
    rounds: int = 5
    steps: int = 4  # of training a turn
    warmup: int = 2  # steps before the first round, not counted
    calls: int = 30  # forward passes a turn: the first ones find the caches full of the others' numbers
    length: int = 128  # of the text that inference reads
    threads: int = 2
    sentences: int = 40  # that augmentation reads a round
    augmentation_rounds: int = 3


QUICK = Settings(
    teacher="4x48", student="2x24", batch=4, rounds=2, steps=1, warmup=1, calls=2, length=16, sentences=2, augmentation_rounds=1
)


class Contestant:
    """A process that runs one contestant and obeys ``speed_meter.Meter``'s commands."""

    def __init__(self, name: str, python: str | Path, job: dict, folder: Path):
        self.name, job_file, self.said = name, folder / f"{name}.json", folder / f"{name}.log"
        own = folder / name
        own.mkdir()
        job_file.write_text(json.dumps(job | {"folder": str(own)}), encoding="utf-8")
        kind = job.get("kind", name)
        script = FOLDER / ("speed_peers.py" if kind in PEERS else "speed_ours.py")
        environment = {k: v for k, v in os.environ.items() if k not in ("TINYLIB_TYPECHECK", "PYTHONPATH")}
        environment |= {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with open(self.said, "w") as log:
            self.process = subprocess.Popen(
                [python, script, kind, job_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )  # fmt: skip

    def tell(self, command: str) -> dict:
        """Send a command and wait for the answer."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """Read the next answer past whatever else is printed."""
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        lines = self.said.read_text(errors="replace").strip().splitlines()
        raise SystemExit(f"{self.name} stopped (exit code {self.process.wait()}):\n" + "\n".join(lines[-15:]))

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def race(jobs: dict[str, dict], settings: Settings, folder: Path, pythons: dict[str, str], per_turn: int) -> dict:
    """Let contestants take turns; return for each its rounds, its memory and what it said when it was ready."""
    folder.mkdir()
    contestants = [Contestant(name, pythons.get(name, sys.executable), job, folder) for name, job in jobs.items()]
    found = {}
    try:
        for one in contestants:
            found[one.name] = {"said": one.answer(), "fills": [], "rounds": []}
        cached = [one for one in contestants if one.name == "ours_cached"]
        for one in cached:
            found[one.name]["fills"].append(one.tell("fill"))
        for one in contestants:
            one.tell(f"go {settings.warmup}")
        for n in range(settings.rounds):
            for one in contestants:
                found[one.name]["rounds"].append(one.tell(f"go {per_turn}"))
            said(f"{folder.name}, round {n + 1} of {settings.rounds}")
        for one in cached:  # once more, so that the cost of filling has a spread too
            found[one.name]["fills"].append(one.tell("fill"))
        for one in contestants:
            found[one.name]["memory"] = one.tell("stop")
    finally:
        for one in contestants:
            one.end()
    return found


def said(sentence: str) -> None:
    """Tell the time and what has been done."""
    print(time.strftime("%H:%M:%S"), sentence, flush=True)


def deal(made: list[list[int]], lengths, rounds: int, per_turn: int) -> list[list[int]]:
    """Choose batches of ``LengthBuckets`` evenly from the shortest to the longest, so that each turn has short and long ones.

    A turn takes one from each of ``per_turn`` equal ranges of length, from its low end in one and from its high end in the next.
    """
    order = sorted(made, key=lambda rows: float(lengths[rows].float().mean()))
    order = [rows for rows in order if len(rows) == len(made[0])]
    total = rounds * per_turn
    chosen = [order[int((i + 0.5) * len(order) / total)] for i in range(total)]
    turns = []
    for n in range(rounds):
        places = [k * rounds + (n if k % 2 == 0 else rounds - 1 - n) for k in range(per_turn)]
        turns += [chosen[place] for place in places]
    return turns


def training_data(settings: Settings) -> dict:
    """Return the texts that everybody reads, and our batches of them in the order of the turns."""
    import torch

    from tinylib import datasets, models
    from tinylib.text import LengthBuckets, encode, load_tokenizer

    tokenizer = models.resolve("minilm-l6")  # BERT's own uncased vocabulary
    every = list(datasets.load("movie_reviews")["train"]["text"])
    pool = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: 64 * settings.batch].tolist()
    encoded = encode(load_tokenizer(tokenizer), [every[row] for row in pool], max_length=64)
    made = list(LengthBuckets(encoded.lengths, settings.batch))
    turns = deal(made, encoded.lengths, settings.rounds, settings.steps)
    rows = sorted(row for batch in turns for row in batch)
    place = {row: i for i, row in enumerate(rows)}
    turns = [[place[row] for row in batch] for batch in turns]
    # The warm-up takes the last turn's batches, the longest among them.
    order = (turns[-settings.steps :] * settings.warmup)[-settings.warmup :] + turns
    chosen = encoded.select(rows)
    return {
        "ids": [row.tolist() for row in chosen.ids], "dealt": order, "tokenizer": str(tokenizer),
        "mean": chosen.lengths.float().mean().item(), "pool_mean": encoded.lengths.float().mean().item(),
    }  # fmt: skip


def make_models(settings: Settings, folder: Path) -> dict:
    """Write teacher and student with random weights in the Hugging Face layout; return them."""
    import torch

    from tinylib.bert import Bert
    from tinylib.config import BertConfig

    head = {"head": "classification", "labels": ("negative", "positive")}
    base = settings.teacher == "bert_base"
    teacher = BertConfig.bert_base(**head) if base else BertConfig.parse(settings.teacher, **head)
    student = BertConfig.parse(settings.student, num_attention_heads=teacher.num_attention_heads, **head)
    made = {}
    for seed, (name, config) in enumerate((("teacher", teacher), ("student", student))):
        made[name] = Bert(config, torch.Generator().manual_seed(seed)).eval()
        made[name].save_pretrained(folder / name)
    return made


def cut(student):
    """Return the student without half its heads and two thirds of its neurons: the hardest cut of structured.py."""
    from structured import BOTH

    from tinylib.prune import shrink

    return shrink(student, **BOTH)


def same_work(job: dict, teacher, student) -> dict[str, float]:
    """Hold our losses against those of the Hugging Face loop on one batch without padding or dropout; raise if they differ.

    From the same weights. The attention of ours is taken after the softmax here, as transformers gives it; where speed is
    measured it is taken before, as the paper does.
    """
    import speed_peers
    import torch

    from tinylib import layers, losses

    theirs = [model.eval() for model in speed_peers.models(job | {"step": "intermediate"})]
    maps = layers.first_projections(teacher, student.config, "random", 0)
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (job["batch"], 24), generator=source)
    mask, layer_map = torch.ones_like(ids, dtype=torch.bool), layers.LayerMap(job["layer_map"])
    weights = layers.Weights(attention_on="probabilities")
    with torch.no_grad():
        told, said_ = (model(input_ids=ids, **speed_peers.keep("intermediate")) for model in theirs)
        plain = speed_peers.matching(said_, told, maps.maps, job["layer_map"]) | speed_peers.soft_targets(said_, told)
        wanted = layers.Wanted.by(layer_map, weights)
        told = layers.teacher_forward(teacher, {"ids": ids, "mask": mask, "segments": None}, wanted.teacher_hidden,
                                      wanted.teacher_scores)  # fmt: skip
        said_ = student(ids, mask, keep_hidden=wanted.hidden, keep_scores=wanted.scores)
        ours = layers.intermediate_losses(said_, told, mask, layer_map, maps, weights)
        ours["prediction"] = losses.soft_target_loss(said_.logits, told.logits)
    differences = {name: abs(float(ours[name] - plain[name])) for name in ours}
    for name, difference in differences.items():
        if not difference <= 1e-4 * max(1e-3, float(plain[name])):  # a NaN is no agreement
            raise SystemExit(f"the {name} loss of ours is {ours[name]}, theirs {plain[name]}: not the same work")
    return differences


def inference_models(made: dict, settings: Settings, folder: Path) -> dict[str, tuple[str, Path]]:
    """Write every model that inference is measured on; return name -> kind of contestant, file or folder."""
    from tinylib import export, quantize

    models = {"bert_base": (made["teacher"], folder / "teacher"), "tinybert4": (made["student"], folder / "student")}
    models["pruned"] = cut(made["student"]), folder / "pruned"
    models["pruned"][0].save_pretrained(folder / "pruned")
    found = {}
    for name, (model, where) in models.items():
        full = export.to_onnx(model, folder / f"{name}-onnx")
        int8 = quantize.dynamic_int8(full, folder / f"{name}-int8.onnx")
        found |= {f"{name}_torch": ("torch_forward", where), f"{name}_transformers": ("transformers_forward", where)}
        found |= {f"{name}_onnx": ("onnx_forward", full), f"{name}_onnx_int8": ("onnx_forward", int8)}
    return {name: found[name] for name in RACES["inference"]}


def textbrewer_python(make: bool) -> Path | None:
    """Return the interpreter of TextBrewer's own environment, made with the same torch and transformers as here.

    None where there is none and ``make`` is False, or where it cannot be made.
    """
    from tinylib import models

    folder = models.cache_folder() / ".venv-textbrewer"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    names = {"torch": version("torch"), "transformers": version("transformers"), "textbrewer": "0.2.1.post1"}
    pins, stamp = [f"{name}=={number}" for name, number in names.items()], folder / "pins.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == pins:
        return python
    if not make:
        return None
    said(f"making TextBrewer's environment in {folder.name} of tinylib's cache folder")
    index = os.environ.get("TORCH_INDEX")  # as in the Makefile: the page with torch's CPU build
    options = ["-qq", "--prefer-binary", *(["--extra-index-url", index] if index else [])]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", *options, *pins, "tensorboard"], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        said(f"TextBrewer's environment could not be made ({error}); it is left out")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    stamp.write_text(json.dumps(pins), encoding="utf-8")
    return python


def augmentation(settings: Settings) -> list[dict]:
    """Run rounds of augmentation.py: words a second, batched and one at a time."""
    import augmentation as measured
    import torch

    from tinylib import datasets
    from tinylib.augment import AugmentSettings, WordVectors, split_words
    from tinylib.bert import Bert
    from tinylib.config import BertConfig
    from tinylib.text import load_tokenizer

    own, tokenizer = torch.Generator().manual_seed(0), load_tokenizer("minilm-l6")
    if settings.teacher == "bert_base":
        model = Bert.from_pretrained("minilm-l6", head="masked_lm", generator=own)
    else:
        model = Bert(BertConfig.parse(settings.teacher, head="masked_lm"), own).eval()
    copies = AugmentSettings(copies=4)
    texts = list(datasets.load("movie_reviews")["train"]["text"])[: settings.augmentation_rounds * settings.sentences]
    words = sorted({name for text in texts for name in split_words(tokenizer, text).names})
    vectors = WordVectors(words, torch.randn(len(words), 50, generator=own))
    measured.one_round(texts[:4], model, tokenizer, vectors, copies, 0)
    rounds = []
    for n in range(settings.augmentation_rounds):
        part = texts[n * settings.sentences : (n + 1) * settings.sentences]
        rounds.append(measured.one_round(part, model, tokenizer, vectors, copies, n))
        said(f"augmentation, round {n + 1} of {settings.augmentation_rounds}")
    return rounds


def version(name: str) -> str:
    """Return an installed package's version without its build ("+cpu")."""
    return importlib.metadata.version(name).split("+")[0]


def busy() -> dict:
    """Say how much of the processors others use just now, and warn if it is much."""
    import psutil

    share = psutil.cpu_percent(interval=2.0) / 100
    load = psutil.getloadavg()[0]
    quiet = share <= BUSY
    if not quiet:
        said(f"WARNING: other jobs take {share:.0%} of the processors (load average {load:.1f}); the figures will be noisy")
    return {"quiet": quiet, "share_of_processors_busy": round(share, 3), "load_average": round(load, 2)}


def machine(threads: int) -> str:
    """Return the machine's class."""
    import torch

    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {threads} threads"


def main() -> None:
    """Race everybody, compare, write."""
    args = options().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the contestants end and their files go
    import torch
    from runs import save

    torch.set_num_threads(args.threads)
    sizes = {name: getattr(args, name) for name in ("threads", "rounds", "steps") if getattr(args, name)}
    settings = dataclasses.replace(QUICK if args.quick else Settings(), **sizes)
    chosen = set(args.only or NAMES)
    quiet, started = busy(), time.perf_counter()
    python = textbrewer_python(make=not args.quick) if "textbrewer_dynamic" in chosen else None
    chosen -= {"textbrewer_dynamic"} if python is None else set()
    data, found = training_data(settings), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_models(settings, folder)
        job = data | {"threads": settings.threads, "batch": settings.batch}
        job |= {"teacher": str(folder / "teacher"), "student": str(folder / "student"), "layer_map": layer_map(made)}
        differences = same_work(job, made["teacher"], made["student"])
        said("the losses of tinylib and of the Hugging Face loop agree")
        jobs = {step: {c: job | {"step": step} for c in RACES[step] if c in chosen} for step in STEPS}
        if set(RACES["inference"]) & chosen:
            jobs["inference"] = inference_jobs(inference_models(made, settings, folder), settings, chosen)
        del made
        for race_, own in jobs.items():
            per_turn = settings.calls if race_ == "inference" else settings.steps
            if own:
                found[race_] = race(own, settings, folder / f"race-{race_}", {"textbrewer_dynamic": python}, per_turn)
    words = augmentation(settings) if "augmentation" in chosen else []
    store = {
        "command": "python benchmarks/speed.py" if sys.argv[1:] else "make bench", "options": sys.argv[1:],
        "machine": machine(settings.threads), "threads": settings.threads,
        "versions": {n: version(n) for n in ("torch", "transformers", "accelerate", "onnxruntime", "onnx", "numpy")}
        | {"textbrewer": "0.2.1.post1" if python else None, "python": platform.python_version()},
        "quiet_before": quiet, "quiet_after": busy(), "settings": dataclasses.asdict(settings),
        "rounds_said": f"batches of {settings.batch}, {settings.rounds} rounds of {settings.steps} steps or {settings.calls} calls",
        "data": {
            "from": "movie_reviews, training texts cut at 64 tokens", "texts": len(data["ids"]),
            "mean_tokens": round(data["mean"], 2), "longest": max(map(len, data["ids"])), "mean_tokens_of_sst2": SST2_MEAN,
        },
        "largest_difference_of_losses": differences,
    }  # fmt: skip
    store |= summary(found, data, words) | {"minutes": round((time.perf_counter() - started) / 60, 1)}
    report(store, args, save)


def layer_map(made: dict) -> list[int]:
    """Return the uniform map."""
    from tinylib.layers import LayerMap

    return list(LayerMap.uniform(*(made[name].config.num_hidden_layers for name in ("teacher", "student"))))


def inference_jobs(models: dict, settings: Settings, chosen: set[str]) -> dict[str, dict]:
    """Return the jobs of the contestants that run a forward pass."""
    import torch

    ids = torch.randint(1000, 30000, (1, settings.length), generator=torch.Generator().manual_seed(0)).tolist()
    job = {"threads": settings.threads, "ids": ids}
    return {name: job | {"kind": kind, "model": str(where)} for name, (kind, where) in models.items() if name in chosen}


def options() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="the JSON file; a README.md beside it gets the tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    return parser


def report(store: dict, args: argparse.Namespace, save: Callable[[dict, Path], None]) -> None:
    """Print the tables; write them unless only a part was run and no file was named."""
    print(table(store), flush=True)
    whole = not args.quick and not args.only
    out = args.out or (FILE if whole else None)
    if out is None:
        said("a part of the benchmark: written nowhere; name a file with --out")
        return
    save(store, out)
    if out.with_name(README).exists():
        write_table(store, out.with_name(README))
    said(f"wrote {out.name} after {store['minutes']} minutes")


if __name__ == "__main__":
    main()
