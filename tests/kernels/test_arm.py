"""The kernels for ARM processors under emulation: the bits of this machine's scalar kernels."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from kit_arm import OBJECTS, ArmCpu, build, features
from kit_attention import check, make_case
from kit_kernels import (
    ALL_TYPES,
    F32,
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    block_size,
    blocks,
    normal,
    type_id,
)
from numpy.typing import NDArray

from ktd_kernels import Cpu, Weight, reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first time everything is compiled
PROCESSORS = {"i8mm": "max", "neon": "neoverse-n1", "scalar": "cortex-a72"}


@pytest.fixture(scope="module")
def program() -> None:
    build()


@pytest.fixture(scope="module", params=PROCESSORS)
def arm(request: pytest.FixtureRequest, program: None) -> Iterator[ArmCpu]:
    """Each set of kernels on the oldest processor that takes it: another's instruction would trap."""
    cpu = ArmCpu(request.param, PROCESSORS[request.param])
    yield cpu
    cpu.close()


@pytest.fixture(scope="module")
def here() -> Cpu:
    return Cpu(3, "scalar")


def product(cpu: Cpu, name: str, w: NDArray[np.uint8], x: F32, before: F32 | None = None) -> F32:
    out = np.full((len(x), len(w)), np.nan, np.float32) if before is None else before.copy()
    cpu.linear(Weight(w.ravel(), type_id(name), [len(w), x.shape[1]]), x, out, before is not None)
    return out


@pytest.mark.usefixtures("program")
def test_each_processor_takes_the_best_it_has() -> None:
    assert features("cortex-a72") == (["scalar"], ["neon"])
    assert features("neoverse-n1") == (["neon", "scalar"], ["neon", "dotprod"])
    assert features("max") == (["i8mm", "neon", "scalar"], ["neon", "dotprod", "i8mm"])


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
def test_products_are_the_same_bits(arm: ArmCpu, here: Cpu, name: str) -> None:
    """1 to 4 tokens on both paths, then tiles with and without a rest; rows past whole fours and eights."""
    step = block_size(name)
    for n, few, rows, cols in (
        *((1, 4, 11, 3), (2, 4, 8, 1), (3, 4, 5, 2), (4, 4, 4, 2)),
        *((1, 0, 3, 2), (3, 0, 9, 1), (4, 0, 8, 3), (11, 4, 19, 9)),
    ):
        w, x = blocks(name, rows, cols * step, seed=n), normal(n, n, cols * step)
        want = product(here, name, w, x)
        np.testing.assert_array_equal(arm.product(name, w, x, few), want)
        before = normal(rows, n, rows)
        np.testing.assert_array_equal(arm.product(name, w, x, few, before), product(here, name, w, x, before))


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
def test_extremes_are_the_same_bits(arm: ArmCpu, here: Cpu, name: str) -> None:
    """Codes and activations at their ends, where narrow sums would overflow; any finite block scale."""
    cols = 2 * block_size(name)
    for fill in (0, 0xFF, None):
        w = blocks(name, 9, cols, fill=fill, scale=None if fill is None else 1.0)
        x = np.stack([np.full(cols, 3.0), np.full(cols, -3.0), *normal(5, 3, cols)]).astype(np.float32)
        want = product(here, name, w, x)
        np.testing.assert_array_equal(arm.product(name, w, x), want)
        np.testing.assert_array_equal(arm.product(name, w, x[:2]), want[:2])


def test_many_tokens_and_values_that_are_none(arm: ArmCpu, here: Cpu) -> None:
    """More tokens and rows than share copies of activations; NaN spoils its token alone."""
    w, x = blocks("Q4_K", 300, 256), normal(1, 600, 256)
    np.testing.assert_array_equal(arm.product("Q4_K", w, x), product(here, "Q4_K", w, x))
    x[1, 7], x[2, 9] = np.nan, np.inf
    for n in (3, 20):
        np.testing.assert_array_equal(arm.product("Q4_K", w, x[:n]), product(here, "Q4_K", w, x[:n]))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_decoded_weights_are_the_same_bits(arm: ArmCpu, name: str) -> None:
    cols = 2 * block_size(name) if name not in FLOAT_TYPES else 33
    w = blocks(name, 5, cols, scale=None)
    want = Weight(w.ravel(), type_id(name), [5, cols]).dequantize()
    np.testing.assert_array_equal(arm.dequantize(name, w, cols), want)


@pytest.mark.parametrize("name", FLOAT_TYPES)
def test_float_products(arm: ArmCpu, here: Cpu, name: str, request: pytest.FixtureRequest) -> None:
    """The same bits from scalar kernels, and for every number of tokens."""
    w, x = blocks(name, 7, 77), normal(3, 6, 77)
    out, want = arm.product(name, w, x), product(here, name, w, x)
    if "scalar" in request.node.name:
        np.testing.assert_array_equal(out, want)
    values = Weight(w.ravel(), type_id(name), [7, 77]).dequantize().astype(np.float64)
    bound = np.abs(x) @ np.abs(values).T * 10 * 2.0**-24
    assert (np.abs(out - x @ values.T) <= bound).all()
    for n in (1, 3):
        np.testing.assert_array_equal(arm.product(name, w, x[:n]), out[:n])


