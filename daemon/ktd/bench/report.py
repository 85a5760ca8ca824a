"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ktd.bench.kernels import KernelResult
from ktd.bench.model import ModelResult
from ktd.bench.ops import AttentionResult, HandOffResult
from ktd.bench.peer_model import PeerResult
from ktd.bench.serve import ServeResult
from ktd.bench.trace import PromptTrace
from ktd.plan import size_text

# Width of a table that goes to a file or a pipe.
_PLAIN_WIDTH = 160


def _print(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    console.print(table)


def print_kernels(results: Sequence[KernelResult]) -> None:
    """One line a measurement and its wall; the peer's columns appear where it was measured."""
    names = [
        "type",
        "matrix",
        "tokens",
        "threads",
        "isa",
        "layout",
        "ns/256 weights",
        "GB/s",
        "GOP/s",
        "peak",
        "of the wall",
    ]
    if any(result.speedup is not None for result in results):
        names += ["llama.cpp GOP/s", "ours/llama.cpp"]
    rows = []
    for r in results:
        row = [
            r.type,
            f"{r.rows}x{r.cols}",
            str(r.tokens),
            str(r.threads),
            r.isa,
            r.layout,
            f"{r.ns_per_block:.2f}",
        ]
        row += [f"{r.gigabytes_per_second:.2f}", f"{r.gigaops_per_second:.1f}"]
        row += ["-" if r.peak is None else f"{r.peak / 1e9:.0f}", f"{r.wall_percent:.0f} % {r.wall}"]
        if r.speedup is not None:
            row += [f"{r.gigaops_per_second / r.speedup:.1f}", f"{r.speedup:.2f}"]
        rows.append(row)
    walls = sorted({(r.threads, r.bandwidth) for r in results})
    wall = ", ".join(f"{bandwidth / 1e9:.1f} GB/s with {threads}" for threads, bandwidth in walls)
    _print(
        f"One matrix times its tokens; wall: reading it from memory ({wall} threads) or multiplying at"
        " the peak, the GOP/s of registers alone, whichever takes longer",
        names,
        rows,
    )


def print_hand_off(results: Sequence[HandOffResult]) -> None:
    """Microseconds by pool."""
    _print(
        "Until all threads of a pool work",
        ["threads", "after another loop, us", "after an idle time, us"],
        [[str(r.threads), f"{r.busy_seconds * 1e6:.1f}", f"{r.idle_seconds * 1e6:.1f}"] for r in results],
    )


def print_attention(results: Sequence[AttentionResult]) -> None:
    """One line a measurement."""
    _print(
        "Latent attention of one layer, 128 heads, 512 + 64 bfloat16 values a token",
        ["sequences", "context", "threads", "isa", "us", "GOP/s", "of the memory wall"],
        [
            [
                str(r.rows),
                str(r.context),
                str(r.threads),
                r.isa,
                f"{r.seconds * 1e6:.0f}",
                f"{r.gigaops_per_second:.1f}",
                f"{r.wall_percent:.0f} %",
            ]
            for r in results
        ],
    )


def print_model(result: ModelResult, peer: PeerResult | None) -> None:
    """Load time and memory, then prompt and answer speed; the peer's columns appear where it was measured."""
    print(f"{result.name}: loaded in {result.load_seconds:.2f} s, {result.threads} threads, {result.isa}")
    gpus = "GPU" if result.gpus == 1 else f"{result.gpus} GPUs"
    gpu = f"; {gpus} {size_text(result.vram)}, experts of {result.expert_layers_on_gpu} layers there"
    print(
        f"memory {size_text(result.ram)}{', repacked' if result.repacked else ''}{gpu if result.vram else ''}"
    )
    names = ["prompt tokens", "seconds", "tok/s"]
    rows = [[str(p.tokens), f"{p.seconds:.3f}", f"{p.tokens_per_second:.1f}"] for p in result.prefill]
    if peer is not None:
        names += ["llama.cpp tok/s", "ours/llama.cpp", "its best flags"]
        for row, p, its in zip(rows, result.prefill, peer.prefill, strict=True):
            row += [f"{p.tokens / its.seconds:.1f}", f"{its.seconds / p.seconds:.2f}", its.flags]
    _print("Reading a prompt", names, rows)
    if result.traces:
        _print_traces(result.traces)
    names = [
        "sequences",
        "context",
        "ms a step",
        "tok/s",
        "memory GB/s",
        "of wall",
        *["GPU GB/s"][: result.gpus],
    ]
    rows = [
        [
            str(d.sequences),
            str(d.context),
            f"{d.seconds_a_step * 1e3:.1f}",
            f"{d.tokens_per_second:.2f}",
            f"{d.memory_bytes_a_step / d.seconds_a_step / 1e9:.2f}",
            f"{100 * d.memory_bytes_a_step / d.seconds_a_step / result.bandwidth:.0f} %",
            *[f"{d.gpu_bytes_a_step / d.seconds_a_step / 1e9:.0f}"][: result.gpus],
        ]
        for d in result.decode
    ]
    if result.layers < result.layers_of_whole:
        # Counts the head once for each part, so it is not too high.
        names.append(f"tok/s of {result.layers_of_whole} layers")
        for row, d in zip(rows, result.decode, strict=True):
            row.append(f"{d.tokens_per_second * result.layers / result.layers_of_whole:.2f}")
    if peer is not None:
        names += ["llama.cpp ms", "ours/llama.cpp", "its best flags"]
        for row, d, its in zip(rows, result.decode, peer.decode, strict=True):
            row += [f"{its.seconds * 1e3:.1f}", f"{its.seconds / d.seconds_a_step:.2f}", its.flags]
    _print(
        "Writing, all sequences together; wall = the file's bytes of the weights read from memory",
        names,
        rows,
    )
    for reason in peer.left_out if peer is not None else ():
        print(reason)


def _print_traces(traces: Sequence[PromptTrace]) -> None:
    """One line a prompt."""
    _print(
        "Where the time of a prompt goes on the GPU, ms while profiled; copies and kernels run side by side",
        ["prompt tokens", "all", "bus", *traces[0].kernels, "nothing"],
        [
            [str(t.tokens)]
            + [f"{1e3 * seconds:.1f}" for seconds in (t.seconds, t.bus, *t.kernels.values(), t.nothing)]
            for t in traces
        ],
    )


def print_serve(title: str, results: Sequence[ServeResult]) -> None:
    """One line a level of load."""
    _print(
        title,
        [
            "users at once",
            "chats",
            "prompt tokens",
            "answer tokens",
            "first token, s",
            "p99",
            "tok/s of each",
            "p99",
            "tok/s of all",
        ],
        [
            [
                str(r.sequences),
                str(r.chats),
                str(r.prompt_tokens),
                str(r.answer_tokens),
                f"{r.first_seconds:.3f}",
                f"{r.first_seconds_p99:.3f}",
                f"{r.tokens_per_second:.2f}",
                f"{r.tokens_per_second_p99:.2f}",
                f"{r.total_tokens_per_second:.2f}",
            ]
            for r in results
        ],
    )
