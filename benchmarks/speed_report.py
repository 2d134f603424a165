"""What the speed benchmark makes of its rounds: ratios of contestants that ran side by side, and README's tables."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from tinylib import measure

MARKS = "<!-- speed: written by speed.py -->", "<!-- speed: end -->"
STEPS = "intermediate", "prediction"
EPOCHS = 3, 10, 20

RACES = {
    "intermediate": {
        "hf_dynamic": "Hugging Face loop", "hf_trainer": "Hugging Face Trainer", "textbrewer_dynamic": "TextBrewer",
        "ours": "tinylib", "ours_cached": "tinylib, teacher cached", "floor_teacher": "floor: teacher forward alone",
        "floor_student": "floor: student forward, backward, optimiser",
        "floor_matching": "floor: student with projections and losses",
    },
    "prediction": {
        "hf_dynamic": "Hugging Face loop", "hf_trainer": "Hugging Face Trainer", "textbrewer_dynamic": "TextBrewer",
        "ours": "tinylib", "ours_cached": "tinylib, teacher cached",
        "floor_student": "floor: student forward, backward, optimiser",
    },
    "inference": {
        "bert_base_torch": "BERT-base, tinylib", "bert_base_transformers": "BERT-base, transformers",
        "bert_base_onnx": "BERT-base, ONNX Runtime", "bert_base_onnx_int8": "BERT-base, ONNX Runtime int8",
        "tinybert4_torch": "TinyBERT4, tinylib", "tinybert4_transformers": "TinyBERT4, transformers",
        "tinybert4_onnx": "TinyBERT4, ONNX Runtime", "tinybert4_onnx_int8": "TinyBERT4, ONNX Runtime int8",
        "pruned_torch": "TinyBERT4 pruned, tinylib", "pruned_onnx": "TinyBERT4 pruned, ONNX Runtime",
        "pruned_onnx_int8": "TinyBERT4 pruned, ONNX Runtime int8",
    },
}  # fmt: skip

# Key -> race, the contestant that is ours, the one that it is divided by.
RATIOS = {
    "intermediate_vs_hf_dynamic": ("intermediate", "ours", "hf_dynamic"),
    "intermediate_vs_textbrewer_dynamic": ("intermediate", "ours", "textbrewer_dynamic"),
    "intermediate_cached_vs_hf_dynamic": ("intermediate", "ours_cached", "hf_dynamic"),
    "prediction_vs_hf_dynamic": ("prediction", "ours", "hf_dynamic"),
    "prediction_cached_vs_hf_dynamic": ("prediction", "ours_cached", "hf_dynamic"),
    "intermediate_vs_floor": ("intermediate", "ours", "floor_both"),
    "intermediate_cached_vs_floor": ("intermediate", "ours_cached", "floor_student"),
    "prediction_cached_vs_floor": ("prediction", "ours_cached", "floor_student"),
    "inference_tinybert4_torch_vs_bert_base_torch": ("inference", "tinybert4_torch", "bert_base_torch"),
    "inference_onnx_int8_vs_bert_base_torch": ("inference", "tinybert4_onnx_int8", "bert_base_torch"),
    "pruned_vs_dense_latency": ("inference", "pruned_torch", "tinybert4_torch"),
}
AUGMENTATION = "augmentation_vs_one_at_a_time"
MORE = {
    "intermediate_vs_hf_trainer": ("intermediate", "ours", "hf_trainer"),
    "prediction_vs_hf_trainer": ("prediction", "ours", "hf_trainer"),
    "prediction_vs_textbrewer_dynamic": ("prediction", "ours", "textbrewer_dynamic"),
    "intermediate_vs_floor_with_losses": ("intermediate", "ours", "floor_both_with_losses"),
    "intermediate_cached_vs_floor_with_losses": ("intermediate", "ours_cached", "floor_matching"),
    "inference_bert_base_torch_vs_transformers": ("inference", "bert_base_torch", "bert_base_transformers"),
    "inference_onnx_int8_vs_bert_base_onnx_int8": ("inference", "tinybert4_onnx_int8", "bert_base_onnx_int8"),
    "pruned_vs_dense_latency_onnx": ("inference", "pruned_onnx", "tinybert4_onnx"),
    "pruned_vs_dense_latency_onnx_int8": ("inference", "pruned_onnx_int8", "tinybert4_onnx_int8"),
}
# Nothing can be faster than both parts, one after the other.
IN_SERIES = {
    "floor_both": ("floor_teacher", "floor_student"), "floor_both_with_losses": ("floor_teacher", "floor_matching"),
}  # fmt: skip


def speeds(rows: list[dict], unit: str, mean: float = 1.0, by: str = "seconds") -> list[float]:
    """Return each round's speed: texts of the mean length a second, or calls a second.

    Of a round's calls the median one speaks for all, as it does in the table of latencies: one call that another process held up
    would weigh more in a mean than all others.
    """
    if unit == "texts":
        return [row["tokens"] / mean / row[by] for row in rows]
    return [1 / statistics.median(row["times"]) if by == "seconds" else len(row["times"]) / row[by] for row in rows]


def middle(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return median, smallest and largest, to some significant digits."""
    return [float(f"{v:.{digits}g}") for v in (statistics.median(values), min(values), max(values))]


