"""Any encoder as a teacher: states, scores and value relations against transformers' own, head counts that differ, the commands.

The checkpoints are small random ones of each architecture, made by transformers, with vocabularies learnt on the spot.
"""

import csv
import inspect
import json
import math
import shutil
import types

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import write_tokenizer

from tinylib import cli, distill, encoders, general, layers, models, text, train
from tinylib.bert import Bert, BertConfig
from tinylib.encoders import Encoder
from tinylib.errors import UserError, UserNote
from tinylib.losses import attention_divergence_loss, attention_loss, group_heads, match_heads
from tinylib.student import automatic_start, new_student, start_basis
from tinylib.text import Encoded
from tinylib.train import Examples, fit, loader

GOOD = ("a warm and clever film", "great fun", "a fine story")
BAD = ("a dull mess", "boring and cold", "a bad story")
WORDS = ("slow", "quick", "long", "short", "new", "old", "french", "silent", "early", "late", "big", "small")
TEXTS = [f"{stem} , {word} and {other}" for stem in GOOD + BAD for word in WORDS[:8] for other in WORDS[8:]]
LABELS = ["positive" if line.startswith(GOOD) else "negative" for line in TEXTS]

V, C, L, H = 60, 32, 3, 4  # of the models without a tokenizer
SIZES = {
    "vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip
DISTIL = {
    "vocab_size": V, "dim": C, "n_layers": L, "n_heads": H, "hidden_dim": 48, "max_position_embeddings": 40,
    "initializer_range": 0.3,
}  # fmt: skip
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "pad_token_id": 0}
# name -> (model_type, its config, whether its scores can be had before the softmax)
KINDS = {
    "bert": ("bert", SIZES, True),
    "roberta": ("roberta", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}, True),
    "xlm-roberta": ("xlm-roberta", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}, True),
    "camembert": ("camembert", SIZES | {"type_vocab_size": 1, "pad_token_id": 1}, True),
    "mpnet": ("mpnet", SIZES | {"pad_token_id": 1}, True),
    "distilbert": ("distilbert", DISTIL, True),
    "electra": ("electra", SIZES | {"embedding_size": C}, True),
    "electra-narrow": ("electra", SIZES | {"embedding_size": 12}, True),
    "albert": ("albert", SIZES | {"embedding_size": 12, "num_hidden_groups": 2, "pad_token_id": 0}, True),
    "deberta-v2": ("deberta-v2", SIZES | DEBERTA, False),
    "modernbert": ("modernbert", SIZES | {"pad_token_id": 0, "local_attention": 8}, False),
}
FOREIGN = [name for name in KINDS if name != "bert"]
SCORED = [name for name in FOREIGN if KINDS[name][2]]
FALLBACK = [name for name in FOREIGN if not KINDS[name][2]]
# what each layer calls its query, key and value: written down here anew, from transformers' parameter names
NAMES = {
    "roberta": "encoder.layer.{}.attention.self.{}", "mpnet": "encoder.layer.{}.attention.attn.{}",
    "distilbert": "transformer.layer.{}.attention.{}_lin",
}  # fmt: skip


def make(folder, name, head=True, labels=("negative", "positive"), **changes):
    """Write a random checkpoint of an architecture by transformers' own classes."""
    kind, sizes, _ = KINDS[name]
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    if head:
        config.id2label, config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():  # the norms too: ones and zeros would hide a mistake
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Give a folder with a classifier for each architecture."""
    place = tmp_path_factory.mktemp("encoders")
    return {name: make(place / name, name) for name in KINDS}


def eager(folder):
    """Load a checkpoint by transformers alone, with the attention that tells its weights."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def batch(model, B=4, T=9, seed=0):
    """Return random ids without padding tokens among them, a mask with padding at the end, and segments."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, T), generator=g)
    mask = torch.arange(T)[None] < torch.randint(2, T + 1, (B,), generator=g)[:, None]
    mask[0] = True
    pad = model.config.pad_token_id or 0
    return ids.masked_fill(~mask, pad), mask, (torch.arange(T) > T // 2).long().expand(B, T) * mask


def told_by_transformers(folder, ids, mask, segments):
    """Run transformers' own model; segments only where it knows more than one."""
    model = eager(folder)
    more = {"token_type_ids": segments} if (getattr(model.config, "type_vocab_size", None) or 0) > 1 else {}
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True, **more)


ALL = {"keep_hidden": range(L + 1), "keep_scores": range(1, L + 1)}

