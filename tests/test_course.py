"""What the lessons share, at small size: tiers, cached products, the headless job; the gpu tier with its true shape."""

import dataclasses
import json
from pathlib import Path

import pretend_gpu
import pytest
import sklearn.metrics
import torch
import transformers
from test_cli import LABELS, TEXTS, make_checkpoint, write_csv
from test_datasets import glue_like

from tinylib import course, datasets, distill, job, models, text
from tinylib.bert import Bert
from tinylib.errors import UserError
from tinylib.train import predict


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Put a tier with a tiny base model and a table of its own in the place of the laptop's, and an empty cache."""
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLIB_TIER", "laptop")
    base = make_checkpoint(tmp_path / "base", TEXTS)
    data = write_csv(tmp_path / "films.csv", zip(TEXTS, LABELS, strict=True))
    settings = distill.Settings(
        student="2x16", epochs_intermediate=2, epochs_prediction=2, lr_intermediate=1e-2, lr_prediction=1e-2
    )
    tier = dataclasses.replace(
        course.LAPTOP,
        base=str(base),
        data=str(data),
        teacher_epochs=4,
        teacher_lr=5e-3,
        batch_size=8,
        settings=settings,
    )
    monkeypatch.setitem(course.TIERS, "laptop", tier)
    return tier


def with_blanks(base) -> str:
    """Write the same model with a masked-LM head beside it; return the folder's name."""
    folder = base.with_name("masked")
    Bert.from_pretrained(base, head="masked_lm", generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    return str(folder)


def test_the_tier_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TINYLIB_TIER", "gpu")
    assert course.tier() is course.GPU
    monkeypatch.setenv("TINYLIB_TIER", "tpu")
    with pytest.raises(UserError, match="TINYLIB_TIER='tpu' is not one of laptop, gpu"):
        course.tier()
    monkeypatch.delenv("TINYLIB_TIER")
    assert course.tier().name == ("gpu" if torch.cuda.is_available() else "laptop")


def test_the_teacher_is_made_once_and_knows_its_history(small, monkeypatch, capsys):
    prepared = course.prepare()
    teacher = course.teacher(prepared)
    history = course.teacher_history(prepared)
    assert len(history.losses["loss"]) == 4 * -(-len(prepared.labels["train"]) // 8)
    assert len(history.measured) == 4
    assert course.score(teacher, prepared) > 0.8
    monkeypatch.setattr(course, "fine_tune", None)  # the second time nothing is trained
    again = course.teacher(prepared)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))


def test_the_student_is_kept_by_its_settings(small, monkeypatch):
    prepared = course.prepare()
    student = course.student(prepared)
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_size == 16
    kinds = [product["kind"] if isinstance(product, dict) else product.kind for product in models.products()]
    assert sorted(kinds) == ["student", "teacher", "teacher-logits"]
    monkeypatch.setattr(distill, "distill", None)
    course.student(prepared)


def test_a_student_that_a_lesson_made_is_found_and_not_made_again(small, monkeypatch):
    prepared = course.prepare()
    teacher = course.teacher(prepared)
    made = distill.distill(teacher, prepared.examples("train"), small.settings).student
    course.keep_student(made, prepared, small.settings)
    monkeypatch.setattr(distill, "distill", None)
    found = course.student(prepared)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), made.parameters(), strict=True))


def test_models_enter_the_ledger_of_the_tiers_data(small):
    row = {"name": "a", "accuracy": 0.5, "parameters": 1, "megabytes": 1.0, "milliseconds": 1.0}
    course.enter([row], "09")
    course.enter([row | {"name": "b"}], "00", data="other")
    own, behind = course.entered()
    assert [r["name"] for r in own] == ["a"]
    assert behind == []


def test_recoded_texts_keep_their_rows_and_labels(small):
    prepared = course.prepare()
    tokenizer = text.load_tokenizer(small.base)
    again = course.recode(prepared, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(again.encoded["test"].ids, prepared.encoded["test"].ids, strict=True))
    shorter = course.recode(prepared, tokenizer, max_length=4)
    assert max(map(len, shorter.encoded["train"].ids)) == 4
    assert max(map(len, course.recode(shorter, tokenizer).encoded["train"].ids)) == 4, "where they were cut before"
    assert len(shorter.examples("train")) == len(prepared.examples("train"))


def test_another_seed_or_setting_has_another_folder(small):
    prepared = course.prepare()
    first = course.run_folder("x", small.settings, prepared)
    assert first == course.run_folder("x", small.settings, prepared)
    assert first != course.run_folder("x", dataclasses.replace(small.settings, seed=1), prepared)
    assert first != course.run_folder(
        "x", dataclasses.replace(small.settings, weights=distill.Weights(hidden=0)), prepared
    )