def compare(pace: dict[str, dict[str, list[float]]], pairs: dict[str, tuple[str, str, str]]) -> dict[str, list[float]]:
    """Return the ratios that can be computed: median, smallest and largest over the rounds."""
    found = {}
    for key, (race_, one, other) in pairs.items():
        if {one, other} <= set(pace.get(race_, {})):
            ratios = [a / b for a, b in zip(pace[race_][one], pace[race_][other], strict=True)]
            found[key] = middle(ratios)
    return found


def paces(found: dict, mean: float, by: str) -> dict[str, dict[str, list[float]]]:
    """Return the speed of each contestant in each round, and of two floors in series."""
    pace = {}
    for name, contestants in found.items():
        unit = "calls" if name == "inference" else "texts"
        own = pace[name] = {c: speeds(said_["rounds"], unit, mean, by) for c, said_ in contestants.items()}
        for both, parts in IN_SERIES.items():
            if set(parts) <= set(own):
                own[both] = [1 / sum(1 / speed for speed in at_once) for at_once in zip(*(own[p] for p in parts), strict=True)]
    return pace


def summary(found: dict, data: dict, words: list[dict]) -> dict:
    """Turn what was measured into what is stored."""
    pace = paces(found, data["mean"], "seconds")
    ratios, further = compare(pace, RATIOS), compare(pace, MORE)
    by_cpu = compare(paces(found, data["mean"], "cpu"), RATIOS)
    if words:
        ratios[AUGMENTATION] = middle([row["batched"] / row["one_at_a_time"] for row in words])
        by_cpu[AUGMENTATION] = middle([row["cpu_ratio"] for row in words])
    store = {
        "ratios": {key: values[0] for key, values in ratios.items()},
        "spread": {key: values[1:] for key, values in ratios.items()},
        "ratios_by_cpu_time": {key: values[0] for key, values in by_cpu.items()},
        "more_ratios": further,
    }
    for step in STEPS:
        if step in found:
            store[step] = {name: training_row(name, said_, pace[step][name]) for name, said_ in found[step].items()}
            both = [name for name in IN_SERIES if name in pace[step]]
            store[step] |= {name: {"sequences_per_second": middle(pace[step][name])} for name in both}
            if "ours_cached" in found[step]:
                store.setdefault("cache", {})[step] = filling(found[step]["ours_cached"], pace[step], data)
    if "inference" in found:
        store["inference"] = {name: inference_row(said_) for name, said_ in found["inference"].items()}
    if words:
        per_second = {name: middle([row[name] for row in words]) for name in ("batched", "one_at_a_time")}
        store["augmentation"] = {"words_per_second": per_second, "rounds": len(words)}
    return store


def training_row(name: str, said_: dict, pace: list[float]) -> dict:
    """Return a contestant's speed and memory."""
    rows = said_["rounds"]
    used = sum(row["cpu"] for row in rows) / sum(row["seconds"] for row in rows)
    return {"sequences_per_second": middle(pace), "processors_used": round(used, 2)} | memory(said_)


def memory(said_: dict) -> dict:
    """Return the peaks in megabytes: of the whole process, and after the models were loaded."""
    peaks = said_["memory"]
    return {"peak_mb": round(max(peaks.values()) / 1e6), "peak_running_mb": round(peaks["running"] / 1e6)}