# -- the wrapper against transformers ---------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_hidden_states_are_transformers_own(folders, name):
    model = encoders.load(folders[name])
    assert isinstance(model, Bert if name == "bert" else Encoder)
    inputs = batch(model)
    told = told_by_transformers(folders[name], *inputs)
    with torch.inference_mode():
        out = model(*inputs, **ALL)
    real = inputs[1]
    torch.testing.assert_close(out.logits, told.logits, atol=2e-5, rtol=1e-4)
    assert len(told.hidden_states) == L + 1
    for m in range(L + 1):
        torch.testing.assert_close(out.hidden_states[m][real], told.hidden_states[m][real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.hidden[real], out.hidden_states[L][real])


@pytest.mark.parametrize("name", KINDS)
def test_the_softmax_of_the_scores_is_the_attention_of_transformers(folders, name):
    model = encoders.load(folders[name])
    inputs = batch(model)
    told = told_by_transformers(folders[name], *inputs).attentions
    with torch.inference_mode():
        scores = model(*inputs, **ALL).scores
    assert sorted(scores) == list(range(1, L + 1))
    real = inputs[1]
    for m in range(1, L + 1):
        weights = scores[m].masked_fill(~real[:, None, None, :], -math.inf).softmax(-1)
        rows = real[:, None, :].expand(-1, H, -1)  # what padding looks at is nobody's
        torch.testing.assert_close(weights[rows], told[m - 1][rows], atol=1e-5, rtol=0)
        assert weights[rows].std() > 0.02, "all alike: the test would see nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_half_precision_rounds_to_zero_has_a_finite_logarithm(folders, monkeypatch, dtype):
    model = encoders.load(folders[FALLBACK[0]])
    inputs, forward = batch(model), model.model.forward

    def rounded(**more):
        out = forward(**more)
        out.attentions = tuple(weights.masked_fill(weights < 0.1, 0.0).to(dtype) for weights in out.attentions)
        return out

    monkeypatch.setattr(model.model, "forward", rounded)
    with torch.inference_mode():
        scores = model(*inputs, keep_scores=(1,)).scores[1]
    assert scores.min() == torch.tensor(torch.finfo(torch.float32).tiny).log()


@pytest.mark.parametrize("name", ["roberta", "mpnet", "distilbert", "electra", "electra-narrow"])
def test_scores_and_relations_are_those_computed_by_hand_from_the_files(folders, name):
    stored, model = load_file(folders[name] / "model.safetensors"), encoders.load(folders[name])
    kind = KINDS[name][0]
    pattern = f"{kind}." + NAMES.get(kind, NAMES["roberta"])
    long = {"q": "query", "k": "key", "v": "value"} if kind in ("roberta", "electra") else {c: c for c in "qkv"}
    ids, mask, segments = batch(model)
    with torch.inference_mode():
        out = model(ids, mask, segments, **ALL, keep_relations=range(1, L + 1))
    for m in range(1, L + 1):
        x = out.hidden_states[m - 1].double()
        q, k, v = (project(x, stored, pattern.format(m - 1, long[c])) for c in "qkv")
        wanted = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(C / H)
        if kind == "mpnet":
            wanted += mpnet_bias(stored["mpnet.encoder.relative_attention_bias.weight"].double(), ids.shape[1])
        torch.testing.assert_close(out.scores[m].double(), wanted, atol=1e-4, rtol=1e-4)
        alike = torch.einsum("bthd,bshd->bhts", v, v) / math.sqrt(C / H)
        torch.testing.assert_close(out.relations[m].double(), alike, atol=1e-4, rtol=1e-4)


def project(x, stored, name):
    """Return x·Wᵀ + b of the stored matrix, cut into heads: (B, T, H, D)."""
    return (x @ stored[f"{name}.weight"].double().T + stored[f"{name}.bias"].double()).unflatten(-1, (H, -1))


def mpnet_bias(table, T):
    """Return the bias of each head and distance (H, T, T), T ≤ 8: a bucket a distance, 16 more for keys ahead."""
    buckets = [[abs(i - j) + (16 if j > i else 0) for j in range(T)] for i in range(T)]
    assert T <= 9, "farther away several distances share a bucket"
    buckets = [[b if abs(i - j) < 8 else 8 + (16 if j > i else 0) for j, b in enumerate(row)] for i, row in enumerate(buckets)]
    return table[torch.tensor(buckets)].permute(2, 0, 1)


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing_that_real_tokens_get(folders, name):
    model = encoders.load(folders[name])
    ids, _, segments = batch(model, B=2, T=6)
    alone = torch.ones_like(ids, dtype=torch.bool)
    wide = torch.nn.functional.pad(ids, (0, 5), value=17)  # a word stands in the padding: the mask alone must decide
    mask = torch.nn.functional.pad(alone, (0, 5), value=False)
    with torch.inference_mode():
        short = model(ids, alone, segments, **ALL)
        long = model(wide, mask, torch.nn.functional.pad(segments, (0, 5)), **ALL)
    torch.testing.assert_close(long.logits, short.logits, atol=1e-5, rtol=1e-4)
    for m in range(1, L + 1):
        torch.testing.assert_close(long.hidden_states[m][:, :6], short.hidden_states[m], atol=2e-5, rtol=1e-4)
        ours, theirs = (out.scores[m][:, :, :6, :6].log_softmax(-1) for out in (long, short))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FOREIGN)
