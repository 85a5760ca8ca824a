"""Weights packed for an instruction set: the same values, the same bits of every product."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from kit_kernels import ALL_TYPES, F32, QUANTIZED_TYPES, blocks, normal, type_id, weight

from ktd_kernels import Cpu, Weight, isa_list

COLS = (256, 512, 768, 1280, 2048)


def packed_types(cpu: Cpu) -> list[str]:
    return [name for name in QUANTIZED_TYPES if cpu.packed_bytes(type_id(name), (16, 256))]


#: What this machine packs: (instruction set, type).
PACKED = [(isa, name) for isa in isa_list() for name in packed_types(Cpu(1, isa))]
each_packed = pytest.mark.parametrize(("isa", "name"), PACKED)
each_packing_isa = pytest.mark.parametrize("isa", sorted({isa for isa, _ in PACKED}))


def slow(*values: int) -> list[Any]:
    """Values that the sanitised and the emulated runs leave out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def product(cpu: Cpu, w: Weight, x: F32) -> F32:
    out = np.full((len(x), w.shape[-2]), np.nan, np.float32)
    cpu.linear(w, x, out)
    return out


def test_every_vector_instruction_set_packs_iq1_to_iq3_and_avx2_what_gains_by_it() -> None:
    tables = {name for name in QUANTIZED_TYPES if name.startswith(("IQ1", "IQ2", "IQ3"))}
    lanes = {"Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q5_1", "IQ4_NL", "MXFP4"}
    for isa in isa_list():
        want = set() if isa == "scalar" else tables | lanes if isa == "avx2" else tables
        assert set(packed_types(Cpu(1, isa))) == want, isa


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
def test_packing_costs_at_most_a_fifth(cpu: Cpu, name: str) -> None:
    shape = (3, 2048, 7168)
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    file = 3 * 2048 * 7168 // values * size
    assert cpu.packed_bytes(type_id(name), shape) <= 1.2 * file


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the oracle overflows on the largest halves, as we do
@each_packed
@pytest.mark.parametrize("rows", [1, 9, 16, 33])
@pytest.mark.parametrize("scale", [1.0, None], ids=["usual", "extreme"])
def test_packed_weights_mean_what_the_file_means(cpu: Cpu, name: str, rows: int, scale: float | None) -> None:
    for cols in COLS:
        data = blocks(name, rows, cols, seed=rows, scale=scale)
        want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).astype(np.float32)
        packed = cpu.pack(Weight(data.ravel(), type_id(name), (rows, cols)))
        data[:] = 0xFF  # a copy, not a view
        assert packed.shape == (rows, cols)
        assert packed.ggml_type == type_id(name)
        assert packed.layout != "file"
        assert packed.nbytes == cpu.packed_bytes(type_id(name), (rows, cols))
        np.testing.assert_array_equal(packed.dequantize().view(np.uint32), want.view(np.uint32))


@each_packed
@pytest.mark.parametrize("rows", [1, 5, 16, 47, *slow(2, 3, 4, 6, 7, 8, 9, 31, 32, 100)])
def test_products_have_the_bits_of_the_file(cpu: Cpu, name: str, rows: int) -> None:
    for cols in COLS if rows in (1, 47) else COLS[2:3]:
        w, x = weight(name, rows, cols, seed=cols), normal(rows, 19, cols)
        x[3] = 1.0  # sums of codes as large as they can be
        x[4] = -1.0
        packed = cpu.pack(w)
        for n in (*range(1, 10), 19):
            np.testing.assert_array_equal(
                product(cpu, packed, x[:n]), product(cpu, w, x[:n]), err_msg=f"{cols} columns, {n} tokens"
            )


@each_packed
@pytest.mark.parametrize("byte", [0x00, 0x77, 0xFF])
def test_extreme_codes_times_extreme_activations(cpu: Cpu, name: str, byte: int) -> None:
    w = Weight(blocks(name, 16, 512, fill=byte).ravel(), type_id(name), (16, 512))  # 7 is MXFP4's largest
    x = np.array([1, -1, 1, -1, 1], np.float32)[:, None] * np.ones((1, 512), np.float32)
    packed = cpu.pack(w)
    for n in range(1, 6):
        np.testing.assert_array_equal(product(cpu, packed, x[:n]), product(Cpu(1, "scalar"), w, x[:n]))


