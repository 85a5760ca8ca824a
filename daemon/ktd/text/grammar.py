"""Answers that must be JSON, or tool calls: their grammar, and where in a reply it holds.

Grammars are llguidance's. A reply is a thought, which is free, and then an answer, which is not:

    <think> ... </think> \\n\\n { ... } end
    free              ^ the first, in code or not
                              ^ blank lines, as models write them there, or tool calls, which are free
                                  ^ the grammar, up to the only token it lets follow
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from time import monotonic

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ktd.errors import EngineFailure, RequestError
from ktd.text.conversation import CLOSE, OPEN
from ktd.text.detokenizer import token_bytes
from ktd.text.forced_calls import arguments_schema, calls_grammar
from ktd.text.tools import CALLS_BEGIN
from ktd.text.vocabulary import Vocabulary
from ktd.types import AnswerSchema, Tool

_CALLS = (CALLS_BEGIN, "<|tool_calls_section_begin|>")
_AFTER_THOUGHT = (b"\n", b"\n\n")
# Enough for any indented JSON, and no endless blanks from a model that is at a loss.
_BLANKS = r" |\n{1,2}[ \t]{0,40}"
# The default for lexer states, five times as many, could take 500 MB a request.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
# For a request's tools. Whoever waited has left then: the thread has not.
_MOST_SECONDS = 5.0
_CAN_BE_IGNORED = ("Unimplemented keys", "Unknown format", "oneOf")


class Grammars:
    """Compiles schemas for one vocabulary; may be called from several threads at once.

    The tokens are indexed at the first use, which takes a second or two with R1's 129,280.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self.vocabulary = vocabulary
        self._encode = encode
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        structural = vocabulary.structural
        self.opens, self.closes = structural.get(OPEN), structural.get(CLOSE)
        self.calls = frozenset(structural[text] for text in _CALLS if text in structural)
        self.stops = np.array(sorted(vocabulary.stop_ids))
        self.blanks: frozenset[int] = frozenset()

    @property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's view of the vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                tokens = _Tokens(self.vocabulary, self._encode)
                stops = sorted(self.vocabulary.stop_ids)
                self._tokenizer = LLTokenizer(TokenizerWrapper(tokens), eos_token=stops)
                size = range(len(self.vocabulary.tokens))
                self.blanks = frozenset(i for i in size if tokens.tokens[i] in _AFTER_THOUGHT)
            return self._tokenizer

    def matcher(self, schema: AnswerSchema, begun: str = "") -> LLMatcher:
        """A matcher that has read `begun`, the part of the answer that is written already.

        Raises RequestError for a schema that cannot be enforced, or one that `begun` does not fit.
        """
        options = {"whitespace_pattern": _BLANKS, "lenient": schema.lenient}
        wanted = json.dumps({**json.loads(schema.schema), "x-guidance": options})
        grammar = LLMatcher.grammar_from_json_schema(wanted)
        matcher = self._compiled(grammar, "The schema of response_format")
        if not begun.strip():
            return matcher
        if not matcher.consume_tokens(self._encode(begun.lstrip())):
            raise RequestError("The answer that is to be continued does not fit the response_format.")
        if matcher.is_stopped():
            raise RequestError("The answer that is to be continued is complete by the response_format.")
        return matcher

    def call_matcher(self, tools: Sequence[Tool], *, fenced: bool, one: bool) -> LLMatcher:
        """A matcher of calls of `tools`, as many as the model likes or `one`. What of their parameters cannot
        be enforced is ignored.

        Raises RequestError for parameters that are no schema, for too much of them, and as `calls_grammar`.
        """
        schemas = [arguments_schema(tool, {"whitespace_pattern": _BLANKS, "lenient": True}) for tool in tools]
        end = monotonic() + _MOST_SECONDS / 2  # all together take as long again, and cannot be interrupted
        for tool, schema in zip(tools, schemas, strict=True):
            self._compiled(
                LLMatcher.grammar_from_json_schema(schema), f'The schema of the tool "{tool.name}"'
            )
            if monotonic() > end:
                raise RequestError(
                    f"The {len(tools)} tools take too long to compile: send fewer or simpler ones."
                )
        grammar = calls_grammar(self.vocabulary.structural, tools, schemas, fenced=fenced, one=one)
        return self._compiled(LLMatcher.grammar_from_lark(grammar), "The tools")

    def _compiled(self, grammar: str, what: str) -> LLMatcher:
        """Raises RequestError where `grammar`, that of `what`, cannot be enforced."""
        tokenizer = self.tokenizer
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        _check(matcher, what)
        # What is wrong may show only while tokens are read: now, and not in the middle of the answer.
        probe = matcher.deep_copy()
        for _ in range(2):
            allowed = np.flatnonzero(_bits(probe, tokenizer.vocab_size))
            _check(probe, what)
            if probe.is_stopped():
                break
            probe.consume_token(next((int(token) for token in allowed if token not in self.stops), -1))
        return matcher

    def closed_thought(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends behind a thought, blanks aside."""
        behind = (i for i in reversed(ids) if token_bytes(self.vocabulary, i).strip())
        return self.closes is not None and next(behind, None) == self.closes


class _Tokens:
    """The vocabulary as llguidance reads it: bytes of each token, and how text is cut into them."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self.tokens = [token_bytes(vocabulary, number) for number in range(len(vocabulary.tokens))]
        # No text has the byte 255. llguidance puts it in front of special tokens: one without a name, or a
        # token of that byte alone, would pass for the beginning of any.
        self.tokens = [b"" if b"\xff" in token else token for token in self.tokens]
        self.special_token_ids = sorted({*vocabulary.structural.values(), *vocabulary.stop_ids})
        for number in self.special_token_ids:
            self.tokens[number] = vocabulary.tokens[number].encode()
        self.eos_token_id = min(vocabulary.stop_ids)
        self.bos_token_id = vocabulary.bos_id
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


class ReplyConstraint:
    """Keeps one reply to its grammar (`ktd.types.Constraint`)."""

    def __init__(
        self, grammars: Grammars, matcher: LLMatcher, *, thinking: bool, beside: Collection[int]
    ) -> None:
        """`thinking`: the reply begins inside a thought. `beside`: tokens that may come before the grammar
        begins: one that opens a thought, and those that open tool calls."""
        self._grammars = grammars
        self._matcher = matcher
        self._thinking = thinking
        self._free = False
        self._calls = frozenset(beside) & grammars.calls
        self._beside = frozenset(beside)
        self._tail = b""

    @property
    def complete(self) -> bool:
        """Whether only the end may follow."""
        return not (self._thinking or self._free) and self._matcher.is_stopped()

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets `logits` [vocab or more] of what may not come next to -inf: in a thought only the end of the
        reply.

        Raises EngineFailure where nothing may come next.
        """
        if self._thinking:
            logits[self._grammars.stops] = -np.inf
        if self._thinking or self._free:
            return
        size = self._grammars.tokenizer.vocab_size
        allowed = _bits(self._matcher, size)
        if self._matcher.is_error():
            raise self._stuck(_reason(self._matcher))
        allowed[list(self._beside)] = True
        if not allowed.any():
            raise self._stuck("nothing may follow")
        np.copyto(logits[:size], -np.inf, where=~allowed)
        logits[size:] = -np.inf

    def accept(self, token: int) -> None:
        """`token` was drawn. Raises EngineFailure for one that the mask did not allow."""
        if self._free or token in self._grammars.vocabulary.stop_ids:
            return
        if self._thinking:
            self._think(token)
        elif token in self._beside:
            self._thinking = token == self._grammars.opens
            self._free = token in self._calls
            self._beside = self._calls
        else:
            self._beside = frozenset()
            self._read([token])

    def _think(self, token: int) -> None:
        # By its text: a model can spell the tag out.
        self._tail += token_bytes(self._grammars.vocabulary, token)
        _, closed, rest = self._tail.partition(CLOSE.encode())
        self._tail = self._tail[1 - len(CLOSE) :]
        if closed:
            self._thinking = False
            self._beside = self._calls | self._grammars.blanks
            if rest := rest.lstrip():
                self._read(self._grammars.tokenizer.tokenize_bytes(rest))

    def _read(self, tokens: list[int]) -> None:
        if not self._matcher.consume_tokens(tokens):
            raise self._stuck(_reason(self._matcher))

    def _stuck(self, reason: str) -> EngineFailure:
        return EngineFailure(
            f"The answer cannot go on as its response_format or tool_choice wants it: {reason}."
        )


def _bits(matcher: LLMatcher, size: int) -> npt.NDArray[np.bool_]:
    """What may come next [size]; where the matcher is in error, only the end."""
    words = np.zeros((size + 31) // 32, np.uint32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says in one line, in our words where its own are about its options."""
    first, *more = matcher.get_error().partition("\n<")[0].splitlines() or [""]
    told = (line.removeprefix("error: ") for line in more if line.startswith("error: "))
    said = ": ".join(line.strip().rstrip(".:") for line in (first, *told))
    for known, better in (
        ("NoExtension", "no JSON fits it"),
        ("oneOf constraints", "oneOf is supported only where it is clear that no two of its schemas fit"),
        ("Parser Error: Current row", "it leaves too many choices open at one place"),
        ("panic: assertion failed: grammar.symbols.len()", "it is too large"),
    ):
        if said.startswith(known):
            return better
    return said


def _check(matcher: LLMatcher, what: str) -> None:
    if not matcher.is_error():
        return
    reason = _reason(matcher)
    hint = "; with strict set to false it is ignored" if reason.startswith(_CAN_BE_IGNORED) else ""
    raise RequestError(f"{what} cannot be enforced: {reason}{hint}.")
