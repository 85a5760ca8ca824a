"""The policy of the step loop: admit, deal out tokens, grow, preempt, finish.

A step first gives one row to every sequence that decodes, then deals what is left of the token budget fairly
to the prompts being read, NORMAL ones before LOW ones. While a step that reads long prompts is under way, the
engine takes further steps in between for the sequences that decode.

Pages are taken as they are needed, not reserved to the end of an answer: answers are usually far shorter than
their limit. A request is admitted when the pages of its prompt are there. When a running sequence then needs
a page and none is free, the one admitted last (LOW ones first) is preempted: it gives its pages back, keeps
the tokens it has drawn, and returns to the front of its queue. Reading them again gives the same bits, so the
client sees a pause and no difference. The oldest sequence is never preempted and one whole context always
fits, so the oldest always gets on and none is lost.

Clients take turns (`ktd.turns`): one client's many requests are only in each other's way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ktd.cache import BlockPool, page_key
from ktd.sched.budget import fair_shares
from ktd.sched.sequence import Sequence
from ktd.turns import Turns


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, start + count) of a sequence; `draws` when the last gives its next token."""

    sequence: Sequence
    start: int
    count: int
    draws: bool


class Scheduler:
    """Owns the queues and, through the pool, the pages. `step_tokens` is the budget of one step."""

    def __init__(self, pool: BlockPool, *, page_size: int, max_sequences: int, step_tokens: int) -> None:
        if step_tokens < max_sequences:
            raise ValueError(f"a step of {step_tokens} tokens cannot serve {max_sequences} sequences")
        self._pool = pool
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._turns = Turns()
        self._waiting: list[Sequence] = []  # those that were preempted first, then in order of arrival
        self.running: list[Sequence] = []  # NORMAL before LOW, each in order of admission

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences in the queue, the next to be admitted first."""
        return self.in_turn(self._waiting) if self._waiting else []

    def in_turn(self, waiting: Iterable[Sequence]) -> list[Sequence]:
        """`waiting`, in order of arrival, in the order in which they would be admitted: NORMAL ones first, of
        these those that were preempted, then clients in turns."""
        running = [sequence.request.client for sequence in self.running]
        return self._turns.order(
            waiting,
            running,
            client=lambda s: s.request.client,
            rank=lambda s: 2 * s.low + (not s.preemptions),
        )

    @property
    def idle(self) -> bool:
        return not (self.running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence into its queue. Its whole length must fit in the pool."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back. After a fault it may be nowhere."""
        for queue in (self.running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """The work of the next step, pages allocated; empty when idle. Every sequence occurs at most once."""
        self._admit()
        granted = {sequence: 1 for sequence in self.running if sequence.decoding}
        reading = [sequence for sequence in self.running if sequence not in granted]
        for low in (False, True):
            equals = [sequence for sequence in reading if sequence.low is low]
            left = self._step_tokens - sum(granted.values())
            granted.update(zip(equals, fair_shares([s.pending for s in equals], left), strict=True))
        work = []
        # Oldest first: a page that runs out is then taken from the back, whose turn has not come yet.
        for sequence in list(self.running):
            count = granted[sequence]
            if count and sequence in self.running and self._grow(sequence, sequence.computed + count):
                start = sequence.computed
                work.append(Work(sequence, start, count, draws=start + count == len(sequence.tokens)))
        return work

    def schedule_meanwhile(self) -> list[Work]:
        """The next token of each sequence that decodes, for while a step of others is under way: nothing is
        admitted, and nobody is preempted for a page."""
        work = []
        for sequence in self.running:
            if sequence.decoding and self._pool.can_allocate(self._missing(sequence, len(sequence.tokens))):
                self._grow(sequence, len(sequence.tokens))
                work.append(Work(sequence, sequence.computed, 1, draws=True))
        return work

    def commit(self, work: Iterable[Work]) -> None:
        """The step went well: its latents are in the cache, and full pages can be found by later prompts."""
        for item in work:
            sequence = item.sequence
            sequence.computed = item.start + item.count
            self._name_pages(sequence, item.start // self._page_size)

    def check_integrity(self) -> None:
        """Raises RuntimeError where pages, holders and sequences disagree."""
        self._pool.check_integrity(sequence.pages for sequence in self.running)
        for sequence in self.running:
            if len(sequence.pages) * self._page_size < sequence.computed:
                raise RuntimeError(f"{sequence.request.request_id} has too few pages for what it computed")
        if any(sequence.pages for sequence in self.waiting):
            raise RuntimeError("a waiting sequence holds pages")

    def _admit(self) -> None:
        if len(self.running) == self._max_sequences:
            return
        # Who is admitted counts as running instead of waiting in front: the others' order stays as it is.
        for sequence in self.waiting[: self._max_sequences - len(self.running)]:
            found = self._find_prefix(sequence)
            missing = self._pages_for(len(sequence.tokens)) - len(found)
            # One page to grow for each that runs, lest the newcomer be preempted at once.
            if not self._pool.can_allocate(missing + len(self.running), found):
                return  # whose turn it is waits for pages: nobody overtakes
            self._waiting.remove(sequence)
            self._turns.serve(sequence.request.client)
            self._start(sequence, found)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of the sequence; at least one token is left, for its logits."""
        keys = sequence.page_keys
        while len(keys) < (len(sequence.tokens) - 1) // self._page_size:
            keys.append(self._next_key(sequence))
        return self._pool.find(keys)

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self._pool.hold(found)
        sequence.pages = found
        sequence.computed = len(found) * self._page_size
        if sequence.preemptions == 0:
            sequence.cached = sequence.computed
        # The pages of the whole prompt are taken now, so that two prompts admitted together cannot starve
        # each other halfway.
        sequence.pages += self._pool.allocate(self._pages_for(len(sequence.tokens)) - len(found))
        place = len(self.running)
        if not sequence.low:
            place = sum(not other.low for other in self.running)
        self.running.insert(place, sequence)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Makes sure of the pages for `tokens` tokens, preempting from the back; False if it was itself
        preempted."""
        missing = self._missing(sequence, tokens)
        while missing > 0 and not self._pool.can_allocate(missing):
            victim = self.running.pop()
            self._release(victim)
            victim.preemptions += 1
            self._waiting.insert(0, victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self._pool.allocate(missing)
        return True

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        return max(self._pages_for(tokens) - len(sequence.pages), 0)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0

    def _name_pages(self, sequence: Sequence, first: int) -> None:
        """Makes the pages from `first` on that are full by now findable."""
        full = sequence.computed // self._page_size
        while len(sequence.page_keys) < full:
            sequence.page_keys.append(self._next_key(sequence))
        for index in range(first, full):
            self._pool.name(sequence.pages[index], sequence.page_keys[index])

    def _next_key(self, sequence: Sequence) -> bytes:
        keys, size = sequence.page_keys, self._page_size
        return page_key(keys[-1] if keys else b"", sequence.tokens[len(keys) * size : (len(keys) + 1) * size])

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)
