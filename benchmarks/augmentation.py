"""Measure how many words a second augmentation replaces, batched and one at a time; write data/results/augmentation.json.

Both sides run Algorithm 1 on the same sentences with the same model, and the model only where a word is replaced (as printed,
the algorithm would run it for every word, ``words_masked_as_printed`` times as often). One at a time is the usual code: a
batch of one sentence, the head over the whole vocabulary at every position. The two take turns, and the medians are compared.
Options: --model NAME (a masked language model; without one, MiniLM-L6 with a new head, which computes as much), --rounds 5.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch
from runs import FOLDER, save

from tinylib import datasets
from tinylib.augment import AugmentSettings, BlankFiller, WordVectors, algorithm_1, augment, is_word, split_words
from tinylib.bert import Bert
from tinylib.text import load_tokenizer

FILE = FOLDER / "augmentation.json"
SENTENCES = 60  # a round


class OneAtATime(BlankFiller):
    """Answer as the usual code does: a sentence a call, logits of the whole vocabulary at every position."""

    @torch.inference_mode()
    def answer(self, questions):
        """Return the K words of each question."""
        found = []
        for ids, place in questions:
            logits = self.model(torch.tensor([ids], device=self.device)).logits[0, place]
            best = logits.masked_fill(self.unfit, -torch.inf).topk(self.settings.candidates).indices
            found.append([self.vocabulary[token] for token in best.tolist()])
        return found


def first_copies(group, draws, filler, vectors) -> tuple[list[str], int]:
    """Make the first copy of each sentence, one after the other; return them with the words that the model was asked for."""
    copies, asked = [], 0
    for words, numbers in zip(group, draws, strict=True):
        copy = algorithm_1(words, numbers[0], filler, vectors)
        candidates = None
        while True:
            try:
                question = copy.send(candidates)
            except StopIteration as end:
                copies.append(end.value)
                break
            (candidates,) = filler.answer([question])
            asked += 1
    return copies, asked


def one_round(texts, model, tokenizer, vectors, settings, seed) -> dict:
    """Time both on the same sentences; one at a time makes only the first of the copies, which is as long as any."""
    # The words that the model replaces: counted from the draws, which are the same as in augment.
    generator = torch.Generator().manual_seed(seed)
    slow, count = OneAtATime(model, tokenizer, settings), 0
    group = [split_words(tokenizer, text) for text in texts]
    shapes = [(settings.copies, len(words.names), 2) for words in group]
    draws = [torch.rand(shape, generator=generator).tolist() for shape in shapes]
    for words, own in zip(group, draws, strict=True):
        mine = [i for i, name in enumerate(words.names) if is_word(name) and slow.may_ask(words, i)]
        count += sum(numbers[i][0] < settings.probability for numbers in own for i in mine)
    started, started_cpu = time.perf_counter(), time.process_time()
    copies = augment(texts, model, tokenizer, vectors, settings, torch.Generator().manual_seed(seed))
    batched, batched_cpu = time.perf_counter() - started, time.process_time() - started_cpu
    started, started_cpu = time.perf_counter(), time.process_time()
    first, asked = first_copies(group, draws, slow, vectors)
    alone, alone_cpu = time.perf_counter() - started, time.process_time() - started_cpu
    same = sum(own[0] == copy for own, copy in zip(copies, first, strict=True)) / len(texts)
    return {
        "batched": count / batched,
        "one_at_a_time": asked / alone,
        "cpu_ratio": (count / batched_cpu) / (asked / alone_cpu),
        "same_copies": same,
    }


def main() -> None:
    """Warm up, take turns, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a masked language model")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    head = {} if args.model else {"head": "masked_lm", "generator": torch.Generator().manual_seed(0)}
    source = args.model or "minilm-l6"
    model, tokenizer = Bert.from_pretrained(source, **head), load_tokenizer(source)
    settings = AugmentSettings(copies=4)
    texts = list(datasets.load("movie_reviews")["train"]["text"])[: args.rounds * SENTENCES]
    words = sorted({name for text in texts for name in split_words(tokenizer, text).names})
    vectors = WordVectors(words, torch.randn(len(words), 50, generator=torch.Generator().manual_seed(0)))
    one_round(texts[:4], model, tokenizer, vectors, settings, 0)
    rounds = []
    for n in range(args.rounds):
        part = texts[n * SENTENCES : (n + 1) * SENTENCES]
        rounds.append(one_round(part, model, tokenizer, vectors, settings, n))
        print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
    per_second = {name: [row[name] for row in rounds] for name in ("batched", "one_at_a_time")}
    ratios = [row["batched"] / row["one_at_a_time"] for row in rounds]
    store = {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}",
        "command": "python " + " ".join(["benchmarks/augmentation.py", *sys.argv[1:]]),
        "model": args.model or "minilm-l6 with a new masked-LM head",
        "data": f"movie_reviews, {len(texts)} training sentences in {args.rounds} rounds",
        "settings": {"copies": settings.copies, "probability": settings.probability, "candidates": settings.candidates},
        "words_per_second": {name: round(statistics.median(values), 1) for name, values in per_second.items()},
        "words_masked_as_printed": round(1 / settings.probability, 2),
        "ratio_of_each_round": [round(ratio, 2) for ratio in ratios],
        "ratio_by_cpu_time": round(
            statistics.median(row["cpu_ratio"] for row in rounds), 2
        ),  # what a busy machine moves less
        "same_copies": round(statistics.mean(row["same_copies"] for row in rounds), 4),
        "ratios": {"augmentation_vs_one_at_a_time": round(statistics.median(ratios), 2)},
    }
    save(store, FILE)
    print(json.dumps(store, indent=1))


if __name__ == "__main__":
    main()
