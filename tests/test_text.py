"""From text to batches: encoding, padding, and buckets that hold every text once and little padding."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tinylib import datasets, models, text
from tinylib.errors import UserError


@pytest.fixture(scope="session")
def tokenizer():
    """Give the tokenizer of MiniLM-L6, which is bert-base-uncased's."""
    return text.load_tokenizer("minilm-l6")


@pytest.fixture(scope="session")
def reviews(tokenizer):
    """Give the encoded training texts of movie_reviews."""
    return text.encode(tokenizer, list(datasets.load("movie_reviews")["train"]["text"]))


# -- encoding ----------------------------------------------------------------


def test_a_text_stands_between_cls_and_sep(tokenizer):
    encoded = text.encode(tokenizer, ["A film of rare charm.", ""])
    assert tokenizer.convert_ids_to_tokens(encoded.ids[0]) == [
        "[CLS]", "a", "film", "of", "rare", "charm", ".", "[SEP]",
    ]  # fmt: skip
    assert encoded.ids[1].tolist() == [101, 102]
    assert len(encoded) == 2
    assert encoded.lengths.tolist() == [8, 2]
    assert encoded.pad_id == 0
    assert encoded.truncated == 0
    assert all(segments.sum() == 0 for segments in encoded.segments)


def test_a_pair_has_two_segments(tokenizer):
    encoded = text.encode(tokenizer, ["a dog runs"], ["an animal moves fast"])
    assert encoded.segments[0].tolist() == [0] * 5 + [1] * 5
    assert (encoded.ids[0] == 102).nonzero().flatten().tolist() == [4, 9]


@pytest.mark.parametrize("max_length", [3, 8, 64])
def test_long_texts_are_cut_and_counted(tokenizer, max_length):
    encoded = text.encode(tokenizer, ["film " * 100, "short"], max_length=max_length)
    assert encoded.lengths.tolist() == [max_length, 3]
    assert encoded.ids[0][-1] == 102  # the end is cut off before [SEP] is put there
    assert encoded.truncated == 1, "a text of exactly max_length tokens is whole"


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8), st.integers(5, 14), st.booleans())
def test_the_count_of_cut_texts_is_that_of_the_whole_lengths(tokenizer, words, max_length, paired):
    texts, pairs = (["film " * n for n in column] for column in zip(*words, strict=True))
    encoded = text.encode(tokenizer, texts, pairs if paired else None, max_length=max_length)
    whole = [first + second + 3 if paired else first + 2 for first, second in words]  # [CLS] and [SEP]
    assert encoded.truncated == sum(length > max_length for length in whole)
    assert encoded.lengths.tolist() == [min(length, max_length) for length in whole]


def test_of_a_pair_the_longer_text_is_cut_first(tokenizer):
    encoded = text.encode(tokenizer, ["film " * 100], ["an animal moves"], max_length=20)
    assert encoded.segments[0].sum() == 4  # the short text is whole, with its [SEP]
    assert encoded.lengths.tolist() == [20]


