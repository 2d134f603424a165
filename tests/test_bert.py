"""Bert against transformers: hidden states, scores, heads, files both ways; and what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from tinylib import models
from tinylib.bert import Bert, BertConfig
from tinylib.errors import UserError

TOLERANCE = 1e-5
SMALL = {
    "vocab_size": 120, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 56, "max_position_embeddings": 32,
}  # fmt: skip
SIZES = {
    "tinybert4": {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200},
    "bert-tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    },
    "gelu_new": SMALL | {"hidden_act": "gelu_new"},
    "one segment": SMALL | {"type_vocab_size": 1},
    "large eps": SMALL | {"layer_norm_eps": 1e-5},
    "no padding token": SMALL | {"pad_token_id": None},
    "token 3 pads": SMALL | {"pad_token_id": 3},
}
REFERENCES = {
    None: transformers.BertModel,
    "classification": transformers.BertForSequenceClassification,
    "masked_lm": transformers.BertForMaskedLM,
}


@pytest.fixture(autouse=True)
def quiet():
    """Keep transformers' remarks on random weights out of the tests, and draw the same numbers in each."""
    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def minilm():
    """Give the folder of MiniLM-L6."""
    return models.fetch("minilm-l6")


def reference(folder, cls=transformers.AutoModel, **options):
    """Load a checkpoint with transformers."""
    return cls.from_pretrained(folder, **options).eval()


