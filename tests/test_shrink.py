"""Structured pruning: what is removed is gone, what stays computes the same, and importance is the loss's own slope."""

import copy
import json

import pytest
import torch
from conftest import shaken
from transformers import AutoModel, AutoModelForSequenceClassification

from tinylib import measure, prune, structure
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError
from tinylib.text import Encoded, encode, load_tokenizer
from tinylib.train import Examples, classification_loss, fit, loader

TEXTS = ["the film was good.", "a bad film, and a long one!", "good actors", "the end was bad"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> Bert:
    config = BertConfig(
        vocab_size=120, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, head="classification", labels=("bad", "good"),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return Bert(config, seeded()).eval()


@pytest.fixture
def examples() -> Examples:
    g = seeded(1)
    ids = tuple(torch.randint(1, 120, (4 + n % 7,), generator=g) for n in range(48))
    return Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)), torch.arange(48) % 2)


def logits(model: Bert, examples: Examples) -> torch.Tensor:
    batch = examples.collate(list(range(len(examples))))
    with torch.no_grad():
        return model(batch["ids"], batch["mask"], batch["segments"]).logits


def closed(model: Bert, importance: structure.Importance, heads: int, neurons: int) -> Bert:
    """Return a copy whose least important parts write nothing: the oracle, by zeros in what reads them."""
    other = copy.deepcopy(model)
    D = model.config.head_width
    with torch.no_grad():
        for i, layer in enumerate(other.layers):
            for h in importance.heads[i].argsort()[:heads].tolist():
                layer.attention.output.weight[:, h * D : (h + 1) * D] = 0
            layer.down.weight[:, importance.neurons[i].argsort()[:neurons]] = 0
    return other


@pytest.mark.parametrize("seed", range(3))
def test_a_shrunk_model_computes_what_the_model_with_the_parts_closed_computes(model, examples, seed):
    shaken(model)
    drawn = structure.Importance(torch.rand(3, 4, generator=seeded(seed)), torch.rand(3, 40, generator=seeded(seed)))
    small = prune.shrink(model, heads=0.5, neurons=0.25, importance=drawn)
    assert (small.config.num_attention_heads, small.config.intermediate_size, small.config.head_width) == (2, 30, 6)
    expected = logits(closed(model, drawn, 2, 10), examples)
    assert torch.allclose(logits(small, examples), expected, atol=1e-5)
    assert not torch.allclose(logits(model, examples), expected, atol=1e-2)
    assert measure.parameters(small) < measure.parameters(model)
    assert measure.flops(small.config, 8) < measure.flops(model.config, 8)


def test_neurons_alone_are_those_of_prune_neurons(model, examples):
    assert torch.allclose(
        logits(prune.shrink(model, neurons=0.3), examples), logits(prune.prune_neurons(model, 0.3), examples), atol=1e-6
    )


def test_layers_go_first_and_each_keeps_its_own_importance(model, examples):
    both = prune.shrink(model, heads=0.25, neurons=0.5, layers=(1, 3))
    one_by_one = prune.shrink(prune.prune_layers(model, (1, 3)), heads=0.25, neurons=0.5)
    assert torch.equal(logits(both, examples), logits(one_by_one, examples))
    assert both.config.num_hidden_layers == 2


def test_nothing_asked_for_changes_nothing(model, examples):
    same = prune.shrink(model)
    assert same.config == model.config
    assert torch.equal(logits(same, examples), logits(model, examples))


def test_a_model_with_fewer_heads_is_saved_and_loaded_and_shrunk_again(model, examples, tmp_path):
    small = prune.shrink(model, heads=0.5, neurons=0.5)
    again = Bert.from_pretrained(small.save_pretrained(tmp_path))
    assert again.config == small.config
    assert torch.equal(logits(again, examples), logits(small, examples))
    last = prune.shrink(again, heads=0.5)
    assert (last.config.num_attention_heads, last.config.head_dim) == (1, 6)
    assert measure.file_size(small.save_pretrained(tmp_path / "s")) < measure.file_size(model.save_pretrained(tmp_path / "m"))


