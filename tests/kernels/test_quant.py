"""Decoding every block type against the gguf package, and what a Weight refuses."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from kit_kernels import ALL_TYPES, blocks, type_id

from ktd_kernels import Weight


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the oracle overflows on the largest halves, as we do
@pytest.mark.parametrize("scale", [1.0, None], ids=["usual", "extreme"])
@pytest.mark.parametrize("name", ALL_TYPES)
def test_dequantize_is_bit_equal_to_gguf(name: str, scale: float | None) -> None:
    data = blocks(name, 16, 2048, seed=3, scale=scale)
    want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).astype(np.float32)
    got = Weight(data.ravel(), type_id(name), [16, 2048]).dequantize()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_stack_dequantizes_to_its_shape() -> None:
    data = blocks("Q4_K", 6, 512)
    weight = Weight(data.ravel(), type_id("Q4_K"), [2, 3, 512])
    flat = Weight(data.ravel(), type_id("Q4_K"), [6, 512])
    assert weight.shape == (2, 3, 512)
    assert (weight.ggml_type, weight.nbytes) == (type_id("Q4_K"), data.size)
    np.testing.assert_array_equal(weight.dequantize().reshape(6, 512), flat.dequantize())


def test_weight_keeps_its_bytes_alive_without_copying() -> None:
    data = blocks("Q8_0", 4, 64)
    weight = Weight(data.ravel(), type_id("Q8_0"), [4, 64])
    before = weight.dequantize()
    data[:, 2:34] = 0
    assert not np.array_equal(weight.dequantize()[:, :32], before[:, :32])
    del data
    assert not weight.dequantize()[:, :32].any()


def test_read_only_and_empty_weights() -> None:
    data = blocks("Q6_K", 4, 256)
    data.flags.writeable = False
    assert Weight(data.ravel(), type_id("Q6_K"), [4, 256]).shape == (4, 256)
    empty = Weight(np.empty(0, np.uint8), type_id("Q6_K"), [0, 256])
    assert empty.dequantize().shape == (0, 256)


@pytest.mark.parametrize(
    ("ggml_type", "shape", "size", "says"),
    [
        (137, [4, 256], 1, "type 137 has no CPU kernel"),
        (type_id("Q4_K"), [4, 128], 288, "not a whole number of Q4_K blocks"),
        (type_id("Q4_K"), [4, 256], 575, "data has shape"),
        (type_id("Q4_K"), [1024], 576, "shape is"),
        (type_id("Q4_K"), [-4, 256], 576, "negative"),
    ],
)
def test_weight_refuses(ggml_type: int, shape: list[int], size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Weight(np.zeros(size, np.uint8), ggml_type, shape)
