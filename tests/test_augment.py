"""Data augmentation: Algorithm 1 against a literal transcription, its limits, pairs, determinism, odd texts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tinylib import augment as aug
from tinylib import datasets, text
from tinylib.augment import AugmentSettings, BlankFiller, WordVectors, augment, augment_from_original, augment_pairs
from tinylib.bert import Bert
from tinylib.config import BertConfig
from tinylib.errors import UserError

# The first eight are words of several pieces, so that looking one up gives others of them and shorter ones.
VECTOR_WORDS = [
    "moviegoers", "unlikeable", "unwatchable", "depressingly", "masochistic", "filmmakers", "yammering", "naivete",
    "film", "viewers", "bad", "sad", "people", "...", "'s", "##ing", "e-mail", "[MASK]",
]  # fmt: skip
TEXTS = [
    "Depressingly thin; moviegoers need not apply.",
    "It's an unwatchable, unlikeable film.",
    "The masochistic yammering of filmmakers isn't for people!",
    "Good.",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tokenizer():
    """Give the tokenizer of MiniLM-L6, which is bert-base-uncased's."""
    return text.load_tokenizer("minilm-l6")


@pytest.fixture(scope="module")
def model():
    """Give a small masked language model whose guesses differ from place to place."""
    config = BertConfig(**SMALL, head="masked_lm", initializer_range=0.3, max_position_embeddings=64)
    return Bert(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def vectors():
    """Give a few words with random vectors."""
    return WordVectors(VECTOR_WORDS, torch.randn(len(VECTOR_WORDS), 6, generator=seeded(5)))


def seeded(seed: int = 0) -> torch.Generator:
    """Give a fresh generator."""
    return torch.Generator().manual_seed(seed)


def few(**changes) -> AugmentSettings:
    """Give settings for a small run."""
    return AugmentSettings(**({"copies": 3, "candidates": 4, "max_length": 64} | changes))


def ids(tokenizer, sentence: str) -> list[int]:
    """Give a sentence's token ids without [CLS] and [SEP]."""
    return tokenizer.encode(sentence, add_special_tokens=False)


# -- the oracle: Algorithm 1 as it is printed, a word at a time -------------------------------------------------------


def words_of(tokenizer, sentence: str) -> list[str]:
    """Split a sentence as BERT does before it looks for word pieces."""
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(sentence))]


def guesses(model, tokenizer, words: list[str], i: int, k: int) -> list[str]:
    """Mask word i, run the model with its head over all positions, and walk down its list until k words are found."""
    pieces = [tokenizer.tokenize(word) for word in words]
    pieces[i] = ["[MASK]"]
    tokens = ["[CLS]", *itertools.chain(*pieces), "[SEP]"]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])).logits[0, tokens.index("[MASK]")]
    ranked = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
    return [token for token in ranked if token.isalnum()][:k]


def neighbours(vectors: WordVectors, table: torch.Tensor, word: str, k: int) -> list[str]:
    """Rank all words by cosine, one by one."""
    if word not in vectors.words:
        return []
    mine = table[vectors.words.index(word)]
    cosine = {
        w: float(mine @ v) / (math.hypot(*mine) * math.hypot(*v)) for w, v in zip(vectors.words, table, strict=True)
    }
    ranked = sorted((w for w in cosine if w != word and w.isalnum()), key=lambda w: -cosine[w])
    return ranked[:k]


