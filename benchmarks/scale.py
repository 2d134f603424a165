"""Memory and time of `tinylib distill` as the data grows: 1, 2, 4 and 8 times as many texts (`python benchmarks/scale.py`).

BERT-base teaches a student of 4 layers, 312 wide; weights are random, of the true sizes. Every run is a process of its own: the
teacher's outputs are computed and kept on disk, an epoch of the intermediate step reads them, one of the prediction step follows.
Memory is told apart as Linux does: what the process holds for itself (anonymous), and pages of mapped files, the cache among
them, which the system takes back whenever it needs the room. Writes data/results/scale.json.
Options: --texts 400 (of the smallest run), --dtypes float16 int8, --times 1 2 4 8, --threads 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from runs import FOLDER, machine, save

from tinylib import distill, layers, paging, train
from tinylib.bert import Bert
from tinylib.config import BertConfig

FILE = FOLDER / "scale.json"
LONGEST = 64  # texts
HEAD = {"head": "classification", "labels": ("negative", "positive")}


def resident() -> dict[str, int]:
    """Return the bytes that this process holds in memory now: its own ("anonymous") and mapped files' ("files")."""
    kinds = {"RssAnon": "anonymous", "RssFile": "files"}
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {kinds[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words[0][:-1] in kinds}


def watched(function: Callable[[], object]) -> dict[str, float]:
    """Run a function; return its seconds and the most memory of each kind that was held meanwhile, looked at 50 times a second."""
    most, done = resident(), threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for kind, now in resident().items():
                most[kind] = max(most[kind], now)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        function()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return {"seconds": round(seconds, 1)} | {f"{kind}_mb": round(most[kind] / 1e6) for kind in most}


def one(texts: int, dtype: str, shapes: list[str]) -> dict:
    """Run the three parts on so many texts in this process."""
    from tinylib import datasets
    from tinylib.text import encode, load_tokenizer

    every = encode(load_tokenizer("minilm-l6"), list(datasets.load("movie_reviews")["train"]["text"]), max_length=64)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    # The longest texts are in every size: the most memory is taken by the batch of them, which a small draw would lack.
    longest = every.lengths[order].argsort(descending=True, stable=True)[:LONGEST]
    rest = [row for row in range(len(every)) if row not in set(longest.tolist())]
    encoded = every.select(order[torch.tensor(longest.tolist() + rest)[:texts]].tolist())
    teacher, student = (
        Bert(BertConfig.bert_base(**HEAD) if shape == "bert_base" else BertConfig.parse(shape, num_attention_heads=12, **HEAD),
             torch.Generator().manual_seed(seed)).eval()
        for seed, shape in enumerate(shapes)
    )  # fmt: skip
    examples = train.Examples(encoded)
    settings = distill.Settings(epochs_intermediate=1, epochs_prediction=1, start="random", cache_dtype=dtype)
    wanted = layers.Wanted.by(distill.choose_map(teacher.config, student.config, None), settings.weights)
    kept = wanted.teacher_hidden, wanted.teacher_scores
    found = {"texts": len(examples), "tokens": int(encoded.lengths.sum()), "dtype": dtype}
    found["cache_mb"] = round(layers.TeacherOutputs.bytes_needed(teacher, examples, *kept, dtype=dtype) / 1e6, 1)
    paging.release_freed_memory()

    def fill() -> None:
        with layers.teacher_outputs(teacher, examples, *kept, keep=True, dtype=dtype):
            pass

    with tempfile.TemporaryDirectory(prefix="scale-") as cache:
        os.environ["TINYLIB_HOME"] = cache  # else the next run would find what this one made, and be faster for it
        found["fill"] = watched(fill)
        found["intermediate"] = watched(lambda: distill.distill_intermediate(teacher, student, examples, settings))
        found["prediction"] = watched(lambda: distill.distill_prediction(teacher, student, examples, settings))
    return found


def main() -> None:
    """Run every size in a process of its own and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs=2, default=["bert_base", "4x312"], help="of teacher and student")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print("@" + json.dumps(one(args.one, args.dtypes[0], args.shapes)))
        return
    rows = []
    for dtype in args.dtypes:
        for times in args.times:
            command = [sys.executable, __file__, "--one", str(args.texts * times), "--dtypes", dtype, "--shapes", *args.shapes]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"times": times} | json.loads(done.stdout.split("@")[-1]))
            print(json.dumps(rows[-1]), flush=True)
    dtypes = " ".join(args.dtypes)
    command = f"python benchmarks/scale.py --texts {args.texts} --threads {args.threads} --dtypes {dtypes}"
    save({"command": command, "machine": machine("highest"), "shapes": args.shapes, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
