"""The masked-LM head: BERT's masking, the loss at chosen places, what is saved and put together again."""

import functools
import json
import sys
import types
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_cli import TEXTS, make_checkpoint

from tinylib import corpus as corpora
from tinylib import mlm, models
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError
from tinylib.text import load_tokenizer

TOLD = {
    "settings": asdict(mlm.Settings(steps=7)), "precision": "highest", "seconds": 1234, "corpus": {"films.txt": "0f"},
    "validation": [{"step": 7, "top 1": 0.25, "top 10": 0.5, "loss": 4.0}],
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Give a tiny BERT with a tokenizer of its own."""
    return make_checkpoint(tmp_path_factory.mktemp("mlm") / "base", TEXTS)


@pytest.fixture(scope="module")
def corpus(base, tmp_path_factory):
    """Give the same sentences as a corpus of many documents."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "films.txt").write_text("\n\n".join(TEXTS * 8), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLIB_HOME", str(folder / "cache"))
        return corpora.load(folder / "films.txt", base, max_length=16)


def test_masking_follows_the_paper_s_shares():
    ids = torch.randint(5, 1000, (400, 100), generator=generator(1))
    allowed = torch.ones_like(ids, dtype=torch.bool)
    allowed[:, 0] = False
    masked, targets = mlm.mask_tokens(ids, allowed, mask_id=4, vocab_size=1000, generator=generator())
    chosen = targets != mlm.IGNORED
    assert chosen.float()[:, 1:].mean().item() == pytest.approx(0.15, abs=0.006)
    assert not chosen[:, 0].any()
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen]), "what was not chosen stays"
    became_mask, stayed = (masked[chosen] == 4).float().mean(), (masked[chosen] == ids[chosen]).float().mean()
    assert became_mask.item() == pytest.approx(0.8, abs=0.02)
    assert stayed.item() == pytest.approx(0.1, abs=0.02)  # and one in 1000 of the random tokens


def test_the_loss_is_the_cross_entropy_of_the_whole_head_at_the_chosen_places(base, corpus):
    model, tokenizer = Bert.from_pretrained(base, head="masked_lm", generator=generator()), load_tokenizer(base)
    batch = corpus["train"].collate([0, 1, 2, 3])
    settings = mlm.Settings(share=0.4)
    ours = mlm.masked_lm_loss(tokenizer, settings, generator(3))(model, batch)["masked_lm"]
    special = torch.tensor(tokenizer.all_special_ids)
    allowed = batch["mask"] & ~torch.isin(batch["ids"], special)
    masked, targets = mlm.mask_tokens(
        batch["ids"], allowed, tokenizer.mask_token_id, model.config.vocab_size, 0.4, generator(3)
    )
    logits = model(masked, batch["mask"], batch["segments"]).logits
    whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=mlm.IGNORED)
    torch.testing.assert_close(ours, whole)


def test_a_batch_without_a_chosen_token_teaches_nothing(base, corpus):
    model, tokenizer = Bert.from_pretrained(base, head="masked_lm", generator=generator()), load_tokenizer(base)
    loss = mlm.masked_lm_loss(tokenizer, mlm.Settings(share=0.0), generator())(model, corpus["train"].collate([0]))
    assert loss["masked_lm"].item() == 0
    loss["masked_lm"].backward()


