"""Norm, rotary embedding, latent store and embedding against the reference, on every instruction set."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ktd_kernels import Cpu, Weight, reference

U = 2.0**-24  # rounding error of one float32 operation, relative
F32 = NDArray[np.float32]


def normal(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("d", [*range(1, 70), 255, 256, 512, 1408, 1536, 7168])
def test_rms_norm_matches_reference(cpu: Cpu, d: int) -> None:
    rng = np.random.default_rng(d)
    wide = normal(rng, 3, d + 5) * np.float32(10.0 ** rng.integers(-3, 4))
    x, weight, out = wide[:, :d], normal(rng, d), np.full((3, d + 3), np.nan, np.float32)
    cpu.rms_norm(x, weight, 1e-6, out[:, :d])
    want = reference.rms_norm(x, weight, 1e-6)
    # At least 16 chains of d / 16 additions, halved by the root; then division, root and two products.
    np.testing.assert_allclose(out[:, :d], want, rtol=((d / 16 + 20) / 2 + 6) * U, atol=0)
    assert np.isnan(out[:, d:]).all()


def test_rms_norm_in_place_and_of_zeros(cpu: Cpu) -> None:
    x = normal(np.random.default_rng(0), 40, 1000)
    weight, out = np.ones(1000, np.float32), np.empty_like(x)
    cpu.rms_norm(x, weight, 1e-6, out)
    cpu.rms_norm(x, weight, 1e-6, x)
    np.testing.assert_array_equal(x, out)
    zeros = np.zeros((1, 1000), np.float32)
    cpu.rms_norm(zeros, weight, 1e-6, zeros)
    assert not zeros.any()


@pytest.mark.parametrize("dr", [2, 6, 16, 30, 64, 128])
@pytest.mark.parametrize("heads", [1, 5])
def test_rope_matches_reference(cpu: Cpu, dr: int, heads: int) -> None:
    rng = np.random.default_rng(dr)
    table = reference.yarn_table(300, dr, factor=40.0)
    buffer = normal(rng, 7, heads, dr + 10)
    before = buffer.copy()
    positions = rng.integers(0, 300, 7).astype(np.int32)
    want = reference.rope(before[:, :, 10:], positions, table)
    cpu.rope(buffer[:, :, 10:], positions, table)
    # Two products and their sum, each rounded once; |cos| and |sin| are at most 1.
    pairs = np.abs(before[:, :, 10:]).reshape(7, heads, -1, 2).sum(-1).repeat(2, -1)
    assert (np.abs(buffer[:, :, 10:] - want) <= 2 * U * pairs).all()
    np.testing.assert_array_equal(buffer[:, :, :10], before[:, :, :10])


def test_rope_of_position_zero_changes_nothing(cpu: Cpu) -> None:
    x = normal(np.random.default_rng(0), 2, 3, 64)
    before = x.copy()
    cpu.rope(x, np.zeros(2, np.int32), reference.yarn_table(1, 64))
    np.testing.assert_array_equal(x, before)


SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF),
        *(0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x00000001, 0x00008000, 0x00018000),
    ],
    np.uint32,
).view(np.float32)


@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
def test_store_latent_rounds_to_nearest_even(cpu: Cpu, width: int) -> None:
    rng = np.random.default_rng(width)
    bits = rng.integers(0, 1 << 32, (50, width + 3), np.uint32)
    latent = bits.view(np.float32)[:, 3:]
    latent.reshape(-1)[: min(width, len(SPECIAL))] = SPECIAL[: min(width, len(SPECIAL))]
    slots = rng.permutation(9 * 7)[:50]
    cache = np.full((9, 7, width), 0xABCD, np.uint16)
    want = cache.copy()
    reference.store_latent(latent, slots, want)
    cpu.store_latent(latent, slots, cache)
    np.testing.assert_array_equal(cache, want)


def test_bf16_of_special_values(cpu: Cpu) -> None:
    cache = np.zeros((1, 1, len(SPECIAL)), np.uint16)
    cpu.store_latent(SPECIAL[None], np.zeros(1, np.int64), cache)
    want = [0x0000, 0x8000, 0x3F80, 0x3F82, 0x3F80, 0x3F81, 0x7F80, 0xFF80]
    want += [0x7F80, 0xFF80, 0x7FC0, 0x7FC0, 0xFFFF, 0x0000, 0x0000, 0x0002]
    assert [hex(v) for v in cache[0, 0]] == [hex(v) for v in want]


def test_store_latent_keeps_float32_bits(cpu: Cpu) -> None:
    latent = normal(np.random.default_rng(0), 4, 20)
    cache = np.zeros((2, 3, 20), np.float32)
    cpu.store_latent(latent, np.array([5, 0, 3, 1]), cache)
    np.testing.assert_array_equal(cache.reshape(6, 20)[[5, 0, 3, 1]], latent)
    assert not cache.reshape(6, 20)[[2, 4]].any()


EMBEDDABLE = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ1_S", "IQ2_XXS", "IQ4_NL", "TQ1_0"]


@pytest.mark.parametrize("name", EMBEDDABLE)
def test_embed_is_the_dequantised_row(cpu: Cpu, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 60, 11 * 512 // values * size).astype(
        np.uint8
    )  # small bytes: every float is finite
    weight = Weight(data, int(kind), (11, 512))
    ids = np.array([10, 0, 3, 3], np.int32)
    out = np.empty((4, 512), np.float32)
    cpu.embed(weight, ids, out)
    np.testing.assert_array_equal(out, reference.embed(reference.dequantize(data, int(kind), (11, 512)), ids))


def test_rows_do_not_depend_on_each_other(cpu: Cpu) -> None:
    rng = np.random.default_rng(2)
    x, weight, table = normal(rng, 64, 520), normal(rng, 520), reference.yarn_table(64, 520)
    positions = np.arange(64, dtype=np.int32)
    together, rotated = np.empty_like(x), x[:, None].copy()
    cpu.rms_norm(x, weight, 1e-6, together)
    cpu.rope(rotated, positions, table)
    for i in range(64):
        alone, turned = np.empty((1, 520), np.float32), x[i : i + 1, None].copy()
        cpu.rms_norm(x[i : i + 1], weight, 1e-6, alone)
        cpu.rope(turned, positions[i : i + 1], table)
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(turned[0], rotated[i])


def test_wrong_arguments_are_refused(cpu: Cpu) -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        cpu.rms_norm(x, np.ones(7, np.float32), 1e-6, x)
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        cpu.rms_norm(np.zeros((2, 16), np.float32)[:, ::2], np.ones(8, np.float32), 1e-6, x)
    with pytest.raises(ValueError, match="even last dimension"):
        cpu.rope(np.zeros((1, 1, 3), np.float32), np.zeros(1, np.int32), np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match=r"positions\[1\] is 5"):
        cpu.rope(x[:, None], np.array([0, 5], np.int32), np.zeros((5, 8), np.float32))
    cache = np.zeros((1, 4, 8), np.float32)
    for slot in (-1, 4):
        with pytest.raises(ValueError, match=rf"slots\[0\] is {slot}"):
            cpu.store_latent(x[:1], np.array([slot]), cache)
    with pytest.raises(ValueError, match="float32, or bfloat16"):
        cpu.store_latent(x[:1], np.array([0]), cache.astype(np.float64))
    embedding = Weight(x.view(np.uint8).reshape(-1), 0, (2, 8))
    with pytest.raises(ValueError, match=r"ids\[0\] is 2"):
        cpu.embed(embedding, np.array([2], np.int32), x[:1])