@pytest.mark.parametrize("shares", [{"neurons": 0.5}, {"layers": 2}, {"neurons": 0.25, "layers": (2, 3)}])
def test_transformers_loads_what_has_lost_neurons_or_layers(model, examples, tmp_path, shares):
    small = prune.shrink(model, **shares)
    theirs = AutoModelForSequenceClassification.from_pretrained(small.save_pretrained(tmp_path)).eval()
    batch = examples.collate([0, 1, 2])
    with torch.no_grad():
        told = theirs(batch["ids"], batch["mask"].long(), batch["segments"]).logits
        said = small(batch["ids"], batch["mask"], batch["segments"]).logits
    assert torch.allclose(said, told, atol=1e-5)


def test_heads_of_zeros_give_transformers_the_same_function(model, examples, tmp_path):
    small = prune.shrink(shaken(model), heads=0.75)
    whole = prune.restore_heads(small)
    assert whole.config.head_dim is None
    assert torch.allclose(logits(whole, examples), logits(small, examples), atol=1e-6)
    theirs = AutoModel.from_pretrained(whole.save_pretrained(tmp_path))
    assert theirs.config.num_attention_heads == 4
    assert prune.restore_heads(model) is model


def test_heads_that_are_together_wider_than_the_model_have_no_layout_for_transformers(model):
    wide = Bert(model.config.replace(hidden_size=8, head_dim=4), seeded())
    with pytest.raises(UserError, match="4 heads of 4 columns do not fit the width 8"):
        prune.restore_heads(wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_smaller_model_keeps_the_precision(model, dtype):
    small = prune.shrink(model.to(dtype), heads=0.5, neurons=0.5, layers=2)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert torch.equal(small.embeddings.word.weight, model.embeddings.word.weight)


def test_a_smaller_model_keeps_the_tokenizer(model, tmp_path):
    model.tokenizer_folder = tmp_path
    small = prune.shrink(model, heads=0.5)
    for other in (small, prune.restore_heads(small), prune.prune_layers(model, 2)):
        assert other.tokenizer_folder == tmp_path


def test_of_equal_parts_the_later_stay(model):
    alike = structure.Importance(torch.zeros(3, 4), torch.zeros(3, 40))
    small = prune.shrink(model, neurons=0.5, importance=alike)
    assert torch.equal(small.layers[0].up.weight, model.layers[0].up.weight[20:])


@pytest.mark.parametrize("shares", [{"heads": 1.0}, {"neurons": 0.99}, {"heads": -0.1}, {"layers": 0}, {"layers": (3, 1)}])
def test_shares_that_leave_nothing_are_refused(model, shares):
    with pytest.raises(UserError):
        prune.shrink(model, **shares)


# -- importance ------------------------------------------------------------------


def test_taylor_importance_is_the_mean_slope_of_the_loss_over_texts(model, examples):
    """Oracle: one text at a time, the gate's slope by central differences in float64."""
    model = model.double()
    found = prune.taylor_importance(model, examples, classification_loss, batches=1, seed=3)
    rows = next(iter(loader(examples, 32, seed=3)))["rows"].tolist()
    D, step = model.config.head_width, 1e-4

    def slopes(layer: int, part: str, index: int) -> float:
        total = 0.0
        for row in rows:
            losses = []
            for gate in (1 + step, 1 - step):
                other = copy.deepcopy(model)
                with torch.no_grad():
                    if part == "heads":
                        other.layers[layer].attention.output.weight[:, index * D : (index + 1) * D] *= gate
                    else:
                        other.layers[layer].down.weight[:, index] *= gate
                losses.append(classification_loss(other, examples.collate([row]))["labels"].item())
            total += abs(losses[0] - losses[1]) / (2 * step)
        return total / len(rows)

    for layer, part, index in ((0, "heads", 2), (2, "heads", 0), (1, "neurons", 17)):
        assert getattr(found, part)[layer, index].item() == pytest.approx(slopes(layer, part, index), rel=1e-4, abs=1e-9)


def test_taylor_importance_leaves_the_model_as_it_is(model, examples):
    before = copy.deepcopy(model.state_dict())
    model.train()
    prune.taylor_importance(model, examples, classification_loss, batches=2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not model.layers[0].down._forward_pre_hooks

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune.taylor_importance(model, examples, broken)
    assert model.training
    assert not model.layers[0].down._forward_pre_hooks


def test_taylor_importance_is_that_of_evaluation_whatever_the_mode(model, examples):
    dropping = Bert(model.config.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train()
    dropping.load_state_dict(model.state_dict())
    one, two = (prune.taylor_importance(own, examples, classification_loss, batches=1) for own in (model, dropping))
    for part in ("heads", "neurons"):
        torch.testing.assert_close(getattr(one, part), getattr(two, part))


def test_taylor_importance_takes_texts_in_parts_where_the_memory_is_too_small(model, examples):
    sizes = []

    def loss(own, batch):
        sizes.append(len(batch["rows"]))
        if sizes[-1] > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return classification_loss(own, batch)

    found = prune.taylor_importance(model, examples, loss, batches=1)
    assert sizes == [16, 8, 8]
    whole = prune.taylor_importance(model, examples, classification_loss, batches=1)
    for part in ("heads", "neurons"):
        torch.testing.assert_close(getattr(found, part), getattr(whole, part), atol=1e-7, rtol=1e-4)


def test_taylor_importance_of_nothing_is_refused(model, examples):
    for given, batches in ((examples, 0), (Examples(Encoded((), ())), 1)):
        with pytest.raises(UserError, match="give at least one text and one batch"):
            prune.taylor_importance(model, given, classification_loss, batches=batches)


def test_taylor_finds_the_neuron_that_magnitude_does_not(model, examples):
    """A large neuron that always gives the same nothing (its input weights 0) is worth nothing, whatever its size."""
    with torch.no_grad():
        model.layers[1].up.weight[5], model.layers[1].up.bias[5] = 0, 0  # GELU(0) = 0: it writes 0, however it is weighted
        model.layers[1].down.weight[:, 5] = 50
    taylor = prune.taylor_importance(model, examples, classification_loss)
    assert taylor.neurons[1].argmin() == 5
    with torch.no_grad():
        model.layers[1].up.weight[5] = 1e-3
    assert prune.magnitude_importance(model).neurons[1].argmin() != 5


# -- learnt structure ---------------------------------------------------------------


def test_movement_removes_exactly_what_it_has_closed(model, examples):
    training = copy.deepcopy(model)
    movement = prune.Movement(training, heads=0.5, neurons=0.44, growth=lambda step: min(1.0, step / 3))  # 17.6 of 40 neurons
    with movement:
        prune.recover(training, examples, classification_loss, epochs=2, lr=1e-3, after_step=movement)
        gated = logits(training, examples)
    small = prune.shrink(training, 0.5, 0.44, importance=movement.importance())
    assert torch.allclose(logits(small, examples), gated, atol=1e-5)
    assert not training.layers[0].down._forward_pre_hooks


def test_the_scores_are_the_sums_of_minus_the_gates_slopes(model, examples):
    movement = prune.Movement(model, heads=0.25, neurons=0.0, growth=lambda step: 1.0)
    batch = examples.collate(list(range(16)))
    for _ in range(2):
        with movement:
            classification_loss(model, batch)["labels"].backward()
        movement(model, 1)
    first = structure.Gates(model)
    with first:
        slope = torch.autograd.grad(classification_loss(model, batch)["labels"], first.heads)[0][:, 0]
    second = structure.Gates(model)
    with torch.no_grad():
        for i, row in enumerate((-slope).argsort()[:, :1].tolist()):
            second.heads[i, 0, row] = 0.0
    with second:
        again = torch.autograd.grad(classification_loss(model, batch)["labels"], second.heads)[0][:, 0]
    assert torch.allclose(movement.importance().heads, -slope - again, atol=1e-6)


def test_processes_share_their_scores(model, examples, monkeypatch):
    """Two processes, the other with three times this one's derivatives, scale each their part of the loss up by two."""
    monkeypatch.setattr(structure.processes, "count", lambda: 2)
    monkeypatch.setattr(structure.sharing, "total", lambda numbers: 4 * numbers)
    movement = prune.Movement(model, heads=0.25, neurons=0.0, growth=lambda step: 1.0)
    with movement:
        classification_loss(model, examples.collate(list(range(16))))["labels"].backward()
    own = movement.gates.heads.grad[:, 0].clone()
    movement(model, 1)
    assert torch.equal(movement.importance().heads, -2 * own)


def test_derivatives_that_overflow_count_for_nothing(model):
    movement = prune.Movement(model, heads=0.25, neurons=0.0, growth=lambda step: 1.0)
    for number in (torch.inf, 2.0):
        movement.gates.heads.grad = torch.full((3, 1, 4), 1.0)
        movement.gates.heads.grad[1, 0, 2] = number
        movement(model, 1)
    assert torch.equal(movement.importance().heads[1], torch.tensor([-1.0, -1.0, -2.0, -1.0]))


@pytest.mark.filterwarnings("ignore:.*the memory is full")
def test_a_step_that_memory_was_too_small_for_leaves_nothing_in_the_scores(model, examples):
    """The first half has been through backward when the second fails; the step begun anew must not count it twice."""
    found = []
    for fails in (False, True):
        calls = []

        def loss(own, batch, fails=fails, calls=calls):
            calls.append(len(batch["rows"]))
            if fails and (len(calls) == 1 or calls == [16, 8, 8]):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return classification_loss(own, batch)

        training = copy.deepcopy(model)
        movement = prune.Movement(training, heads=0.5, neurons=0.5, growth=lambda step: 1.0)
        with movement:
            fit(training, loader(examples, 16, seed=0), loss, epochs=1, steps=1, lr=1e-3, warmup=0.0, after_step=movement)
        found.append(movement.importance())
    assert calls == [16, 8, 8, 4, 4, 4, 4]
    for part in ("heads", "neurons"):
        torch.testing.assert_close(getattr(found[0], part), getattr(found[1], part), atol=1e-7, rtol=1e-4)


def test_learn_structure_leaves_the_given_model_alone_and_returns_a_smaller_one(model, examples):
    before = logits(model, examples)
    small, history = prune.learn_structure(
        model, examples, prune.teacher_loss(model, examples), heads=0.25, neurons=0.5, epochs=2, lr=1e-3
    )
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (3, 20)
    assert torch.equal(logits(model, examples), before)
    assert len(history.losses["loss"]) == 4


# -- vocabulary ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("general-4x312")


@pytest.fixture
def reader(tokenizer) -> Bert:
    """A classifier with the shipped tokenizer."""
    from tinylib import models

    config = BertConfig.parse("1x12", intermediate_size=8, max_position_embeddings=64, vocab_size=len(tokenizer))
    model = Bert(config.replace(head="classification", labels=("bad", "good")), seeded()).eval()
    model.tokenizer_folder = models.resolve("general-4x312")
    return model


def test_texts_of_kept_pieces_are_read_as_before(reader, tokenizer, tmp_path):
    small = prune.shrink_vocabulary(reader, TEXTS, tmp_path / "tokenizer")
    assert small.config.vocab_size < 3000
    cut = load_tokenizer(tmp_path / "tokenizer")
    assert len(cut) == small.config.vocab_size
    mine, theirs = (encode(t, TEXTS) for t in (cut, tokenizer))
    for a, b in zip(mine.ids, theirs.ids, strict=True):
        assert cut.convert_ids_to_tokens(a.tolist()) == tokenizer.convert_ids_to_tokens(b.tolist())
        with torch.no_grad():
            assert torch.allclose(small(a[None]).logits, reader(b[None]).logits, atol=1e-6)


def test_other_words_are_spelt_from_what_is_left(reader, tmp_path):
    prune.shrink_vocabulary(reader, TEXTS, tmp_path)
    cut = load_tokenizer(tmp_path)
    pieces = cut.tokenize("the unforgettable zebra 42 é")
    assert pieces[0] == "the"
    assert cut.unk_token not in pieces
    assert "".join(p.removeprefix("##") for p in pieces) == "theunforgettablezebra42e"
    pair = cut("good film", "bad film")
    assert cut.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "good", "film", "[SEP]", "bad", "film", "[SEP]"]
    assert cut.pad_token_id == cut.convert_tokens_to_ids("[PAD]")


def test_a_padding_token_that_moves_gets_its_new_number(reader, tmp_path):
    reader.config = reader.config.replace(pad_token_id=102)  # [SEP], before which most pieces go
    small = prune.shrink_vocabulary(reader, TEXTS, tmp_path)
    assert small.config.pad_token_id == load_tokenizer(tmp_path).sep_token_id != 102


def test_a_masked_lm_keeps_the_biases_of_the_pieces_that_stay(reader, tokenizer, tmp_path):
    filler = Bert(reader.config.replace(head="masked_lm", labels=()), seeded())
    filler.tokenizer_folder = reader.tokenizer_folder
    torch.nn.init.normal_(filler.lm_bias, generator=seeded(1))
    small, pieces = prune.shrink_vocabulary(filler, TEXTS, tmp_path), load_tokenizer(tmp_path).get_vocab()
    old = tokenizer.convert_tokens_to_ids(sorted(pieces, key=pieces.get))
    assert torch.equal(small.lm_bias, filler.lm_bias[old])


def test_a_post_processor_in_a_sequence_gets_the_new_numbers(reader, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "tokenizer.json").read_text(encoding="utf-8"))
    stored["post_processor"] = {"type": "Sequence", "processors": [stored["post_processor"]]}
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    told = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text(encoding="utf-8"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"  # BERT's own would write a post-processor anew
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    reader.tokenizer_folder = tmp_path / "old"
    prune.shrink_vocabulary(reader, TEXTS, tmp_path / "new")
    cut, plain = load_tokenizer(tmp_path / "new"), load_tokenizer(tmp_path / "old")
    ids = cut("good film")["input_ids"]
    assert max(ids) < len(cut)
    assert cut.convert_ids_to_tokens(ids) == plain.convert_ids_to_tokens(plain("good film")["input_ids"])


def test_a_model_with_a_small_vocabulary_travels_with_its_tokenizer(reader, tmp_path):
    small = prune.shrink_vocabulary(reader, TEXTS, tmp_path / "tokenizer", least=2)
    folder = small.save_pretrained(tmp_path / "model")
    again = Bert.from_pretrained(folder)
    ids = encode(load_tokenizer(folder), TEXTS[:1]).ids[0]
    assert ids.max() < again.config.vocab_size
    with torch.no_grad():
        assert torch.equal(again(ids[None]).logits, small(ids[None]).logits)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.config.vocab_size == again.config.vocab_size
    assert load_tokenizer(tmp_path / "tokenizer").tokenize("actors")[0] != "actors", "it occurs once only"


def test_a_student_of_another_vocabulary_learns_from_what_its_teacher_sees(reader, tokenizer, tmp_path):
    small = prune.shrink_vocabulary(reader, TEXTS, tmp_path, least=2)
    own = Examples(encode(load_tokenizer(tmp_path), TEXTS))
    losses = prune.teacher_loss(reader, own, seen=encode(tokenizer, TEXTS))
    batch = own.collate([0, 1, 2, 3])
    assert losses(small, batch)["prediction"] >= 0
    for fewer in (TEXTS[:2], []):
        with pytest.raises(UserError, match=f"sees {len(fewer)} texts and the student 4; encode the same texts for both"):
            prune.teacher_loss(reader, own, seen=encode(tokenizer, fewer))


def test_a_model_without_a_tokenizer_cannot_lose_pieces(model, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        prune.shrink_vocabulary(model, TEXTS, tmp_path)


def test_no_texts_leave_no_pieces(reader, tmp_path):
    with pytest.raises(UserError, match="no texts whose pieces could be counted"):
        prune.shrink_vocabulary(reader, [], tmp_path)