def test_a_tier_that_no_general_student_is_shipped_for_has_a_key_of_its_own(small):
    shipped = course.general.fingerprint("4x312", "minilm-l6")
    assert len(shipped) == 64
    assert course.general.fingerprint("4x312", "bert-base-uncased") is None
    assert course.general.fingerprint("2x16", "minilm-l6") is None
    settings = dataclasses.replace(small.settings, start="general")
    assert course.recipe(course.prepare(), settings)["general"] == "states", "which is where such a student starts"


def test_texts_cut_elsewhere_have_another_teacher_and_another_folder(small, monkeypatch):
    keys = []
    monkeypatch.setattr(course.models, "product", lambda kind, recipe, make: keys.append(recipe) or Path())
    usual = course.prepare()
    for prepared in (usual, course.prepare(max_length=8), course.recode(usual, text.load_tokenizer(small.base), 8)):
        course._teacher_folder(prepared, 0)
    assert [key["max_length"] for key in keys] == [64, 8, 8]
    folders = [course.run_folder("x", small.settings, own) for own in (usual, course.prepare(max_length=8))]
    assert folders[0] != folders[1]


def test_another_general_student_or_masked_lm_has_another_folder(small, monkeypatch):
    prepared = course.prepare()
    keys = {}
    for made in ("one", "two"):
        monkeypatch.setattr(course.general, "fingerprint", lambda shape, base, made=made: made)
        monkeypatch.setattr(course.mlm, "fingerprint", lambda base, made=made: made)
        for start, copies in (("general", 0), ("teacher", 1), ("teacher", 0)):
            settings = small.settings.replace(start=start, augment=copies)
            keys.setdefault((start, copies), set()).add(course.run_folder("x", settings, prepared))
    assert {chosen: len(folders) for chosen, folders in keys.items()} == {
        ("general", 0): 2, ("teacher", 1): 2, ("teacher", 0): 1,
    }  # fmt: skip


def test_the_job_writes_models_table_and_figure(small, tmp_path, capsys):
    assert job.main(["--out", str(tmp_path / "out")]) == 0
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in stored["models"]] == ["teacher", "student", "student, 50% pruned"]
    for name in ("teacher", "student"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name)
    assert (tmp_path / "out" / "trade_off.png").stat().st_size > 10_000
    assert "| teacher |" in capsys.readouterr().out


def test_the_gpu_tier_runs_with_bert_base_and_glue_shaped_files(tmp_path, monkeypatch):
    """The gpu tier's own settings, one epoch a step: 12 layers of 768 → 4 of 312 on sentence pairs as GLUE names them.

    Beside a GPU that is played (``pretend_gpu``), which refuses what was left on the CPU.
    """
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLIB_TIER", "gpu")
    tiny = make_checkpoint(tmp_path / "tokenizer", TEXTS)
    config = transformers.BertConfig(vocab_size=json.loads((tiny / "config.json").read_text())["vocab_size"])
    base = tmp_path / "bert-base"
    transformers.BertForMaskedLM(config).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    for split, rows in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20))):
        (tmp_path / "glue").mkdir(exist_ok=True)
        write_csv(
            tmp_path / "glue" / f"{split}.csv",
            [(TEXTS[i], TEXTS[-1 - i], i % 2) for i in rows],
            ("text", "text_pair", "label"),
        )
    settings = dataclasses.replace(course.GPU.settings, epochs_intermediate=1, epochs_prediction=1, augment=2)
    tier = dataclasses.replace(
        course.GPU, base=str(base), data=str(tmp_path / "glue"), teacher_epochs=1, settings=settings, masked_lm=str(base)
    )
    monkeypatch.setitem(course.TIERS, "gpu", tier)
    with pretend_gpu.present():
        prepared = course.prepare()
        student = course.student(prepared)
        teacher = course.teacher(prepared)
        assert {parameter.device.type for model in (student, teacher) for parameter in model.parameters()} == {"cuda"}
    assert (teacher.config.num_hidden_layers, teacher.config.hidden_size) == (12, 768)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (4, 312)
    assert distill.LayerMap.uniform(12, 4) == (3, 6, 9, 12)


@pytest.mark.parametrize(
    ("task", "metric"), [("cola", "matthews"), ("mrpc", "f1"), ("mnli", "accuracy"), ("sst2", "accuracy")]
)
def test_the_tasks_of_glue_are_judged_as_glue_does_at_the_paper_s_lengths(task, metric, small, monkeypatch):
    monkeypatch.setattr(datasets.hf, "load_dataset", lambda *args, **more: glue_like(task))
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    monkeypatch.setenv("TINYLIB_TIER", "gpu")
    monkeypatch.setitem(course.TIERS, "gpu", dataclasses.replace(course.GPU, base=str(small.base), teacher_epochs=1))
    prepared = course.prepare(f"glue/{task}")
    cut_to: list[int] = []
    monkeypatch.setattr(course, "encode", lambda *args, max_length: cut_to.append(max_length) or text.encode(*args, max_length))
    course.prepare(f"glue/{task}")
    assert set(cut_to) == {64 if task in ("cola", "sst2") else 128}
    teacher = course.teacher(prepared)
    said = predict(teacher, prepared.encoded["test"]).argmax(-1)
    truth = prepared.labels["test"]
    judges = {
        "matthews": sklearn.metrics.matthews_corrcoef, "f1": sklearn.metrics.f1_score, "accuracy": sklearn.metrics.accuracy_score,
    }  # fmt: skip
    assert course.score(teacher, prepared) == pytest.approx(judges[metric](truth, said))