def test_training_fills_more_blanks_and_leaves_the_embeddings_alone(base, corpus, tmp_path):
    tokenizer = load_tokenizer(base)
    settings = mlm.Settings(steps=60, batch_size=8, lr=5e-3, measure_every=30, validation=16)
    model, history = mlm.train_head(base, tokenizer, corpus, settings)
    before = Bert.from_pretrained(base, head="masked_lm", generator=generator())
    untrained = mlm.accuracy(before, tokenizer, corpus["validation"], settings)
    assert [row["step"] for row in history.measured] == [30, 60]
    assert history.measured[-1]["loss"] < untrained["loss"]
    assert history.measured[-1]["top 10"] >= history.measured[-1]["top 1"]
    assert torch.equal(model.embeddings.word.weight, before.embeddings.word.weight)

    mlm.save_delta(model, str(base), tmp_path / "delta", TOLD)
    assert not any(name.startswith("embeddings") for name in load_file(tmp_path / "delta" / mlm.DELTA))
    again = mlm.load(tmp_path / "delta")
    ids = corpus["train"].collate([0, 1])
    with torch.inference_mode():
        one, two = (m.eval()(ids["ids"], ids["mask"]).logits for m in (model, again))
    torch.testing.assert_close(one, two, atol=0.05, rtol=0.01)  # stored in float16
    assert json.loads((tmp_path / "delta" / mlm.CARD).read_text()) == TOLD | {"base": str(base)}
    page = (tmp_path / "delta" / "README.md").read_text(encoding="utf-8")
    assert "| 7 | 25.0% | 50.0% | 4.00 |" in page
    assert "in 1,234 s: 7 steps" in page


def test_top_k_counts_what_is_among_the_k_likeliest(base, corpus, monkeypatch):
    """A model that ranks the truth sixth has a top 1 of nothing and a top 10 of everything."""
    tokenizer = load_tokenizer(base)
    model = Bert.from_pretrained(base, head="masked_lm", generator=generator())
    held_out, told = corpus["validation"], mlm.Settings(validation=16, share=0.5)

    batches, original = [], mlm.loader

    def remembered(*args, **options):
        for batch in original(*args, **options):
            batches.append(batch["ids"])
            yield batch

    monkeypatch.setattr(mlm, "loader", remembered)
    truth = lambda *_: types.SimpleNamespace(hidden=batches[-1][..., None].float())  # noqa: E731

    def token_logits(hidden):
        logits = torch.zeros(len(hidden), model.config.vocab_size)
        logits[:, :5] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])  # special tokens, which are never the truth
        return logits.scatter(1, hidden.long(), 4.0)

    monkeypatch.setattr(model, "encode", truth)
    monkeypatch.setattr(model, "token_logits", token_logits)
    assert mlm.accuracy(model, tokenizer, held_out, told)["top 1"] == 0
    assert mlm.accuracy(model, tokenizer, held_out, told)["top 10"] == 1


def test_a_damaged_delta_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no masked-LM head"):
        mlm.load(tmp_path)


