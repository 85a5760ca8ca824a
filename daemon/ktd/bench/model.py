"""A whole model through the engine: load, prompts of given lengths, answers of given batches and contexts."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from ktd.bench.timing import read_bandwidth
from ktd.budget import budget_of
from ktd.engine import Engine, EngineConfig
from ktd.errors import KtdError, SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import find_gpus, gpus_for
from ktd.model import ModelConfig, load_model
from ktd.model.placement import ROUTED, Placement
from ktd.plan import PAGE_SIZE, make_plan
from ktd.types import Ended, EngineEvent, Failed, GenerationRequest, SamplingParams, Tokens
from ktd_kernels import Cpu

_SHORT = (32, 6)  # context and tokens of a run that only warms up or is profiled


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A prompt of `tokens` until the first token of its answer."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens over time."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Steps in which each of `sequences`, with `context` tokens behind it, writes one; bytes are those of the
    weights that a step reads from memory, and of those it reads from GPUs' memory."""

    sequences: int
    context: int
    seconds_a_step: float
    memory_bytes_a_step: float
    gpu_bytes_a_step: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences together."""
        return self.sequences / self.seconds_a_step


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Everything measured on one file; bandwidth in bytes a second with as many threads.

    `ram` and `vram`, in bytes, are what the process holds (mapped weights included) and what the `gpus` lost
    in free memory. `layers_of_whole` is how many layers the model has of which `layers` were measured.
    """

    name: str
    isa: str
    threads: int
    chunk_tokens: int
    bandwidth: float
    layers: int
    layers_of_whole: int
    load_seconds: float
    ram: int
    vram: int
    gpus: int
    repacked: bool
    expert_layers_on_gpu: int
    prefill: list[PrefillResult]
    decode: list[DecodeResult]

    def as_json(self) -> dict[str, object]:
        """All fields and rates."""
        plain = asdict(self)
        plain["prefill"] = [asdict(p) | {"tokens_per_second": p.tokens_per_second} for p in self.prefill]
        plain["decode"] = [asdict(d) | {"tokens_per_second": d.tokens_per_second} for d in self.decode]
        return plain


@dataclass(frozen=True, slots=True)
class ModelBench:
    """What to measure: prompt lengths, numbers of sequences, tokens in front of them and tokens each writes.

    `layers_of_whole`: see ModelResult; None for a whole model. `trace`: where a profile of a few decode steps
    goes, for chrome://tracing or Perfetto.
    """

    path: Path
    prompts: Sequence[int]
    sequences: Sequence[int]
    contexts: Sequence[int]
    answer_tokens: int
    chunk_tokens: int | None
    threads: int | None
    ram: int | None
    vram: Sequence[int] | None
    repack: bool = True
    layers_of_whole: int | None = None
    trace: Path | None = None

    def run(self, say: Callable[[str], None]) -> ModelResult:
        """Load and measure; `say` hears what is being done. Raises GgufError, SettingsError."""
        most = max(self.sequences)
        context = max(*self.prompts, max(self.contexts) + self.answer_tokens, sum(_SHORT)) + 1
        with GgufFile.open(self.path) as gguf:
            config = ModelConfig.from_gguf(gguf)
            gpus = gpus_for(self.vram, gguf.nbytes)
            cpu = Cpu(threads=self.threads)
            plan = make_plan(
                gguf,
                config,
                budget=budget_of(self.ram, self.vram, gpus),
                packer=cpu if self.repack else None,
                context=context,
                sequences=most,
                chunk_tokens=self.chunk_tokens,
                cache_type="bf16",
            )
            starting = most * max(self.contexts) // plan.chunk_tokens
            if self.answer_tokens < starting + 3:
                raise SettingsError(
                    f"{most} sequences take {starting} steps to start: "
                    f"let them write at least {starting + 3} tokens each, not {self.answer_tokens}."
                )
            written = most * (max(self.contexts) + self.answer_tokens + PAGE_SIZE)
            if written > plan.cache_tokens:
                raise SettingsError(
                    f"The cache holds {plan.cache_tokens} tokens where {most} sequences take {written}:"
                    " take fewer --sequences, shorter --contexts or more --ram or --vram."
                )
            say("loading")
            start = time.perf_counter()
            model = load_model(
                gguf,
                cpu,
                context=context,
                progress=lambda _: None,
                repack=plan.repacked > 0,
                placement=plan.placement,
            )
            engine_config = EngineConfig(
                context, most, PAGE_SIZE, plan.pages, plan.chunk_tokens, queue_limit=most
            )
            engine = Engine(model, engine_config)
            load_seconds = time.perf_counter() - start
            engine.start()
            try:
                session = Session(engine, config.vocab_size)
                session.decode(1, *_SHORT)  # touches every page of the dense part once
                prefill = []
                for tokens in self.prompts:
                    say(f"prompt of {tokens} tokens")
                    prefill.append(PrefillResult(tokens, session.prefill(tokens)))
                decode = []
                for before in self.contexts:
                    for count in self.sequences:
                        say(f"{count} sequences writing, {before} tokens behind each")
                        seconds = session.decode(count, before, self.answer_tokens)
                        read = weight_bytes(gguf, config, plan.placement, count)
                        decode.append(DecodeResult(count, before, seconds, *read))
                if self.trace is not None:
                    say(f"profiling into {self.trace}")
                    _profile(session, self.trace)
                now = {gpu.device: gpu.free for gpu in find_gpus()} if plan.gpus else {}
            finally:
                engine.stop()
            return ModelResult(
                name=gguf.name,
                isa=cpu.isa,
                threads=cpu.threads,
                chunk_tokens=plan.chunk_tokens,
                bandwidth=read_bandwidth(cpu.threads),
                layers=config.layers,
                layers_of_whole=self.layers_of_whole or config.layers,
                load_seconds=load_seconds,
                ram=psutil.Process().memory_info().rss,
                vram=sum(g.free - now[g.device] for g in gpus if g.device in plan.placement.devices),
                gpus=len(plan.gpus),
                repacked=plan.repacked > 0,
                expert_layers_on_gpu=len(plan.placement.expert_layers_on_gpu),
                prefill=prefill,
                decode=decode,
            )