@pytest.mark.parametrize("mix", [("IQ1_S", "IQ1_S", "IQ2_XXS"), ("Q4_K", "Q8_0", "Q6_K")], ids="-".join)
def test_a_mixture_is_the_same_bits(arm: ArmCpu, here: Cpu, mix: tuple[str, str, str]) -> None:
    """Both loops over the pool: pieces of hidden rows, then of output rows."""
    experts, hidden, width = 5, 512, 256
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    w = [blocks(name, s[0] * s[1], s[2], seed=i) for i, (name, s) in enumerate(zip(mix, shapes, strict=True))]
    stacks = [Weight(b.ravel(), type_id(name), list(s)) for name, b, s in zip(mix, w, shapes, strict=True)]
    rng = np.random.default_rng(1)
    for n in (1, 9):
        ids = np.stack([rng.permutation(experts)[:3] for _ in range(n)]).astype(np.int32)
        x, weights = normal(n, n, width), rng.uniform(0.1, 1, (n, 3)).astype(np.float32)
        want = np.full_like(x, np.nan)
        here.moe(*stacks, x, ids, weights, want)
        got = arm.moe(mix, w, [experts, hidden, width], x, ids, weights)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "bf16"])
def test_attention(arm: ArmCpu, here: Cpu, bf16: bool, request: pytest.FixtureRequest) -> None:
    """Within the bounds of the other instruction sets; of scalar kernels the same bits."""
    for heads, r, dr, page in ((3, 24, 6, 7), (9, 64, 16, 16)):
        case = make_case([[1, 2, 33], [300, 64], [0]], heads, r, dr, page, bf16=bf16)
        out = case.run(arm)
        check(case, out)
        if "scalar" in request.node.name:
            np.testing.assert_array_equal(out, case.run(here))


def test_rows(arm: ArmCpu, here: Cpu, request: pytest.FixtureRequest) -> None:
    x, weight = normal(1, 3, 519), normal(2, 519)
    want = np.empty_like(x)
    here.rms_norm(x, weight, 1e-6, want)
    out = arm.rms_norm(x, weight, 1e-6)
    np.testing.assert_allclose(out, want, rtol=2 * ((519 / 16 + 20) / 2 + 6) * 2.0**-24, atol=0)
    if "scalar" in request.node.name:
        np.testing.assert_array_equal(out, want)
    turned, positions = normal(3, 4, 5, 64), np.array([0, 7, 1, 299], np.int32)
    table = reference.yarn_table(300, 64, factor=40.0)
    out = arm.rope(turned, positions, table)
    here.rope(turned, positions, table)
    np.testing.assert_array_equal(out, turned)
    latent, cache = normal(5, 6, 72), np.zeros((3, 4, 72), np.uint16)
    latent[0, :3] = np.nan, np.inf, -np.inf
    slots = np.array([3, 0, 11, 5, 7, 6])
    stored = arm.store_latent(latent, slots, cache)
    here.store_latent(latent, slots, cache)
    np.testing.assert_array_equal(stored, cache)


def test_drawn_tokens_and_log_probabilities(arm: ArmCpu, here: Cpu, request: pytest.FixtureRequest) -> None:
    """Those of this machine, unless a random number is within the error of weights of a boundary; of scalar
    kernels the same bits."""
    logits = 3 * normal(1, 3, 5003)
    rows = np.repeat(np.arange(3, dtype=np.int32), 40)
    fractions = np.random.default_rng(0).random(len(rows))
    for rule in ((0, 0, 1, 0), (1, 0, 1, 0), (0.6, 0, 0.95, 0), (1, 7, 0.9, 0.01), (2, 900, 0.99, 0)):
        rules = np.column_stack([np.tile(rule, (len(rows), 1)), fractions])
        tokens, want = np.empty((2, len(rows)), np.int32)
        arm.draw(logits, rows, rules, tokens)
        here.draw(logits, rows, rules, want)
        assert (tokens != want).sum() <= (0 if "scalar" in request.node.name else 1)
    logits[1, 5002] = np.nan
    arm.draw(logits, rows, rules, tokens)
    np.testing.assert_array_equal(tokens == -1, rows == 1)
    numbers, ids = np.array([2, 0], np.int32), np.empty((2, 3), np.int32)
    totals, expected = np.empty((2, 2))
    arm.score(logits, numbers, totals, ids)
    here.score(logits, numbers, expected, ids)
    np.testing.assert_allclose(totals, expected, rtol=0 if "scalar" in request.node.name else 1e-6)


@pytest.mark.usefixtures("program")
def test_dot_products_stay_inside_their_instruction_set() -> None:
    """Nor do their objects export what the linker could pick for everybody."""
    seen = set()
    for path in OBJECTS.glob("*.dir/**/*.o"):
        folder = path.relative_to(OBJECTS).parts[0]
        text = _tool("objdump", "-d", "--no-show-raw-insn", str(path))
        dot, matrix = re.search(r"\t[su]dot\t", text), re.search(r"\t(us|[us])mmla\t", text)
        assert (dot is not None) == (folder in ("isa_neon.dir", "isa_i8mm.dir")), path
        assert (matrix is not None) == (folder == "isa_i8mm.dir"), path
        seen.add(folder)
    assert seen == {"isa_i8mm.dir", "isa_neon.dir", "isa_scalar.dir", "core.dir", "program.dir"}
    for name in ("neon", "i8mm"):
        (compiled,) = OBJECTS.glob(f"isa_{name}.dir/**/*.o")
        symbols = _tool("nm", "-C", "--defined-only", str(compiled)).splitlines()
        shared = [line for line in symbols if line.split()[1] in "TWVBDRu"]
        assert [line.split(maxsplit=2)[2] for line in shared] == [f"ktd::{name}::table()"]


def _tool(name: str, *arguments: str) -> str:
    command = [f"aarch64-linux-gnu-{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