def test_the_config_says_what_the_model_is(folders, name):
    model = encoders.load(folders[name])
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (C, L, H)
    assert (config.vocab_size, config.intermediate_size, config.labels) == (V, 48, ("negative", "positive"))
    offset = 2 if name in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0  # positions begin behind the padding's number
    assert config.max_position_embeddings == 40 - offset
    assert config.pad_token_id == eager(folders[name]).config.pad_token_id
    assert model.has_scores == KINDS[name][2]
    longest = torch.full((1, config.max_position_embeddings), 5)
    with torch.inference_mode():
        assert model(longest).logits.shape == (1, 2)
        with pytest.raises(UserError, match=f"{longest.shape[1] + 1} tokens is longer than the {longest.shape[1]} positions"):
            model(torch.full((1, longest.shape[1] + 1), 5))


def test_layers_that_are_not_there_are_refused(folders):
    model = encoders.load(folders["roberta"])
    with pytest.raises(UserError, match=f"keep_scores asks for layer 0, but this model has layers 1 to {L}"):
        model(torch.full((1, 4), 5), keep_scores=[0])
    with pytest.raises(UserError, match="keep_hidden asks for layer 9"):
        model(torch.full((1, 4), 5), keep_hidden=[9])


def test_a_wrapped_model_is_saved_and_found_again(folders, tmp_path):
    model = encoders.load(folders["mpnet"])
    again = encoders.load(model.save_pretrained(tmp_path / "again"))
    inputs = batch(model)
    with torch.inference_mode():
        assert torch.equal(model(*inputs).logits, again(*inputs).logits)
    assert layers.weights_hash(model) == layers.weights_hash(again)
    assert layers.weights_hash(model) != layers.weights_hash(encoders.load(folders["roberta"]))


def test_a_classifier_of_several_labels_is_no_teacher_but_has_an_encoder(folders, tmp_path):
    shutil.copytree(folders["roberta"], tmp_path / "multi")
    config = json.loads((tmp_path / "multi" / "config.json").read_text(encoding="utf-8"))
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "multi" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="config.json describes a classifier that gives a text several labels"):
        encoders.load(tmp_path / "multi")
    ids = torch.arange(5, 12)[None]
    bare, whole = encoders.load(tmp_path / "multi", labels=()), encoders.load(folders["roberta"])
    assert bare.config.head is None
    assert torch.equal(bare(ids).hidden, whole(ids).hidden)
    assert encoders.load(tmp_path / "multi", labels=("a", "b", "c")).config.outputs == 3