def algorithm_1(sentence, model, tokenizer, vectors, table, asked: AugmentSettings, generator, original=False):
    """Return the copies of one sentence as lists of words."""
    x = words_of(tokenizer, sentence)
    draws = torch.rand((asked.copies, len(x), 2), generator=generator)
    copies = []
    for n in range(asked.copies):
        x_m = list(x)
        for i in range(len(x)):
            if not x[i].isalnum():
                continue
            if len(tokenizer.tokenize(x[i])) == 1 and tokenizer.tokenize(x[i]) != ["[UNK]"]:
                candidates = guesses(model, tokenizer, x if original else x_m, i, asked.candidates)
            else:
                candidates = neighbours(vectors, table, x[i], asked.candidates)
            p, which = draws[n, i].tolist()
            if p < asked.probability and candidates:
                x_m[i] = sorted(candidates)[int(which * len(candidates))]
        copies.append(x_m)
    return copies


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(("probability", "candidates"), [(0.4, 4), (1.0, 15), (0.7, 1)])
def test_the_copies_are_those_of_algorithm_1(model, tokenizer, vectors, probability, candidates, original):
    asked = few(probability=probability, candidates=candidates)
    function = augment_from_original if original else augment
    got = function(TEXTS, model, tokenizer, vectors, asked, seeded(3))
    table, generator = torch.randn(len(VECTOR_WORDS), 6, generator=seeded(5)), seeded(3)
    for sentence, copies in zip(TEXTS, got, strict=True):
        expected = algorithm_1(sentence, model, tokenizer, vectors, table, asked, generator, original)
        assert [words_of(tokenizer, copy) for copy in copies] == expected
    assert got != [[sentence] * 3 for sentence in TEXTS]


def test_a_replacement_changes_what_the_model_says_further_on(model, tokenizer, vectors):
    # K = 1 leaves nothing to chance: where the two functions differ, they masked different sentences.
    asked = few(probability=1.0, candidates=1)
    first, second = (
        augment(TEXTS, model, tokenizer, vectors, asked),
        augment_from_original(TEXTS, model, tokenizer, vectors, asked),
    )
    assert first != second
    assert first[3] == second[3]  # of one word there is no earlier one to replace


# -- what is replaced, and by what ------------------------------------------------------------------------------------


def test_probability_0_copies_the_texts(model, tokenizer, vectors):
    odd = [*TEXTS, "", "  two  spaces\t", "中文 café 😀 [MASK]", "film " * 200]
    assert augment(odd, model, tokenizer, vectors, few(probability=0.0)) == [[each] * 3 for each in odd]


def test_a_draw_that_equals_the_probability_replaces_nothing():
    words = aug.Words(("a", "b"), ("a", "b"), ((1,), (2,)), ("", " ", ""), (False, False, False))
    draws = [[0.0, 0.9], [0.25, 0.9]]  # draws lie in [0, 1): 0 itself comes up
    assert aug._chosen(words, draws, AugmentSettings(probability=0.0)) == []
    assert aug._chosen(words, draws, AugmentSettings(probability=0.25)) == [0]


@pytest.mark.parametrize("function", [augment, augment_from_original])
def test_probability_1_replaces_every_word_that_can_be(model, tokenizer, vectors, function):
    sentence = "The moviegoers' Unlikeable zzyzzyvas, e-mail: 42%!"
    (copies,) = function([sentence], model, tokenizer, vectors, few(probability=1.0, candidates=2, copies=20))
    originals = words_of(tokenizer, sentence)
    for copy in copies:
        new = words_of(tokenizer, copy)
        assert [w for w in new if not w.isalnum()] == ["'", ",", "-", ":", "%", "!"]
        assert new[originals.index("zzyzzyvas")] == "zzyzzyvas"  # several pieces and no vector: it stays
        assert new[1] in vectors.nearest("moviegoers", 2)
        assert new[3] in vectors.nearest("unlikeable", 2)
    changed = [{words_of(tokenizer, copy)[i] for copy in copies} for i in range(len(originals))]
    assert all(len(seen) == 2 for seen, word in zip(changed, originals, strict=True) if word in ("moviegoers", "the"))


def test_candidates_are_whole_words(model, tokenizer):
    filler = BlankFiller(model, tokenizer, few(candidates=5000))
    (found,) = filler.answer([filler.question([(5,), (6,)], 1)])
    assert len(set(found)) == 5000
    assert all(word.isalnum() for word in found)
    assert all(tokenizer.tokenize(word) == [word] for word in found)  # so a copy's text has the pieces that it had
    assert not set(found) & set(tokenizer.all_special_tokens)


