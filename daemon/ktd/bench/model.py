"""A whole model through the engine: load, prompts of given lengths, answers of given batches and contexts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ktd.bench.session import Session
from ktd.bench.timing import read_bandwidth
from ktd.bench.trace import PromptTrace, profiled, prompt_trace
from ktd.budget import budget_of
from ktd.engine import Engine, EngineConfig
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.gpu import find_gpus, gpus_for
from ktd.model import ModelConfig, load_model
from ktd.model.placement import ROUTED, Placement
from ktd.plan import PAGE_SIZE, make_plan
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
    traces: list[PromptTrace]

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
    goes, for chrome://tracing or Perfetto; those of prompts go beside it, by length.
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
                traces = self._profile(session, self.trace, say) if self.trace is not None else []
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
                traces=traces,
            )

    def _profile(self, session: Session, path: Path, say: Callable[[str], None]) -> list[PromptTrace]:
        """Profiles answers and a prompt of each length; says of those on a GPU where their time went."""
        say(f"profiling into {path}")
        with profiled(path):
            session.decode(1, *_SHORT)
        traces = []
        for tokens in dict.fromkeys(self.prompts):
            place = path.with_stem(f"{path.stem}-prompt-{tokens}")
            say(f"profiling into {place}")
            with profiled(place):
                seconds = session.read(tokens)
            traces.append(prompt_trace(place, tokens, seconds))
        return [trace for trace in traces if trace is not None]


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
