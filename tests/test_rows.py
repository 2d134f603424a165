"""Gradients of tables row by row: the numbers of PyTorch's dense gradients, whatever becomes of a step."""

import pytest
import torch
from torch import nn

from tinylib import train
from tinylib.bert import Bert
from tinylib.config import BertConfig
from tinylib.rows import RowGradient, row_gradients
from tinylib.text import Encoded

WORDS, WIDTH = 50, 8


class Reader(nn.Module):
    def __init__(self, padding: int | None = 0):
        super().__init__()
        self.word = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.word.weight.data.copy_(numbers(WORDS, WIDTH))
        self.top = nn.Linear(WIDTH, 1, bias=False)
        self.top.weight.data.copy_(numbers(1, WIDTH))

    def forward(self, ids):
        return self.top(self.word(ids)).square().mean()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def batches(count: int, rows: int = 4) -> list[torch.Tensor]:
    own = torch.Generator().manual_seed(3)
    return [torch.randint(0, WORDS, (rows, 6), generator=own) for _ in range(count)]  # words that come twice, and padding


def steps(model: nn.Module, parts: int = 1, each=lambda model: None) -> list[torch.Tensor]:
    """Train; return the table's gradient before each step."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.1), []
    for ids in batches(5):
        for part in ids.chunk(parts):
            model(part).backward()
        seen.append(model.word.weight.grad.clone())
        each(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # changes the gradient in place
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("padding", [None, 0])
def test_gradients_and_weights_are_those_of_dense_gradients(parts, padding):
    plain, ours = Reader(padding), Reader(padding)
    expected = steps(plain, parts)
    with row_gradients(ours, least=1):
        found = steps(ours, parts)
    exact = parts == 1  # of parts the sums run in another order
    for a, b in zip([*found, ours.word.weight], [*expected, plain.word.weight], strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert any((gradient == 0).all(1).any() for gradient in found), "the batches read every word: nothing was tested"


def test_one_buffer_serves_every_step_and_is_dense():
    model, kept = Reader(), []
    with row_gradients(model, least=1):
        steps(model, each=lambda model: kept.append(model.word.weight.grad))
    assert {gradient.data_ptr() for gradient in kept} == {kept[0].data_ptr()}
    assert not kept[0].is_sparse


def test_a_step_that_fails_leaves_nothing_in_the_next_one():
    model, plain = Reader(), Reader()
    first, second = batches(2)
    with row_gradients(model, least=1):
        model(first).backward()
        model.word.weight.grad[first.unique()] = torch.nan  # what a loss that is no number writes
        model.zero_grad()
        model(second).backward()
    plain(second).backward()
    assert torch.equal(model.word.weight.grad, plain.word.weight.grad)


def test_afterwards_everything_is_as_it_was():
    model = Reader()
    with row_gradients(model, least=1):
        assert model.word.sparse
    model(batches(1)[0]).backward()
    assert not model.word.sparse
    assert not model.word.weight.grad.is_sparse
    with pytest.raises(ZeroDivisionError), row_gradients(model, least=1):
        raise ZeroDivisionError
    assert not model.word.sparse


def test_small_frozen_and_sparse_tables_are_left_alone():
    small, frozen, sparse = Reader(), Reader(), Reader()
    frozen.word.weight.requires_grad_(False)
    sparse.word.sparse = True
    with row_gradients(small), row_gradients(frozen, least=1):
        assert not small.word.sparse
        assert not frozen.word.sparse
    with row_gradients(sparse, least=1):
        sparse(batches(1)[0]).backward()
        assert sparse.word.weight.grad.is_sparse  # as its owner wants it
    assert sparse.word.sparse


def test_a_table_that_serves_as_output_matrix_too_gets_both_gradients():
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, head="masked_lm",
    )  # fmt: skip
    models = [Bert(config, torch.Generator().manual_seed(0)) for _ in range(2)]
    ids = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    for model in models:
        with row_gradients(model, least=1 if model is models[1] else 10**9):
            for _ in range(2):
                model.zero_grad()
                model(ids).logits.logsumexp(-1).mean().backward()
    plain, ours = (model.embeddings.word.weight.grad for model in models)
    assert torch.allclose(plain, ours, atol=1e-7)
    assert not ours.is_sparse


def test_fit_trains_to_the_same_weights_with_and_without(monkeypatch):
    ids = tuple(torch.randint(5, 200, (n,), generator=torch.Generator().manual_seed(n)) for n in range(4, 20))
    examples = train.Examples(Encoded(ids, tuple(torch.zeros_like(row) for row in ids)), [n % 2 for n in range(len(ids))])
    config = BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, head="classification", labels=("no", "yes"),
    )  # fmt: skip
    calls, own = [], RowGradient.__call__

    def counted(self, table):
        calls.append(table)
        own(self, table)

    monkeypatch.setattr(RowGradient, "__call__", counted)
    trained = []
    for least in (10**9, 1):
        monkeypatch.setattr("tinylib.train.row_gradients", lambda model, least=least: row_gradients(model, least))
        model = Bert(config, torch.Generator().manual_seed(0))
        train.fit(model, train.loader(examples, 4), train.classification_loss, epochs=2, lr=1e-2)
        trained.append(model.state_dict())
    assert calls, "fit did not take gradients row by row"
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