def weight_bytes(
    gguf: GgufFile, config: ModelConfig, placement: Placement, sequences: int
) -> tuple[float, float]:
    """Bytes of weights, as they are in the file, that a step of `sequences` tokens reads from memory and from
    GPUs' memory if each token chooses its experts at random."""
    chosen = 1.0 - (1.0 - config.moe.used / config.moe.experts) ** sequences if config.moe else 1.0
    read = [0.0, 0.0]
    for name, info in gguf.tensors.items():
        if name == "token_embd.weight" and "output.weight" in gguf.tensors:
            continue  # a few rows
        share = chosen if ROUTED.match(name) else 1.0
        read[placement.on_gpu(name)] += share * info.nbytes
    return read[0], read[1]


def _profile(session: Session, path: Path) -> None:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        session.decode(1, *_SHORT)
    profile.export_chrome_trace(str(path))


class Session:
    """Submits requests and waits for their tokens."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine, self._vocab_size = engine, vocab_size
        self._rng = np.random.default_rng(0)
        self._count = 0

    def _request(self, prompt_tokens: int, max_tokens: int) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(
            request_id=f"bench-{self._count}",
            prompt=self._rng.integers(0, self._vocab_size, prompt_tokens).tolist(),
            max_tokens=max_tokens,
            # Random tokens, as the peer's are: greedy text of random weights goes round in a circle, and its
            # few experts would stay in the caches.
            sampling=SamplingParams(temperature=1.0, top_p=1.0, seed=self._count),
            stop_ids=frozenset(),
        )

    def _run(self, sequences: int, prompt_tokens: int, max_tokens: int) -> tuple[float, list[list[float]]]:
        """When `sequences` equal requests were submitted, and when each token of each came."""
        events: queue.Queue[tuple[int, float, EngineEvent]] = queue.Queue()

        def listener(number: int) -> Callable[[EngineEvent], None]:
            return lambda event: events.put((number, time.perf_counter(), event))

        started = 0.0

        def submit_all(event: EngineEvent) -> None:
            nonlocal started
            if isinstance(event, Failed):
                events.put((0, time.perf_counter(), event))
            if isinstance(event, Ended):
                started = time.perf_counter()
                try:
                    for number in range(sequences):
                        self._engine.submit(self._request(prompt_tokens, max_tokens), listener(number))
                except KtdError as error:  # nobody else would hear it on this thread
                    events.put((0, started, Failed(error)))

        # A first request ends; from its last event, on the engine's thread, the others start in one step.
        self._engine.submit(self._request(1, 1), submit_all)
        times: list[list[float]] = [[] for _ in range(sequences)]
        ended = 0
        while ended < sequences:
            number, when, event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Tokens):
                times[number] += [when] * len(event.ids)
            ended += isinstance(event, Ended)
        return started, times

    def prefill(self, tokens: int) -> float:
        """Seconds until the first token after a prompt."""
        started, times = self._run(1, tokens, 1)
        return times[0][0] - started

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        """Mean seconds of a step while all sequences write behind prompts of `context` tokens."""
        _, times = self._run(sequences, context, tokens)
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        steps = sum(first < when <= last for own in times for when in own) / sequences
        return (last - first) / steps
