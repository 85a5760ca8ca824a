"""The engine: takes requests in from any thread and works on them step by step, on one of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from enum import Enum, auto

from ktd.cache import BlockPool, LatentCache
from ktd.engine.checks import check_request
from ktd.engine.config import EngineConfig
from ktd.engine.live import Listener, LiveRequest
from ktd.engine.runner import Runner
from ktd.engine.step import FATAL, FAULT, Abandoned, Stepper
from ktd.errors import Busy, EngineFailure, FileLost, KtdError, RequestError, Unavailable
from ktd.model import Model
from ktd.sched import Scheduler
from ktd.types import Ended, EngineStatus, Failed, GenerationRequest

log = logging.getLogger(__name__)

_IDLE_LOOK = 1.0  # seconds; a file that is lost is told to nobody where the daemon ends before the next asks
_ENDED = "The daemon is shutting down and ended this answer: ask again in a moment."
_CLOSED = "The engine takes no requests now: it is not started yet, or is stopping."
_GAVE_WAY = "The queue is full, and others have fewer requests in it: this one gave way; try again later."
_DIED = "The engine died: the daemon ends, to be started again; its log has the trace."
_DEAD = "The engine failed and takes no more requests: the daemon has to be restarted."


class _State(Enum):
    NEW = auto()
    OPEN = auto()
    DRAINING = auto()
    STOPPED = auto()
    DEAD = auto()


class Engine:
    """Serves many requests at once from one model.

    `submit`, `abort`, `status`, `drain`, `stop` and `check_integrity` may be called from any thread.
    Listeners are called from the engine thread, one event at a time, and hold it up while they run.

    A fault in a step ends the requests it touches with EngineFailure and the loop goes on. Where even that
    goes wrong, or a device or the model's file is lost, the loop is dead: all requests end with
    EngineFailure, no other is taken, and `death` is done.

    Two locks: `_inbox` guards what other threads leave for the loop, `_books` the scheduler. Neither is held
    while the model runs or a listener is called.
    """

    def __init__(
        self, model: Model, config: EngineConfig, check_file: Callable[[], None] = lambda: None
    ) -> None:
        """`check_file` raises FileLost when the model read what its file does not have any more; it is called
        on every step and between layers, and every second while there is nothing to do."""
        self._config = config
        self._check_file = check_file
        self._vocab_size = model.config.vocab_size
        cache = LatentCache(
            model.config.layers,
            config.total_pages,
            config.page_size,
            model.config.latent,
            config.cache_type,
            model.devices,
        )
        self._pool = BlockPool(config.total_pages)
        self._scheduler = Scheduler(
            self._pool,
            page_size=config.page_size,
            max_sequences=config.max_sequences,
            step_tokens=config.chunk_tokens,
        )
        model.reserve(config.chunk_tokens, config.max_sequences, cache)
        self._inbox = threading.Condition()
        self._books = threading.Lock()
        self._state = _State.NEW
        self._live: dict[str, LiveRequest] = {}
        self._unfinished = 0  # submitted and not yet told their last word
        self._arrived: list[LiveRequest] = []
        self._aborted: set[str] = set()
        self._given_way: set[str] = set()
        self._stepper = Stepper(
            Runner(model, cache),
            self._scheduler,
            self._books,
            self._live,
            model.cpu,
            check_file=check_file,
            unwanted=self._unwanted,
            end=self._end,
        )
        self.death: Future[EngineFailure] = Future()
        self._thread = threading.Thread(target=self._loop, name="ktd-engine", daemon=True)

    def start(self) -> None:
        """Starts the loop. An engine is started once."""
        with self._inbox:
            self._state = _State.OPEN
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Queues a request. `listener` then gets its events, exactly one of them terminal (Ended or Failed).

        Raises ContextExceeded, RequestError (empty prompt, foreign token id, id in use), Unavailable before
        start, once draining began and after the loop's death, and Busy when the queue is full. If another
        client has more requests in it, the last of these ends with Failed(Busy) instead.
        """
        check_request(request, self._config.context, self._vocab_size)
        live = LiveRequest(request, listener)
        with self._inbox:
            if self._state is not _State.OPEN:
                raise Unavailable(_DEAD if self._state is _State.DEAD else _CLOSED)
            if request.request_id in self._live:
                raise RequestError(f"A request with the id {request.request_id} is being worked on.")
            most = self._config.max_sequences + self._config.queue_limit
            if len(self._live) - len(self._given_way) >= most:
                self._make_way(live)
            self._live[request.request_id] = live
            self._unfinished += 1
            self._arrived.append(live)
            self._inbox.notify_all()

    def _make_way(self, newcomer: LiveRequest) -> None:
        """Marks the last in the line of those who wait. Raises Busy when that is the newcomer."""
        with self._books:
            waiting = [*self._scheduler.waiting, *(live.sequence for live in self._arrived)]
            leaving = self._given_way | self._aborted
            line = [each for each in waiting if each.request.request_id not in leaving]
            last = self._scheduler.in_turn([*line, newcomer.sequence])[-1]
        if last is newcomer.sequence:
            raise Busy(f"{self._config.queue_limit} requests are waiting already; try again later.")
        self._given_way.add(last.request.request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request with Failed(Unavailable) before the next step; does nothing for one that has
        ended."""
        with self._inbox:
            if request_id in self._live:
                self._aborted.add(request_id)
                self._inbox.notify_all()

    def status(self) -> EngineStatus:
        with self._inbox, self._books:
            running = len(self._scheduler.running)
            return EngineStatus(
                running=running,
                waiting=max(len(self._live) - running, 0),
                pages_total=self._pool.total,
                pages_free=self._pool.free,
                prompt_tokens_total=self._stepper.prompt_tokens,
                completion_tokens_total=self._stepper.completion_tokens,
                steps_total=self._stepper.steps,
            )

    def check_integrity(self) -> None:
        """Raises RuntimeError where pages leaked or are held twice."""
        with self._books:
            self._scheduler.check_integrity()

    def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for those it has; False when some are left after `seconds`."""
        with self._inbox:
            if self._state is _State.OPEN:
                self._state = _State.DRAINING
            return self._inbox.wait_for(lambda: not self._unfinished, timeout=seconds)

    def stop(self) -> None:
        """Ends every request with Failed(Unavailable), then the thread. Safe to repeat."""
        with self._inbox:
            started = self._state is not _State.NEW
            self._state = _State.STOPPED
            self._inbox.notify_all()
        if started and threading.current_thread() is not self._thread:
            self._thread.join()

    # The loop. All below runs on the engine thread.

    def _loop(self) -> None:
        try:
            while self._collect():
                try:
                    self._stepper.step()
                    self._drop_deaf()
                except Abandoned:
                    continue
                except FATAL:
                    raise
                except Exception:
                    log.exception("the step loop failed")
                    self._start_over()
            self._fail(self._known(), Unavailable(_ENDED))
        except FileLost as error:
            log.critical("%s", error)
            self._die(error, error)
        except BaseException:
            log.critical("the step loop is dead", exc_info=True)
            self._die(EngineFailure(FAULT), EngineFailure(_DIED))

    def _start_over(self) -> None:
        """Ends every request there is. Raises RuntimeError where the books are wrong even then."""
        self._fail(self._known(), EngineFailure(FAULT))
        with self._books:
            if not self._scheduler.idle:
                raise RuntimeError("the scheduler has sequences that belong to no request")
            self._scheduler.check_integrity()

    def _die(self, told: EngineFailure, reason: EngineFailure) -> None:
        with self._inbox:
            self._state = _State.DEAD
            self._arrived.clear()
            left = list(self._live.values())
        for live in left:
            try:
                self._end(live, Failed(told))
            except Exception:  # it was told its last word; its pages are beyond help
                log.exception("request %s could not be taken out", live.request.request_id)
        self.death.set_result(reason)

    def _has_something_to_do(self) -> bool:
        left_by_others = self._arrived or self._aborted or self._given_way
        return bool(left_by_others) or self._state is _State.STOPPED or not self._scheduler.idle

    def _collect(self) -> bool:
        """Takes in what other threads left, waiting while there is nothing to do; False once stopped."""
        with self._inbox:
            while not self._inbox.wait_for(self._has_something_to_do, timeout=_IDLE_LOOK):
                self._check_file()
            arrived, self._arrived = self._arrived, []
            aborted = [self._live[name] for name in self._aborted if name in self._live]
            self._aborted.clear()
            given_way = [self._live[name] for name in self._given_way]
            self._given_way.clear()
        with self._books:
            for live in arrived:
                self._scheduler.add(live.sequence)
        self._fail(aborted, Unavailable("cancelled"))
        # One that was admitted in the meantime stays: the queue has its place.
        running = self._scheduler.running
        gone = [live for live in given_way if live.sequence not in running and live not in aborted]
        self._fail(gone, Busy(_GAVE_WAY))
        return self._state is not _State.STOPPED

    def _fail(self, requests: Iterable[LiveRequest], error: KtdError) -> None:
        for live in requests:
            self._end(live, Failed(error))

    def _end(self, live: LiveRequest, event: Ended | Failed) -> None:
        """Frees what the request holds, then says the last word; `drain` waits for both."""
        name = live.request.request_id
        try:
            with self._books:
                self._scheduler.remove(live.sequence)
        finally:
            with self._inbox:
                del self._live[name]
                self._aborted.discard(name)  # the name may be used again at once
                self._given_way.discard(name)
            live.tell(event)
            with self._inbox:
                self._unfinished -= 1
                self._inbox.notify_all()

    def _drop_deaf(self) -> None:
        """A request whose listener raised goes on for nobody."""
        for live in self._known():
            if live.deaf:
                self._end(live, Failed(live.deaf))

    def _known(self) -> list[LiveRequest]:
        """Requests that were taken in, oldest first, whether or not the scheduler still has them."""
        with self._inbox:
            return [live for live in self._live.values() if live not in self._arrived]

    def _unwanted(self) -> set[str]:
        """Ids of the requests that nobody wants any more: all of them once the engine stops."""
        with self._inbox:
            return set(self._live if self._state is _State.STOPPED else self._aborted)