@pytest.mark.parametrize("isa", [isa for isa, name in PACKED if name == "MXFP4"])
def test_every_power_of_two_as_a_scale(cpu: Cpu) -> None:
    """MXFP4's scale is an exponent, two of which stand for floats below the least normal one."""
    data = blocks("MXFP4", 256, 32)
    data[:, 0] = np.arange(256)
    w, x = Weight(data.ravel(), type_id("MXFP4"), (256, 32)), normal(2, 7, 32)
    for n in (1, 2, 3, 4, 7):
        want = product(Cpu(1, "scalar"), w, x[:n])
        np.testing.assert_array_equal(product(cpu, cpu.pack(w), x[:n]), want)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_byte_permutes_read_what_word_permutes_wrote(name: str) -> None:
    """One layout for both: a packed copy may be used with and without VBMI, in either direction."""
    if "avx512vbmi" not in isa_list():
        pytest.skip("needs a CPU with AVX-512 VBMI")
    w, x = weight(name, 40, 1280), normal(1, 9, 1280)
    words, permutes = Cpu(1, "avx512"), Cpu(1, "avx512vbmi")
    for n in (1, 2, 3, 4, 9):
        want = product(Cpu(1, "scalar"), w, x[:n])
        np.testing.assert_array_equal(product(permutes, words.pack(w), x[:n]), want)
        np.testing.assert_array_equal(product(words, permutes.pack(w), x[:n]), want)


@each_packed
def test_threads_strides_and_accumulation(isa: str, name: str) -> None:
    cpu = Cpu(1, isa)
    w = weight(name, 200, 512)
    x = np.full((3, 600), np.nan, np.float32)
    x[:, :512] = normal(7, 3, 512)
    want = product(cpu, w, np.ascontiguousarray(x[:, :512]))
    for threads in (1, 2, 5):
        many = Cpu(threads, isa)
        packed = many.pack(w)
        out = np.full((3, 210), 3.0, np.float32)
        many.linear(packed, x[:, :512], out[:, 5:205])
        np.testing.assert_array_equal(out[:, 5:205], want)
        many.linear(packed, x[:, :512], out[:, 5:205], accumulate=True)
        np.testing.assert_array_equal(out[:, 5:205], want + want)
        assert (out[:, :5] == 3).all()
        assert (out[:, 205:] == 3).all()


@each_packed
def test_rows_too_long_to_prepare_their_activations(isa: str, name: str) -> None:
    cpu = Cpu(1, isa)
    w, x = weight(name, 3, 1 << 17), normal(1, 8, 1 << 17)
    for n in (1, 4, 8):
        np.testing.assert_array_equal(product(cpu, cpu.pack(w), x[:n]), product(cpu, w, x[:n]))


@pytest.mark.parametrize(
    ("isa", "names"),
    [
        *((isa, ("IQ1_S", "IQ1_M", "IQ1_S")) for isa in sorted({isa for isa, _ in PACKED})),
        *((isa, ("Q2_K", "Q3_K", "MXFP4")) for isa in isa_list() if isa == "avx2"),
    ],
)
@pytest.mark.parametrize("n", [1, 3, 40])
def test_gated_layers_and_heads_take_packed_weights(cpu: Cpu, names: tuple[str, str, str], n: int) -> None:
    gate, up = weight(names[0], 5, 256, 512), weight(names[1], 5, 256, 512, seed=1)
    down = weight(names[2], 5, 512, 256, seed=2)
    rng = np.random.default_rng(n)
    x, ids = normal(3, n, 512), rng.integers(0, 5, (n, 3)).astype(np.int32)
    weights = normal(4, n, 3)
    want, got = (np.full((n, 512), np.nan, np.float32) for _ in range(2))
    cpu.moe(gate, up, down, x, ids, weights, want)
    cpu.moe(cpu.pack(gate), up, cpu.pack(down), x, ids, weights, got)
    np.testing.assert_array_equal(got, want)
    cpu.moe(cpu.pack(gate), cpu.pack(up), cpu.pack(down), x, ids, weights, got)
    np.testing.assert_array_equal(got, want)
    wide = normal(5, n, 5, 512)
    out, packed_out = (np.empty((n, 5, 256), np.float32) for _ in range(2))
    cpu.linear_heads(gate, wide, out)
    cpu.linear_heads(cpu.pack(gate), wide, packed_out)
    np.testing.assert_array_equal(packed_out, out)


@each_packed
@pytest.mark.parametrize("n", [1, 3, 8])
def test_not_a_number_stays_in_its_row(cpu: Cpu, name: str, n: int) -> None:
    w, x = cpu.pack(weight(name, 33, 512)), normal(9, n + 3, 512)
    clean = product(cpu, w, x)
    x[0, 300], x[1, 5], x[2, 511] = np.nan, np.inf, -np.inf
    got = product(cpu, w, x)
    assert not np.isfinite(got[:3]).any()
    np.testing.assert_array_equal(got[3:], clean[3:])