def test_a_stopped_training_goes_on_to_the_same_weights(base, corpus, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(base)
    settings = mlm.Settings(steps=6, batch_size=4, measure_every=3, validation=4)
    monkeypatch.setattr(mlm, "fit", functools.partial(mlm.fit, checkpoint_every=2))
    whole, _ = mlm.train_head(base, tokenizer, corpus, settings)

    class Killed(Exception):
        pass

    calls, original = [], mlm.mask_tokens

    def dies(*args):
        calls.append(1)
        if len(calls) > 4:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mlm, "mask_tokens", dies)
        with pytest.raises(Killed):
            mlm.train_head(base, tokenizer, corpus, settings, tmp_path / "run.safetensors")
    resumed, _ = mlm.train_head(base, tokenizer, corpus, settings, tmp_path / "run.safetensors")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_command_trains_a_head_that_is_loaded_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "cache"))
    own = make_checkpoint(tmp_path / "own", TEXTS, positions=128)
    (tmp_path / "films.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    typed = ["--base", str(own), "--corpus", str(tmp_path / "films.txt"), "--steps", "2", "--out", str(tmp_path / "head")]
    assert mlm.main(typed) == 0
    assert "top 10" in capsys.readouterr().out
    card = json.loads((tmp_path / "head" / mlm.CARD).read_text())
    assert (card["base"], card["settings"]["steps"], card["validation"][-1]["step"]) == (str(own), 2, 2)
    changed = load_file(tmp_path / "head" / mlm.DELTA)
    stored = mlm.load(tmp_path / "head").state_dict()
    assert all(torch.equal(stored[name], tensor.float()) for name, tensor in changed.items())
    assert [path.name for path in (tmp_path / "cache" / "runs").iterdir()], "a killed run could go on"
    other = make_checkpoint(tmp_path / "other", [*TEXTS, "quite another word"], positions=128)
    (tmp_path / "head" / mlm.CARD).write_text(json.dumps(card | {"base": str(other)}))
    with pytest.raises(UserError, match="head holds no masked-LM head"):
        mlm.load(tmp_path / "head")


def test_a_mistake_of_the_command_is_a_sentence(base, tmp_path, capsys):
    typed = ["--base", str(base), "--corpus", str(tmp_path / "gone"), "--out", str(tmp_path / "head")]
    assert mlm.main(typed) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mlm: the corpus ")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "head").exists()


def test_a_head_that_is_not_shipped_is_a_sentence_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(mlm.models, "shipped_folder", lambda: tmp_path)
    for ask in (mlm.shipped, mlm.fingerprint):
        with pytest.raises(UserError, match=r"minilm-l6 has no masked-LM head yet; train one.*python -m tinylib.mlm"):
            ask("minilm-l6")


def test_a_model_that_has_no_head_fills_no_blanks(tmp_path):
    Bert(BertConfig(30, 16, 1, 2, 32, 40, head=None), torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no masked-LM head, and augmentation .*; name a BertForMaskedLM"):
        mlm.shipped(str(tmp_path / "bare"))


def test_the_card_of_a_delta_and_of_a_model_with_its_own_head(base, tmp_path, monkeypatch):
    model = Bert.from_pretrained(base, head="masked_lm", generator=generator())
    mlm.save_delta(model, str(base), tmp_path / "head", TOLD)
    monkeypatch.setattr(mlm.models, "shipped_folder", lambda: tmp_path)
    monkeypatch.setitem(mlm.SHIPPED, "minilm-l6", "head")
    assert mlm.card("minilm-l6") == TOLD | {"base": str(base)}
    assert mlm.card(str(base)) is None


def test_the_card_names_what_loads_it_and_the_command_that_made_it(base, corpus, tmp_path):
    model = Bert.from_pretrained(base, head="masked_lm", generator=generator())
    mlm.save_delta(model, str(base), tmp_path / "own", TOLD | {"corpus_from": "films.txt"})
    page = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert '`tinylib.mlm.load("THIS FOLDER")`' in page
    assert f"python -m tinylib.mlm --base {base} --corpus films.txt --steps 7 --seed 0 --precision highest --out FOLDER" in page
    own = mlm.card_text(mlm.card() | {"corpus_from": "mine.txt", "corpus": {"mine.txt": "0" * 64}})
    assert '`tinylib.mlm.load("THIS FOLDER")`' in own, "the shipped base, and another head than the shipped one"
    assert "snli" not in own
    shipped = models.shipped_folder() / mlm.SHIPPED["minilm-l6"]
    assert mlm.card_text(mlm.card()) == (shipped / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--steps", "0"], "'0' is not a whole number from 1 to 2147483647"),
        (["--seed", "99999999999999999999999"], "is not a whole number from 0"),
        (["--out", "{file}/x"], "mlm: --out {file}/x cannot be written (Not a directory); name another place"),
        (["--corpus", "{short}", "--steps", "1"], "held-out sequences are too short to mask a token of"),
    ],
)
def test_a_mistake_on_its_command_line_is_a_sentence(base, tmp_path, monkeypatch, capsys, typed, says):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    (tmp_path / "short.txt").write_text("\n\n".join(["☃ ☃"] * 60), encoding="utf-8")  # [UNK], which is never masked
    names = {"file": str(tmp_path / "file"), "short": str(tmp_path / "short.txt")}
    with pytest.raises(SystemExit, match="2"):
        sys.exit(mlm.main(["--base", str(base), "--out", f"{tmp_path}/out", *(word.format(**names) for word in typed)]))
    assert says.format(**names) in capsys.readouterr().err
