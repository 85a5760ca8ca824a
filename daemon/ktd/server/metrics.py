"""Figures for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktd.errors import KtdError
from ktd.types import Answer, ChatEvent, EngineStatus, Finished, Reasoning, ToolCall, Usage

# Seconds: a hit in the prefix cache of a small model up to a long prompt on a slow machine.
_FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Tokens per second.
_RATE_BUCKETS = (0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 5000)


class Metrics:
    """Counters of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ktd_requests", "Chat requests by how they ended.", ["end"], registry=self._registry
        )
        self._first_token = Histogram(
            "ktd_time_to_first_token_seconds",
            "From the arrival of a request to its first piece of text.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._prefill_rate = Histogram(
            "ktd_prefill_tokens_per_second",
            "Prompt tokens read per second, of one request.",
            buckets=_RATE_BUCKETS,
            registry=self._registry,
        )
        self._decode_rate = Histogram(
            "ktd_decode_tokens_per_second",
            "Tokens written per second, of one request.",
            buckets=_RATE_BUCKETS,
            registry=self._registry,
        )

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Reports the engine's own figures from now on."""
        self._registry.register(_EngineCollector(status))

    @contextmanager
    def request(self) -> Iterator[Tally]:
        """Counts one request, however it ends."""
        tally = Tally(self._first_token, self._prefill_rate, self._decode_rate)
        try:
            yield tally
        except KtdError as error:
            tally.end = type(error).__name__
            raise
        finally:
            self._requests.labels(tally.end).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class Tally:
    """One request while it is counted. `end` is the finish reason, an error's name, or "cancelled"."""

    def __init__(self, first_token: Histogram, prefill_rate: Histogram, decode_rate: Histogram) -> None:
        self.end = "cancelled"
        self._arrived = time.monotonic()
        self._waits_for_text = True
        self._first_token = first_token
        self._prefill_rate = prefill_rate
        self._decode_rate = decode_rate

    def see(self, event: ChatEvent) -> None:
        """Counts one event of the request."""
        if self._waits_for_text and isinstance(event, Reasoning | Answer | ToolCall):
            self._waits_for_text = False
            self._first_token.observe(time.monotonic() - self._arrived)
        elif isinstance(event, Usage):
            read = event.prompt_tokens - event.cached_tokens
            if read and event.timings.prefill_seconds > 0:
                self._prefill_rate.observe(read / event.timings.prefill_seconds)
            if event.completion_tokens and event.timings.decode_seconds > 0:
                self._decode_rate.observe(event.completion_tokens / event.timings.decode_seconds)
        elif isinstance(event, Finished):
            self.end = event.reason.value


class _EngineCollector(Collector):
    """Reads the engine's status when it is asked for, so that nothing is counted twice."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        for name, text, value in (
            ("ktd_requests_running", "Sequences in the step loop.", status.running),
            ("ktd_requests_waiting", "Requests in the queue.", status.waiting),
            ("ktd_cache_pages", "Pages of the latent cache.", status.pages_total),
            ("ktd_cache_pages_free", "Pages of the latent cache that are free.", status.pages_free),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("ktd_prompt_tokens", "Prompt tokens read.", status.prompt_tokens_total),
            ("ktd_completion_tokens", "Tokens written.", status.completion_tokens_total),
            ("ktd_steps", "Steps of the engine.", status.steps_total),
        ):
            yield CounterMetricFamily(name, text, value=value)