def test_the_candidates_are_the_likeliest_first(model, tokenizer):
    filler = BlankFiller(model, tokenizer, few(candidates=15))
    words = words_of(tokenizer, "a film of rare charm.")
    question = filler.question([tuple(ids(tokenizer, word)) for word in words], 3)
    assert filler.answer([question]) == [guesses(model, tokenizer, words, 3, 15)]


def test_a_word_longer_than_the_tokenizer_takes_is_looked_up_by_its_vector(model, tokenizer):
    long = "a" * 120  # one [UNK] for the tokenizer
    vectors = WordVectors([long, "film"], torch.ones(2, 3))
    assert augment([long], model, tokenizer, vectors, few(probability=1.0)) == [["film"] * 3]


def test_the_replacements_are_drawn_uniformly_and_as_often_as_asked(model, tokenizer):
    vectors = WordVectors(["moviegoers", "film", "viewers", "people", "bad"], torch.eye(5) + 1)
    (copies,) = augment(["moviegoers"], model, tokenizer, vectors, few(copies=4000, probability=0.4), seeded(1))
    counts = torch.tensor([copies.count(word) for word in ["film", "viewers", "people", "bad"]])
    assert abs(counts.sum() / 4000 - 0.4) < 3 * math.sqrt(0.4 * 0.6 / 4000)
    expected = counts.sum() / 4
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27  # χ² with 3 degrees of freedom, p = 0.001


# -- the text of a copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "pattern"),
    [
        ("  Bad,\tbad  —film…", "  {},\t{}  —{}…"),
        ("It isn't O'Neil's", "{} {}'{} {}'{}'{}"),
        ("😀 bad 😀😀film film", "😀 {} 😀😀film {}"),  # 😀😀film is one word for BERT, and holds a symbol
        ("cafe\u0301 noir", "{} {}"),  # the accent goes with its letter
        ("bad [MASK] film [SEP]", "{} [MASK] {} [SEP]"),
        ("中文bad", "{} {} {}"),  # three words with nothing between them: two replacements must not become one word
        ("bad\u200d中", "{}\u200d {}"),
        ("3.5% of 20", "{}.{}% {} {}"),
    ],
)
def test_untouched_characters_stay(model, tokenizer, vectors, sentence, pattern):
    (copies,) = augment([sentence], model, tokenizer, vectors, few(probability=1.0, candidates=300))
    for copy in copies:
        words = [word for word in words_of(tokenizer, copy) if word.isalnum()]
        words = [word for word in words if word not in ("mask", "sep")]
        assert pattern.format(*words) == copy


alphabet = st.one_of(st.sampled_from("  .,'-\"!?aeinostfilmbd中文é\u0301\u200d😀\t[]#1"), st.characters(codec="utf-8"))


@settings(max_examples=150, deadline=None)
@given(sentence=st.text(alphabet, max_size=30), seed=st.integers(0, 99))
def test_any_text_keeps_what_is_not_replaced_and_the_model_saw_the_text(tokenizer, sentence, seed):
    words = aug.split_words(tokenizer, sentence)
    assert words.join({}) == sentence
    assert [token for piece in words.pieces for token in piece] == ids(tokenizer, sentence)
    asked = few(probability=0.5)
    draws = torch.rand((len(words.names), 2), generator=seeded(seed)).tolist()
    new, pieces = {}, list(words.pieces)
    for i in aug._chosen(words, draws, asked):
        new[i] = "film" if draws[i][1] < 0.5 else "unlikeable"
        pieces[i] = tuple(ids(tokenizer, new[i]))
    copy = words.join(new)
    assert ids(tokenizer, copy) == [token for piece in pieces for token in piece]
    if not new:
        assert copy == sentence


