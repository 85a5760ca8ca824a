"""Times mla_attention at R1's sizes: `python -m ktd_kernels.triton.bench`. Needs a CUDA device.

Bfloat16 cache in pages of 64 tokens, one query token a row. Calls are replayed from a CUDA graph and go
over so many caches in turn that none is found in the second-level cache. Counts 2 · rows · heads · context
· (576 + 512) operations.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

from ktd_kernels.triton.attention import mla_attention

HEADS, LATENT, ROPE, PAGE = 128, 512, 64, 64
#: (rows, context)
SHAPES = (
    *((1, 1024), (1, 4096), (1, 16384), (1, 32768), (1, 131072), (4, 4096), (4, 32768)),
    *((8, 8192), (16, 8192), (32, 8192)),
)
_ENOUGH = 150_000_000  # bytes of caches, three times the largest second-level cache


def microseconds(call: Callable[[int], None], turns: int, repeats: int = 9) -> float:
    """Median time of call(0), …, call(turns - 1), each, replayed from one graph."""
    call(0)
    torch.cuda.synchronize()
    calls = max(turns, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % turns)
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1000 / calls)
    return statistics.median(times[1:])


def decode(rows: int, context: int) -> float:
    """Microseconds of one decode step's attention."""
    pages = context // PAGE
    turns = -(-_ENOUGH // (rows * context * (LATENT + ROPE) * 2))
    device = torch.device("cuda")
    shape = (turns * rows * pages, PAGE, LATENT + ROPE)
    cache = torch.randn(shape, device=device, dtype=torch.bfloat16)
    order = torch.randperm(len(cache), device=device).to(torch.int32).view(turns, rows, pages)
    q_latent = torch.randn(rows, HEADS, LATENT, device=device)
    q_rope = torch.randn(rows, HEADS, ROPE, device=device)
    seq = torch.arange(rows, device=device, dtype=torch.int32)
    contexts = torch.full((rows,), context, device=device, dtype=torch.int32)
    out = torch.empty_like(q_latent)

    def call(turn: int) -> None:
        mla_attention(q_latent, q_rope, cache, order[turn], seq, contexts, 0.1, out, context)

    return microseconds(call, turns)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("No CUDA device: this measures the GPU's attention.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("rows × context       µs   TFLOP/s")
    for rows, context in SHAPES:
        took = decode(rows, context)
        operations = 2 * rows * HEADS * context * (LATENT + ROPE + LATENT)
        print(f"{rows:4} × {context:<8} {took:8.1f} {operations / took / 1e6:9.0f}", flush=True)


if __name__ == "__main__":
    main()
