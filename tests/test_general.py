"""General distillation: the same weights after a kill, losses that fall, what is saved and loaded, and its errors."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from test_cli import CHILD, TEXTS, make_checkpoint, wait_until

from tinylib import cli, corpus, general, layers, models, output
from tinylib.bert import Bert
from tinylib.encoders import Encoder
from tinylib.errors import UserError
from tinylib.student import FEW, new_student, states_basis

SETTINGS = general.Settings(
    student="2x16", steps=12, batch_size=4, lr=5e-3, max_length=24, dropout=0.1, measure_every=5, validation=8
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with a random pretrained teacher and a small corpus of 100 documents."""
    folder = tmp_path_factory.mktemp("general")
    make_checkpoint(folder / "base", TEXTS)
    documents = ["\n".join(TEXTS[(d + s) % len(TEXTS)] for s in range(1 + d % 4)) for d in range(100)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Give the module a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLIB_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def teacher(place):
    return Bert.from_pretrained(place / "base")


@pytest.fixture(scope="module")
def parts(place, cache):
    return corpus.load(place / "text.txt", place / "base", max_length=24)


@pytest.fixture(scope="module")
def result(place, parts):
    return general.distill_general(Bert.from_pretrained(place / "base"), parts, SETTINGS)


@pytest.fixture(scope="module")
def saved(place, result):
    """Give the folder of a general student."""
    teacher = Bert.from_pretrained(place / "base")
    card = general.card_of(result, SETTINGS, "base", str(place / "text.txt"), 1234, "a test", "tinylib general")
    (place / "student").mkdir()
    general.save(result, teacher, place / "student", card)
    return place / "student"


def same(one: general.Result, two: general.Result) -> bool:
    pairs = ((one.student, two.student), (one.projections, two.projections))
    return all(torch.equal(tensor, b.state_dict()[name]) for a, b in pairs for name, tensor in a.state_dict().items())


def test_a_masked_lm_teaches_without_its_head_and_twice_the_same(place, parts, tmp_path, monkeypatch):
    """Its logits over the vocabulary are read by no loss, and its student has no pooler to save."""
    config = Bert.from_pretrained(place / "base").config.replace(head="masked_lm")
    teacher = Bert(config, torch.Generator().manual_seed(0)).eval()
    teacher.tokenizer_folder = place / "base"
    monkeypatch.setattr(Bert, "token_logits", lambda *_: pytest.fail("the head was run"))
    for name in ("one", "two"):
        torch.rand(1)  # the global generator goes on
        result = general.distill_general(teacher, parts, SETTINGS)
        card = general.card_of(result, SETTINGS, "base", str(place / "text.txt"), 1234, "a test", "tinylib general")
        general.save(result, teacher, tmp_path / name, card)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_the_card_tells_licence_size_and_latency(saved):
    told, page = general.card(saved), (saved / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(page.split("---\n")[1])
    assert (front["license"], front["pipeline_tag"]) == ("unknown", "feature-extraction")
    assert "base_model" not in front, "a folder is nothing on the hub"
    assert told["bytes"] == (saved / "model.safetensors").stat().st_size
    assert told["parameters"] == sum(t.numel() for t in load_file(saved / "model.safetensors").values())
    assert told["latency"]["tokens"] == 32
    assert f"| file | {told['bytes']:,} bytes |" in page
    assert f"{told['latency']['median_ms']:.2f} ms" in page
    assert "unknown: see the model that it was made of, base." in page


# What it learns


def test_every_loss_falls_on_held_out_text(teacher, parts):
    told = general.distill_general(teacher, parts, SETTINGS.replace(steps=100, measure_every=1)).history.measured
    names = set(told[0]) - {"step"}
    assert names == {"embedding 0", *(f"{kind} {m}" for kind in ("hidden", "attention") for m in (1, 2))}
    assert {name for name in names if told[-1][name] > 0.8 * told[0][name]} == set()


def test_the_losses_are_measured_every_so_many_steps_and_at_the_end(result):
    assert [row["step"] for row in result.history.measured] == [5, 10, 12]
    assert len(result.history.losses["loss"]) == 12
    assert set(result.history.losses) == {"embedding", "hidden", "attention", "loss"}, "no prediction loss"


def test_the_validation_losses_are_means_over_tokens(teacher, parts):
    settings = SETTINGS.replace(batch_size=2, validation=3)
    shape = layers.student_config(teacher, "2x16")
    pair = layers.Distiller(
        new_student(teacher, shape, (1, 2), "teacher").eval(), layers.first_projections(teacher, shape, "teacher", 0)
    )
    layer_map = layers.LayerMap((1, 2))
    found = general.validation_losses(teacher, pair, parts["validation"], layer_map, settings)
    sums, tokens = {}, 0
    for row in range(3):  # one by one, without padding
        batch = parts["validation"].spread(3).collate([row])
        n = batch["ids"].shape[1]
        tokens += n
        for (name, m), value in layers.matching_loss(teacher, layer_map, layers.Weights(), by_layer=True)(
            pair, batch
        ).items():
            sums[f"{name} {m}"] = sums.get(f"{name} {m}", 0.0) + n * value.item()
    for name in ("embedding 0", "hidden 1", "hidden 2"):
        assert found[name] == pytest.approx(sums[name] / tokens, rel=1e-4)
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_the_teacher_is_not_changed_and_gets_no_gradient(teacher, parts):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    general.distill_general(teacher, parts, SETTINGS.replace(steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_two_runs_with_one_seed_agree_and_with_another_do_not(teacher, parts, result):
    assert same(result, general.distill_general(teacher, parts, SETTINGS))
    assert not same(result, general.distill_general(teacher, parts, SETTINGS.replace(seed=1)))


def test_more_steps_than_the_corpus_has_batches(teacher, parts):
    batches = -(-len(parts["train"]) // 16)
    history = general.distill_general(
        teacher, parts, SETTINGS.replace(batch_size=16, steps=2 * batches + 1, measure_every=1000)
    ).history
    assert len(history.losses["loss"]) == 2 * batches + 1
    assert [row["step"] for row in history.measured] == [2 * batches + 1]


# Kill and resume


class Killed(Exception):
    """Stands for whatever ends a process."""


def run_killed_at(step: int, teacher, parts, checkpoint, every: int, monkeypatch) -> None:
    """Run until the losses of this step (from 1) are asked for, and end there."""
    original, calls = layers.intermediate_losses, []

    def dies(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "intermediate_losses", dies)
        with pytest.raises(Killed):
            general.distill_general(teacher, parts, SETTINGS, checkpoint=checkpoint, checkpoint_every=every)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("step", range(1, 13))
def test_killed_in_any_step_it_resumes_to_the_same_weights(teacher, parts, result, tmp_path, monkeypatch, step, every):
    file = tmp_path / "run.safetensors"
    run_killed_at(step, teacher, parts, file, every, monkeypatch)
    assert file.exists() == (step > every)
    again = general.distill_general(teacher, parts, SETTINGS, checkpoint=file, checkpoint_every=every)
    assert same(again, result)
    assert again.history.measured == result.history.measured
    assert again.history.losses == result.history.losses


def test_killed_twice_and_while_writing_it_resumes_to_the_same_weights(teacher, parts, result, tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    run_killed_at(6, teacher, parts, file, 2, monkeypatch)
    run_killed_at(4, teacher, parts, file, 2, monkeypatch)  # the fourth step of what is left
    half = file.read_bytes()
    file.with_suffix(".12345.tmp").write_bytes(half[: len(half) // 2])  # a checkpoint that was being written
    assert same(general.distill_general(teacher, parts, SETTINGS, checkpoint=file, checkpoint_every=2), result)


def test_a_finished_run_is_not_run_again(teacher, parts, result, tmp_path):
    file = tmp_path / "run.safetensors"
    general.distill_general(teacher, parts, SETTINGS, checkpoint=file)
    again = general.distill_general(teacher, parts, SETTINGS, checkpoint=file)
    assert same(again, result)
    assert again.history.losses == result.history.losses
    assert again.history.measured == result.history.measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_command_that_got_sigkill_resumes_to_the_same_weights(place, tmp_path, capsys):
    options = ["--teacher", f"{place}/base", "--corpus", f"{place}/text.txt", "--student", "2x16", "--max-length", "24"]
    options += ["--steps", "400", "--batch-size", "4", "--measure-every", "100", "--checkpoint-every", "20", "--out"]
    start = {"cwd": ROOT, "env": CHILD, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    line = [sys.executable, "-m", "tinylib", "general", *options]
    whole, killed = (subprocess.Popen([*line, f"{tmp_path}/{name}"], **start) for name in ("whole", "out"))
    wait_until((tmp_path / ".out.unfinished" / output.CHECKPOINTS / "general.safetensors").exists, killed)
    time.sleep(0.05)  # somewhere between two checkpoints, or in the middle of one
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it had ended by itself"
    assert not (tmp_path / "out").exists()
    assert cli.main(["general", *options, f"{tmp_path}/out"]) == 2
    assert "--resume" in capsys.readouterr().err
    done = subprocess.run([*line, f"{tmp_path}/out", "--resume"], **start)
    assert done.returncode == 0, done.stdout
    whole.communicate()
    assert whole.returncode == 0
    for name in ("model.safetensors", general.PROJECTIONS):
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "out" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    cards = [general.card(tmp_path / name)["validation"] for name in ("whole", "out")]
    assert cards[0] == cards[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


# What is saved and loaded


def test_a_card_says_what_made_the_student(saved, place, result, teacher):
    card = general.card(saved)
    assert card["settings"]["steps"] == 12
    assert card["settings"]["weights"]["attention_on"] == "scores"
    assert card["validation"] == result.history.measured
    assert card["corpus"] == corpus.fingerprint(place / "text.txt")
    assert card["teacher"]["hidden_size"] == teacher.config.hidden_size == 32
    assert (card["made_from"], card["corpus_tokens"], card["machine"]) == ("base", 1234, "a test")
    page = (saved / "README.md").read_text(encoding="utf-8")
    assert "    tinylib general\n" in page
    assert all(f"| {row['step']} | {row['embedding 0']:.3f} |" in page for row in card["validation"])


def test_a_student_is_stored_as_a_bare_encoder_in_float16(saved, result):
    stored = load_file(saved / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert not any(name.startswith("classifier") for name in stored)
    model = Bert.from_pretrained(saved)
    assert model.config.head is None
    assert (saved / "tokenizer.json").is_file()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(ids).hidden, result.student.eval()(ids).hidden, atol=0.05)
    maps = load_file(saved / general.PROJECTIONS)
    assert {name: tuple(t.shape) for name, t in maps.items()} == {f"{m}": (32, 16) for m in range(3)}


def task_teacher(place) -> Bert:
    return Bert.from_pretrained(
        place / "base", labels=("negative", "positive"), generator=torch.Generator().manual_seed(3)
    )


def test_a_loaded_student_reads_the_teacher_s_head_through_the_last_projection(saved, place, result):
    teacher = task_teacher(place)
    student, projections = general.load(saved, teacher)
    assert student.config.labels == ("negative", "positive")
    for linear, trained in zip(projections.maps, result.projections.maps, strict=True):
        assert torch.equal(linear.weight, trained.weight.detach().half().float())
    # the pooler's kept outputs, of a teacher whose states are the student's, projected
    keep = teacher.classifier.weight.norm(dim=0).topk(16).indices.sort().values
    states = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    wanted = teacher.pooler(projections.maps[-1](states))[:, keep]
    assert torch.allclose(student.pooler(states), wanted, atol=1e-5)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, keep])


def test_a_student_wider_than_its_teacher_begins_with_the_teacher_s_logits(place, parts, tmp_path):
    base, wide = Bert.from_pretrained(place / "base"), SETTINGS.replace(student="2x64", start="random", steps=2)
    made = general.distill_general(base, parts, wide)
    card = general.card_of(made, wide, "base", str(place / "text.txt"), 1234, "a test", "tinylib general")
    general.save(made, base, tmp_path, card)
    teacher = task_teacher(place)
    student, projections = general.load(tmp_path, teacher)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        m.classifier(torch.tanh(m.pooler(x))) for m, x in ((student, states), (teacher, projections.maps[-1](states)))
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.square().sum().backward()
    assert (student.classifier.weight.grad.abs().min(0).values > 0).all(), "all of its width can be used"


def test_a_head_that_nobody_gives_is_drawn_from_the_seed_alone(saved, place):
    """A DistilBERT of the teacher's sizes: its head has a ReLU, so the student's is a new one."""
    names, vocabulary = ("negative", "positive"), Bert.from_pretrained(place / "base").config.vocab_size
    config = transformers.DistilBertConfig(vocab_size=vocabulary, n_layers=2, n_heads=4, dim=32, hidden_dim=64)
    teacher = Encoder(transformers.DistilBertForSequenceClassification(config), names).eval()

    def heads(*generators):
        for world, generator in enumerate(generators):
            torch.manual_seed(world)  # what the caller has drawn must not matter
            student, _ = general.load(saved, teacher, *generator)
            yield torch.cat([student.pooler.weight, student.classifier.weight])

    plain, again = heads((), ())
    assert torch.equal(plain, again)
    one, same_seed, other = heads(*((torch.Generator().manual_seed(seed),) for seed in (1, 1, 2)))
    assert torch.equal(one, same_seed)
    assert not torch.equal(one, other)


def test_a_teacher_of_other_sizes_is_refused(saved, place, tmp_path):
    other = Bert.from_pretrained(make_checkpoint(tmp_path / "other", TEXTS[:3]))
    with pytest.raises(UserError, match="teacher of other sizes"):
        general.load(saved, other)


@pytest.mark.parametrize("name", [general.CARD, general.PROJECTIONS])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_folder_is_named(saved, place, tmp_path, name, how):
    folder = tmp_path / "student"
    shutil.copytree(saved, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "cut":
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="missing or damaged|is missing|is damaged") as caught:
        general.load(folder, task_teacher(place))
    assert str(folder) in str(caught.value)


def test_a_shipped_student_is_found_only_for_its_own_teacher_and_shape(saved, place, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(general, "SHIPPED", {"2x16": "general-2x16"})
    teacher = Bert.from_pretrained(place / "base")
    shape = layers.student_config(teacher, "2x16")
    assert general.shipped_for(teacher, shape) is None, "not there yet"
    shutil.copytree(saved, tmp_path / "general-2x16")
    assert general.shipped_for(teacher, shape) == tmp_path / "general-2x16"
    assert general.shipped_for(teacher, layers.student_config(teacher, "1x16")) is None
    other = Bert.from_pretrained(make_checkpoint(tmp_path / "other", TEXTS[:3]))
    assert general.shipped_for(other, shape) is None


def test_the_command_writes_student_projections_card_and_report(place, tmp_path, capsys):
    options = ["--teacher", f"{place}/base", "--corpus", f"{place}/text.txt", "--student", "2x16", "--steps", "3"]
    options += ["--batch-size", "4", "--max-length", "16", "--layer-map", "1,2", "--lr", "1e-3", "--seed", "2"]
    assert cli.main(["general", *options, "--out", f"{tmp_path}/out"]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    card = general.card(tmp_path / "out")
    assert report["steps"] == card["settings"]["steps"] == 3
    assert report["validation"] == card["validation"][-1]
    assert card["settings"]["layer_map"] == [1, 2]
    assert card["settings"]["start"] == "states"
    assert (card["settings"]["lr"], card["settings"]["seed"], card["settings"]["max_length"]) == (1e-3, 2, 16)
    general.load(tmp_path / "out", task_teacher(place))


MISTAKES = {
    "--student 2x64 --start teacher": "student width=64 is greater than the teacher's 32",
    "--layer-map 1,3": "between 1 and 2",
    "--start svd": "is not one of random, embeddings, teacher",
    "--corpus nowhere": "nowhere does not exist",
    "--max-length 2": "leaves no room",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(place, tmp_path, capsys, typed):
    options = ["general", "--teacher", f"{place}/base", "--corpus", f"{place}/text.txt", "--student", "2x16"]
    assert cli.main([*options, "--max-length", "24", *typed.split(), "--out", f"{tmp_path}/out"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert MISTAKES[typed] in said
    assert not list(tmp_path.iterdir())


def test_a_general_student_starts_at_the_states_that_the_corpus_shows(place):
    teacher = Bert.from_pretrained(place / "base")
    parts = corpus.load(place / "text.txt", place / "base", 16)
    settings = SETTINGS.replace(student="2x16", start="states", steps=1, lr=1e-12)
    texts = general.first_texts(settings, parts)
    basis = general.first_basis(teacher, settings, texts)
    some = parts["train"].spread(FEW)
    assert torch.equal(basis, states_basis(teacher, some.encoded(range(len(some))), (0, 1, 2), 16))
    result = general.distill_general(teacher, parts, settings)
    for maps in result.projections.maps:
        torch.testing.assert_close(maps.weight.detach(), basis, atol=1e-6, rtol=0)
    assert general.first_texts(settings.replace(start="teacher"), parts) is None
    assert general.first_basis(teacher, settings, None) is None