def test_empty_texts_and_no_texts(model, tokenizer, vectors):
    assert augment(["", " "], model, tokenizer, vectors, few(probability=1.0)) == [[""] * 3, [" "] * 3]
    for function in (augment, augment_from_original):
        assert function([], model, tokenizer, vectors, few()) == []
    assert augment_pairs([], [], model, tokenizer, vectors, few()) == []


@pytest.mark.parametrize("function", [augment, augment_from_original])
def test_words_beyond_max_length_stay(model, tokenizer, vectors, function):
    sentence = " ".join(["bad film"] * 200)  # 400 tokens; the model has 64 positions
    (copies,) = function([sentence], model, tokenizer, vectors, few(probability=1.0, max_length=12))
    for copy in copies:
        new = copy.split(" ")
        assert len(new) == 400
        assert new[10:] == ["bad", "film"] * 195
        assert sum(a != b for a, b in zip(new[:10], ["bad", "film"] * 5, strict=True)) >= 8


def test_a_word_that_grew_may_push_the_next_beyond_max_length(model, tokenizer):
    grown = "unwatchableness"
    vectors = WordVectors(["unlikeable", grown], torch.ones(2, 3))
    now, then = (len(ids(tokenizer, word)) for word in ("unlikeable", grown))
    assert now < then
    asked = few(probability=1.0, max_length=2 + now + 1)  # room for [CLS], the first word, one more piece, [SEP]
    (copies,) = augment(["unlikeable zzz", "unlikeable bad"], model, tokenizer, vectors, asked)[1:]
    assert copies == [f"{grown} bad"] * 3
    (copies,) = augment_from_original(["unlikeable bad"], model, tokenizer, vectors, asked)
    assert all(copy.split()[0] == grown for copy in copies)
    assert any(copy.split()[1] != "bad" for copy in copies)  # within the limit in the original


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [augment, augment_from_original])
def test_copy_i_of_the_first_goes_with_copy_i_of_the_second(model, tokenizer, vectors, method):
    asked, generator = few(copies=6, probability=0.9), seeded(2)
    got = augment_pairs(TEXTS, TEXTS[::-1], model, tokenizer, vectors, asked, seeded(2), method=method)
    first = method(TEXTS, model, tokenizer, vectors, asked, generator)
    second = method(TEXTS[::-1], model, tokenizer, vectors, asked, generator)
    assert got == [list(zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)]
    assert len({pair[0] for pair in got[1]}) > 1  # not the last copy of the first again and again
    assert len({pair[1] for pair in got[1]}) > 1


def test_equal_sides_of_a_pair_change_each_in_its_own_way(model, tokenizer, vectors):
    for generator in (None, seeded(4)):
        (copies,) = augment_pairs(TEXTS[:1], TEXTS[:1], model, tokenizer, vectors, few(probability=1.0), generator)
        assert any(a != b for a, b in copies)


# -- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [augment, augment_from_original])
def test_the_batch_size_decides_nothing(model, tokenizer, vectors, function, monkeypatch):
    texts = list(datasets.load("movie_reviews")["train"]["text"])[:24]
    runs = [function(texts, model, tokenizer, vectors, few(), seeded(7), batch_size=size) for size in (1, 3, 64)]
    assert runs[0] == runs[1] == runs[2]
    monkeypatch.setattr(aug, "POOL", 1)  # groups of one text
    assert function(texts, model, tokenizer, vectors, few(), seeded(7), batch_size=1) == runs[0]
    assert function(texts, model, tokenizer, vectors, few(), seeded(8)) != runs[0]


def test_near_ties_are_decided_alone(model, tokenizer, monkeypatch):
    filler, sizes = BlankFiller(model, tokenizer, few()), []
    original = BlankFiller._likeliest

    def counted(self, encoded, questions, rows):
        sizes.append(len(rows))
        return original(self, encoded, questions, rows)

    monkeypatch.setattr(BlankFiller, "_likeliest", counted)
    questions = [filler.question([(n,), (6,)], 1) for n in range(2000, 2010)]
    plain = filler.answer(questions)
    assert max(sizes) == 10
    monkeypatch.setattr(aug, "TIE", math.inf)
    sizes.clear()
    assert filler.answer(questions) == plain
    assert sizes == [10] + [1] * 10


