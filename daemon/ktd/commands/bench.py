"""`ktd bench`: how fast this machine is, beside llama.cpp and beside what its memory allows."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ktd.bench.ggml import Ggml
from ktd.bench.kernels import KernelBench
from ktd.bench.model import ModelBench, ModelResult
from ktd.bench.ops import attention, hand_off
from ktd.bench.peer_model import PeerResult, measure_llama_cpp
from ktd.bench.report import print_attention, print_hand_off, print_kernels, print_model, print_serve
from ktd.bench.serve import ServeBench, ServeResult
from ktd.bench.values import number, numbers, pool, pools, seconds, size, sizes, types
from ktd.client import Address, Client
from ktd.commands.wait import address_of
from ktd.errors import UserError
from ktd.settings import Settings
from ktd.settings_sources import load
from ktd.synth import SHAPES, file_in_memory
from ktd.synth.mixes import MIX_NAMES
from ktd_kernels import Cpu, isa_list

NAME = "bench"
HELP = "measure kernels, a model, or a running daemon"

_TYPES = "Q8_0,Q4_K,Q6_K,IQ1_S,IQ2_XXS"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add `kernels`, `ops`, `model` and `serve` with their options."""
    what = parser.add_subparsers(dest="what", required=True, metavar="kernels|ops|model|serve")
    kernels = what.add_parser("kernels", help="quantised products at the sizes of R1's experts")
    kernels.add_argument("--types", type=types, default=_TYPES, help="block types (default: %(default)s)")
    kernels.add_argument("--tokens", type=numbers, default="1,16,512", help="tokens (default: %(default)s)")
    kernels.add_argument("--threads", type=pools, help="numbers of threads (default: one per core)")
    kernels.add_argument(
        "--isa", default="best", choices=("best", "all", *isa_list()), help="instruction set"
    )
    kernels.add_argument("--seconds", type=seconds, default="0.5", help="for each measurement (default: 0.5)")
    kernels.add_argument("--against", choices=("llama.cpp",), help="measure this peer in turns with ours")
    kernels.add_argument("--peer-lib", type=Path, help="folder that holds libggml-cpu.so")
    kernels.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    kernels.set_defaults(run=_run_kernels)
    ops = what.add_parser("ops", help="waking the threads, and attention at the size of R1's")
    ops.add_argument("--rows", type=numbers, default="1", help="sequences (default: %(default)s)")
    ops.add_argument(
        "--contexts", type=numbers, default="1024,4096,16384", help="tokens (default: %(default)s)"
    )
    ops.add_argument("--threads", type=pools, help="numbers of threads (default: one per core)")
    ops.add_argument("--isa", choices=isa_list(), help="instruction set (default: the best)")
    ops.add_argument("--seconds", type=seconds, default="0.5", help="for each measurement (default: 0.5)")
    ops.set_defaults(run=_run_ops)
    model = what.add_parser("model", help="load time, memory, prompt and answer speed of a model")
    model.add_argument("gguf", type=Path, nargs="?", help="file, shard or folder")
    model.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead, made in memory")
    model.add_argument("--mix", choices=MIX_NAMES, metavar="MIX", help="their block types (see ktd synth)")
    model.add_argument("--layers", type=int, help="measure this many of its layers (default: all)")
    model.add_argument("--dense-layers", type=int, help="dense ones among them (default: in proportion)")
    model.add_argument("--ram", type=size, help="memory to use (default: what is free)")
    model.add_argument(
        "--vram",
        type=sizes,
        help="GPU memory to use, as ktd serve; 0 uses no GPU (default: what is free)",
    )
    model.add_argument("--no-repack", action="store_true", help="leave the weights in the file's layout")
    model.add_argument("--prompts", type=numbers, default="128,512", help="lengths (default: %(default)s)")
    model.add_argument("--sequences", type=numbers, default="1,4", help="at once (default: %(default)s)")
    model.add_argument(
        "--contexts", type=numbers, default="32", help="tokens before an answer (default: %(default)s)"
    )
    model.add_argument(
        "--against",
        choices=("llama.cpp",),
        help="this peer on the same file; beside a GPU, its experts on the CPU",
    )
    model.add_argument("--peer-python", type=Path, help="Python that has llama-cpp-python")
    model.add_argument(
        "--trace",
        type=Path,
        help="write a profile of a few steps, and beside it one of a prompt of each length, for chrome://tracing",
    )
    model.add_argument(
        "--answer", type=int, default=16, help="tokens a sequence writes (default: %(default)s)"
    )
    model.add_argument("--chunk-tokens", type=int, help="prompt tokens a step (default: as ktd serve)")
    model.add_argument("--cpu-infer", type=pool, help="threads (default: one per core)")
    model.add_argument("--json", action="store_true", help="a JSON object instead of tables")
    model.set_defaults(run=_run_model)
    serve = what.add_parser("serve", help="a running daemon, several users at once")
    serve.add_argument(
        "--connect", metavar="ADDRESS", help="the daemon at grpc://host:port (default: this machine's)"
    )
    serve.add_argument(
        "--sequences", type=numbers, default="1,4,8", help="users at once (default: %(default)s)"
    )
    serve.add_argument("--prompt", type=number, default="128", help="tokens, about (default: %(default)s)")
    serve.add_argument("--answer", type=number, default="64", help="tokens at most (default: %(default)s)")
    serve.add_argument("--rounds", type=number, default="3", help="chats of each (default: %(default)s)")
    serve.add_argument(
        "--api-key", dest="api_key", default=argparse.SUPPRESS, help="key of the daemon (better: KTD_API_KEY)"
    )
    serve.add_argument("--json", action="store_true", help="a JSON object instead of a table")
    serve.set_defaults(run=_run_serve)