@pytest.mark.parametrize(
    ("data", "copies", "epochs"),
    [
        ("glue/cola", 30, 50), ("glue/mnli", 10, 10), ("glue/mnli_mismatched", 10, 10), ("glue/sst2", 20, 20),
        ("glue/qnli", 20, 10), ("glue/stsb", 30, 20), ("films.csv", 0, 20),
    ],
)
def test_a_gpu_takes_the_paper_s_settings_for_each_task(data, copies, epochs, monkeypatch):
    monkeypatch.setenv("TINYLIB_TIER", "gpu")
    settings = course.settings_for(data)
    assert (settings.augment, settings.epochs_intermediate, settings.epochs_prediction) == (copies, epochs, 3)
    monkeypatch.setenv("TINYLIB_TIER", "laptop")
    assert course.settings_for(data) == course.LAPTOP.settings


def test_augmented_copies_are_made_once_and_stand_behind_the_texts(small, monkeypatch):
    tier = dataclasses.replace(small, masked_lm=with_blanks(Path(small.base)))
    monkeypatch.setitem(course.TIERS, "laptop", tier)
    prepared = course.prepare()
    rows = len(prepared.labels["train"])
    both = course.augmented(prepared, 2)
    assert len(both) == 3 * rows
    assert all(torch.equal(a, b) for a, b in zip(both.encoded.ids, prepared.encoded["train"].ids, strict=False))
    assert torch.equal(both.labels[rows:], prepared.labels["train"].repeat_interleave(2)), "two copies a text, in order"
    changed = sum(
        not torch.equal(both.encoded.ids[rows + 2 * i + c], both.encoded.ids[i]) for i in range(rows) for c in (0, 1)
    )
    assert changed > rows, "p_t = 0.4 changes nearly every copy"
    monkeypatch.setattr(course.augment, "augment", None)  # from now on they come from the cache
    again = course.augmented(prepared, 2)
    assert all(torch.equal(a, b) for a, b in zip(both.encoded.ids, again.encoded.ids, strict=True))
    assert len(course.augmented(prepared, 0)) == rows
    short = course.prepare(max_length=5)
    assert max(map(len, course.augmented(short, 2).encoded.ids)) == 5, "copies are cut where the texts are"
    with pytest.raises(TypeError):  # another seed, other copies
        course.augmented(prepared, 2, seed=1)


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_augmentation_that_was_killed_goes_on_to_the_same_copies(tmp_path, monkeypatch, small, pairs):
    table = tmp_path / "some.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    if pairs:
        rows = [row | {"text_pair": f"{row['text']} indeed"} for row in rows]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tier = dataclasses.replace(small, masked_lm=with_blanks(Path(small.base)), data=str(table))
    monkeypatch.setitem(course.TIERS, "laptop", tier)
    monkeypatch.setattr(course, "PART", 5)
    prepared, real, asked = course.prepare(), course.augment.augment, []
    count = -(-len(prepared.labels["train"]) // 5) * (1 + pairs)

    def killed(texts, *args, **more):
        asked.append(len(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(texts, *args, **more)

    monkeypatch.setattr(course.augment, "augment", killed)
    with pytest.raises(KeyboardInterrupt):
        course.augmented(prepared, 2)
    again = course.augmented(prepared, 2)
    assert count >= 4
    assert len(asked) == count + 1, "what was made before the kill is not made again"
    assert {product.kind for product in models.products()} >= {"augmented"}
    assert "augmented-part" not in {product.kind for product in models.products()}, "nothing is left behind"
    monkeypatch.setattr(course.augment, "augment", real)
    monkeypatch.setattr(course, "PART", 10_000)
    (folder,) = {models.cache_folder() / "products" / p.kind / p.key for p in models.products() if p.kind == "augmented"}
    models.take_away(folder)
    whole = course.augmented(prepared, 2)
    assert all(torch.equal(a, b) for a, b in zip(again.encoded.ids, whole.encoded.ids, strict=True))


def test_copies_of_pairs_keep_both_sides(tmp_path, monkeypatch, small):
    pairs = [(f"{text} indeed", text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
    table = tmp_path / "pairs.jsonl"
    rows = [{"text": a, "text_pair": b, "label": c} for a, b, c in pairs]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tier = dataclasses.replace(small, masked_lm=with_blanks(Path(small.base)), data=str(table))
    monkeypatch.setitem(course.TIERS, "laptop", tier)
    prepared = course.prepare()
    both = course.augmented(prepared, 1)
    assert len(both) == 2 * len(prepared.labels["train"])
    assert all(set(segment.tolist()) == {0, 1} for segment in both.encoded.segments), "two texts in each row"