def test_a_question_that_comes_twice_is_computed_once(model, tokenizer, monkeypatch):
    filler, seen = BlankFiller(model, tokenizer, few()), []
    original = BlankFiller._encode
    monkeypatch.setattr(BlankFiller, "_encode", lambda self, i, *rest: seen.append(len(i)) or original(self, i, *rest))
    question = filler.question([(2000,), (2001,)], 0)
    answers = filler.answer([question, filler.question([(2000,), (2001,)], 1), question])
    assert answers[0] == answers[2]
    assert seen[0] == 2


def test_the_global_random_state_and_the_model_are_left_alone(tokenizer, vectors):
    config = BertConfig(**SMALL, head="masked_lm", initializer_range=0.3, max_position_embeddings=64)
    model = Bert(config, seeded(0)).train()  # with dropout 0.1
    before = torch.get_rng_state()
    first, again = (augment(TEXTS, model, tokenizer, vectors, few(), seeded(1)) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert augment(TEXTS, model, tokenizer, vectors, few()) == augment(
        TEXTS, model, tokenizer, vectors, few(), seeded(0)
    )


def test_the_tokenizer_may_have_been_used_with_truncation_before(tokenizer):
    text.encode(tokenizer, TEXTS, max_length=3)
    assert aug.split_words(tokenizer, "a bad sad film").names == ("a", "bad", "sad", "film")


def test_a_progress_bar_counts_the_copies(model, tokenizer, vectors, capsys):
    for function in (augment, augment_from_original):
        function(TEXTS, model, tokenizer, vectors, few(), label="augmenting")
        assert "augmenting" in capsys.readouterr().err
    augment(TEXTS, model, tokenizer, vectors, few())
    assert not capsys.readouterr().err


# -- word vectors -----------------------------------------------------------------------------------------------------


def test_nearest_words_by_cosine(vectors):
    table = torch.randn(len(VECTOR_WORDS), 6, generator=seeded(5))
    for word in VECTOR_WORDS:
        for k in (1, 3, 50):
            assert vectors.nearest(word, k) == neighbours(vectors, table, word, k)
    assert vectors.nearest_each(["film", "zzz", "film"], 2) == [
        vectors.nearest("film", 2),
        [],
        vectors.nearest("film", 2),
    ]
    assert vectors.nearest("zzz", 3) == []


def test_what_is_returned_may_be_changed(vectors):
    vectors.nearest("film", 2).clear()
    assert len(vectors.nearest("film", 2)) == 2


def test_a_vector_of_zeros_is_nobodys_neighbour_but_the_last():
    vectors = WordVectors(["a", "b", "c"], torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    assert vectors.nearest("a", 2) == ["c", "b"]


def write(folder, words: str = "film\nbad\n", **tensors):
    """Write a folder of word vectors."""
    (folder / "words.txt").write_text(words, encoding="utf-8")
    save_file(tensors or {"vectors": torch.eye(2).half()}, folder / "vectors.safetensors")
    return folder


def test_word_vectors_are_read(tmp_path):
    assert WordVectors.load(write(tmp_path)).nearest("film", 5) == ["bad"]
    assert WordVectors.load(str(write(tmp_path, "film\nbad"))).words == ["film", "bad"]


def test_the_shipped_word_vectors():
    if not (datasets.data_folder() / "word_vectors" / "words.txt").is_file():
        pytest.skip("the word vectors do not come with this copy")
    vectors = WordVectors.load()
    assert len(vectors.words) == len(set(vectors.words)) > 1000
    near = vectors.nearest("film", 15)
    assert len(near) == 15
    assert "movie" in near


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "words.txt").unlink(), "words.txt"),
        (lambda f: (f / "vectors.safetensors").unlink(), "vectors.safetensors"),
        (lambda f: (f / "vectors.safetensors").write_bytes(b"no"), "no usable word vectors"),
        (lambda f: (f / "words.txt").write_bytes(b"\xff\xfe"), "no usable word vectors"),
        (lambda f: write(f, "film\n"), "1 words but 2 vectors"),
        (lambda f: write(f, other=torch.eye(2)), "'vectors'"),
    ],
)
def test_damaged_word_vectors_are_refused(tmp_path, break_it, words):
    break_it(write(tmp_path))
    with pytest.raises(UserError, match=words):
        WordVectors.load(tmp_path)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"copies": 0}, "copies=0 must be at least 1"),
        ({"candidates": 0}, "candidates=0 must be at least 1"),
        ({"max_length": 2}, "max_length=2 must be at least 3"),
        ({"probability": 1.01}, "probability=1.01 must lie between 0 and 1"),
        ({"probability": -0.1}, "must lie between 0 and 1"),
        ({"probability": math.nan}, "must lie between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        AugmentSettings(**changes)


def test_the_defaults_are_the_papers():
    defaults = AugmentSettings()
    assert (defaults.copies, defaults.probability, defaults.candidates) == (20, 0.4, 15)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"head": None}, {}, r'head is None; load one with mlm.shipped\(\)'),
        ({"head": "classification", "labels": ("a", "b")}, {}, "head is 'classification'"),
        ({"vocab_size": 100}, {}, "not that of the model"),
        ({}, {"max_length": 65}, "max_length=65 is more than the model's 64 positions"),
        ({}, {"candidates": 30000}, "candidates=30000 is more than the 23502 whole words"),
    ],
)
def test_models_that_cannot_fill_blanks_are_refused(tokenizer, vectors, config, changes, words):
    other = Bert(BertConfig(**(SMALL | {"head": "masked_lm", "max_position_embeddings": 64} | config)))
    with pytest.raises(UserError, match=words):
        augment(TEXTS, other, tokenizer, vectors, few(**changes))