@pytest.mark.parametrize("together", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("paired", [False, True])
def test_how_many_texts_are_tokenized_at_a_time_changes_nothing(tokenizer, monkeypatch, together, paired):
    texts = ["a dog runs " * n for n in range(1, 8)]
    pairs = texts[::-1] if paired else None
    whole = text.encode(tokenizer, texts, pairs, max_length=12)
    monkeypatch.setattr(text, "TOGETHER", together)
    parts = text.encode(tokenizer, texts, pairs, max_length=12)
    assert [row.tolist() for row in parts.ids] == [row.tolist() for row in whole.ids]
    assert [row.tolist() for row in parts.segments] == [row.tolist() for row in whole.segments]
    assert (len(parts), parts.truncated) == (7, whole.truncated)
    assert whole.truncated > 0


def test_no_texts_are_no_rows(tokenizer):
    assert len(text.encode(tokenizer, [])) == 0
    assert text.encode(tokenizer, []).lengths.tolist() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": ["a"], "max_length": 2}, "max_length=2 leaves no room for the text; give at least 3"),
        ({"texts": ["a"], "text_pairs": ["b"], "max_length": 4}, "give at least 5"),
        ({"texts": ["a", "b"], "text_pairs": ["c"]}, "2 texts and 1 text_pairs"),
    ],
)
def test_what_cannot_be_encoded_is_refused(tokenizer, arguments, words):
    with pytest.raises(UserError, match=words):
        text.encode(tokenizer, **arguments)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no tokenizer; copy"),
        ({"tokenizer.json": "{"}, "damaged tokenizer"),
        ({"tokenizer.json": "[]"}, "damaged tokenizer"),
        ({"vocab.txt": ""}, "damaged tokenizer"),
    ],
    ids=str,
)
def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path, files, words):
    for name, content in ({"config.json": '{"model_type": "bert"}'} | files).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        text.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def copy_of(tokenizer, folder, kind="bert", config=None, **changes):
    """Write the tokenizer with other special tokens, beside a config.json."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind} | (config or {})))
    beside = folder / "tokenizer_config.json"
    told = json.loads(beside.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"} | changes
    beside.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    for name in ("vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_a_tokenizer_without_the_tokens_around_a_text_is_refused(tokenizer, tmp_path):
    lacks = {"cls_token": None, "sep_token": None}
    with pytest.raises(UserError, match="names no cls_token and no sep_token, between which BERT reads a text; copy"):
        text.load_tokenizer(copy_of(tokenizer, tmp_path / "a", **lacks))
    with pytest.raises(UserError, match="names no sep_token, between"):
        text.load_tokenizer(copy_of(tokenizer, tmp_path / "b", sep_token=None))
    padless = text.load_tokenizer(copy_of(tokenizer, tmp_path / "c", pad_token=None))
    assert padless.pad_token_id is None
    assert text.encode(padless, ["a film"]).pad_id == 0, "the mask hides it"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_config_that_transformers_cannot_read_is_not_the_tokenizer_s_fault(tokenizer, tmp_path, kind):
    folder = copy_of(tokenizer, tmp_path / "a", kind, {"torch_dtype": "floaty"})
    tokenizer.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(folder)
    except AttributeError:
        with pytest.raises(UserError, match="config.json cannot be read by transformers .*floaty") as caught:
            text.load_tokenizer(folder)
        assert "tokenizer" not in str(caught.value)
    else:  # a transformers that takes any name, or does without the config here
        text.load_tokenizer(folder)


def test_a_tokenizer_is_loaded_from_a_folder(tokenizer):
    again = text.load_tokenizer(models.fetch("minilm-l6"))
    assert again("unflinching").input_ids == tokenizer("unflinching").input_ids


def test_select_keeps_the_order_asked_for(tokenizer):
    encoded = text.encode(tokenizer, ["one", "two films", "three"])
    chosen = encoded.select([2, 0])
    assert [row.tolist() for row in chosen.ids] == [encoded.ids[2].tolist(), encoded.ids[0].tolist()]


# -- padding -----------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest_text(tokenizer):
    encoded = text.encode(tokenizer, ["a", "a film of charm", "one two three four five six"], ["b", "b", "b"])
    batch = text.pad(encoded, [1, 0])
    assert batch["ids"].shape == batch["mask"].shape == batch["segments"].shape == (2, 8)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(1).tolist() == encoded.lengths[[1, 0]].tolist()
    for place, row in enumerate((1, 0)):
        length = len(encoded.ids[row])
        assert torch.equal(batch["ids"][place, :length], encoded.ids[row])
        assert torch.equal(batch["segments"][place, :length], encoded.segments[row])
        assert (batch["ids"][place, length:] == encoded.pad_id).all()
        assert not batch["mask"][place, length:].any()


def test_a_batch_is_what_the_tokenizer_pads(tokenizer):
    texts = ["a gripping , moving film", "no", "too long by half"]
    ours, theirs = text.pad(text.encode(tokenizer, texts), [0, 1, 2]), tokenizer(texts, padding=True)
    assert ours["ids"].tolist() == theirs["input_ids"]
    assert ours["mask"].long().tolist() == theirs["attention_mask"]
    assert ours["segments"].tolist() == theirs["token_type_ids"]


def test_another_padding_token_is_used():
    encoded = text.Encoded((torch.tensor([5, 6]), torch.tensor([7])), (torch.zeros(2).long(), torch.zeros(1).long()), 9)
    assert text.pad(encoded, [0, 1])["ids"].tolist() == [[5, 6], [7, 9]]
    assert text.pad(encoded.select([1, 0]), [0, 1])["ids"].tolist() == [[7, 9], [5, 6]]


# -- length buckets ----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=300),
    batch_size=st.integers(1, 40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_row_comes_once_an_epoch(lengths, batch_size, epoch, shuffle):
    buckets = text.LengthBuckets(torch.tensor(lengths), batch_size, seed=3, shuffle=shuffle)
    buckets.set_epoch(epoch)
    batches = list(buckets)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(buckets)
    assert max(map(len, batches)) <= batch_size
    assert sum(len(batch) < batch_size for batch in batches) <= 1  # the rest, kept and not dropped


def test_seed_and_epoch_decide_the_order(reviews):
    def order(seed, epoch):
        buckets = text.LengthBuckets(reviews.lengths, 32, seed=seed)
        buckets.set_epoch(epoch)
        return list(buckets)

    before = torch.get_rng_state()
    assert order(0, 0) == order(0, 0)
    different = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])
    assert torch.equal(before, torch.get_rng_state())  # the global state is neither read nor moved
    # other neighbours, not the same batches in another order
    assert len({frozenset(b) for b in different[0]} & {frozenset(b) for b in different[1]}) <= 2


@pytest.mark.parametrize("batch_size", [16, 32, 64])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_little_of_a_batch_is_padding(reviews, batch_size, epoch):
    buckets = text.LengthBuckets(reviews.lengths, batch_size)
    buckets.set_epoch(epoch)
    plain = [list(range(i, min(i + 32, len(reviews)))) for i in range(0, len(reviews), 32)]
    assert text.padding_waste(reviews.lengths, plain) > 0.4  # what it is without
    assert text.padding_waste(reviews.lengths, list(buckets)) < 0.05


def test_short_and_long_batches_alternate(reviews):
    longest = [int(reviews.lengths[batch].max()) for batch in text.LengthBuckets(reviews.lengths, 32)]
    rises = sum(a < b for a, b in zip(longest, longest[1:], strict=False)) / len(longest)
    assert 0.35 < rises < 0.65  # sorted lengths would drift through an epoch, and the model with them


def test_unshuffled_batches_are_sorted_by_length(reviews):
    buckets = text.LengthBuckets(reviews.lengths, 64, shuffle=False)
    in_order = reviews.lengths[[row for batch in buckets for row in batch]]
    assert (in_order.diff() >= 0).all()
    buckets.set_epoch(5)
    assert list(buckets) == list(text.LengthBuckets(reviews.lengths, 64, shuffle=False))


@pytest.mark.parametrize("start", [0, 1, 100, 264, 265])
def test_an_interrupted_epoch_goes_on_where_it_stopped(reviews, start):
    whole, resumed = (text.LengthBuckets(reviews.lengths, 32, seed=4) for _ in range(2))
    whole.set_epoch(2)
    resumed.set_epoch(2, start)
    assert list(resumed) == list(whole)[start:]
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert list(resumed) == list(whole)  # the next epoch is whole again


def test_an_interrupted_epoch_is_cut_short_once_only():
    buckets = text.LengthBuckets(torch.arange(1, 41), 4, seed=4)
    buckets.set_epoch(2)
    whole = list(buckets)
    buckets.set_epoch(2, start=3)
    assert list(buckets) == whole[3:]
    assert list(buckets) == whole, "the start is of one pass"


def test_no_batch_size_below_one():
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        text.LengthBuckets(torch.tensor([1, 2]), 0)


def test_the_padding_waste_is_counted():
    lengths = torch.tensor([2, 4, 4, 1])
    assert text.padding_waste(lengths, [[0, 1], [2, 3]]) == pytest.approx(1 - 11 / 16)
    assert text.padding_waste(lengths, [[1, 2], [0], [3]]) == 0.0


def test_a_pair_of_robertas_has_four_tokens_of_its_own():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5}
    own = Tokenizer(models.WordLevel(words, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    roberta = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match="give at least 6"):
        text.encode(roberta, ["a b"], ["b a"], max_length=5)
    assert text.encode(roberta, ["a b"], ["b a"], max_length=6).ids[0].tolist() == [0, 4, 2, 2, 5, 2]
    assert text.encode(roberta, ["a b"], max_length=3).ids[0].tolist() == [0, 4, 2]


def test_buckets_of_no_texts_hold_no_batch_and_any_seed_will_do():
    assert list(text.LengthBuckets(torch.tensor([], dtype=torch.long), 4)) == []
    rows = sorted(row for batch in text.LengthBuckets(torch.arange(9), 4, seed=2**62) for row in batch)
    assert rows == list(range(9))