def make(folder, cls=transformers.BertModel, options=None, **sizes):
    """Save a checkpoint of random weights, made by transformers, none of them at its initial zero or one."""
    model = cls(transformers.BertConfig(**sizes), **(options or {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "LayerNorm.weight" in name else 0.0
            parameter.normal_(around, 0.1)
    model.save_pretrained(folder)
    return folder


def batch(model, lengths=(11, 4, 1, 7), pairs=False):
    """Make a padded batch; the padding holds real tokens' ids, so that only the mask can hide it."""
    V, T = model.config.vocab_size, max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (len(lengths), T), generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    segments = (torch.arange(T).expand_as(ids) >= 3).long() if pairs else torch.zeros_like(ids)
    return ids, mask, segments


def keep_projections(encoder):
    """Record what the query, key and value projections of a transformers model give; return also what ends it."""
    kept, hooks = {}, []
    for m, layer in enumerate(encoder.encoder.layer, start=1):
        for name in ("query", "key", "value"):
            hook = lambda module, inputs, output, place=(m, name): kept.update({place: output})  # noqa: E731
            hooks.append(getattr(layer.attention.self, name).register_forward_hook(hook))
    return kept, lambda: [hook.remove() for hook in hooks]


@torch.no_grad()
def assert_agreement(ours: Bert, theirs, ids, mask, segments):
    """Compare every hidden state, the scores before the softmax, the attention after it, the values' relations, the logits.

    transformers' fused attention is ours, so padding positions must agree too. Its eager attention, which
    alone returns the weights, is compared where there are real tokens: MiniLM magnifies rounding in the
    padding, where the two ways of transformers differ from each other by 5e-5.
    """
    L, H = ours.config.num_hidden_layers, ours.config.num_attention_heads
    given = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": segments}
    kept, remove = keep_projections(getattr(theirs, "bert", theirs))
    switch = getattr(theirs, "set_attn_implementation", lambda kind: None)  # older ones turn to eager when asked for weights
    switch("sdpa")
    want = theirs(**given, output_hidden_states=True)
    remove()
    switch("eager")
    eager = theirs(**given, output_hidden_states=True, output_attentions=True)
    each = range(1, L + 1)
    got = ours(ids, mask, segments, keep_hidden=range(L + 1), keep_scores=each, keep_relations=each)
    far = {}
    for m in range(L + 1):
        far[f"hidden {m}"] = got.hidden_states[m] - want.hidden_states[m]
        far[f"eager hidden {m}"] = (got.hidden_states[m] - eager.hidden_states[m])[mask]
    for m in range(1, L + 1):
        B, T, C = kept[m, "query"].shape
        q, k, v = (kept[m, name].view(B, T, H, C // H) for name in ("query", "key", "value"))
        far[f"scores {m}"] = got.scores[m] - torch.einsum("bthd,bshd->bhts", q, k) / (C // H) ** 0.5
        far[f"relations {m}"] = got.relations[m] - torch.einsum("bthd,bshd->bhts", v, v) / (C // H) ** 0.5
        weights = got.scores[m].masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
        far[f"weights {m}"] = (weights - eager.attentions[m - 1]).transpose(1, 2)[mask]
    if got.logits is not None:
        far["logits"] = got.logits - want.logits
    far = {name: difference.abs().max().item() for name, difference in far.items()}
    assert max(far.values()) <= TOLERANCE, far
    assert torch.equal(got.hidden, got.hidden_states[L])
    return got


# -- what others saved, we read ----------------------------------------------


def test_minilm_agrees_on_a_padded_batch_of_real_sentences(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = [
        "a film of rare charm .",
        "no",
        "it 's slow , dull and far too long , but the ending is superb .",
    ]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    ours = Bert.from_pretrained("minilm-l6")
    got = assert_agreement(ours, reference(minilm), rows.input_ids, rows.attention_mask.bool(), rows.token_type_ids)
    assert got.logits is None
    assert not ours.training


def test_minilm_agrees_without_a_mask_and_on_a_long_sequence(minilm):
    ours = Bert.from_pretrained(minilm)
    ids = torch.randint(0, 30522, (1, 512))
    with torch.no_grad():
        want = reference(minilm)(input_ids=ids).last_hidden_state
        assert (ours(ids).hidden - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_checkpoint_of_another_size_agrees(tmp_path, sizes):
    ours = Bert.from_pretrained(make(tmp_path, **sizes))
    pairs = ours.config.type_vocab_size > 1
    assert_agreement(ours, reference(tmp_path), *batch(ours, pairs=pairs))


@pytest.mark.parametrize("head", REFERENCES)
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_each_head_agrees(tmp_path, head, act):
    cls = REFERENCES[head]
    ours = Bert.from_pretrained(make(tmp_path, cls, num_labels=3, **SMALL, hidden_act=act))
    assert ours.config.head == head
    assert_agreement(ours, reference(tmp_path, cls), *batch(ours, pairs=True))


def test_segments_change_nothing_where_there_is_one():
    ours = Bert(BertConfig(**SMALL, type_vocab_size=1), torch.Generator().manual_seed(0)).eval()
    ids, mask, segments = batch(ours, pairs=True)
    assert segments.any()
    with torch.no_grad():
        assert torch.equal(ours(ids, mask, segments).hidden, ours(ids, mask).hidden)


def test_segments_reach_the_classifier(tmp_path):
    ours = Bert.from_pretrained(make(tmp_path, transformers.BertForSequenceClassification, **SMALL))
    ids, mask, segments = batch(ours, pairs=True)
    with torch.no_grad():
        one, two = ours(ids, mask, torch.zeros_like(ids)).logits, ours(ids, mask, segments).logits
        assert torch.equal(ours(ids, mask).logits, one)  # None means: all of the first text
    assert (one - two).abs().max() > 1e-3
    assert ours.config.labels == (
        "LABEL_0",
        "LABEL_1",
    )  # transformers leaves these two out of its config.json


def test_a_checkpoint_without_a_pooler_agrees(tmp_path):
    ours = Bert.from_pretrained(make(tmp_path, options={"add_pooling_layer": False}, **SMALL))
    assert_agreement(ours, reference(tmp_path, add_pooling_layer=False), *batch(ours))


def test_pretraining_checkpoints_agree(tmp_path):
    make(tmp_path, transformers.BertForPreTraining, **SMALL)
    ours = Bert.from_pretrained(tmp_path, head="masked_lm")
    assert_agreement(ours, reference(tmp_path, transformers.BertForMaskedLM), *batch(ours))
    assert_agreement(Bert.from_pretrained(tmp_path), reference(tmp_path), *batch(ours))


def test_a_masked_lm_whose_output_matrix_is_its_own_is_refused(tmp_path):
    stored = load_file(make(tmp_path, transformers.BertForMaskedLM, **SMALL) / "model.safetensors")
    table = stored["bert.embeddings.word_embeddings.weight"]
    save_file(stored | {"cls.predictions.decoder.weight": table.clone()}, tmp_path / "model.safetensors")
    assert Bert.from_pretrained(tmp_path).config.head == "masked_lm", "many files hold the table twice"
    save_file(stored | {"cls.predictions.decoder.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'cls.predictions.decoder.weight' is not the word table.*head=None"):
        Bert.from_pretrained(tmp_path)
    assert Bert.from_pretrained(tmp_path, head=None).config.head is None


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_the_names_of_very_old_checkpoints_are_read(tmp_path, prefix):
    theirs = copy.deepcopy(reference(make(tmp_path, **SMALL)))  # older ones keep the file mapped, which is written anew
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[prefix + name] = tensor
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(32)[None]  # a buffer that old versions saved
    save_file(tensors, tmp_path / "model.safetensors")
    ours = Bert.from_pretrained(tmp_path)
    assert_agreement(ours, theirs, *batch(ours))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_into_float32(tmp_path, dtype):
    make(tmp_path, **SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    ours = Bert.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    name = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    assert_agreement(ours, reference(tmp_path, **{name: torch.float32}), *batch(ours))


# -- what we save, others read -----------------------------------------------


@pytest.mark.parametrize("head", REFERENCES)
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_what_we_save_transformers_loads_and_back(tmp_path, head, act):
    labels = ("negative", "neutral", "positive") if head == "classification" else ()
    config = BertConfig(**SMALL, hidden_act=act, head=head, labels=labels)
    ours = Bert(config, torch.Generator().manual_seed(0)).eval()
    assert ours.save_pretrained(tmp_path / "a") == tmp_path / "a"
    automatic = {
        None: transformers.AutoModel,
        "classification": transformers.AutoModelForSequenceClassification,
        "masked_lm": transformers.AutoModelForMaskedLM,
    }[head]
    theirs, told = automatic.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(told.values()), told  # no weight is missing, unexpected or of another shape
    assert_agreement(ours, theirs.eval(), *batch(ours, pairs=True))
    if labels:
        assert tuple(theirs.config.id2label.values()) == labels
    theirs.save_pretrained(tmp_path / "b")
    again = Bert.from_pretrained(tmp_path / "b")
    assert again.config == config
    before, after = ours.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()


def test_the_tokenizer_travels_with_the_model(minilm, tmp_path):
    Bert.from_pretrained(minilm).save_pretrained(tmp_path / "copy")
    text = "An unflinching film."
    theirs = [transformers.AutoTokenizer.from_pretrained(f)(text).input_ids for f in (minilm, tmp_path / "copy")]
    assert theirs[0] == theirs[1]
    Bert.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "copy")  # onto itself
    again = Bert.from_pretrained(tmp_path / "copy")
    assert_agreement(again, reference(minilm), *batch(again))


def test_weights_are_drawn_from_the_generator_alone():
    config = BertConfig(**SMALL, head="classification", labels=("a", "b"))
    one, same, other = (Bert(config, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.pooler.weight, same.pooler.weight)
    assert not torch.equal(one.pooler.weight, other.pooler.weight)
    assert one.layers[0].up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.embeddings.word.weight[0].abs().sum() == 0


# -- heads -------------------------------------------------------------------


def test_a_new_head_is_drawn_and_the_encoder_kept(minilm):
    labels = ("negative", "positive")
    models_ = [
        Bert.from_pretrained(minilm, labels=labels, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert models_[0].config.labels == labels
    assert torch.equal(models_[0].classifier.weight, models_[1].classifier.weight)
    assert not torch.equal(models_[0].classifier.weight, models_[2].classifier.weight)
    assert torch.equal(models_[0].layers[5].down.weight, models_[2].layers[5].down.weight)
    assert Bert.from_pretrained(minilm, head="masked_lm").config.head == "masked_lm"


def test_a_classifier_of_other_classes_is_replaced_only_when_asked(tmp_path):
    make(tmp_path, transformers.BertForSequenceClassification, num_labels=3, **SMALL)
    stored = Bert.from_pretrained(tmp_path)
    assert stored.classifier.out_features == 3
    two = Bert.from_pretrained(tmp_path, labels=("no", "yes"))
    assert two.classifier.out_features == 2
    assert torch.equal(two.pooler.weight, stored.pooler.weight)
    three = Bert.from_pretrained(tmp_path, labels=("a", "b", "c"))
    assert torch.equal(three.classifier.weight, stored.classifier.weight)
    assert Bert.from_pretrained(tmp_path, head=None).config.head is None


# -- one forward path --------------------------------------------------------


def test_only_what_is_asked_for_is_kept():
    ours = Bert(BertConfig(**SMALL), torch.Generator().manual_seed(0)).eval()
    ids, mask, _ = batch(ours)
    plain = ours(ids, mask)
    assert plain.hidden_states == {}
    assert plain.scores == {}
    assert plain.relations == {}
    assert plain.logits is None
    kept = ours(ids, mask, keep_hidden=(0, 2), keep_scores={3}, keep_relations={1})
    assert sorted(kept.hidden_states) == [0, 2]
    assert sorted(kept.scores) == [3]
    assert sorted(kept.relations) == [1]
    assert kept.scores[3].shape == kept.relations[1].shape == (4, 4, 11, 11)
    assert torch.equal(kept.hidden, plain.hidden)  # asking changes nothing


def test_what_stands_in_the_padding_changes_no_real_token():
    ours = Bert(BertConfig(**SMALL), torch.Generator().manual_seed(0)).eval()
    ids, mask, _ = batch(ours)
    other = torch.where(mask, ids, (ids + 7) % 120)
    got, want = ours(other, mask).hidden, ours(ids, mask).hidden
    torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=1e-6)
    alone = ours(ids[1:2, :4]).hidden[0]
    torch.testing.assert_close(want[1, :4], alone, rtol=0, atol=1e-6)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    ours = Bert(BertConfig(**SMALL), torch.Generator().manual_seed(0)).train()
    ids, mask, _ = batch(ours)
    assert not torch.equal(ours(ids, mask).hidden, ours(ids, mask).hidden)
    ours.eval()
    assert torch.equal(ours(ids, mask).hidden, ours(ids, mask).hidden)


def test_gradients_reach_every_parameter_of_a_classifier():
    ours = Bert(BertConfig(**SMALL, head="classification", labels=("a", "b")), torch.Generator().manual_seed(0))
    ids, mask, segments = batch(ours, pairs=True)
    ours(ids, mask, segments).logits.square().sum().backward()
    without = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a key's bias adds the same number to a whole row of scores, which the softmax does not see
    assert [name for name in without if not name.endswith("key.bias")] == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"keep_hidden": (4,)}, "keep_hidden asks for layer 4, but this model has layers 0 to 3"),
        ({"keep_hidden": (-1,)}, "layer -1"),
        ({"keep_scores": (0,)}, "keep_scores asks for layer 0, but this model has layers 1 to 3"),
        ({"keep_scores": (1, 4)}, "layer 4"),
        ({"keep_relations": (0,)}, "keep_relations asks for layer 0, but this model has layers 1 to 3"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(asked, words):
    ours = Bert(BertConfig(**SMALL))
    with pytest.raises(UserError, match=words):
        ours(torch.zeros(1, 2, dtype=torch.long), **asked)


def test_a_sequence_that_is_too_long_is_refused():
    ours = Bert(BertConfig(**SMALL))
    ours(torch.zeros(1, 32, dtype=torch.long))
    with pytest.raises(UserError, match=r"33 tokens is longer than max_position_embeddings=32; cut it"):
        ours(torch.zeros(1, 33, dtype=torch.long))


# -- files that are refused --------------------------------------------------


def edit_config(folder, **changes):
    """Change a checkpoint's config.json."""
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))


def cut(folder):
    """Cut the weights off in the middle."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(name):
    """Return a function that takes a tensor out of a checkpoint."""

    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return edit


REFUSED = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; name the folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; copy"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which can run code; convert it",
    ),
    "cut-off weights": (cut, "model.safetensors is damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config is not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is not JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
    "roberta": (lambda f: edit_config(f, model_type="roberta"), "describes a 'roberta' model"),
    "a decoder": (lambda f: edit_config(f, is_decoder=True), "asks for relative positions or a decoder"),
    "relative positions": (
        lambda f: edit_config(f, position_embedding_type="relative_key"),
        "asks for relative positions",
    ),
    "another width": (
        lambda f: edit_config(f, hidden_size=28),
        r"has shape \(.*24.*\), but config.json asks for \(.*28.*\)",
    ),
    "another vocabulary": (
        lambda f: edit_config(f, vocab_size=99),
        "word_embeddings.*the two files are not of one",
    ),
    "bad heads": (
        lambda f: edit_config(f, num_attention_heads=5),
        "config.json: hidden_size=24 must be a multiple of num_attention_heads=5; try hidden_size=25",
    ),
    "a layer more": (
        lambda f: edit_config(f, num_hidden_layers=4),
        r"has no 'bert.encoder.layer.3.*BertModel",
    ),
    "a tensor missing": (
        drop("encoder.layer.1.output.dense.weight"),
        "has no 'bert.encoder.layer.1.output.dense.weight'",
    ),
    "no head, though the config has one": (
        lambda f: edit_config(f, architectures=["BertForSequenceClassification"]),
        "has no 'classifier.weight', which a BertForSequenceClassification needs",
    ),
    "half a layer": (
        lambda f: edit_config(f, num_hidden_layers=2.5),
        "num_hidden_layers=2.5 must be a whole number",
    ),
    "a text for a number": (
        lambda f: edit_config(f, hidden_size="24"),
        "hidden_size='24' must be a whole number",
    ),
    "true for a number": (
        lambda f: edit_config(f, vocab_size=True),
        "vocab_size=True must be a whole number",
    ),
    "no dropout named": (
        lambda f: edit_config(f, hidden_dropout_prob=None),
        "hidden_dropout_prob=None must be a num",
    ),
    "a negative size": (
        lambda f: edit_config(f, vocab_size=-1),
        "config.json: vocab_size=-1 must be at least 1",
    ),
    "an unknown activation": (lambda f: edit_config(f, hidden_act="relu"), "config.json: hidden_act='relu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_checkpoint_is_refused_in_one_sentence(tmp_path, case):
    break_it, words = REFUSED[case]
    break_it(make(tmp_path, **SMALL))
    with pytest.raises(UserError, match=words) as caught:
        Bert.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_stored_classifier_of_another_size_than_its_config_is_refused(tmp_path):
    make(tmp_path, transformers.BertForSequenceClassification, num_labels=3, **SMALL)
    edit_config(tmp_path, id2label={"0": "a", "1": "b"})
    with pytest.raises(UserError, match=r"'classifier\.(weight|bias)' has shape \(3"):
        Bert.from_pretrained(tmp_path)


def test_a_folder_or_name_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HUB", "0")
    with pytest.raises(UserError):
        Bert.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="minilm-l6"):
        Bert.from_pretrained("minilm-l66")


# -- the configuration -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"type_vocab_size": 0}, "type_vocab_size=0"),
        (
            {"hidden_size": 310},
            "hidden_size=310 must be a multiple of num_attention_heads=12; try hidden_size=312",
        ),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must be at least 0 and below 1"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps=-1e-12 must be at least 0"),
        ({"initializer_range": -0.02}, "initializer_range=-0.02"),
        ({"pad_token_id": 30522}, "pad_token_id=30522 must be a token of the vocabulary, 0 to 30521"),
        ({"hidden_act": "swish"}, "hidden_act='swish' is not one of gelu, gelu_new"),
        ({"head": "ranking"}, "head='ranking' is not one of None, 'classification', 'regression', 'masked_lm'"),
        ({"head": "regression"}, "head='regression' gives one score, got labels=()"),
        ({"head": "regression", "labels": ("a", "b")}, "name that one: labels=('score',)"),
        ({"head": "classification"}, "needs at least two labels"),
        ({"head": "classification", "labels": ("only",)}, "needs at least two labels"),
        ({"head": "classification", "labels": ("a", "b", "a")}, "holds a name twice"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError) as caught:
        BertConfig(**changes)
    assert words in str(caught.value)
    with pytest.raises(UserError):
        BertConfig().replace(**changes)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (BertConfig.bert_base(), 109.48),
        (BertConfig.minilm_l6(), 22.71),
        (BertConfig.tinybert4(), 14.35),
        (BertConfig.tinybert6(), 66.96),
    ],
    ids=["bert_base", "minilm_l6", "tinybert4", "tinybert6"],
)
def test_the_named_sizes_have_the_parameters_of_the_papers(config, millions):
    with torch.device("meta"):  # shapes without memory
        ours = Bert(config)
    theirs = transformers.BertConfig(**{k: v for k, v in config.to_dict().items() if k not in ("architectures",)})
    with torch.device("meta"):
        reference_model = transformers.BertModel(theirs)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference_model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("4x312", (4, 312, 12, 1200)),
        ("6x768", (6, 768, 12, 3072)),
        (" 2X128 ", (2, 128, 8, 512)),
        ("3×70", (3, 70, 10, 280)),
        ("1x7", (1, 7, 7, 28)),
    ],
)
def test_a_shape_is_read(shape, sizes):
    config = BertConfig.parse(shape)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    assert tuple(getattr(config, name) for name in names) == sizes
    assert BertConfig.parse("4x312") == BertConfig.tinybert4()
    assert BertConfig.parse("6x768") == BertConfig.tinybert6()


@pytest.mark.parametrize("shape", ["", "312", "4x", "x312", "4x312x12", "four", "-4x312", "0x312", "4x0"])
def test_a_shape_that_cannot_be_is_refused(shape):
    with pytest.raises(UserError, match=r"write for example 4x312|at least 1"):
        BertConfig.parse(shape)


def test_a_config_survives_its_file():
    config = BertConfig.tinybert4(head="classification", labels=("ja", "nein"), hidden_act="gelu_new")
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert BertConfig.from_dict({}) == BertConfig.bert_base()
    assert BertConfig.from_dict({"hidden_dropout_prob": 0, "pad_token_id": None}).hidden_dropout_prob == 0.0


def test_bert_and_its_config_load_without_transformers():
    code = (
        "import sys, tinylib.bert; from tinylib.bert import BertConfig; "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'datasets', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_set_dropout_reaches_every_dropout_and_leaves_the_config():
    config = BertConfig(**SMALL)
    model = Bert(config, torch.Generator().manual_seed(0)).train()
    ids = torch.randint(5, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(ids).hidden, model(ids).hidden), "BERT's own dropout is on"
    model.set_dropout(0.0)
    assert torch.equal(model(ids).hidden, model(ids).hidden)
    assert model.config.hidden_dropout_prob == 0.1
    with pytest.raises(UserError, match=r"p=1\.0 must be at least 0 and below 1"):
        model.set_dropout(1.0)


def test_loading_and_asking_a_model_loads_no_compiler(tmp_path):
    """PyTorch's compiler takes a second and sixty megabytes to load; a model without memory must not ask for it."""
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30)
    Bert(config, torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "model")
    code = f"""
import sys, torch
from tinylib.bert import Bert
with torch.inference_mode():
    Bert.from_pretrained({str(tmp_path / "model")!r})(torch.ones(1, 4, dtype=torch.long))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
