"""A whole model through the engine: load, prompts of given lengths, answers of given batches."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ktd.bench.timing import read_bandwidth
from ktd.engine import Engine, EngineConfig
from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.model import ModelConfig, load_model
from ktd.types import Ended, EngineEvent, Failed, GenerationRequest, SamplingParams, Tokens
from ktd_kernels import Cpu

_DECODE_PROMPT = 32  # tokens in front of an answer
_PAGE_SIZE = 64


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
    """Steps in which each of `sequences` writes a token; bytes are those of the routed experts they read."""

    sequences: int
    seconds_a_step: float
    expert_bytes_a_step: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences together."""
        return self.sequences / self.seconds_a_step


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Everything measured on one file; bandwidth in bytes a second with as many threads."""

    name: str
    isa: str
    threads: int
    bandwidth: float
    load_seconds: float
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
    """What to measure: prompt lengths, numbers of sequences, tokens a sequence writes."""

    path: Path
    prompts: Sequence[int]
    sequences: Sequence[int]
    answer_tokens: int
    chunk_tokens: int
    threads: int | None

    def run(self, say: Callable[[str], None]) -> ModelResult:
        """Load and measure; `say` hears what is being done. Raises GgufError, SettingsError."""
        context = max(*self.prompts, _DECODE_PROMPT + self.answer_tokens) + 1
        with GgufFile.open(self.path) as gguf:
            config = ModelConfig.from_gguf(gguf)
            if context > config.context:
                raise SettingsError(
                    f"{gguf.name} has a context of {config.context} tokens; {context} are asked for."
                )
            starting = max(self.sequences) * _DECODE_PROMPT // max(self.chunk_tokens, max(self.sequences))
            if self.answer_tokens < starting + 3:
                raise SettingsError(
                    f"{max(self.sequences)} sequences take {starting} steps to start: "
                    f"let them write at least {starting + 3} tokens each, not {self.answer_tokens}."
                )
            say("loading")
            cpu = Cpu(threads=self.threads)
            start = time.perf_counter()
            model = load_model(gguf, cpu, context=context, progress=lambda _: None)
            load_seconds = time.perf_counter() - start
            most = max(self.sequences)
            # One long prompt, or all writers; each with a page to grow, without which none is admitted.
            answer_pages = -(-(_DECODE_PROMPT + self.answer_tokens) // _PAGE_SIZE) + 1
            pages = max(-(-context // _PAGE_SIZE) + 1, most * answer_pages)
            engine_config = EngineConfig(
                context, most, _PAGE_SIZE, pages, max(self.chunk_tokens, most), queue_limit=most
            )
            engine = Engine(model, engine_config)
            engine.start()
            try:
                session = _Session(engine, config.vocab_size)
                session.decode(1, 4)  # touches every page of the dense part once
                prefill = []
                for tokens in self.prompts:
                    say(f"prompt of {tokens} tokens")
                    prefill.append(PrefillResult(tokens, session.prefill(tokens)))
                decode = []
                for count in self.sequences:
                    say(f"{count} sequences writing")
                    seconds = session.decode(count, self.answer_tokens)
                    decode.append(DecodeResult(count, seconds, expert_bytes(gguf, config, count)))
            finally:
                engine.stop()
            threads = cpu.threads
            bandwidth = read_bandwidth(threads)
            return ModelResult(gguf.name, cpu.isa, threads, bandwidth, load_seconds, prefill, decode)


def expert_bytes(gguf: GgufFile, config: ModelConfig, sequences: int) -> float:
    """Bytes of routed experts that a step of `sequences` tokens reads if each token chooses at random."""
    if config.moe is None:
        return 0.0
    total = sum(info.nbytes for info in gguf.tensors.values() if "_exps." in info.name)
    missed = (1.0 - config.moe.used / config.moe.experts) ** sequences
    return float(total * (1.0 - missed))


class _Session:
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
            sampling=SamplingParams(temperature=0.0),
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
                for number in range(sequences):
                    self._engine.submit(self._request(prompt_tokens, max_tokens), listener(number))

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

    def decode(self, sequences: int, tokens: int) -> float:
        """Mean seconds of a step while all sequences write."""
        _, times = self._run(sequences, _DECODE_PROMPT, tokens)
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        steps = sum(first < when <= last for own in times for when in own) / sequences
        return (last - first) / steps
