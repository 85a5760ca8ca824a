"""One step: schedule → run → sample → publish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from threading import Lock
from time import monotonic

from ktd.engine.live import LiveRequest
from ktd.engine.logprobs import RowScores, score_rows
from ktd.engine.runner import Runner
from ktd.engine.sampler import draw_tokens
from ktd.errors import DeviceLost, EngineFailure, FileLost, KtdError
from ktd.model import Tick
from ktd.sched import Scheduler, Sequence, Work
from ktd.types import Ended, Failed, FinishReason, Tokens
from ktd_kernels import Cpu

log = logging.getLogger(__name__)

FAULT = "The engine failed while it worked on this request; the daemon's log has the trace."
# After these no later step could do better.
FATAL = (DeviceLost, FileLost)
_PREFILL_EVERY = 0.9  # seconds; clients are promised progress at least once a second
# Prompt tokens of a step beyond which sequences that decode do not wait for its end; below, they share its
# reading of the weights.
_LONG = 32


class Abandoned(Exception):
    """Nobody wants the running step any more."""


class Stepper:
    """Takes the engine's steps, on its thread.

    A long step, which reads prompts, carries none of the sequences that decode: they have a step before it,
    and more between its layers, for a third of the time.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        books: Lock,
        live: Mapping[str, LiveRequest],
        cpu: Cpu,
        *,
        check_file: Callable[[], None],
        unwanted: Callable[[], Collection[str]],
        end: Callable[[LiveRequest, Ended | Failed], None],
    ) -> None:
        """books: guards the scheduler; live: the engine's requests by id; cpu: what draws; check_file: as of
        Engine; unwanted: ids of those that nobody waits for any more; end: takes a request out and says its
        last word."""
        self.prompt_tokens = self.completion_tokens = self.steps = 0  # done so far
        self._runner = runner
        self._scheduler = scheduler
        self._books = books
        self._live = live
        self._cpu = cpu
        self._check_file = check_file
        self._unwanted = unwanted
        self._end = end
        self._next_turn = 0.0  # of those that decode, while a long step is under way; monotonic seconds

    def step(self) -> None:
        """Runs what is due, if anything is, and ends the requests that are complete.

        A fault of the model or of a draw ends the requests that it touches. Raises Abandoned, one of FATAL,
        and RuntimeError where the scheduler has sequences and no work.
        """
        with self._books:
            work = self._scheduler.schedule()
            waiting = self._scheduler.waiting
            running = list(self._scheduler.running)
        for position, sequence in enumerate(waiting):
            self._of(sequence).queued(position)
        for sequence in running:
            self._of(sequence).started()
        if work:
            decoding = [item for item in work if item.sequence.decoding]
            reading = [item for item in work if not item.sequence.decoding]
            if decoding and sum(item.count for item in reading) > _LONG:
                self._take_turn(decoding)
                work = reading
            self._run(work, lambda fraction: self._tick(work, fraction))
        elif waiting or running:
            raise RuntimeError("the scheduler found nothing to do for the requests it has")

    def _run(self, work: list[Work], tick: Tick | None = None) -> None:
        requests = [self._of(item.sequence) for item in work]
        drawing = [live for item, live in zip(work, requests, strict=True) if item.draws]
        try:
            logits = self._runner.run(work, tick)
            self._check_file()
            # Before the draw, which overwrites the logits.
            scores = score_rows(
                self._cpu,
                logits,
                [live.request.sampling.top_logprobs for live in drawing],
                [live.sampler.adjusts for live in drawing],
            )
            drawn = draw_tokens(self._cpu, logits, [live.sampler for live in drawing])
        except (Abandoned, *FATAL):
            raise
        except Exception:
            self._check_file()  # zeros may be what it stumbled over
            log.exception("a step failed; its %d requests end", len(work))
            for live in requests:
                self._end(live, Failed(EngineFailure(FAULT)))
            return
        with self._books:
            self._scheduler.commit(work)
            self.steps += 1
        rows = zip(drawn, scores, strict=True)
        for item, live in zip(work, requests, strict=True):
            if item.draws:
                live.prefilled(live.sequence.prompt_tokens)
                self._publish(live, *next(rows))
            else:
                live.prefilled(live.sequence.computed, every=_PREFILL_EVERY)

    def _publish(self, live: LiveRequest, token: int | Exception, scores: RowScores | None) -> None:
        """Tells the token, and perhaps the end; a fault of its draw is this request's alone."""
        if isinstance(token, Exception):
            log.error("sampling failed for request %s", live.request.request_id, exc_info=token)
            self._end(live, Failed(token if isinstance(token, KtdError) else EngineFailure(FAULT)))
            return
        if live.sequence.drawn == 0:
            self.prompt_tokens += live.sequence.prompt_tokens
        live.drew(token)
        if token in live.request.stop_ids:
            self._end(live, Ended(FinishReason.STOP, live.timings()))
            return
        self.completion_tokens += 1
        live.tell(Tokens((token,), (scores.of(token),) if scores else ()))
        if live.sampler.complete:
            self._end(live, Ended(FinishReason.STOP, live.timings()))
        elif live.sequence.drawn == live.request.max_tokens:
            self._end(live, Ended(FinishReason.LENGTH, live.timings()))

    def _tick(self, work: list[Work], fraction: float) -> None:
        """Called between layers: tells progress within a long step, gives up one that nobody wants, and lets
        others decode."""
        self._check_file()
        unwanted = self._unwanted()
        if all(item.sequence.request.request_id in unwanted for item in work):
            raise Abandoned
        if all(item.sequence.decoding for item in work):
            return
        done = {item.sequence: item.start + int(item.count * fraction) for item in work}
        for sequence in self._scheduler.running:
            live = self._of(sequence)
            almost = min(done.get(sequence, 0), sequence.prompt_tokens - 1)
            live.prefilled(almost, every=_PREFILL_EVERY)
        if monotonic() >= self._next_turn and not any(item.sequence.decoding for item in work):
            with self._books:
                meanwhile = self._scheduler.schedule_meanwhile()
            wanted = [item for item in meanwhile if item.sequence.request.request_id not in unwanted]
            if wanted:
                self._take_turn(wanted)

    def _take_turn(self, work: list[Work]) -> None:
        """A step of those that decode; the next is due when this has been a third of the time."""
        start = monotonic()
        self._run(work)
        self._next_turn = monotonic() + 2 * (monotonic() - start)

    def _of(self, sequence: Sequence) -> LiveRequest:
        return self._live[sequence.request.request_id]