def test_a_new_head_starts_from_the_generator_and_leaves_the_encoder(folders):
    three = ("a", "b", "c")
    state = torch.random.get_rng_state()
    one, two, other = (
        encoders.load(folders["roberta"], labels=three, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state moved"
    inputs = batch(one)
    with torch.inference_mode():
        logits = [model(*inputs).logits for model in (one, two, other)]
    assert one.config.labels == three
    assert logits[0].shape == (4, 3)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    torch.testing.assert_close(one(*inputs).hidden, encoders.load(folders["roberta"])(*inputs).hidden)


def test_loading_leaves_the_gpus_generators_alone(folders, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    encoders.load(folders["roberta"], labels=("a", "b", "c"))
    assert not seeded


# -- head counts that differ -------------------------------------------------


def test_equal_head_counts_are_compared_as_ever():
    a, b = torch.randn(2, 3, 4, 5, 5)
    same = match_heads(a, b)
    assert same[0] is a
    assert same[1] is b


@pytest.mark.parametrize(("student", "teacher"), [(4, 12), (12, 4), (8, 12), (5, 12), (1, 4)])
def test_groups_of_heads_are_compared_by_their_means(student, teacher):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, student, 5, 5, generator=g, dtype=torch.float64)
    b = torch.randn(2, teacher, 5, 5, generator=g, dtype=torch.float64)
    groups = math.gcd(student, teacher)
    wanted = 0.0
    for i in range(groups):
        ours = sum(a[:, h] for h in range(student) if h * groups // student == i) / (student // groups)
        theirs = sum(b[:, h] for h in range(teacher) if h * groups // teacher == i) / (teacher // groups)
        wanted += (ours - theirs).square().mean().item() / groups
    assert attention_loss(*match_heads(a, b)).item() == pytest.approx(wanted, rel=1e-12)
    assert attention_loss(*match_heads(a, a.clone())).item() == 0.0
    copied = group_heads(b, groups).repeat_interleave(student // groups, 1)  # each student head says what its group says
    assert attention_loss(*match_heads(copied, b)).item() == pytest.approx(0.0, abs=1e-24)


def test_a_group_of_heads_scores_as_one_wide_head():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, 6, 8, generator=g, dtype=torch.float64)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8)
    wide_q, wide_k = (x.transpose(1, 2).flatten(2) for x in (q, k))
    torch.testing.assert_close(group_heads(scores, 1)[:, 0], wide_q @ wide_k.transpose(-2, -1) / (4 * math.sqrt(8)))
    with pytest.raises(UserError, match="groups=3 must divide the 4 heads"):
        group_heads(scores, 3)


@pytest.mark.parametrize("heads", [2, 3, 8, 6])
def test_a_student_cut_with_other_heads_gives_the_mean_scores_of_its_group(heads):
    config = BertConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3,
        head="classification", labels=("no", "yes"), max_position_embeddings=16,
    )  # fmt: skip
    teacher = Bert(config, torch.Generator().manual_seed(0)).eval()
    # heads of width 24 hold a group's scores whole, so nothing but the grouping is tested
    student = new_student(teacher, config.replace(num_attention_heads=heads, head_dim=24), (1, 2), "teacher").eval()
    ids = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = (m(ids, keep_scores=[1], keep_hidden=[0]) for m in (student, teacher))
    torch.testing.assert_close(ours.hidden_states[0], theirs.hidden_states[0], atol=1e-5, rtol=1e-4)
    said, told = match_heads(ours.scores[1], theirs.scores[1])
    torch.testing.assert_close(said, told, atol=1e-4, rtol=1e-4)
    assert said.shape[1] == math.gcd(heads, 4)
    assert told.std() > 0.05


@pytest.mark.parametrize(("shape", "heads"), [("2x16", 4), ("2x18", 9), ("2x15", 5)])
def test_the_student_gets_the_teachers_heads_where_they_divide_its_width(folders, shape, heads):
    assert layers.student_config(encoders.load(folders["roberta"]), shape).num_attention_heads == heads


def test_the_cache_keeps_the_means_of_the_groups(folders):
    teacher, examples = encoders.load(folders["mpnet"]), random_text(12)
    kept = [layers.TeacherOutputs(teacher, examples, (0,), (1, 3), heads=n) for n in (2, 4)]
    sizes = [layers.TeacherOutputs.bytes_needed(teacher, examples, (), (1, 3), heads=n) for n in (2, 4, None)]
    assert sizes[0] * 2 == sizes[1] == sizes[2]
    two, four = (outputs.batch([3, 5], 9, torch.device("cpu")) for outputs in kept)
    torch.testing.assert_close(two.scores[3], group_heads(four.scores[3], 2), atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(two.hidden_states[0], four.hidden_states[0])


# -- what is learnt from each architecture (issue 6, must hold 5) -------------


def random_text(N=64, seed=0, low=3):
    """Return random sentences of 4 to 9 tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(low, V, (int(torch.randint(4, 10, (), generator=g)),), generator=g) for _ in range(N))
    return Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids), pad_id=0))


def learn(teacher, shape="2x24", weights=None, start=None, steps=120, lr=3e-3):
    """Train a student on the intermediate losses; return its attention loss on the text, before and after."""
    config, examples = layers.student_config(teacher, shape), random_text()
    layer_map = layers.choose_map(teacher.config, config, None)
    start = start or automatic_start(teacher, config.hidden_size)
    student = new_student(teacher, config, layer_map, start, torch.Generator().manual_seed(0))
    pair = layers.Distiller(student, layers.first_projections(teacher, config, start, 0))
    weights = weights or layers.Weights()
    losses = layers.matching_loss(teacher, layer_map, weights)
    wanted = layers.Wanted.by(layer_map, weights)
    told = wanted.teacher_hidden, wanted.teacher_scores, wanted.teacher_relations
    kept = layers.TeacherOutputs(teacher, examples, *told, heads=math.gcd(H, config.num_attention_heads))

    @torch.no_grad()
    def measured() -> float:
        pair.eval()
        rows = [(losses(pair, b)["attention"].item(), int(b["mask"].sum())) for b in loader(examples, 16, shuffle=False)]
        return sum(value * n for value, n in rows) / sum(n for _, n in rows)

    before = measured()
    fit(pair, loader(examples, 16), layers.matching_loss(teacher, layer_map, weights, kept), epochs=1000, steps=steps, lr=lr)
    return before, measured()


@pytest.fixture(scope="module")
def milder(tmp_path_factory):
    """Give a function that loads a teacher whose weights are drawn smaller: scores near 1, as a trained model's are."""
    place = tmp_path_factory.mktemp("milder")
    return lambda name: encoders.load(make(place / name, name, initializer_range=0.1))


LEARNT = ["bert", "roberta", "mpnet", "distilbert", "electra", "electra-narrow", "albert", "deberta-v2"]


@pytest.mark.parametrize("name", LEARNT)
def test_the_attention_loss_falls_to_half_within_200_steps(milder, name):
    before, after = learn(milder(name))
    print(f"{name}: attention loss {before:.4g} at step 0, {after:.4g} at step 120 ({after / before:.0%})")
    assert after <= before / 2


@pytest.mark.parametrize(("shape", "heads"), [("2x18", 9), ("2x15", 5)])
def test_it_falls_with_other_head_counts_too(milder, shape, heads):
    teacher = milder("roberta")
    assert layers.student_config(teacher, shape).num_attention_heads == heads
    before, after = learn(teacher, shape, steps=100)
    print(f"{heads} heads: attention loss {before:.4g} at step 0, {after:.4g} at step 100 ({after / before:.0%})")
    assert after <= before / 2


def test_value_relations_are_learnt_from_a_foreign_teacher(milder):
    before, after = learn(milder("distilbert"), weights=layers.Weights(attention_on="values"), steps=100)
    assert after <= before / 2


def test_a_fallback_says_so_once_and_takes_the_divergence(milder):
    teacher, usual = milder("deberta-v2"), layers.Weights()
    with pytest.warns(UserNote, match="'deberta-v2' model gives its attention weights after the softmax only") as said:
        assert layers.fitting(teacher, usual, say=True).attention_on == "divergence"
    assert len(said) == 1
    for model in (milder("roberta"), milder("bert")):
        assert layers.fitting(model, usual, say=True) is usual
    with pytest.raises(UserError, match="the values of a 'deberta-v2' model cannot be read; choose attention_on='divergence'"):
        teacher(torch.full((1, 4), 5), keep_relations=[1])


def test_the_divergence_is_zero_at_equality_and_pytorchs_elsewhere():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5, 5, generator=g, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([3, 5, 2])[:, None]
    assert attention_divergence_loss(a, a + 3.0, mask).item() == pytest.approx(0.0, abs=1e-12), "a constant a query is nothing"
    rows = [
        torch.nn.functional.kl_div(a[i, h, t, :n].log_softmax(-1), b[i, h, t, :n].softmax(-1), reduction="sum").item()
        for i, n in enumerate((3, 5, 2)) for h in range(4) for t in range(n)
    ]  # fmt: skip
    assert attention_divergence_loss(a, b, mask).item() == pytest.approx(sum(rows) / len(rows), rel=1e-9)


# -- a student of a foreign teacher -------------------------------------------


def test_a_student_starts_from_the_tables_that_the_teacher_has(folders):
    for name in ("roberta", "mpnet", "distilbert", "electra", "deberta-v2"):
        teacher = encoders.load(folders[name])
        shape = layers.student_config(teacher, f"2x{C}")
        student = new_student(teacher, shape, (1, 2), "embeddings", torch.Generator().manual_seed(0))
        stored = load_file(folders[name] / "model.safetensors")
        stored = {full.split(".embeddings.")[-1]: tensor for full, tensor in stored.items() if ".embeddings." in full}
        assert torch.equal(student.embeddings.word.weight, stored["word_embeddings.weight"])
        assert torch.equal(student.embeddings.norm.weight, stored["LayerNorm.weight"])
        if name != "deberta-v2":
            first = 2 if name in ("roberta", "mpnet") else 0
            assert torch.equal(student.embeddings.position.weight, stored["position_embeddings.weight"][first:])
        config = student.config
        assert (config.vocab_size, config.max_position_embeddings) == (V, teacher.config.max_position_embeddings)
        assert config.type_vocab_size == 2
        assert config.pad_token_id == teacher.config.pad_token_id
        with torch.inference_mode():
            ids = torch.randint(3, V, (2, 6))
            assert student.eval()(ids, segments=torch.ones_like(ids)).logits.shape == (2, 2)


def test_an_electras_word_table_is_read_through_its_projection(folders):
    teacher, stored = encoders.load(folders["electra-narrow"]), load_file(folders["electra-narrow"] / "model.safetensors")
    wanted = stored["electra.embeddings.word_embeddings.weight"] @ stored["electra.embeddings_project.weight"].T
    tables, norm = teacher.embedding_tables()
    torch.testing.assert_close(tables["word"], wanted)
    assert norm is None
    assert tables["position"].shape == (40, C)
    basis = start_basis(teacher, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
def test_a_student_of_the_teachers_own_size_is_the_teacher(folders, name):
    teacher = encoders.load(folders[name])
    config = layers.student_config(teacher, f"{L}x{C}").replace(intermediate_size=48)
    student = new_student(teacher, config, (1, 2, 3), "teacher", torch.Generator().manual_seed(0)).eval()
    ids, mask, segments = batch(teacher)
    segments = torch.zeros_like(segments)
    with torch.inference_mode():
        ours, theirs = (m(ids, mask, segments, **ALL) for m in (student, teacher))
    for m in range(L + 1):
        torch.testing.assert_close(ours.hidden_states[m][mask], theirs.hidden_states[m][mask], atol=2e-3, rtol=1e-3)
    if name == "roberta":  # whose head is of BERT's kind
        torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-3, rtol=1e-3)


def test_starts_fall_back_as_far_as_the_teacher_asks(folders):
    roberta, deberta = (encoders.load(folders[name]) for name in ("roberta", "deberta-v2"))
    assert [automatic_start(roberta, 16), automatic_start(deberta, 16)] == ["teacher", "embeddings"]
    settings = distill.Settings(student="2x16")
    for teacher in (roberta, deberta):
        student, projections = distill.first_student(teacher, settings)
        fresh = layers.first_projections(teacher, student.config, "general", 0)
        pairs = zip(projections.parameters(), fresh.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "no general student is shipped for it"
    texts = random_text(32)
    made = (distill.first_student(roberta, settings.replace(start=start), texts) for start in ("general", "states"))
    assert torch.equal(*(projections.maps[0].weight for _, projections in made)), "with texts: its teacher's states"
    assert distill.first_student(deberta, settings, texts)[0].config.hidden_size == 16
    with pytest.raises(UserError, match="layers of a 'deberta-v2' model cannot be cut to size; choose start='embeddings'"):
        distill.first_student(deberta, settings.replace(start="teacher"))
    with pytest.warns(UserNote, match=f"a student of width 64 is wider than its teacher \\({C}\\), so it starts from random"):
        student, _ = distill.first_student(roberta, settings.replace(student="2x64"))
    assert student.config.hidden_size == 64
    assert layers.first_projections(roberta, student.config, "general", 0).maps[0].weight.shape == (C, 64)


def test_the_shipped_general_student_goes_to_bert_with_its_own_vocabulary_alone(tmp_path, folders, monkeypatch):
    made = models.shipped_folder() / "general-4x312"
    sizes = general.card(made)["teacher"]
    config = BertConfig(**sizes)
    teacher = types.SimpleNamespace(config=config, tokenizer_folder=made)
    shape = BertConfig.parse("4x312")
    check = inspect.unwrap(general.shipped_for)
    assert check(teacher, shape) == made
    words = list(text.load_tokenizer(made).get_vocab())
    swapped = {word: i for i, word in enumerate(sorted(words))}
    write_tokenizer(tmp_path, sorted(swapped, key=swapped.get))
    teacher.tokenizer_folder = tmp_path
    assert check(teacher, shape) is None
    foreign = encoders.load(folders["roberta"])
    foreign.config = config
    assert check(foreign, shape) is None


def test_a_run_reads_the_cache_and_ends_in_a_bert(milder, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLIB_HOME", str(tmp_path))
    teacher, examples = milder("mpnet"), random_text(32)
    settings = distill.Settings(student="2x18", epochs_intermediate=4, epochs_prediction=20, lr_prediction=5e-3, batch_size=16)
    result = distill.distill(teacher, examples, settings)  # 9 heads of the student's, 4 of the teacher's
    told = train.predict(teacher, examples.encoded)
    first = train.predict(distill.first_student(teacher, settings)[0].eval(), examples.encoded)
    assert (train.predict(result.student, examples.encoded) - told).square().mean() < (first - told).square().mean()
    assert isinstance(result.student, Bert)
    assert teacher.training is False
    with pytest.raises(UserError, match="the teacher is in training mode"):
        layers.teacher_forward(teacher.train(), examples.collate([0]))


# -- the commands, with tokenizers of their own --------------------------------


def byte_level(folder, config_file):
    """Write a byte-level BPE learnt from the texts, as RoBERTa has it; without the configs its class is told by the model alone."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learnt = tokenizers.ByteLevelBPETokenizer()
    learnt.train_from_iterator(TEXTS, vocab_size=330, special_tokens=special, show_progress=False)
    folder.mkdir()
    learnt.save_model(str(folder))
    if config_file:
        transformers.RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return learnt.get_vocab_size()


def word_pieces(folder, kind, special):
    """Write word pieces of the texts' words and letters."""
    words = sorted({word for line in TEXTS for word in line.split()})
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    write_tokenizer(folder, pieces, kind)
    return len(pieces)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Give a folder with pretrained models that have tokenizers, tables, and a RoBERTa fine-tuned by the command itself."""
    folder = tmp_path_factory.mktemp("commands")
    for name, with_config in (("roberta", False), ("saved", True)):
        count = byte_level(folder / name, with_config)
        make(folder / name, "roberta", head=False, vocab_size=count, initializer_range=0.2)
    count = word_pieces(folder / "distilbert", transformers.DistilBertTokenizerFast, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    make(folder / "distilbert", "distilbert", vocab_size=count, initializer_range=0.2)
    count = word_pieces(folder / "deberta", transformers.BertTokenizerFast, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    make(folder / "deberta", "deberta-v2", vocab_size=count)
    for name, rows, header in (
        ("films", zip(TEXTS, LABELS, strict=True), ("text", "label")),
        ("pairs", zip(TEXTS, WORDS * 16, LABELS, strict=True), ("text", "text_pair", "label")),
    ):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    options = ["--data", f"{folder}/films.csv", "--epochs", "10", "--lr", "5e-3", "--batch-size", "16"]
    assert cli.main(["teach", "--base", f"{folder}/roberta", *options, "--out", f"{folder}/teacher"]) == 0
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def figures(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_a_roberta_is_taught_distilled_and_measured_by_the_commands(place, tmp_path, capsys):
    assert figures(place / "teacher")["accuracy"] > 0.9
    told = transformers.AutoModelForSequenceClassification.from_pretrained(place / "teacher")
    assert told.config.model_type == "roberta"
    assert told.config.id2label == {0: "negative", 1: "positive"}
    options = ["--data", f"{place}/films.csv", "--student", "2x32", "--epochs-intermediate", "6", "--epochs-prediction", "6"]
    options += ["--batch-size", "8"]
    assert cli.main(["distill", "--teacher", f"{place}/teacher", *options, "--out", f"{tmp_path}/student"]) == 0
    report = figures(tmp_path / "student")
    assert report["retention"] > 0.9
    assert report["teacher_accuracy"] == figures(place / "teacher")["accuracy"]
    assert json.loads((tmp_path / "student" / "config.json").read_text())["model_type"] == "bert"
    capsys.readouterr()
    for model in (place / "teacher", tmp_path / "student"):
        assert cli.main(["evaluate", "--model", str(model), "--data", f"{place}/films.csv", "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["accuracy"] == figures(model)["accuracy"]
    pipeline_agrees(tmp_path / "student", TEXTS[::9])


def pipeline_agrees(folder, texts, pairs=None):
    """Check transformers' pipeline on a folder against our own logits; return the pipeline."""
    model, tokenizer = encoders.load(folder), text.load_tokenizer(folder)
    ours = train.predict(model, text.encode(tokenizer, texts, pairs)).softmax(-1)
    classify = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    inputs = texts if pairs is None else [{"text": a, "text_pair": b} for a, b in zip(texts, pairs, strict=True)]
    for told, wanted in zip(classify(inputs), ours, strict=True):
        found = {one["label"]: one["score"] for one in told}
        assert [found[name] for name in model.config.labels] == pytest.approx(wanted.tolist(), abs=2e-6)
    assert ours[:, 0].std() > 1e-4, "all texts alike: the tokenizer finds nothing in them"
    return classify


@pytest.mark.parametrize("base", ["roberta", "saved"])
def test_a_students_folder_has_its_teachers_tokenizer(place, tmp_path, base):
    teacher = encoders.load(place / base, labels=("negative", "positive"))
    student = new_student(teacher, layers.student_config(teacher, "2x16"), (1, 2), "teacher", torch.Generator().manual_seed(0))
    folder = student.save_pretrained(tmp_path / "student")
    theirs = transformers.RobertaTokenizerFast.from_pretrained(place / base)
    for line in (*TEXTS[:5], "An unknown, Überraschung  with   spaces"):
        for tokenizer in (text.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)):
            assert tokenizer(line)["input_ids"] == theirs(line)["input_ids"]
    assert pipeline_agrees(folder, TEXTS[:6]).tokenizer.pad_token_id == student.config.pad_token_id == 1


def test_a_bert_with_a_byte_level_tokenizer_is_saved_with_it(tmp_path, capsys):
    count = byte_level(tmp_path / "bert", False)  # vocab.json and merges.txt
    told = json.dumps({"tokenizer_class": "RobertaTokenizer"})
    (tmp_path / "bert" / "tokenizer_config.json").write_text(told)
    make(tmp_path / "bert", "bert", vocab_size=count, pad_token_id=1)
    folder = encoders.load(tmp_path / "bert").save_pretrained(tmp_path / "again")
    ours, theirs = (text.load_tokenizer(place)(TEXTS[0])["input_ids"] for place in (folder, tmp_path / "bert"))
    assert ours == theirs
    assert cli.main(["export", "--model", str(folder), "--format", "onnx", "--out", f"{tmp_path}/onnx"]) == 0
    assert (tmp_path / "onnx" / "merges.txt").is_file()
    capsys.readouterr()


def test_pairs_of_a_model_without_segments_are_one_segment(place, tmp_path):
    teacher = encoders.load(place / "distilbert")
    encoded = text.encode(text.load_tokenizer(place / "distilbert"), ["a bad film"], ["great fun"])
    assert encoded.segments[0].sum() == 0
    student = new_student(teacher, layers.student_config(teacher, "2x16"), (1, 2), "teacher", torch.Generator().manual_seed(0))
    pipeline_agrees(student.save_pretrained(tmp_path / "student"), TEXTS[:6], list(WORDS[:6]))


def test_a_general_student_of_a_foreign_encoder_is_made_and_goes_on(place, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    options = ["--corpus", f"{tmp_path}/text.txt", "--student", "2x16", "--steps", "4", "--batch-size", "4", "--max-length", "16"]
    assert cli.main(["general", "--teacher", f"{place}/roberta", *options, "--out", f"{tmp_path}/general"]) == 0
    assert general.card(tmp_path / "general")["settings"]["start"] == "states"
    options = ["--data", f"{place}/films.csv", "--student", "2x16", "--epochs-intermediate", "1", "--epochs-prediction", "1"]
    options += ["--general", f"{tmp_path}/general", "--out", f"{tmp_path}/student"]
    assert cli.main(["distill", "--teacher", f"{place}/teacher", *options]) == 0
    assert (tmp_path / "student" / "merges.txt").is_file()


def test_a_fallback_teacher_distils_with_a_note(place, tmp_path, capsys):
    options = ["--data", f"{place}/films.csv", "--student", "2x16", "--epochs-intermediate", "1", "--epochs-prediction", "0"]
    options += ["--allow-weak-teacher"]
    assert cli.main(["distill", "--teacher", f"{place}/deberta", *options, "--out", f"{tmp_path}/student"]) == 0
    said = capsys.readouterr().err
    assert said.count("note: a 'deberta-v2' model gives its attention weights after the softmax only") == 1


# -- errors: one sentence each --------------------------------------------------


WEAK = "distill --teacher {p}/deberta --data {p}/films.csv --allow-weak-teacher"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("prune --model {p}/teacher --data {p}/films.csv --out {o}", "is a 'roberta' model, and only a BERT can be pruned; distil"),
        ("export --model {p}/teacher --out {o}", "only a BERT can be exported; distil a student from it first: tinylib distill"),
        ("distill --teacher {p}/roberta --data {p}/films.csv --out {o}", "has no classification head; fine-tune it first"),
        (f"{WEAK} --start teacher --student 2x16 --out {{o}}", "cannot be cut to size; choose start='embeddings'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(place, tmp_path, capsys, typed, sentence):
    assert cli.main(typed.format(p=place, o=tmp_path / "out").split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1]
    assert len([line for line in said if line.startswith("tinylib") and "note:" not in line]) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_encoder_is_refused(tmp_path):
    sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(UserError, match="gpt.config.json describes a 'gpt2' model, which is no encoder; a teacher is a"):
        encoders.load(tmp_path / "gpt")
    sizes = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    transformers.BartModel(transformers.BartConfig(**sizes)).save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="'bart' model, which is no encoder"):
        encoders.load(tmp_path / "bart")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_and_unsafe_checkpoints_are_refused(folders, tmp_path):
    def copy(name):
        return shutil.copytree(folders["roberta"], tmp_path / name)

    folder = copy("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle, which can run code; convert it"):
        encoders.load(folder)
    folder = copy("cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut/model.safetensors is damaged .*; copy or download it again"):
        encoders.load(folder)
    folder = copy("lost")
    stored = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}  # the file is written anew
    gone = stored.pop("roberta.encoder.layer.1.attention.self.key.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors has no 'roberta.encoder.layer.1.attention.self.key.weight'"):
        encoders.load(folder)
    stored["roberta.encoder.layer.1.attention.self.key.weight"] = gone[:16].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for labels in (None, ("a", "b", "c")):  # a new head excuses no other matrix
        with pytest.raises(UserError, match="lost"):
            encoders.load(folder, labels=labels)
    folder = copy("code")
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match="describes a 'homemade' model that transformers cannot read"):
        encoders.load(folder)
    assert not (tmp_path / "ran").exists()
    folder = copy("large")
    change_config(folder, vocab_size=10**7)
    held = sum(tensor.numel() for tensor in stored.values()) + gone.numel() - gone[:16].numel()
    with pytest.raises(UserError, match=f"numbers that the weights' file, with {held:,}, does not hold"):
        encoders.load(folder)
    folder = copy("bad")
    change_config(folder, hidden_size="wide")
    with pytest.raises(UserError, match="bad"):
        encoders.load(folder)


def test_an_encoder_that_shows_no_attention_cannot_teach(tmp_path):
    config = transformers.FNetConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, intermediate_size=16)
    transformers.FNetModel(config).save_pretrained(tmp_path / "fnet")
    with pytest.raises(UserError, match="'fnet' model"):
        encoders.load(tmp_path / "fnet")


def test_weights_that_are_no_numbers_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["distilbert"], tmp_path / "nan")
    stored = load_file(folder / "model.safetensors")
    stored["distilbert.transformer.layer.0.ffn.lin1.weight"][0, 0] = math.nan
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="'distilbert.transformer.layer.0.ffn.lin1.weight' holds NaN"):
        encoders.load(folder)
