"""The training loop: it learns, repeats by its seed, disturbs nobody's random state, and resumes bit for bit."""

import contextlib
import hashlib
import json
import os
import stat
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from tinylib import checkpoint, train
from tinylib.bert import Bert
from tinylib.config import BertConfig
from tinylib.errors import UserError
from tinylib.text import Encoded

CONFIG = BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16, head="classification", labels=("no", "yes"), initializer_range=0.2,
)  # fmt: skip


def model(seed: int = 0, **changes) -> Bert:
    return Bert(CONFIG.replace(**changes), torch.Generator().manual_seed(seed))


def examples(count: int = 48, seed: int = 0) -> train.Examples:
    """Make pairs of texts, of many lengths, whose class is their second token: 10 means yes, 11 means no."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=g).tolist()
    ids = [torch.randint(12, 30, (n,), generator=g) for n in lengths]
    labels = torch.randint(0, 2, (count,), generator=g)
    for row, label in zip(ids, labels.tolist(), strict=True):
        row[0], row[1] = 2, 11 - label
    return train.Examples(Encoded(tuple(ids), tuple((torch.arange(n) >= 2).long() for n in lengths)), labels)


def one_by_one(own: Bert, encoded: Encoded) -> torch.Tensor:
    """Return the logits of each text alone, without padding."""
    with torch.no_grad():
        rows = [own(ids[None], segments=segments[None]).logits for ids, segments in zip(encoded.ids, encoded.segments, strict=True)]
    return torch.cat(rows)


def run(own: Bert, epochs: int = 2, **options) -> train.History:
    settings = {"lr": 5e-3, "seed": 3} | options
    batches = train.loader(examples(), batch_size=8, seed=5)  # 6 steps an epoch
    return train.fit(own, batches, train.classification_loss, epochs=epochs, **settings)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_labels_may_be_of_any_type_of_whole_number():
    encoded = examples(4).encoded
    for labels in (torch.tensor([0, 1, 1, 0], dtype=torch.int32), torch.tensor([False, True, True, False]), [0, 1, 1, 0]):
        assert train.Examples(encoded, labels).labels.tolist() == [0, 1, 1, 0]
        assert train.Examples(encoded, labels).labels.dtype == torch.long
    assert train.Examples(encoded, torch.tensor([0.5, 1.0, 2.0, 3.0])).labels.dtype == torch.float32


# Learning


@pytest.mark.parametrize("what", ["gradients that lie there", "a launcher's accumulation", "a GPU of Apple's"])
def test_what_stands_around_a_run_does_not_change_it(monkeypatch, what):
    plain, other = model(), model()
    run(plain)
    if what == "gradients that lie there":
        sum(parameter.sum() for parameter in other.parameters()).backward()
    elif what == "a launcher's accumulation":
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    else:
        monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_, **__: True)
    run(other)
    assert same(plain, other)


def test_fit_lowers_the_loss_and_learns_the_rule():
    own = model()
    history = run(own, epochs=12)
    assert history.losses["loss"] == history.losses["labels"]
    assert len(history.losses["loss"]) == 12 * 6
    assert sum(history.losses["loss"][-6:]) < 0.5 * sum(history.losses["loss"][:6])
    fresh = examples(seed=9)
    told = train.predict(own, fresh.encoded).argmax(-1)
    assert (told == fresh.labels).float().mean() > 0.9
    assert not own.training
    assert history.seconds > 0


def test_the_loss_of_a_batch_is_that_of_its_texts_one_by_one():
    own, data = model().eval(), examples(8)
    wanted = nn.functional.cross_entropy(one_by_one(own, data.encoded), data.labels)
    torch.testing.assert_close(train.classification_loss(own, data.collate(list(range(8)))), {"labels": wanted})


def test_the_history_smooths_over_a_window():
    history = train.History({"loss": [1.0, 2.0, 3.0, 6.0]})
    assert history.smooth(window=2) == [1.5, 2.5, 4.5]
    assert history.smooth(window=100) == [3.0]


def test_the_sum_of_the_losses_is_what_is_minimised():
    def two(own, batch):
        loss = train.classification_loss(own, batch)["labels"]
        return {"half": 0.5 * loss, "rest": 0.5 * loss}

    whole, halves = model(), model()
    run(whole)
    batches = train.loader(examples(), batch_size=8, seed=5)
    history = train.fit(halves, batches, two, epochs=2, lr=5e-3, seed=3)
    assert set(history.losses) == {"half", "rest", "loss"}
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_hooks_see_every_step_and_epoch():
    steps, epochs = [], []
    history = run(
        model(),
        after_step=lambda own, step: steps.append(step),
        after_epoch=lambda own, epoch: epochs.append((epoch, own.training)) or {"epoch": epoch},
    )
    assert steps == list(range(1, 13))
    assert epochs == [(0, False), (1, False)], "what is measured is measured without dropout"
    assert history.measured == [{"epoch": 0}, {"epoch": 1}]


# Randomness


def test_the_seed_decides_the_run():
    first, again, other = model(), model(), model()
    run(first)
    run(again)
    run(other, seed=4)
    assert same(first, again)
    assert not same(first, other), "another seed draws another dropout"


def test_the_order_of_the_data_changes_from_epoch_to_epoch():
    seen = []

    def watch(own, batch):
        seen.append(batch["rows"].tolist())
        return train.classification_loss(own, batch)

    train.fit(model(), train.loader(examples(), batch_size=8, seed=5), watch, epochs=3, lr=1e-3)
    epochs = [seen[:6], seen[6:12], seen[12:]]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_global_random_state_neither_matters_nor_changes():
    one, two = model(), model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(one)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    run(two)
    assert same(one, two)


def test_the_global_random_state_is_restored_after_a_failure():
    own, before = model(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        run(own, after_step=lambda own, step: 1 / 0)
    assert torch.equal(torch.get_rng_state(), before)


# Optimiser and schedule


@pytest.mark.parametrize(
    ("steps", "warmup", "shares"),
    [
        (10, 0.0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        (10, 0.2, [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
        (4, 0.5, [0.0, 0.5, 1.0, 0.5, 0.0]),
        (4, 0.1, [1.0, 0.75, 0.5, 0.25, 0.0]),  # a tenth of four steps is none
    ],
)
def test_the_rate_rises_over_the_warm_up_and_falls_to_zero(steps, warmup, shares):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = train.linear_schedule(optimizer, steps, warmup)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4 * share for share in shares])


def test_matrices_decay_and_vectors_do_not():
    own = model()
    own.pooler.weight.requires_grad_(False)
    decayed, plain = train.adamw(own, lr=1e-3, weight_decay=0.05).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(weight.ndim > 1 for weight in decayed["params"])
    assert all(weight.ndim == 1 for weight in plain["params"])
    held = {id(weight) for group in (decayed, plain) for weight in group["params"]}
    assert held == {id(weight) for weight in own.parameters() if weight.requires_grad}


def test_a_step_is_adamw_s_own():
    # the oracle: torch's AdamW without a schedule, on the same gradient, clipped the same way
    ours, theirs = (model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in range(2))
    data = examples(8)
    batches = train.loader(data, batch_size=8, shuffle=False)
    train.fit(ours, batches, train.classification_loss, epochs=1, lr=1e-3, warmup=0.0, clip=0.1)
    train.classification_loss(theirs.train(), next(iter(batches)))["labels"].backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim > 1) == many] for many in (True, False))
    torch.optim.AdamW(matrices, lr=1e-3, weight_decay=0.01).step()
    torch.optim.AdamW(vectors, lr=1e-3, weight_decay=0.0).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_steps_are_those_of_a_plain_loop_and_the_history_holds_its_losses():
    # several steps: a gradient that is left over from the last one shows only in the next
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, theirs = model(**quiet), model(**quiet)
    batches = train.loader(examples(), batch_size=8, shuffle=False)
    history = train.fit(ours, batches, train.classification_loss, epochs=2, lr=5e-3, warmup=0.0, clip=1.0)
    optimizer, seen = train.adamw(theirs.train(), 5e-3), []
    for step, batch in enumerate([*batches, *batches]):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 12)
        loss = train.classification_loss(theirs, batch)["labels"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    assert history.losses["loss"] == pytest.approx(seen, abs=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_parts_of_a_batch_are_its_rows_each_trimmed_to_its_own_longest_text():
    data = examples()
    rows = torch.argsort(data.lengths).tolist()
    batch = data.collate([*rows[:4], *rows[-4:]])  # the short ones first
    assert train._split(batch, 1)[0] is batch
    short, long = train._split(batch, 2)
    assert short["rows"].tolist() + long["rows"].tolist() == batch["rows"].tolist()
    assert short["ids"].shape == short["mask"].shape == (4, int(data.lengths[rows[:4]].max()))
    assert short["ids"].shape[1] < long["ids"].shape[1] == batch["ids"].shape[1]
    assert torch.equal(short["ids"], batch["ids"][:4, : short["ids"].shape[1]])
    assert torch.equal(torch.cat([short["labels"], long["labels"]]), batch["labels"])


def test_the_end_of_a_run_takes_no_checkpoint_away_before_the_last_one_is_there(tmp_path, monkeypatch):
    own = model()
    optimizer = train.adamw(own, 1e-3)
    kept = checkpoint.Checkpoint(
        tmp_path / "run.safetensors", own, optimizer, train.linear_schedule(optimizer, 9, 0.1), train.History()
    )
    kept.save(3)
    kept.save(5)

    def fail(*_):
        raise OSError("the power went")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.os, "replace", fail)
        with pytest.raises(UserError, match="cannot be written"):
            kept.save(9, finished=True)
    assert kept.load() == 5
    kept.save(9, finished=True)
    assert kept.load() == 9
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_what_is_frozen_stays():
    own = model()
    own.embeddings.requires_grad_(False)
    before = own.embeddings.word.weight.clone()
    run(own, epochs=1)
    assert torch.equal(own.embeddings.word.weight, before)


def test_no_epochs_change_nothing():
    own = model()
    assert run(own, epochs=0).losses == {}
    assert same(own, model())


# Checkpoints


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_at(last: int):
    def after_step(own, step):
        if step == last:
            raise Killed

    return after_step


def measure(own, epoch) -> dict[str, float]:
    return {"validation": round(float(train.predict(own, examples().encoded).sum()), 4)}


@pytest.mark.parametrize(
    ("kill", "every"),
    [(1, 1), (5, 4), (6, 4), (7, 4), (13, 5), (18, 200)],
    ids=["at once", "in an epoch", "before an epoch's end", "after it", "later", "between epochs only"],
)
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, kill, every):
    whole, resumed = model(), model()
    told = run(whole, epochs=3, after_epoch=measure)
    file = tmp_path / "run.safetensors"
    options = {"epochs": 3, "checkpoint": file, "checkpoint_every": every, "after_epoch": measure}
    with pytest.raises(Killed):
        run(model(), **options, after_step=killed_at(kill))
    again = run(resumed, **options)
    assert same(whole, resumed)
    assert again.losses == told.losses
    assert again.measured == told.measured
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_run_killed_twice_ends_in_the_same_weights(tmp_path):
    whole, resumed = model(), model()
    run(whole, epochs=3)
    options = {"epochs": 3, "checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 2}
    for kill in (5, 11):
        with pytest.raises(Killed):
            run(model(), **options, after_step=killed_at(kill))
    steps = []
    run(resumed, **options, after_step=lambda own, step: steps.append(step))
    assert steps == list(range(11, 19)), "it goes on from step 10, the last one saved"
    assert same(whole, resumed)


def test_a_finished_run_is_not_run_again(tmp_path):
    own, again = model(), model()
    options = {"checkpoint": tmp_path / "run.safetensors", "after_epoch": measure}
    told = run(own, **options)
    found = run(again, **options, after_step=killed_at(1))
    assert (found.losses, found.measured) == (told.losses, told.measured)
    assert found.seconds > 0.5 * told.seconds, "the first run's time is not forgotten"
    assert same(own, again)
    kept = load_file(tmp_path / "run.safetensors")
    assert not any(name.startswith("optimizer.") for name in kept), "AdamW's moments are needed no more"


def test_a_checkpoint_draws_no_random_numbers(tmp_path):
    plain, saved = model(), model()
    run(plain)
    run(saved, checkpoint=tmp_path / "run.safetensors", checkpoint_every=1)
    assert same(plain, saved)


@pytest.mark.parametrize(
    ("plan", "told"),
    [({"epochs": 4}, "24 steps, 6"), ({"steps": 9}, "9 steps, 6"), ({"rows": 40}, "15 steps, 5")],
    ids=["epochs", "steps", "batches"],
)
def test_a_checkpoint_of_another_plan_is_a_sentence(tmp_path, plan, told):
    file = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        run(model(), epochs=3, checkpoint=file, checkpoint_every=2, after_step=killed_at(5))
    before, rows = file.read_bytes(), plan.get("rows", 48)
    plan = {name: value for name, value in plan.items() if name != "rows"}  # a copy: the parameters are those of every run
    with pytest.raises(UserError) as caught:
        train.fit(
            model(), train.loader(examples(rows), 8, seed=5), train.classification_loss, lr=5e-3, seed=3, checkpoint=file,
            **{"epochs": 3} | plan,
        )  # fmt: skip
    assert f"the checkpoint {file} is of a run of 18 steps, 6 steps an epoch, not of {told} steps an epoch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_a_checkpoint_from_before_plans_were_kept_is_taken(tmp_path):
    file, whole, resumed = tmp_path / "run.safetensors", model(), model()
    options = {"epochs": 3, "checkpoint": file, "checkpoint_every": 2}
    with pytest.raises(Killed):
        run(model(), **options, after_step=killed_at(5))
    with safe_open(file, framework="pt") as stored:
        told = stored.metadata()
    tensors = {name: t.clone() for name, t in load_file(file).items()}  # no longer mapped from what is written anew
    said = json.loads(told["run"])
    assert said.pop("plan") == {"steps": 18, "steps an epoch": 6}
    told["run"] = json.dumps(said)
    save_file(tensors, file, metadata=told | {"sha256_run": hashlib.sha256(told["run"].encode()).hexdigest()})
    run(whole, epochs=3)
    run(resumed, **options)
    assert same(whole, resumed)


def checkpoint_of(file, **changes) -> None:
    run(model(**changes), epochs=1, checkpoint=file)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbled(file):
    file.write_bytes(b"no checkpoint")


def empty(file):
    file.write_bytes(b"")


def of_another_model(file):
    file.unlink()
    checkpoint_of(file, hidden_size=24)


def without_a_run(file):
    save_file({"model.x": torch.zeros(1)}, file)


def without_its_step(file):
    save_file(
        {f"model.{n}": t for n, t in model().state_dict().items()} | {"random": torch.get_rng_state()},
        file,
        metadata={"run": json.dumps({"losses": {}})},
    )


@pytest.mark.parametrize("harm", [cut, garbled, empty, of_another_model, without_a_run, without_its_step])
def test_a_damaged_checkpoint_is_a_sentence(tmp_path, harm):
    file = tmp_path / "run.safetensors"
    checkpoint_of(file)
    harm(file)
    with pytest.raises(UserError) as caught:
        run(model(), checkpoint=file)
    sentence = str(caught.value)
    assert f"the checkpoint {file} is damaged or of another model" in sentence
    assert "delete it and start again" in sentence
    assert "\n" not in sentence


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"run\.safetensors cannot be written .*free some space"):
        run(model(), checkpoint=tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_file_goes_with_the_next_save_once_it_is_old(tmp_path):
    old, fresh, other = (tmp_path / name for name in ("run.1.tmp", "run.2.tmp", "another.3.tmp"))
    for half in (old, fresh, other):
        half.write_bytes(b"half")
    for half in (old, other):
        os.utime(half, (time.time() - 7200,) * 2)
    run(model(), epochs=1, checkpoint=tmp_path / "run.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run.safetensors", "run.2.tmp", "another.3.tmp"}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replace, sync = [], os.replace, checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (done.append(path.suffix), sync(path)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    run(model(), epochs=1, checkpoint=tmp_path / "run.safetensors")
    assert done == [".tmp", "renamed", ""], "the file, its name, the folder"


def test_a_file_system_that_syncs_no_folders_ends_no_run(tmp_path, monkeypatch):
    sync, refused = os.fsync, []

    def files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", files_only)
    run(model(), epochs=1, checkpoint=tmp_path / "run.safetensors")
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


# Mistakes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_with_a_sentence(value):
    calls = []

    def loss(own, batch):
        calls.append(1)
        good = train.classification_loss(own, batch)["labels"]
        return {"labels": good + value if len(calls) == 8 else good}

    says = rf"recovering: the loss is {value} at step 7 of epoch 1; lower lr=0\.005"
    batches = train.loader(examples(), batch_size=8)
    with pytest.raises(UserError, match=says):
        train.fit(model(), batches, loss, epochs=2, lr=5e-3, label="recovering")


def test_texts_without_labels_are_counted():
    encoded = examples(4).encoded
    with pytest.raises(UserError, match="4 texts but 3 labels; pass one label a text"):
        train.Examples(encoded, [0, 1, 0])
    assert train.Examples(encoded).labels.tolist() == [0, 0, 0, 0]


# Batches and predictions


def test_a_batch_holds_its_texts_in_place():
    data = examples()
    batches = train.loader(data, batch_size=8)
    assert isinstance(batches, DataLoader)
    for batch in batches:
        assert set(batch) == {"ids", "mask", "segments", "labels", "rows"}
        for i, row in enumerate(batch["rows"].tolist()):
            assert torch.equal(batch["ids"][i][batch["mask"][i]], data.encoded.ids[row])
            assert batch["labels"][i] == data.labels[row]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 48, 100])
def test_predictions_stand_in_the_order_given_whatever_the_batch_size(batch_size):
    own, data = model().train(), examples()
    told = train.predict(own, data.encoded, batch_size=batch_size)
    assert own.training, "the mode is as before"
    assert told.shape == (48, 2)
    torch.testing.assert_close(told, one_by_one(own.eval(), data.encoded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_an_error_in_predictions_leaves_the_mode_as_it_was(monkeypatch, training):
    own = model().train(training)
    monkeypatch.setattr(own, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.predict(own, examples(5).encoded)
    assert own.training is training


def test_predictions_draw_no_random_numbers():
    own, before = model(), torch.get_rng_state()
    train.predict(own, examples(5).encoded)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_is_shown_where_it_is_asked_for(capfd):
    train.predict(model(), examples(5).encoded)
    assert capfd.readouterr().err == ""
    train.predict(model(), examples(5).encoded, label="measuring")
    run(model(), epochs=1, label="teaching", after_step=lambda own, step: time.sleep(0.05))
    shown = capfd.readouterr().err
    assert "measuring" in shown
    assert "teaching" in shown
    assert "loss=" in shown


# Precision


@pytest.fixture
def bfloat16():
    """Train under autocast for one test."""
    train.set_precision("bfloat16")
    yield
    train.set_precision("highest")


def test_bfloat16_trains_in_it_and_leaves_the_model_as_it_was(bfloat16, tmp_path):
    seen = []

    def losses(own, batch):
        out = own(batch["ids"], batch["mask"], batch["segments"], keep_scores=(1,))
        seen.append((out.scores[1].dtype, torch.is_autocast_enabled("cpu")))
        return {"labels": nn.functional.cross_entropy(out.logits.float(), batch["labels"])}

    own, batches = model(), train.loader(examples(), batch_size=8, seed=5)
    history = train.fit(own, batches, losses, epochs=12, lr=5e-3, seed=3)
    assert set(seen) == {(torch.bfloat16, True)}
    assert sum(history.losses["loss"][-6:]) < 0.5 * sum(history.losses["loss"][:6])
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    assert own(*(batches.dataset.collate([0, 1])[name] for name in ("ids", "mask"))).logits.dtype == torch.float32


@pytest.mark.parametrize(("scale", "ends"), [(2.0, False), (1.0, False), (0.5, True)])
def test_a_float16_gradient_that_overflows_ends_the_run_only_when_its_loss_is_scaled_down_already(scale, ends):
    """Accelerate has a scaler on GPUs only: this one says that each gradient overflows, and skips nothing."""
    own, stepped = model(), []

    class Scaled:
        scaler, device = SimpleNamespace(get_scale=lambda: scale), torch.device("cpu")

        def backward(self, loss):
            loss.backward()

        def clip_grad_norm_(self, parameters, clip):
            return torch.tensor(torch.inf)

    optimizer = train.adamw(own, 1e-3)
    train.linear_schedule(optimizer, 4, 0.0)  # sets the rate that the sentence names
    optimizer.step = lambda: stepped.append(True)
    take = train.Step(Scaled(), train.Losses(own, train.classification_loss), optimizer, train.texts, 1.0, "training")
    batch = examples().collate(list(range(4)))
    with pytest.raises(UserError, match="the gradient's norm is inf at step 3") if ends else contextlib.nullcontext():
        take(batch, 3, 0)
    assert bool(stepped) != ends


def test_a_checkpoint_keeps_the_scale_of_float16_s_loss(tmp_path):
    """Accelerate makes a scaler on GPUs only; torch has one for CPUs too, and what is kept of both is the same."""

    def state(scaler):
        own = model()
        optimizer = train.adamw(own, 1e-3)
        schedule = train.linear_schedule(optimizer, 4, 0.0)
        return train.Checkpoint(tmp_path / "run.safetensors", own, optimizer, schedule, train.History(), scaler=scaler)

    one, two = (torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) for scale in (8.0, 2.0))
    optimizer = torch.optim.SGD(model().parameters(), lr=1e-3)
    for bad in (False, True, False):  # a gradient that overflows halves the scale; the steps since are counted too
        gradients = [torch.full_like(p, float("inf") if bad else 1.0) for p in optimizer.param_groups[0]["params"]]
        one.scale(torch.zeros(()))  # begins the scale
        for p, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            p.grad = gradient
        one.step(optimizer)
        one.update()
    assert (one.get_scale(), one.state_dict()["_growth_tracker"]) == (4.0, 1)
    state(one).save(3)
    assert state(two).load() == 3
    assert two.state_dict() == one.state_dict()
    assert state(None).load() == 3


def test_a_bfloat16_run_resumes_to_the_same_weights(bfloat16, tmp_path):
    class Stop(Exception):
        pass

    def stop(own, step):
        if step == 9:
            raise Stop

    whole, halved = model(), model()
    run(whole, checkpoint=tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        run(halved, checkpoint=tmp_path / "halved.safetensors", checkpoint_every=4, after_step=stop)
    halved = model(seed=7)
    run(halved, checkpoint=tmp_path / "halved.safetensors", checkpoint_every=4)
    assert same(whole, halved)


def test_another_precision_than_the_four_is_refused():
    with pytest.raises(UserError, match=r"precision='half' is not one of highest, high, medium, bfloat16"):
        train.set_precision("half")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_launcher_s_float16_is_told_of_gpus_only(monkeypatch, gpu):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert train.precision() == ("float16" if gpu else torch.get_float32_matmul_precision())


def test_precisions_are_told_apart():
    weights = {}
    for name in ("highest", "bfloat16", "highest"):
        train.set_precision(name)
        own = model()
        run(own)
        weights.setdefault(name, []).append(own.embeddings.word.weight.detach().clone())
    assert torch.equal(*weights["highest"]), "a run in bfloat16 between them changes nothing"
    assert not torch.equal(weights["highest"][0], weights["bfloat16"][0])
