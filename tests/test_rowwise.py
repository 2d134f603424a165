"""Rows of a cache: what comes back is what was put in, to within half a step of each row's own scale."""

import pytest
import torch

from tinylib import rowwise
from tinylib.errors import UserError


def numbers(*shape: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 4, 64), (5, 384)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_int8_is_off_by_half_a_step_at_most(shape, size):
    given = numbers(*shape, size=size)
    packed = rowwise.pack_int8(given)
    assert packed.dtype == torch.int8
    assert packed.shape == (*shape[:-1], rowwise.SCALE + shape[-1])
    back = rowwise.unpack_int8(packed)
    step = given.abs().amax(-1, keepdim=True) / 127
    # a scale in float16 is off by 2⁻¹¹ of itself, and below 6e-5 by up to 3e-8
    assert ((back - given).abs() <= step / 2 * (1 + 2**-10) + 127 * 3e-8).all()
    assert torch.equal(rowwise.pack_int8(back), packed), "what was rounded once is not rounded again"


@pytest.mark.parametrize("size", [1e-6, 1e-4, 10.0, 1000.0])
def test_int8_is_off_by_no_more_than_is_said(size):
    given = numbers(20_000, 32, size=size)
    largest = given.abs().amax(-1, keepdim=True)
    more = torch.where(largest < 127 * 2**-14, 127 * 2**-25, largest / 254 * 2**-11)
    rounding = largest * 2**-23  # of float32's own quotients and products
    off = (rowwise.unpack_int8(rowwise.pack_int8(given)) - given).abs()
    assert (off <= largest / 254 + more + rounding).all()
    assert (off > largest / 254 + 0.5 * more).any(), "half of it would not do"


def test_a_large_row_does_not_make_its_neighbour_coarse():
    given = torch.stack([numbers(8, size=1e4), numbers(8)])
    back = rowwise.unpack_int8(rowwise.pack_int8(given))
    assert (back - given)[1].abs().max() <= given[1].abs().max() / 254 * 1.001


def test_signs_zeros_and_the_largest_number_come_back():
    given = torch.tensor([[-2.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(rowwise.unpack_int8(rowwise.pack_int8(given)), given, atol=2 / 254)
    assert torch.equal(rowwise.unpack_int8(rowwise.pack_int8(given))[1], given[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_is_not_finite_in_float16_is_not_hidden(bad):
    given = torch.tensor([[1.0, bad, 2.0], [1.0, 3.0, 2.0]])
    back = rowwise.unpack_int8(rowwise.pack_int8(given))
    assert not back[0].isfinite().all(), "a teacher that says inf must stop the run, not teach it zeros"
    assert back[1].isfinite().all()


@pytest.mark.parametrize("name", list(rowwise.FORMATS))
def test_a_format_gives_back_what_it_was_given_in_its_own_size(name):
    stored, given = rowwise.format_of(name), numbers(4, 6)
    packed = stored.pack(given)
    assert packed.numpy().dtype == stored.dtype
    assert packed.numpy().itemsize == stored.bytes
    assert packed.shape[-1] == 6 + stored.extra
    assert torch.allclose(stored.unpack(packed).float(), given, atol=0.02)


def test_a_format_that_there_is_not_is_refused_by_name():
    with pytest.raises(UserError, match="'int4'.*float16, int8"):
        rowwise.format_of("int4")
