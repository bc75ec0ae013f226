"""The conversion between tensors and bfloat16 bits, compared with arithmetic on the bits of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.machine.bfloat16 import from_bits, to_bits


def test_every_bfloat16_survives_the_round_trip():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = from_bits(bits)
    assert values.dtype == torch.bfloat16 and values.shape == (256, 256)
    back = to_bits(values)
    assert back.dtype == np.uint16
    np.testing.assert_array_equal(back, bits)


def test_bits_are_the_upper_half_of_float32():
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(from_bits(bits).float().numpy(), expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(to_bits(torch.from_numpy(expected[finite])), bits[finite])


@pytest.mark.parametrize(
    ("float32_bits", "rounded"),
    [
        (0x3F80_7FFF, 0x3F80),  # below the middle: down
        (0x3F80_8000, 0x3F80),  # a tie: down to the even neighbour
        (0x3F80_8001, 0x3F81),  # above the middle: up
        (0x3F81_8000, 0x3F82),  # a tie: up to the even neighbour
        (0xBF81_8000, 0xBF82),  # the same away from zero on the negative side
        (0x7F7F_FFFF, 0x7F80),  # past the largest number: infinity
    ],
)
def test_rounding_is_to_nearest_and_ties_go_to_even(float32_bits: int, rounded: int):
    value = torch.from_numpy(np.array([float32_bits], np.uint32).view(np.float32))
    assert to_bits(value).tolist() == [rounded]


def test_no_copy_is_made_of_bfloat16():
    bits = np.zeros(4, np.uint16)
    tensor = from_bits(bits)
    again = to_bits(tensor)
    assert np.shares_memory(again, bits)
    bits[2] = 0x3F80
    assert tensor[2] == 1.0


def test_parts_of_a_tensor_are_converted():
    states = torch.arange(12.0).reshape(3, 4)
    bits = to_bits(states[1:, 2:])
    np.testing.assert_array_equal(from_bits(bits).float().numpy(), [[6, 7], [10, 11]])
