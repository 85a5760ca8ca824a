"""Products with every block type: against float64, between instruction sets, and between batch sizes."""

from __future__ import annotations

import numpy as np
import pytest
from kit_kernels import (
    ALL_TYPES,
    F32,
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    TYPES_32,
    block_size,
    blocks,
    normal,
    type_id,
    weight,
)
from numpy.typing import NDArray

from ktd_kernels import Cpu, Weight, isa_list

U = 2.0**-24  # rounding error of one float32 operation, relative


def product(cpu: Cpu, w: Weight, x: F32) -> F32:
    out = np.full((len(x), w.shape[-2]), np.nan, np.float32)
    cpu.linear(w, x, out)
    return out


def quantized(x: F32, block: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What int8 with one scale per block makes of x, and the largest error of each value."""
    parts = x.astype(np.float64).reshape(len(x), -1, block)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0))
    return (codes * scale).reshape(x.shape), np.broadcast_to(scale / 2, parts.shape).reshape(x.shape)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_against_float64(cpu: Cpu, name: str) -> None:
    cols = 544 if name in TYPES_32 else 527 if name in FLOAT_TYPES else 768
    w, x = weight(name, 37, cols), normal(1, 9, cols) * np.float32(10) ** normal(2, 9, 1)
    exact = w.dequantize().astype(np.float64)
    got = product(cpu, w, x)
    if name in FLOAT_TYPES:
        # At least four running sums of a quarter of the values each, then their sum.
        bound = (cols / 4 + 8) * U * (np.abs(x.astype(np.float64)) @ np.abs(exact).T)
        assert (np.abs(got - x.astype(np.float64) @ exact.T) <= bound).all()
        return
    # Rounding an activation to int8 moves it by at most half a step; float division may turn a tie.
    block = block_size(name)
    seen, step = quantized(x, block)
    moved = (step * (1 + 1e-5)) @ np.abs(exact).T
    # Per block: two products, a conversion and a sum for the scales and for the minima. A weight's parts are
    # no larger than thrice the largest weight of its block.
    parts = (
        np.abs(exact)
        .reshape(37, -1, block)
        .max(axis=-1, keepdims=True)
        .repeat(block, axis=-1)
        .reshape(37, -1)
    )
    rounding = (2 * (cols / block) + 10) * U * (np.abs(seen) @ (3 * parts).T)
    assert (np.abs(got - x.astype(np.float64) @ exact.T) <= moved + rounding).all()
    # Without ties the codes are known, and only float rounding is left.
    assert (
        np.abs(got - seen @ exact.T)
        <= rounding + 2 * np.max(step, axis=1, keepdims=True) * 1e-3 * parts.max()
    ).all()


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
@pytest.mark.parametrize("rows", [1, 3, 33, 70])
def test_instruction_sets_give_the_same_bits(name: str, rows: int) -> None:
    cols = 5 * 32 + 256 if name in TYPES_32 else 768
    w, x = weight(name, rows, cols, seed=rows), normal(rows, 13, cols)
    results = {isa: product(Cpu(2, isa), w, x) for isa in isa_list()}
    for isa, got in results.items():
        np.testing.assert_array_equal(got, results["scalar"], err_msg=isa)


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
def test_largest_sums(isa: str, name: str) -> None:
    """All bytes of codes and scales alike, activations as large as they get: sums that must not overflow."""
    size, cols = block_size(name), 512
    signs = np.repeat(normal(4, 8, cols // 8), 8, axis=1)  # of every 8 columns
    x = np.concatenate([np.ones((1, cols)), -np.ones((1, cols)), np.sign(signs)]).astype(np.float32)
    for fill in (0x00, 0xFF, 0x88, 0x77, 0x0F, 0xF0):
        data = blocks(name, 19, cols, fill=fill).ravel()
        w = Weight(data, type_id(name), [19, cols])
        exact = w.dequantize().astype(np.float64)
        # Codes of these activations are 127 or -127: only float rounding is left.
        bound = (2 * (cols / size) + 10) * U * 3 * cols * np.abs(exact).max()
        cpu = Cpu(1, isa)
        got = product(cpu, w, x)
        assert (np.abs(got - x @ exact.T) <= bound).all(), f"{fill:#x}"
        for i in range(len(x)):
            np.testing.assert_array_equal(product(cpu, w, x[i : i + 1])[0], got[i])
        if cpu.packed_bytes(type_id(name), [19, cols]):
            np.testing.assert_array_equal(product(cpu, cpu.pack(w), x), got)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ1_S", "IQ2_XS", "IQ4_XS", "Q5_1"])
def test_more_tokens_and_columns_than_a_cache_holds(isa: str, name: str) -> None:
    rows, cols = 70, 8448 + 32 * (name in TYPES_32)
    n = 260 if isa == "avx2" else 140  # its panels are narrow, so that sums of more tokens fit
    w, x = weight(name, rows, cols), normal(11, n, cols)
    cpu = Cpu(1, isa)
    got = product(cpu, w, x)
    for i in (0, n // 2 - 1, n // 2, n - 1):
        np.testing.assert_array_equal(got[i], product(cpu, w, x[i : i + 1])[0])
    if cpu.packed_bytes(type_id(name), [rows, cols]):
        np.testing.assert_array_equal(product(cpu, cpu.pack(w), x), got)


def test_few_tokens_with_more_columns_than_scratch_holds() -> None:
    rows, cols = 17, 64 * 3500
    w, x = weight("Q4_0", rows, cols), normal(11, 4, cols)
    cpu = Cpu(1)
    got = product(cpu, w, x)
    for i in range(4):
        np.testing.assert_array_equal(got[i], product(cpu, w, x[i : i + 1])[0])


@pytest.mark.parametrize("name", ALL_TYPES)
def test_a_row_does_not_depend_on_its_company(cpu: Cpu, name: str) -> None:
    cols = 320 if name in TYPES_32 else 300 if name in FLOAT_TYPES else 512
    w, x = weight(name, 67, cols), normal(5, 64, cols)
    x[7] *= 1e4
    alone = np.concatenate([product(cpu, w, x[i : i + 1]) for i in range(64)])
    for n in (*range(1, 15), 31, 64):
        np.testing.assert_array_equal(product(cpu, w, x[:n]), alone[:n], err_msg=f"{n} rows")


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ1_S", "F16"])
@pytest.mark.parametrize("n", [70, 300])  # 300: cut into parts
def test_threads_give_the_same_bits(isa: str, name: str, n: int) -> None:
    w, x = weight(name, 200, 512), normal(6, n, 512)
    want = product(Cpu(1, isa), w, x)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(product(Cpu(threads, isa), w, x), want)


@pytest.mark.parametrize("name", ["Q6_K", "Q4_1", "IQ2_XXS", "BF16"])
@pytest.mark.parametrize("n", [1, 3, 11])
def test_strides_and_accumulation(cpu: Cpu, name: str, n: int) -> None:
    w = weight(name, 35, 512)
    x = np.full((n, 600), np.nan, np.float32)
    x[:, :512] = normal(7, n, 512)
    want = product(cpu, w, np.ascontiguousarray(x[:, :512]))
    out = np.full((n, 50), 3.0, np.float32)
    cpu.linear(w, x[:, :512], out[:, 5:40])
    np.testing.assert_array_equal(out[:, 5:40], want)
    cpu.linear(w, x[:, :512], out[:, 5:40], accumulate=True)
    np.testing.assert_array_equal(out[:, 5:40], want + want)
    assert (out[:, :5] == 3).all()
    assert (out[:, 40:] == 3).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F32"])
@pytest.mark.parametrize("n", [1, 11])
def test_heads(cpu: Cpu, name: str, n: int) -> None:
    heads, rows, cols = 5, 40, 256
    w = weight(name, heads, rows, cols)
    bytes_of_head = w.nbytes // heads
    data = blocks(name, heads * rows, cols).ravel()
    x = normal(8, n, heads, cols + 64)
    out = np.full((n, heads, rows + 3), np.nan, np.float32)
    cpu.linear_heads(w, x[:, :, :cols], out[:, :, :rows])
    for h in range(heads):
        one = Weight(data[h * bytes_of_head : (h + 1) * bytes_of_head], type_id(name), [rows, cols])
        np.testing.assert_array_equal(
            out[:, h, :rows], product(cpu, one, np.ascontiguousarray(x[:, h, :cols])), err_msg=f"head {h}"
        )
    assert np.isnan(out[:, :, rows:]).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "IQ1_S", "IQ3_S", "F16"])
@pytest.mark.parametrize("n", [1, 8])
def test_not_a_number_stays_in_its_row(cpu: Cpu, name: str, n: int) -> None:
    w, x = weight(name, 33, 512), normal(9, n + 3, 512)
    clean = product(cpu, w, x)
    x[0, 300], x[1, 5], x[2, 511] = np.nan, np.inf, -np.inf
    got = product(cpu, w, x)
    assert not np.isfinite(got[:3]).any()
    np.testing.assert_array_equal(got[3:], clean[3:])


def test_zeros_tiny_and_empty(cpu: Cpu) -> None:
    w = weight("Q4_K", 8, 512)
    assert not product(cpu, w, np.zeros((2, 512), np.float32)).any()
    tiny = np.full((1, 512), 1e-40, np.float32)
    assert not product(cpu, w, tiny).any()
    assert product(cpu, w, np.zeros((0, 512), np.float32)).shape == (0, 8)
    nothing = Weight(np.empty(0, np.uint8), w.ggml_type, [0, 512])
    assert product(cpu, nothing, np.zeros((2, 512), np.float32)).shape == (2, 0)


def test_wrong_arrays_are_refused(cpu: Cpu) -> None:
    w, x, out = weight("Q4_K", 8, 512), normal(0, 2, 512), np.empty((2, 8), np.float32)
    with pytest.raises(ValueError, match="x has shape"):
        cpu.linear(w, x[:, :256], out)
    with pytest.raises(ValueError, match="out has shape"):
        cpu.linear(w, x, out[:1])
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        cpu.linear(w, np.repeat(x, 2, axis=1)[:, ::2], out)
    with pytest.raises(TypeError):
        cpu.linear(w, x.astype(np.float64), out)
    with pytest.raises(ValueError, match="stack"):
        cpu.linear_heads(w, x[:, None], out[:, None])