def test_wrong_arguments_are_refused(model, tokenizer, vectors):
    with pytest.raises(UserError, match="one string"):
        augment("a film", model, tokenizer, vectors, few())
    with pytest.raises(UserError, match="4 texts and 1 text_pairs"):
        augment_pairs(TEXTS, ["a"], model, tokenizer, vectors, few())
    with pytest.raises(UserError, match="batch_size=0"):
        augment(TEXTS, model, tokenizer, vectors, few(), batch_size=0)
    with pytest.raises(UserError, match="k=0"):
        vectors.nearest("film", 0)
    with pytest.raises(UserError, match="1 words but 2 vectors"):
        WordVectors(["a"], torch.eye(2))
    with pytest.raises(UserError, match="'a' stands twice"):
        WordVectors(["a", "b", "a"], torch.eye(3))


def test_a_text_of_any_length_keeps_numbers_for_the_words_in_reach_only(tokenizer, model, vectors, monkeypatch):
    kept = []
    for limits, method in itertools.product((few(), few(max_length=12)), (augment, augment_from_original)):
        long = "film people bad " * 200
        name = "_together" if method is augment else "_by_original"
        inner = getattr(aug, name)

        def watched(group, draws, *rest, inner=inner):
            kept.append([len(numbers) for own in draws for numbers in own])
            return inner(group, draws, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(aug, name, watched)
            (copies,) = method([long], model, tokenizer, vectors, limits, seeded())
        reach = limits.max_length - 2
        changed = [a != b for copy in copies for a, b in zip(copy.split(), long.split(), strict=True)]
        assert any(changed)
        for copy in copies:
            assert copy.split()[reach:] == long.split()[reach:]
    assert max(map(max, kept)) <= 65
