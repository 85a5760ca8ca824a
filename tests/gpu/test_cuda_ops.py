"""Products on the GPU: every block type against float64, independence of the batch, graphs, refusals."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from kit_cuda import gpu_weight, product_bound, rounding_bound
from kit_kernels import (
    ALL_TYPES,
    F32,
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    TYPES_32,
    blocks,
    normal,
    type_id,
    weight,
)

from ktd_kernels import Cpu
from ktd_kernels import cuda as ops
from ktd_kernels.cuda import GpuWeight, grouped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIXES = [
    ("Q4_K", "Q4_K", "Q6_K"),
    ("IQ1_S", "IQ1_S", "IQ2_XXS"),
    ("Q8_0", "Q4_K", "F32"),
    ("F16", "Q5_0", "Q8_0"),
]


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda")


def linear(w: GpuWeight, x: torch.Tensor) -> torch.Tensor:
    out = poisoned(len(x), w.shape[-2])
    ops.linear(w, x, out)
    return out


def many_bound(name: str, values: F32, x: F32) -> np.ndarray:
    """bfloat16 rounds each factor by 2^-9, with F32 weights none; float32 sums add little beside it."""
    magnitudes = np.abs(x.astype(np.float64)) @ np.abs(values.astype(np.float64)).T
    rounding = 0 if name == "F32" else 2.0**-8 + 2.0**-16
    return (rounding + len(values[0]) * 2.0**-24) * magnitudes


@pytest.mark.parametrize("name", ALL_TYPES)
def test_dequantize_is_bit_equal_to_the_oracle(name: str) -> None:
    for shape, scale in (((70, 1024), None), ((3, 5, 256), 1.0)):
        data = blocks(name, int(np.prod(shape[:-1])), shape[-1], scale=scale)
        with np.errstate(all="ignore"):
            want = (
                gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
                .astype(np.float32)
                .reshape(shape)
            )
        w = GpuWeight(torch.from_numpy(data.ravel()).cuda(), type_id(name), shape)
        assert w.nbytes <= data.size + 16 * w.matrices
        got = w.dequantize().cpu()
        np.testing.assert_array_equal(got.numpy().view(np.uint32), want.view(np.uint32))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(w.dequantize(dtype).cpu(), torch.from_numpy(want).to(dtype))


@pytest.mark.parametrize("name", ["IQ1_S", "Q4_0", "BF16"])
def test_matrices_are_loaded_one_by_one(name: str) -> None:
    data = torch.from_numpy(blocks(name, 3 * 5, 256).ravel()).cuda()
    want, got = (
        GpuWeight(data, type_id(name), (3, 5, 256)),
        GpuWeight.empty(type_id(name), (3, 5, 256), data.device),
    )
    size = data.numel() // 3
    got.load(data[2 * size :], 2)
    got.load(data[: 2 * size])
    assert torch.equal(got.dequantize(), want.dequantize())
    with pytest.raises(ValueError, match="2 matrices from 2 on do not lie within 3"):
        got.load(data[: 2 * size], 2)


@pytest.mark.parametrize("name", ALL_TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(70, 256), (33, 1536), (5, 7168)])
def test_linear_against_float64(name: str, rows: int, cols: int) -> None:
    w, values = gpu_weight(name, rows, cols)
    x = normal(1, 200, cols) * np.float32(10) ** normal(2, 200, 1)
    device_x = torch.from_numpy(x).cuda()
    want, bound = x.astype(np.float64) @ values.astype(np.float64).T, product_bound(name, values, x)
    together = linear(w, device_x[:64])
    for n in (1, 2, 3, 8, 17, 64):
        got = linear(w, device_x[:n])
        assert torch.equal(got, together[:n])
        assert (np.abs(got.cpu().numpy() - want[:n]) <= bound[:n]).all()
    for n in (65, 200):
        got = linear(w, device_x[:n]).cpu().numpy()
        assert (np.abs(got - want[:n]) <= many_bound(name, values, x[:n])).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16", "F32"])
@pytest.mark.parametrize("n", [1, 3, 64, 300, 512])
def test_rows_of_a_prompt_have_the_same_bits_in_any_company(name: str, n: int) -> None:
    w, _ = gpu_weight(name, 300, 1536)
    heads, _ = gpu_weight(name, 6, 40, 256)
    x = torch.from_numpy(normal(14, 1100, 1536)).cuda()
    split, first = x.view(1100, 6, 256), 1100 - n
    together, several = torch.full((1100, 300), 0.5, device="cuda"), poisoned(1100, 6, 40)
    alone, some = torch.full((n, 300), 0.5, device="cuda"), poisoned(n, 6, 40)
    for accumulate in (False, True):
        ops.linear(w, x, together, accumulate, prompt=True)
        ops.linear(w, x[first:], alone, accumulate, prompt=True)
        assert torch.equal(alone, together[first:])
    ops.linear_heads(heads, split, several, prompt=True)
    ops.linear_heads(heads, split[first:], some, prompt=True)
    assert torch.equal(some, several[first:])


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
def test_linear_is_what_the_cpu_computes(name: str) -> None:
    """Both quantise activations alike and sum exact integers: they differ by the order of float additions."""
    cols = 1536
    w, values = gpu_weight(name, 40, cols)
    x = normal(12, 3, cols)
    got = linear(w, torch.from_numpy(x).cuda()).cpu().numpy()
    want = np.empty_like(got)
    Cpu(threads=1).linear(weight(name, 40, cols), x, want)
    assert (np.abs(got - want) <= 2 * rounding_bound(name, values, x)).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("cols", [32, 96, 128, 544])
def test_rows_of_few_blocks(name: str, cols: int) -> None:
    w, values = gpu_weight(name, 19, cols)
    x = normal(3, 5, cols)
    got = linear(w, torch.from_numpy(x).cuda()).cpu().numpy()
    want = x.astype(np.float64) @ values.astype(np.float64).T
    assert (np.abs(got - want) <= product_bound(name, values, x)).all()


@pytest.mark.parametrize("n", [1, 5, 64, 65])
def test_accumulate_and_strided_rows(n: int) -> None:
    w, _ = gpu_weight("Q4_K", 70, 512)
    x = torch.from_numpy(normal(4, n, 2, 512)).cuda()
    plain = linear(w, x[:, 1].contiguous())
    out = torch.full((n, 100), 2.0, device="cuda")
    ops.linear(w, x[:, 1], out[:, :70], accumulate=True)
    assert torch.equal(out[:, :70], 2 + plain)
    assert (out[:, 70:] == 2).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("n", [1, 3, 17, 65])
def test_linear_heads(name: str, n: int) -> None:
    heads, rows, cols = 6, 40, 256
    w, values = gpu_weight(name, heads, rows, cols)
    x = normal(5, heads, n, cols)
    out = poisoned(n, heads, rows)
    ops.linear_heads(w, torch.from_numpy(x).cuda().transpose(0, 1), out)
    for h in range(heads):
        bound = product_bound(name, values[h], x[h]) if n <= 64 else many_bound(name, values[h], x[h])
        want = x[h].astype(np.float64) @ values[h].astype(np.float64).T
        assert (np.abs(out[:, h].cpu().numpy() - want) <= bound).all()


def layer(
    mix: tuple[str, str, str], hidden: int, *stack: int, cols: int = 256
) -> tuple[list[GpuWeight], list[F32]]:
    shapes = [(hidden, cols), (hidden, cols), (cols, hidden)]
    made = [
        gpu_weight(name, *stack, *shape, seed=i)
        for i, (name, shape) in enumerate(zip(mix, shapes, strict=True))
    ]
    return [w for w, _ in made], [values for _, values in made]


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(gate.double()) * up.double()).float()


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("n", [1, 2, 11, 64])
def test_mlp_is_what_the_plain_products_give(mix: tuple[str, str, str], n: int) -> None:
    (gate, up, down), _ = layer(mix, 288 if mix[2] == "Q8_0" else 512)
    x = torch.from_numpy(normal(6, n, 256)).cuda()
    want = linear(down, gated(linear(gate, x), linear(up, x)))
    out = poisoned(n, 256)
    ops.mlp(gate, up, down, x, out)
    # SiLU within 4 units in the last place may move a rounding to int8, by one step of one value.
    torch.testing.assert_close(out, want, rtol=0, atol=2e-3 * want.abs().max().item())


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    ("n", "cols", "hidden"),
    [*((n, 256, 512) for n in (1, 3, 64, 65, 200)), (1, 3072, 1024), (3, 1024, 2048)],
)
def test_moe_against_a_sum_over_experts(mix: tuple[str, str, str], n: int, cols: int, hidden: int) -> None:
    """Experts out of range live elsewhere and add nothing."""
    experts, used = 6, 4
    narrow = mix[2] == "Q8_0" and hidden == 512
    (gate, up, down), values = layer(mix, 288 if narrow else hidden, experts, cols=cols)
    rng = np.random.default_rng(7)
    ids = np.stack([rng.permutation(experts + 2)[:used] for _ in range(n)]).astype(np.int32) - 1
    x, weights = normal(8, n, cols) * np.float32(0.1), rng.uniform(0.1, 1, (n, used)).astype(np.float32)
    g, u, d = (v.astype(np.float64) for v in values)
    want = np.zeros((n, cols))
    for t in range(n):
        for j in range(used):
            e = ids[t, j]
            if 0 <= e < experts:
                gate_x = g[e] @ x[t]
                want[t] += weights[t, j] * (
                    d[e] @ (gate_x / (1 + np.exp(np.minimum(-gate_x, 700))) * (u[e] @ x[t]))
                )
    arguments = [torch.from_numpy(a).cuda() for a in (x, ids, weights)]
    out = poisoned(n, cols)
    ops.moe(gate, up, down, *arguments, out)
    # Two roundings of activations to int8 (0.7 % of a normal vector each), the first seen by both factors;
    # random signs make the sums of products no better than their terms. bfloat16 is closer (0.2 % each).
    assert np.linalg.norm(out.cpu().numpy() - want) < (0.035 if n <= 64 else 0.01) * np.linalg.norm(want)
    if n <= 64:
        for i in {0, n // 2, n - 1}:
            alone = poisoned(1, cols)
            ops.moe(gate, up, down, *(a[i : i + 1] for a in arguments), alone)
            assert torch.equal(alone[0], out[i])
    elif mix[0] == mix[1]:  # tensor cores; fewer tokens are cut into smaller tiles
        fewer = poisoned(65, cols)
        ops.moe(gate, up, down, *(a[:65] for a in arguments), fewer)
        assert torch.equal(fewer, out[:65])
    more = torch.full((n, cols), 2.0, device="cuda")
    ops.moe(gate, up, down, *arguments, more, accumulate=True)
    torch.testing.assert_close(more, out + 2, rtol=0, atol=8 * 2.0**-24 * (2 + out.abs().max().item()))


def test_experts_in_pieces_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens in pieces of 64, 256 rows in slices of 128."""
    data = [blocks(name, 6 * rows, cols) for name, rows, cols in (("Q4_K", 512, 256), ("Q6_K", 256, 512))]
    gate = GpuWeight(torch.from_numpy(data[0].ravel()).cuda(), type_id("Q4_K"), (6, 512, 256))
    down = GpuWeight(torch.from_numpy(data[1].ravel()).cuda(), type_id("Q6_K"), (6, 256, 512))
    x = torch.from_numpy(normal(13, 300, 256)).cuda()
    ids = torch.stack([torch.randperm(6, device="cuda")[:3] for _ in range(300)]).int()
    weights = torch.rand(300, 3, device="cuda")
    whole, parts = poisoned(300, 256), poisoned(300, 256)
    ops.moe(gate, gate, down, x, ids, weights, whole)
    monkeypatch.setattr(grouped, "_PARTIAL", 1)
    monkeypatch.setattr(grouped, "_HIDDEN", 1)
    ops.moe(gate, gate, down, x, ids, weights, parts)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", ["Q4_K", "IQ1_S", "F16"])