def run(args: argparse.Namespace) -> int:
    """Measure and print; raises UserError for options that do not fit together."""
    handler: Callable[[argparse.Namespace], int] = args.run
    return handler(args)


def _run_kernels(args: argparse.Namespace) -> int:
    if args.peer_lib is not None and args.against is None:
        raise UserError("--peer-lib needs --against llama.cpp.")
    isas = isa_list() if args.isa == "all" else [Cpu(threads=1).isa if args.isa == "best" else args.isa]
    bench = KernelBench(
        types=args.types,
        tokens=args.tokens,
        threads=args.threads or [Cpu().threads],
        isas=isas,
        seconds=args.seconds,
        peer=Ggml(args.peer_lib) if args.against else None,
    )
    results = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(bench))
        for result in bench.run():
            results.append(result)
            progress.update(task, advance=1, description=f"{result.type} x {result.tokens}")
            if args.json:
                print(json.dumps(result.as_json()), flush=True)
    if not args.json:
        print_kernels(results)
    return 0


def _run_serve(args: argparse.Namespace) -> int:
    settings = load(args)
    address = Address.parse(args.connect) if args.connect else address_of(settings)
    name, results = asyncio.run(_serve(args, settings, address))
    if args.json:
        print(json.dumps({"model": name, "address": str(address), "results": [asdict(r) for r in results]}))
    else:
        print_serve(f"{name} at {address}", results)
    return 0


async def _serve(
    args: argparse.Namespace, settings: Settings, address: Address
) -> tuple[str, list[ServeResult]]:
    """The model's name and the figures of each number of users."""
    async with Client(address, settings.api_key, settings.ssl_certfile) as client:
        (model,) = await client.models()
        if args.prompt + args.answer > model.context_length:
            raise UserError(
                f"--prompt {args.prompt} and --answer {args.answer} exceed the context of {model.id}, "
                f"{model.context_length} tokens: choose less."
            )
        bench = ServeBench(client.chat, prompt=args.prompt, answer=args.answer, rounds=args.rounds)
        results = []
        with Console(stderr=True).status("measuring a prompt") as status:
            for users in args.sequences:
                status.update(f"{users} at once")
                results.append(await bench.run(users))
    return model.id, results


def _run_ops(args: argparse.Namespace) -> int:
    pools = args.threads or [Cpu().threads]
    print_hand_off([hand_off(threads) for threads in pools])
    cpus = [Cpu(threads=threads, isa=args.isa) for threads in pools]
    print_attention([r for cpu in cpus for r in attention(args.rows, args.contexts, cpu, args.seconds)])
    return 0


def _run_model(args: argparse.Namespace) -> int:
    if (args.gguf is None) == (args.shape is None):
        raise UserError("Name a GGUF or a --shape, one of the two.")
    shaped = {"--mix": args.mix, "--layers": args.layers, "--dense-layers": args.dense_layers}
    if args.gguf is not None and (given := [name for name, value in shaped.items() if value is not None]):
        raise UserError(f"{given[0]} belongs to --shape, not to a GGUF.")
    if (args.against is None) != (args.peer_python is None):
        raise UserError("--against llama.cpp and --peer-python belong together.")
    console = Console(stderr=True)
    # What loading tells, such as the share of a prompt's experts that is sent, and no library.
    told = RichHandler(console=console, show_path=False)
    told.addFilter(logging.Filter("ktd"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[told])
    with console.status("starting") as status:
        if args.gguf is not None:
            result, peer, failure = _measure(args, args.gguf, None, status.update)
        else:
            whole = SHAPES[args.shape]
            shape = whole.cut(args.layers, args.dense_layers)
            status.update("making random weights")
            with file_in_memory(shape, args.mix or MIX_NAMES[0], seed=0, on_bytes=lambda _: None) as path:
                result, peer, failure = _measure(args, path, whole.layers, status.update)
            result = replace(result, name=f"{shape.layers} layers of {args.shape}")
    if args.json:
        print(json.dumps(result.as_json() | {"llama.cpp": asdict(peer) if peer else None}))
    else:
        print_model(result, peer)
    if failure is not None:
        raise failure
    return 0


def _measure(
    args: argparse.Namespace, path: Path, layers_of_whole: int | None, say: Callable[[str], None]
) -> tuple[ModelResult, PeerResult | None, UserError | None]:
    """Our figures, the peer's, and why it has none: ours took minutes, and are not lost with the peer."""
    bench = ModelBench(
        path=path,
        prompts=args.prompts,
        sequences=args.sequences,
        contexts=args.contexts,
        answer_tokens=args.answer,
        chunk_tokens=args.chunk_tokens,
        threads=args.cpu_infer,
        ram=args.ram,
        vram=args.vram,
        repack=not args.no_repack,
        layers_of_whole=layers_of_whole,
        trace=args.trace,
    )
    result = bench.run(say)
    if args.against is None:
        return result, None, None
    # After ours, whose memory is free again: both would not fit beside each other.
    try:
        peer = measure_llama_cpp(
            args.peer_python,
            path,
            prompts=args.prompts,
            sequences=args.sequences,
            contexts=args.contexts,
            answer_tokens=args.answer,
            chunk_tokens=result.chunk_tokens,
            threads=result.threads,
            gpu=result.vram > 0,
            say=say,
        )
    except UserError as failure:
        return result, None, failure
    return result, peer, None