def test_what_cannot_be_packed_is_refused(cpu: Cpu) -> None:
    for name in set(ALL_TYPES) - set(packed_types(cpu)):
        assert cpu.packed_bytes(type_id(name), (16, 256)) == 0
        with pytest.raises(ValueError, match="do not pack it"):
            cpu.pack(weight(name, 16, 256))
    for name in packed_types(cpu):
        with pytest.raises(ValueError, match="packed already"):
            cpu.pack(cpu.pack(weight(name, 16, 256)))


@each_packed
def test_bytes_that_were_packed_before_are_taken_as_they_are(cpu: Cpu, name: str) -> None:
    made, x = cpu.pack(weight(name, 3, 40, 512)), normal(4, 2, 512)
    kept = np.empty(made.nbytes + 128, np.uint8)
    data = kept[-kept.ctypes.data % 64 :][: made.nbytes]
    data[:] = made.bytes
    again = cpu.packed(data, made.ggml_type, made.shape)
    assert (again.layout, again.shape, again.nbytes) == (made.layout, made.shape, made.nbytes)
    assert (made.copied, made.part(1, 1).copied, again.copied) == (True, True, False)
    assert np.shares_memory(again.bytes, data)
    np.testing.assert_array_equal(again.dequantize(), made.dequantize())
    for i in range(3):
        want, got = (np.empty((2, 1, 40), np.float32) for _ in range(2))
        cpu.linear_heads(made.part(i, 1), x[:, None], want)
        cpu.linear_heads(again.part(i, 1), x[:, None], got)
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="data"):
        cpu.packed(data[:-1], made.ggml_type, made.shape)
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        cpu.packed(kept[1 - kept.ctypes.data % 64 + 64 :][: made.nbytes], made.ggml_type, made.shape)
    with pytest.raises(ValueError, match="does not pack"):
        Cpu(1, "scalar").packed(data, made.ggml_type, made.shape)


@pytest.mark.skipif(not PACKED, reason="this CPU packs nothing")
def test_another_instruction_set_refuses_a_layout_it_does_not_know() -> None:
    best, scalar = Cpu(1), Cpu(1, "scalar")
    packed = best.pack(weight("IQ1_S", 16, 256))
    with pytest.raises(ValueError, match="does not know"):
        product(scalar, packed, normal(0, 1, 256))
    embedded = np.empty((2, 256), np.float32)
    scalar.embed(packed, np.array([15, 2], np.int32), embedded)  # decoding needs no instruction set
    np.testing.assert_array_equal(embedded, packed.dequantize()[[15, 2]])


@each_packing_isa
def test_an_empty_weight_is_packed(cpu: Cpu) -> None:
    packed = cpu.pack(Weight(np.empty(0, np.uint8), type_id("IQ1_S"), (0, 256)))
    assert product(cpu, packed, normal(0, 2, 256)).shape == (2, 0)


def test_bytes_and_parts_are_views(cpu: Cpu) -> None:
    data = blocks("Q4_K", 5 * 3, 512).ravel()
    w = Weight(data, type_id("Q4_K"), (5, 3, 512))
    part = w.part(2, 2)
    assert part.shape == (2, 3, 512)
    assert part.nbytes == data.size // 5 * 2
    assert np.shares_memory(part.bytes, data)
    assert np.array_equal(part.bytes, data.reshape(5, -1)[2:4].ravel())
    assert np.array_equal(part.dequantize(), w.dequantize()[2:4])
    assert w.part(5, 0).bytes.size == 0
    with pytest.raises(ValueError, match="read-only"):
        w.bytes[0] = 1
    for first, count in ((0, 6), (5, 1), (-1, 2), (2, -1), (2**62, 2**62)):
        with pytest.raises(
            ValueError, match=f"{count} matrices from {first} on do not lie within a stack of 5"
        ):
            w.part(first, count)
    with pytest.raises(ValueError, match="Only a stack"):
        weight("Q4_K", 3, 512).part(0, 1)


@each_packed
def test_a_packed_stack_is_its_matrices_one_after_another(cpu: Cpu, name: str) -> None:
    w = weight(name, 5, 41, 512)
    packed = cpu.pack(w)
    data = packed.bytes
    each = [cpu.pack(w.part(i, 1)).bytes for i in range(5)]
    assert data.size == packed.nbytes
    assert np.array_equal(data, np.concatenate(each))
    part = packed.part(1, 3)
    assert part.layout == packed.layout
    assert np.array_equal(part.bytes, data.reshape(5, -1)[1:4].ravel())
    want = packed.dequantize()
    del packed
    assert np.array_equal(part.dequantize(), want[1:4])  # each keeps the memory
    del part
    assert np.array_equal(data, np.concatenate(each))