@pytest.mark.parametrize("n", [40, 200, 700])
def test_experts_in_groups(name: str, n: int) -> None:
    """The bits of all at once; one of the groups is chosen by nobody."""
    shapes = [(9, 512, 256), (9, 512, 256), (9, 256, 512)]
    data = [blocks(name, shape[0] * shape[1], shape[2]).reshape(9, -1) for shape in shapes]

    def stacks(first: int, count: int) -> list[GpuWeight]:
        return [
            GpuWeight(
                torch.from_numpy(raw[first : first + count].ravel()).cuda(),
                type_id(name),
                (count, *shape[1:]),
            )
            for raw, shape in zip(data, shapes, strict=True)
        ]

    x = torch.from_numpy(normal(14, n, 256)).cuda()
    ids = torch.stack([torch.randperm(7, device="cuda")[:3] for _ in range(n)]).int()
    ids[ids == 4] = -1
    ids[ids > 4] += 1
    weights = torch.rand(n, 3, device="cuda")
    whole, parts = poisoned(n, 256), torch.zeros(n, 256, device="cuda")
    ops.moe(*stacks(0, 9), x, ids, weights, whole, prompt=True)
    pairs = ops.pairs(x, ids, weights, 9)
    for first, count in ((0, 3), (3, 1), (4, 2), (6, 3)):
        ops.add_experts(*stacks(first, count), pairs, first, parts)
    assert torch.equal(parts, whole)
    with pytest.raises(ValueError, match="experts from 7 on are not among the 9"):
        ops.add_experts(*stacks(6, 3), pairs, 7, parts)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_embed(name: str) -> None:
    w, values = gpu_weight(name, 50, 512)
    ids = np.array([3, 0, 49, 3, 17], np.int32)
    out = poisoned(5, 512)
    ops.embed(w, torch.from_numpy(ids).cuda(), out)
    np.testing.assert_array_equal(out.cpu().numpy(), values[ids])