def filling(said_: dict, pace: dict[str, list[float]], data: dict) -> dict:
    """Return what the cache costs, and the speed over some epochs with that cost in it."""
    texts, seconds = len(data["ids"]), [fill["seconds"] for fill in said_["fills"]]
    once, fast = statistics.median(seconds) / texts, statistics.median(pace["ours_cached"])
    with_filling = {str(n): float(f"{n / (once + n / fast):.4g}") for n in EPOCHS}
    found = {
        "texts": texts, "fill_seconds": [round(s, 3) for s in seconds], "bytes_per_text": round(said_["fills"][0]["bytes"] / texts),
        "sequences_per_second_with_filling": with_filling,
    }  # fmt: skip
    if "hf_dynamic" in pace:
        slow = statistics.median(pace["hf_dynamic"])
        found["with_filling_vs_hf_dynamic"] = {n: float(f"{speed / slow:.4g}") for n, speed in with_filling.items()}
    return found


def inference_row(said_: dict) -> dict:
    """Return a model's latency in milliseconds, its file and its memory."""
    times = [1000 * t for row in said_["rounds"] for t in row["times"]]
    p95 = measure.percentile(times, 0.95)
    row = {"latency_ms": middle(times)[0], "p95_ms": float(f"{p95:.4g}"), "calls": len(times)}
    if "megabytes" in said_["said"]:
        row["file_mb"] = round(said_["said"]["megabytes"], 2)
    return row | memory(said_)


def table(store: dict) -> str:
    """Return README's tables."""
    lines = [f"{store['machine']}, torch {store['versions']['torch']}; {store['rounds_said']}.", ""]
    if store["quiet_before"]["quiet"] and store["quiet_after"]["quiet"]:
        lines[0] += " Nothing else ran."
    else:
        lines[0] += " **Other jobs ran meanwhile: these figures are noisy.**"
    for step in STEPS:
        if step in store:
            lines += [*training_table(store, step), ""]
    if "inference" in store:
        lines += [*inference_table(store), ""]
    lines += ["| ratio | median | smallest | largest |", "|---|---|---|---|"]
    for key, value in store["ratios"].items():
        low, high = store["spread"][key]
        lines.append(f"| `{key}` | {value:.3g} | {low:.3g} | {high:.3g} |")
    return "\n".join(lines)


def training_table(store: dict, step: str) -> list[str]:
    """Return the table of one step of the training."""
    rows, hf = store[step], store[step].get("hf_dynamic", {}).get("sequences_per_second", [None])[0]
    names = RACES[step] | {
        "floor_both": "floor: teacher, then student",
        "floor_both_with_losses": "floor: teacher, then student with projections and losses",
    }
    lines = [f"| {step} step | sequences a second | smallest to largest | × Hugging Face loop | peak memory, MB |"]
    lines.append("|---|---|---|---|---|")
    for name, title in names.items():
        if name in rows:
            speed, low, high = rows[name]["sequences_per_second"]
            times = f"{speed / hf:.2f}" if hf else ""
            lines.append(f"| {title} | {speed:.3g} | {low:.3g} to {high:.3g} | {times} | {rows[name].get('peak_mb', '')} |")
    for epochs, speed in store.get("cache", {}).get(step, {}).get("sequences_per_second_with_filling", {}).items():
        times = f"{speed / hf:.2f}" if hf else ""
        lines.append(f"| tinylib, teacher cached: {epochs} epochs, filling counted | {speed:.3g} | | {times} | |")
    return lines


def inference_table(store: dict) -> list[str]:
    """Return the table of the latencies."""
    rows, settings = store["inference"], store["settings"]
    base = rows.get("bert_base_torch", {}).get("latency_ms")
    heads = [f"one text of {settings['length']} tokens", "median, ms", "95 % under, ms", "× BERT-base, tinylib", "file, MB"]
    lines = ["| " + " | ".join([*heads, "peak memory, MB"]) + " |", "|---|---|---|---|---|---|"]
    for name, title in RACES["inference"].items():
        if name in rows:
            row = rows[name]
            times = f"{base / row['latency_ms']:.1f}" if base else ""
            cells = [title, f"{row['latency_ms']:.3g}", f"{row['p95_ms']:.3g}", times, row.get("file_mb", ""), row["peak_mb"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def write_table(store: dict, readme: Path) -> None:
    """Put the tables between README's marks."""
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{table(store)}\n{MARKS[1]}{after}", encoding="utf-8")