@pytest.mark.parametrize("n", [1, 8, 64])
def test_calls_can_be_captured(n: int) -> None:
    (gate, up, down), _ = layer(("Q4_K", "Q5_K", "Q6_K"), 512)
    experts, _ = layer(("IQ1_S", "IQ1_S", "IQ2_XXS"), 512, 6)
    heads, _ = gpu_weight("Q8_0", 4, 64, 64)
    x = torch.from_numpy(normal(9, n, 256)).cuda()
    ids = torch.arange(n * 3, device="cuda", dtype=torch.int32).reshape(n, 3) % 6
    weights = torch.full((n, 3), 0.5, device="cuda")
    outs = [poisoned(n, 512), poisoned(n, 256), poisoned(n, 256), poisoned(n, 4, 64), poisoned(n, 256)]
    vocabulary, _ = gpu_weight("Q4_K", 32, 256)
    calls: list[Callable[[], None]] = [
        lambda: ops.linear(gate, x, outs[0]),
        lambda: ops.mlp(gate, up, down, x, outs[1]),
        lambda: ops.moe(experts[0], experts[1], experts[2], x, ids, weights, outs[2]),
        lambda: ops.linear_heads(heads, x.view(n, 4, 64), outs[3]),
        lambda: ops.embed(vocabulary, ids[:, 0].contiguous(), outs[4]),
    ]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    x.copy_(torch.from_numpy(normal(10, n, 256)))
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    got = [out.clone() for out in outs]
    for call in calls:
        call()
    for a, b in zip(got, outs, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


@pytest.mark.parametrize("name", FLOAT_TYPES[:1] + TYPES_32[:1])
def test_refusals(name: str) -> None:
    w, _ = gpu_weight(name, 64, 64)
    x, out = torch.zeros(2, 64, device="cuda"), torch.zeros(2, 64, device="cuda")
    with pytest.raises(ValueError, match=r"x must have shape \[2, 64\], not \[2, 32\]"):
        ops.linear(w, x[:, :32], out)
    with pytest.raises(TypeError, match="x must be float32"):
        ops.linear(w, x.half(), out)
    with pytest.raises(TypeError, match="out must be float32 on cuda"):
        ops.linear(w, x, out.cpu())
    with pytest.raises(ValueError, match="out must be contiguous"):
        ops.linear(w, x, torch.zeros(64, 4, device="cuda").T[:2])
    with pytest.raises(ValueError, match="w must be a stack"):
        ops.linear_heads(w, x[:, None], out[:, None])
    data = torch.zeros(100, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"take .* bytes, not 100"):
        GpuWeight(data, w.ggml_type, (64, 64))
    with pytest.raises(ValueError, match="has no GPU kernels"):
        GpuWeight(data, 9, (64, 64))
    with pytest.raises(ValueError, match="multiple of"):
        GpuWeight(data, w.ggml_type, (64, 63))
    with pytest.raises(TypeError, match="lies on a CUDA device"):
        GpuWeight(data.cpu(), w.ggml_type, (64, 64))


def test_infinity_in_an_activation_is_seen() -> None:
    w, _ = gpu_weight("Q4_K", 40, 512)
    x = torch.from_numpy(normal(11, 2, 512)).cuda()
    x[1, 300] = float("inf")
    got = linear(w, x)
    assert got[1].isnan().all()
    assert not got[0].isnan().any()
