"""
title: ktd
version: 0.1.0
license: Apache-2.0
required_open_webui_version: 0.6.0
description: DeepSeek-R1 with native thoughts, sources, progress and speeds, from ktd or any OpenAI-like API
"""

# Paste this file into Open WebUI: Admin Panel, Functions, New Function. Then set BASE_URL in its valves.
# It is one file because Open WebUI takes one file. Sections: texts, events, thoughts (embedded), sources,
# text and markers, the chat body, tools, what upstreams share, gRPC, HTTP, the page, background tasks,
# settings, and the Pipe itself.
#
# An event of an upstream (gRPC or HTTP) is one of: Queued, Prefill, Reasoning, Answer, ToolCall, Sources,
# Usage, Finished.
# Only `Page` knows what Open WebUI wants to see; only the two upstream sections know what a server sends.

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import importlib.util
import ipaddress
import json
import logging
import math
import os
import re
import ssl
import time
import unicodedata
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import Enum
from typing import Any, Literal
from urllib.parse import urlsplit

try:
    from pydantic import BaseModel, Field, field_validator
except ImportError as error:
    raise ImportError(
        "This function needs pydantic, which Open WebUI brings along: is the installation whole?"
    ) from error

try:
    import grpc
    import grpc.aio
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    GRPC_PROBLEM = ""
except ImportError as error:
    GRPC_PROBLEM = str(error)

try:
    import httpx

    HTTPX_PROBLEM = ""
except ImportError as error:
    HTTPX_PROBLEM = str(error)

log = logging.getLogger("ktd.pipe")

Json = dict[str, Any]
Emitter = Callable[[Json], Awaitable[None]]
Language = Literal["en", "zh"]


# --- Texts that a person reads ------------------------------------------------------------------------------

TEXTS: dict[str, dict[Language, str]] = {
    "next": {"en": "Waiting: next in line", "zh": "排队中：下一个就是您"},
    "waiting": {"en": "Waiting: {n} in front", "zh": "排队中：前面还有 {n} 个请求"},
    "prefill": {
        "en": "Reading the prompt: {read} of {total} tokens, {rate} tok/s",
        "zh": "正在读取提示词：{read}/{total} 个 token，{rate} tok/s",
    },
    "prefilled": {
        "en": "Prompt read: {total} tokens in {seconds} s",
        "zh": "提示词已读完：{total} 个 token，用时 {seconds} 秒",
    },
    "started": {"en": "Started after {seconds} s", "zh": "等待 {seconds} 秒后开始"},
    "thinking": {"en": "Thinking", "zh": "正在思考"},
    "thought": {"en": "Thought for {seconds} s", "zh": "思考了 {seconds} 秒"},
    "stopped": {"en": "Stopped", "zh": "已停止"},
    "failed": {"en": "Failed", "zh": "失败"},
    "length": {
        "en": "Cut off: the token limit was reached (max_tokens or the context)",
        "zh": "回答被截断：已达到 token 上限（max_tokens 或上下文长度）",
    },
    "ended": {
        "en": "The service ended the answer: {reason}",
        "zh": "服务提前结束了回答：{reason}",
    },
    "thought_enough": {
        "en": "\n\nThe thinking budget is used up: I answer now.",
        "zh": "\n\n思考预算已用完，现在作答。",
    },
    "searching": {"en": "Searching the web", "zh": "正在联网搜索"},
    "searched": {"en": "Searched {{count}} sites", "zh": "已搜索 {{count}} 个网站"},
    "search_failed": {"en": "The web search failed: {reason}", "zh": "联网搜索失败：{reason}"},
    "bad_url": {
        "en": "The valve BASE_URL must hold addresses such as grpc://127.0.0.1:50051 or https://host/v1, "
        "not {url!r}.",
        "zh": "阀门 BASE_URL 应填写 grpc://127.0.0.1:50051 或 https://host/v1 这样的地址，而不是 {url!r}。",
    },
    "bad_key": {
        "en": "The valve API_KEY holds blanks or characters beyond ASCII, which no service takes: enter the "
        "key again.",
        "zh": "阀门 API_KEY 中含有空白或非 ASCII 字符，任何服务都不接受：请重新填写密钥。",
    },
    "bad_file": {
        "en": "The file {path} of the TLS valves cannot be read: {reason}.",
        "zh": "无法读取 TLS 阀门中的文件 {path}：{reason}。",
    },
    "no_grpc": {
        "en": "Open WebUI's Python lacks grpcio or protobuf ({reason}): install them there, or use an "
        "http address.",
        "zh": "Open WebUI 的 Python 环境缺少 grpcio 或 protobuf（{reason}）：请在其中安装，或改用 http "
        "地址。",
    },
    "no_httpx": {
        "en": "Open WebUI's Python lacks httpx ({reason}): install it there, or use a grpc:// address.",
        "zh": "Open WebUI 的 Python 环境缺少 httpx（{reason}）：请在其中安装，或改用 grpc:// 地址。",
    },
    "unreachable": {
        "en": "Nothing answers at {address}. Start the service there (supervisorctl start ktd) or correct "
        "the valve "
        "BASE_URL.",
        "zh": "{address} 没有响应。请启动服务（supervisorctl start ktd），或更正阀门 BASE_URL。",
    },
    "other_protocol": {
        "en": "Something listens at {address}, but does not answer as {scheme}:// ({reason}). Correct "
        "the valve BASE_URL (its port; grpc, grpcs, http or https) or the TLS valves.",
        "zh": "{address} 有程序在监听，但没有按 {scheme}:// 应答（{reason}）。请更正阀门 "
        "BASE_URL（端口；grpc、grpcs、http 或 https）或 TLS 阀门。",
    },
    "unreachable_name": {"en": "ktd: {address} does not answer", "zh": "ktd：{address} 没有响应"},
    "broke_off": {
        "en": "The connection to {address} broke off in mid-answer ({reason}). What was written is kept; "
        "ask again "
        "when the service is back.",
        "zh": "与 {address} 的连接在回答过程中断开（{reason}）。已写出的内容已保留；服务恢复后请重新提问。",
    },
    "wrong_key": {
        "en": "{address} refused the key: set the valve API_KEY ({reason}).",
        "zh": "{address} 拒绝了密钥：请设置阀门 API_KEY（{reason}）。",
    },
    "silent": {
        "en": "{address} sent nothing for {seconds} s. Raise the valve {valve} if it only needs longer.",
        "zh": "{address} 在 {seconds} 秒内没有发送任何内容。如果只是需要更长时间，请调大阀门 {valve}。",
    },
    "bad_reply": {
        "en": "{address} sent a reply that cannot be read: {reason}",
        "zh": "无法解读 {address} 的回复：{reason}",
    },
    "http_status": {"en": "{address} answered {status}: {reason}", "zh": "{address} 返回 {status}：{reason}"},
    "images": {
        "en": "This model reads text only: remove the image and ask again.",
        "zh": "此模型只能读取文字：请移除图片后重新提问。",
    },
    "bad_value": {
        "en": "The parameter {name} cannot be {value!r}: {wanted} is needed.",
        "zh": "参数 {name} 不能是 {value!r}：需要{wanted}。",
    },
    "no_messages": {"en": "There is no message to answer.", "zh": "没有可回答的消息。"},
    "bug": {
        "en": "The ktd function failed ({reason}); Open WebUI's log has the details.",
        "zh": "ktd 函数出错（{reason}）；详情见 Open WebUI 的日志。",
    },
}


def say(language: Language, key: str, /, **values: object) -> str:
    """The text `key` in the reader's language."""
    return TEXTS[key][language].format(**values)


# --- Events of an upstream ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queued:
    """`position` requests are in front; 0 = next."""

    position: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt progress in tokens."""

    done: int
    total: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought, without tags."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the answer, citation markers as the model wrote them."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a tool; `arguments` is JSON as text."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Source:
    """One search result or document; from the network, so checked by `clean_source` before it is shown."""

    title: str
    url: str
    text: str


# How a service writes its markers beside [citation:N]: "plain" adds [N], "summary" adds 摘要N.
MarkerStyle = Literal["citation", "plain", "summary"]


@dataclass(frozen=True, slots=True)
class Sources:
    """All sources the service has named so far, in its own order (marker N means the Nth)."""

    items: tuple[Source, ...]
    style: MarkerStyle


@dataclass(frozen=True, slots=True)
class Usage:
    """Figures shown behind the (i) of the message, in OpenAI's names plus seconds and rates."""

    figures: Json


@dataclass(frozen=True, slots=True)
class Finished:
    """`reason` is OpenAI's finish_reason."""

    reason: str


Event = Queued | Prefill | Reasoning | Answer | ToolCall | Sources | Usage | Finished


class PipeError(Exception):
    """An error that the chat shows. `key` and `values` name the text, or `plain` is the server's own
    sentence.
    """

    def __init__(
        self,
        key: str = "",
        /,
        *,
        plain: str = "",
        code: int | str | None = None,
        retry: bool = False,
        **values: object,
    ) -> None:
        super().__init__(plain or key)
        self.key, self.plain, self.code, self.retry, self.values = key, plain, code, retry, values

    def text(self, language: Language) -> str:
        return self.plain or say(language, self.key, **self.values)


# --- Thoughts in text ---------------------------------------------------------------------------------------

# >>> embedded by plugin/embed.py: daemon/ktd/chat/splitter.py

OPEN = "<think>"
CLOSE = "</think>"

# How much may wait for the end of a code block that holds a closing tag. Quoted tags sit in short blocks;
# past this the block is taken for one that the model forgot to close.
MOST_HELD = 512

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)\Z")
_TICKS = re.compile(r"`+")
_BLANK_LINE = re.compile(r"[ \t]*\n[ \t]*\n")


class _State(Enum):
    START = 0  # only blanks or a beginning of <think> so far
    THOUGHT_START = 1  # blanks after the opening tag
    THOUGHT = 2
    ANSWER_START = 3  # blank lines after the closing tag
    ANSWER = 4


class ReasoningSplitter:
    """Splits one model turn. `opened` says that the prompt ended inside an opened thought."""

    def __init__(self, opened: bool) -> None:
        self._state = _State.THOUGHT_START if opened else _State.START
        self._may_repeat_tag = opened
        self._pending = ""
        self._code = _Code()

    @property
    def thinking(self) -> bool:
        """Whether the text pushed last belongs to a thought that has not ended."""
        return self._state in (_State.THOUGHT_START, _State.THOUGHT)

    @property
    def answering(self) -> bool:
        """Whether all text from now on is answer."""
        return self._state is _State.ANSWER

    def push(self, text: str) -> list[Reasoning | Answer]:
        """Takes the next piece of text and returns what is certain by now, in order; at most one event of a
        kind.
        """
        if self._state is _State.ANSWER:
            return [Answer(text)] if text else []
        self._pending += text
        return self._advance(final=False)

    def flush(self) -> list[Reasoning | Answer]:
        """Ends the text: returns what was held back. An unfinished tag is text."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Reasoning | Answer]:
        thought, answer = "", ""
        while True:
            state = self._state
            if state is _State.START:
                self._start(final)
            elif state is _State.THOUGHT_START:
                self._thought_start(final)
            elif state is _State.THOUGHT:
                thought += self._thought(final)
            elif state is _State.ANSWER_START:
                self._answer_start()
            else:
                answer, self._pending = self._pending, ""
            if self._state is state:
                break
        if final:
            self._pending = ""
        events: list[Reasoning | Answer] = []
        if thought:
            events.append(Reasoning(thought))
        if answer:
            events.append(Answer(answer))
        return events

    def _start(self, final: bool) -> None:
        body = self._pending.lstrip()
        if body.startswith(OPEN):
            self._pending = body[len(OPEN) :]
            self._state = _State.THOUGHT_START
        elif final or not OPEN.startswith(body):
            self._state = _State.ANSWER

    def _thought_start(self, final: bool) -> None:
        self._pending = body = self._pending.lstrip()
        if self._may_repeat_tag and body.startswith(OPEN):
            self._pending = body[len(OPEN) :].lstrip()
            self._may_repeat_tag = False
            return self._thought_start(final)
        waits_for_tag = self._may_repeat_tag and OPEN.startswith(body)
        if body and (final or not waits_for_tag):
            self._state = _State.THOUGHT

    def _thought(self, final: bool) -> str:
        """Consumes the thought as far as it is certain; moves to ANSWER_START at its end."""
        at, closes = self._code.find_close(self._pending, final)
        if closes:
            thought = self._pending[:at].rstrip()
            self._pending = self._pending[at + len(CLOSE) :]
            self._state = _State.ANSWER_START
            return thought
        thought = self._pending[:at].rstrip()
        self._code.consume(thought)
        self._pending = self._pending[len(thought) :]
        return thought

    def _answer_start(self) -> None:
        body = self._pending.lstrip()
        if body:
            blanks = self._pending[: len(self._pending) - len(body)]
            self._pending = blanks[blanks.rfind("\n") + 1 :] + body
            self._state = _State.ANSWER


class _Tag(Enum):
    CLOSES = 0
    QUOTED = 1
    UNDECIDED = 2


class _Code:
    """Where code stands in the thought: the fence that is open and the line that is being written
    (Markdown).
    """

    def __init__(self) -> None:
        self._fence = ""
        self._line = ""
        self._quotes = False  # the open fence has quoted an opening tag

    def consume(self, text: str) -> None:
        """Moves on past `text`."""
        self._fence, self._line, self._quotes = _after(self._fence, self._line + text, self._quotes)

    def find_close(self, text: str, final: bool) -> tuple[int, bool]:
        """Looks for the tag that ends the thought in `text`, which follows what was consumed.

        Returns (its position, True), or (how much of `text` is certainly thought, False).
        """
        fence, line, quotes, start = self._fence, self._line, self._quotes, 0
        while (at := text.find(CLOSE, start)) >= 0:
            fence, line, quotes = _after(fence, line + text[start:at], quotes)
            start = at + len(CLOSE)
            tag = _judge(fence, line, quotes or OPEN in line, text[start:], final)
            if tag is not _Tag.QUOTED:
                return at, tag is _Tag.CLOSES
            line += CLOSE
        return len(text) - (0 if final else overlap(text, CLOSE)), False


def _judge(fence: str, line: str, quotes: bool, rest: str, final: bool) -> _Tag:
    """Whether a closing tag between `line` (its line so far) and `rest` ends the thought or is quoted in
    code. `quotes`: an opening tag was quoted in the same fence.
    """
    rest, complete = rest[:MOST_HELD], final or len(rest) >= MOST_HELD
    if fence and not _closes(fence, line):
        if not quotes and _BLANK_LINE.match(rest):
            return _Tag.CLOSES
        _, *lines = rest.split("\n")
        if not final:
            lines = lines[:-1]
        for match in filter(None, map(_FENCE.match, lines)):
            if match[1].startswith(fence):
                # An opening fence with a language cannot stand inside an open fence: it belongs to the
                # answer.
                return _Tag.CLOSES if match[2].strip() else _Tag.QUOTED
    else:
        open_spans = _unmatched_ticks(line)
        if not open_spans:
            return _Tag.CLOSES
        rest_of_line, newline, _ = rest.partition("\n")
        if newline or complete:
            quoted = any(len(ticks) in open_spans for ticks in _TICKS.findall(rest_of_line))
            return _Tag.QUOTED if quoted else _Tag.CLOSES
    return _Tag.CLOSES if complete else _Tag.UNDECIDED


def _after(fence: str, text: str, quotes: bool) -> tuple[str, str, bool]:
    """The open fence, the unfinished line and whether the fence quotes an opening tag, after `text`, which
    starts at the beginning of a line.
    """
    *lines, line = text.split("\n")
    for done in lines:
        if fence:
            fence = "" if _closes(fence, done) else fence
            quotes = bool(fence) and (quotes or OPEN in done)
        elif (match := _FENCE.match(done)) and not (match[1][0] == "`" and "`" in match[2]):
            fence = match[1]
    return fence, line, quotes


def _closes(fence: str, line: str) -> bool:
    match = _FENCE.match(line)
    return bool(match and match[1].startswith(fence) and not match[2].strip())


def _unmatched_ticks(line: str) -> set[int]:
    """Lengths of the backtick runs in `line` that open a code span which the line does not close."""
    runs = [len(ticks) for ticks in _TICKS.findall(line)]
    unmatched, i = set(), 0
    while i < len(runs):
        if runs[i] in runs[i + 1 :]:
            i = runs.index(runs[i], i + 1)
        else:
            unmatched.add(runs[i])
        i += 1
    return unmatched


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without completing it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


# <<< embedded

# --- Sources: what the model sees, what the page shows ------------------------------------------------------
# DeepSeek's search form, kept short. One block per source, numbered from 1 and joined by newlines; the
# body is
# "title\ntext", or the text alone. The embedded model is trained on exactly this text.

SEARCH_RESULT = "[webpage {n} begin]{body}[webpage {n} end]"

SEARCH_TEMPLATES: dict[Language, str] = {
    "en": (
        "# The following contents are the search results related to the user's message:\n"
        "{results}\n"
        "Each result is formatted as [webpage X begin]...[webpage X end], X is its number. Today is {date}. "
        "Not every result matters: choose. Cite with [citation:X] right after the sentence that uses "
        "result X, "
        "several as [citation:3][citation:5], not gathered at the end. Answer in the language of the "
        "question.\n"
        "\n"
        "# The user's message is:\n"
        "{question}"
    ),
    "zh": (
        "# 以下内容是基于用户发送的消息的搜索结果:\n"
        "{results}\n"
        "每个结果的格式是[webpage X begin]...[webpage X end]，X是它的编号。今天是{date}。"
        "并非所有结果都与问题有关，请筛选。用到结果X的句子之后紧跟[citation:X]，"
        "多个写成[citation:3][citation:5]，不要集中在最后。请用提问的语言回答。\n"
        "\n"
        "# 用户消息为：\n"
        "{question}"
    ),
}

_HAN = re.compile(r"[\u3400-\u9fff]")
_FRAME = re.compile(r"\[(?=webpage \d+ (?:begin|end)\])")


def search_prompt(results: Sequence[tuple[str, str]], question: str, date: str, language: Language) -> str:
    """The user message for a question with sources.

    `results` are (title, text), an empty title is left out; `date` is ISO (2025-01-31). A result cannot
    close its
    own frame: "[webpage 2 end]" inside it loses its bracket.
    """
    blocks = []
    for n, (title, text) in enumerate(results, start=1):
        body = _FRAME.sub("(", f"{title}\n{text}" if title else text)
        blocks.append(SEARCH_RESULT.format(n=n, body=body))
    return SEARCH_TEMPLATES[language].format(results="\n".join(blocks), date=date, question=question)


def _words(text: str) -> list[str]:
    """The words of a text without control and direction characters.

    A search may bring megabytes, and nobody else in the server runs meanwhile: only a text that has such
    characters is looked at closely, and each distinct character once.
    """
    words = text.split()
    if "".join(words).isprintable():
        return words
    unseen = (c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf") and not c.isspace())
    return text.translate({ord(c): None for c in unseen}).split()


def clean_text(text: object, limit: int) -> str:
    """Text from the network on one line: no control or direction characters, at most `limit` characters."""
    if not isinstance(text, str):
        return ""
    kept = " ".join(_words(text[: 4 * limit]))
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def clean_url(url: object) -> str:
    """The address if it is http(s) with a host, else an empty string: javascript:, data: and the like go
    nowhere.
    """
    if not isinstance(url, str) or len(url) > 2048:
        return ""
    url = "".join(_words(url))
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return url if parts.scheme.lower() in ("http", "https") and parts.hostname else ""


def is_public(url: str) -> bool:
    """Whether the address may be in the list of a search status: the browser asks a favicon service for
    each of its addresses, which must not learn of hosts inside.
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith(
            (".local", ".internal", ".lan", ".localdomain", ".home.arpa")
        )


def clean_source(title: object, url: object, text: object, limit: int = 2000) -> Source:
    """A source whose every field is safe to show."""
    link = clean_url(url)
    name = clean_text(title, 200) or (urlsplit(link).hostname or "" if link else "")
    return Source(name, link, clean_text(text, limit))


class SourceList:
    """The numbers of the sources of one message, counted as Open WebUI counts them: one per distinct
    identity.
    """

    def __init__(self, given: Iterable[Mapping[str, Any]]) -> None:
        self._numbers: dict[str, int] = {}
        self._prompt: list[tuple[str, list[str]]] = []
        for entry in given:
            source = entry.get("source") or {}
            for text, about in zip(entry.get("document") or [], entry.get("metadata") or [], strict=False):
                about = about or {}
                identity = str(about.get("source") or source.get("id") or "N/A")
                # A legacy search names its query as the source; the page's title is in the metadata.
                title = clean_text(about.get("title") or source.get("name") or about.get("name"), 200)
                if self._number(identity) > len(self._prompt):
                    self._prompt.append((title, []))
                self._prompt[self._numbers[identity] - 1][1].append(str(text))
        self._theirs: list[int] = []
        self._late = False

    def __len__(self) -> int:
        return len(self._numbers)

    def _number(self, identity: str) -> int:
        return self._numbers.setdefault(identity, len(self._numbers) + 1)

    @property
    def prompt(self) -> list[tuple[str, str]]:
        """(title, text) by number, for `search_prompt`."""
        return [(title, "\n".join(texts)) for title, texts in self._prompt]

    def add(self, sources: Sequence[Source], *, to_prompt: bool) -> list[Json]:
        """Numbers the sources, returns the `source` events of the new ones.

        With `to_prompt` they join those that the model reads; else they are the service's own list, and
        its marker N
        means the Nth of them.
        """
        events, theirs = [], []
        for position, source in enumerate(sources, start=1):
            identity = source.url or f"{source.title or 'source'} ({position})"
            known = identity in self._numbers
            theirs.append(self._number(identity))
            if known:
                continue
            if to_prompt:
                self._prompt.append((source.title, [source.text]))
            title = source.title or identity
            about = {"id": identity, "name": title} | ({"url": source.url} if source.url else {})
            details = {"source": identity, "name": title, "external": True}
            events.append(
                {"source": about, "document": [source.text or title], "metadata": [details]},
            )
        if not to_prompt:
            self._theirs = theirs
        return events

    def expect_late(self) -> None:
        """The service may name its sources after the text that cites them: its numbers are taken on trust."""
        self._late = True

    def resolve(self, number: int) -> int | None:
        """What the model's marker `number` is called on the page; None where there is no such source."""
        if self._theirs:
            return self._theirs[number - 1] if 1 <= number <= len(self._theirs) else None
        return number if number >= 1 and (self._late or number <= len(self)) else None


# --- Text: markers, images, live tags -----------------------------------------------------------------------

_OPENING = {"[": "]", "【": "】", "［": "］"}
_KEYWORDS = ("citation", "webpage", "摘要")
_COLONS = ":："
_SEPARATORS = ",，、;；"
_MOST_NUMBERS = 16


class _NeedMore(Exception):
    """The text ends inside what may become a marker."""


class _Scanner:
    """Reads one marker from `text`. At the end of the text it raises _NeedMore, or, if `final`, sees an
    empty char.
    """

    def __init__(self, text: str, at: int, final: bool) -> None:
        self.text, self.at, self.final = text, at, final

    def peek(self) -> str:
        if self.at < len(self.text):
            return self.text[self.at]
        if self.final:
            return ""
        raise _NeedMore

    def take(self, allowed: str) -> bool:
        char = self.peek()
        if char and char in allowed:
            self.at += 1
            return True
        return False

    def blanks(self) -> None:
        for _ in range(2):
            if not self.take(" "):
                break

    def keyword(self) -> bool:
        start = self.at
        for word in _KEYWORDS:
            self.at = start
            for letter in word:
                if self.peek().lower() != letter:
                    break
                self.at += 1
            else:
                return True
        self.at = start
        return False

    def number(self) -> int | None:
        digits = ""
        while self.peek().isdecimal() and len(digits) < 4:
            digits += self.peek()
            self.at += 1
        return int(digits) if 1 <= len(digits) <= 3 else None


@dataclass(frozen=True, slots=True)
class Marker:
    """A marker found: its source numbers and the index after it."""

    numbers: tuple[int, ...]
    end: int


def find_marker(text: str, at: int, *, final: bool, style: MarkerStyle) -> Marker | None:
    """The marker that begins at `at`, or None.

    Forms: [citation:3], [citation:1,2], [citation:1, citation:2], [webpage 3], the same in 【】 or ［］; with
    style "plain" also [3] and [1, 2] unless a link's (address) follows; with "summary" also 摘要1、2. Raises
    _NeedMore while the text is too short to tell (at most about 250 characters, two dozen in practice).
    """
    scan = _Scanner(text, at, final)
    if text[at] == "摘":
        return _find_summary(scan) if style == "summary" else None
    closing = _OPENING[scan.peek()]
    scan.at += 1
    scan.blanks()
    named = scan.keyword()
    if not named and style != "plain":
        return None
    numbers: list[int] = []
    while len(numbers) < _MOST_NUMBERS:
        scan.blanks()
        if numbers and named:
            scan.keyword()
        if named:
            scan.blanks()
            scan.take(_COLONS)
            scan.blanks()
        number = scan.number()
        if number is None:
            return None
        numbers.append(number)
        scan.blanks()
        if scan.take(closing):
            if not named and scan.peek() in ("(", ":"):
                return None
            return Marker(tuple(numbers), scan.at)
        if not scan.take(_SEPARATORS):
            return None
    return None


def _find_summary(scan: _Scanner) -> Marker | None:
    if not scan.keyword():
        return None
    numbers: list[int] = []
    end = scan.at
    while len(numbers) < _MOST_NUMBERS:
        scan.blanks()
        if numbers:
            scan.keyword()
        number = scan.number()
        if number is None:
            break
        numbers.append(number)
        end = scan.at
        scan.blanks()
        if not scan.take(_SEPARATORS):
            break
    return Marker(tuple(numbers), end) if numbers else None


# What may stand in front of a fence: indentation, quote marks, list markers.
_FENCE_LINE = re.compile(r"((?:[ \t>]|[-+*][ \t]|\d{1,9}[.)][ \t])*)(`{3,}|~{3,})(.*)")
_HTML_LINE = re.compile(r" {0,3}<(?:[A-Za-z/]|([!?]))")
_RAW_HTML = re.compile(r" {0,3}<(?:pre|script|style|textarea)", re.IGNORECASE)


class _Markup:
    """Follows Markdown one character at a time, to know where text is code or mathematics."""

    def __init__(self) -> None:
        self._fence = ""  # the run that opened it
        self._fence_sure = False
        self._in_step = True  # no line so far that a Markdown parser may have read differently
        self._html = False
        self._line = ""
        self._span = 0  # length of the backtick run that opened a code span
        self._math = ""  # what opened it: $, $$, \( or \[
        self._run = ("", 0, False)  # character, length, whether it began its line
        self._opens = False  # this line may open a fence
        self._escaped = False
        self._line_start = True
        self.before = "\n"  # the character in front of the next one, or of the run

    def prose(self, next_char: str) -> bool:
        """Whether the next character stands in plain text."""
        self._settle(next_char)
        return not (self._fence or self._opens or self._span or self._math or self._escaped)

    @property
    def code_for_sure(self) -> bool:
        """Whether every Markdown parser takes the next character for code: an unindented fence is open."""
        return bool(self._fence) and self._fence_sure

    def feed_plain(self, text: str) -> None:
        """Takes text without any of the characters that mean something here: the same as one by one."""
        if self._escaped:
            self.feed(text[0])
            text = text[1:]
        if text:
            self._settle(text[0])
            self._line_start = self._line_start and not text.strip(" \t>")
            self._line += text
            self.before = text[-1]

    def feed(self, char: str) -> None:
        """Takes the next character."""
        if char == self._run[0]:
            self._run = (char, self._run[1] + 1, self._run[2])
            self._line += char
            return
        self._settle(char)
        if self._escaped:
            self._escaped = False
            if self._math == "" and char in "([":
                self._math = "\\" + char
            elif (self._math, char) in (("\\(", ")"), ("\\[", "]")):
                self._math = ""
        elif char == "\\" and not self._fence and not self._span:
            self._escaped = True
        elif char in "`~$":
            self._run = (char, 1, self._line_start)
        if char == "\n":
            self._end_line()
        else:
            self._line_start = self._line_start and char in " \t>"
            self._line += char
        if char not in "`~$":
            self.before = char

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        self._escaped = self._opens = False
        self._line_start = True
        if self._math == "$":
            self._math = ""
        fence = _FENCE_LINE.fullmatch(line)
        if self._fence:
            closes = fence and fence[2].startswith(self._fence) and not fence[3].strip()
            if fence and closes and not (self._fence_sure and fence[1] not in ("", " ", "  ", "   ")):
                self._fence = ""
            return
        if fence and self._math:
            self._in_step = False
        elif fence and not (fence[2][0] == "`" and "`" in fence[3]):
            self._fence_sure = self._in_step = self._in_step and not self._html and not fence[1]
            self._fence, self._span = fence[2], 0
            return
        if not line.strip():
            self._html = False
            self._span = 0  # neither code spans nor inline mathematics cross a blank line
            if self._math == "\\(":
                self._math = ""
        elif html := _HTML_LINE.match(line):
            self._html = True
            self._in_step = self._in_step and not html[1] and not _RAW_HTML.match(line)
        elif line.startswith(":::"):
            self._in_step = False

    def _settle(self, following: str) -> None:
        """Ends a run of backticks, tildes or dollars, once the character after it is known to be another."""
        char, length, began_line = self._run
        if not char or following == char:
            return
        self._run = ("", 0, False)
        if char == "$":
            self._settle_dollars(length, following)
        elif self._math or self._fence:
            return
        elif began_line and length >= 3 and not self._span:
            self._opens = True
        elif char == "`":
            if not self._span:
                self._span = length
            elif self._span == length:
                self._span = 0

    def _settle_dollars(self, length: int, following: str) -> None:
        if self._fence or self._opens or self._span or self._math.startswith("\\"):
            return
        if self._math == "$$":
            self._math = "" if length >= 2 else "$$"
        elif self._math == "$":
            self._math = ""
        elif length >= 2:
            self._math = "$$"
        # A price ("$5", "US$ 5") is no formula.
        elif not (following.isspace() or following.isdecimal() or self.before.isalnum()):
            self._math = "$"


# What no code, mathematics, marker, image or tag begins or ends with; "(" and ")" matter behind a backslash
# only.
_PLAIN = re.compile(r"[^\\\n`~$!<\[\]【［摘]+")
# An invisible character that keeps "!" and "[" (or "<" and a tag's name) from being read together.
_JOINER = "\u2060"
# Tags that Open WebUI renders though other HTML is shown as text: media, which the browser fetches at once,
# and blocks that pass for its own.
_LIVE_TAGS = ("iframe", "video", "audio", "file", "details")


class PageText:
    """The model's text as the page may have it.

    Markers outside code and mathematics become the page's [n]: `resolve` gives the number of a source, or
    None where there is none (the marker is then dropped); `active` says whether there are markers at all,
    `style` which forms count. Unless `media`, an image becomes a link and media tags become text: the
    browser would fetch them from any host, and what the model was told could leave in the address.

    Text is held back only while it may still become one of these, so any way of cutting the stream gives
    the same page.
    """

    def __init__(self, resolve: Callable[[int], int | None], *, media: bool) -> None:
        self._resolve = resolve
        self._media = media
        self._held = ""
        self._markup = _Markup()
        self.active = False
        self.style: MarkerStyle = "citation"

    def push(self, text: str) -> str:
        """Takes the next piece, returns what can be shown."""
        self._held += text
        return self._advance(final=False)

    def flush(self) -> str:
        """Returns what is held back: the text ends here."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        text, at = self._held, 0
        shown: list[str] = []
        while at < len(text):
            if plain := _PLAIN.match(text, at):
                shown.append(plain[0])
                self._markup.feed_plain(plain[0])
                at = plain.end()
                continue
            char = text[at]
            try:
                if self.active and (char in _OPENING or char == "摘") and self._markup.prose(char):
                    marker = find_marker(text, at, final=final, style=self.style)
                    if marker is not None:
                        numbers = (self._resolve(number) for number in marker.numbers)
                        shown.extend(f"[{number}]" for number in numbers if number is not None)
                        self._markup.feed("]")
                        at = marker.end
                        continue
                live = char in "!<" and not self._media and self._is_live(text, at, final)
            except _NeedMore:
                break
            shown.append(char + _JOINER if live else char)
            self._markup.feed(char)
            at += 1
        self._held = text[at:]
        return "".join(shown)

    def _is_live(self, text: str, at: int, final: bool) -> bool:
        """Whether an image or a live tag begins at `at`. Raises _NeedMore."""
        prose = self._markup.prose(text[at])
        if self._markup.code_for_sure:
            return False
        if text[at] == "!":
            if at + 1 == len(text) and not final:
                raise _NeedMore
            # In code that only looks like code, "vec![" is left alone.
            before = self._markup.before
            return text.startswith("[", at + 1) and (prose or not (before.isalnum() or before in "_#"))
        name = text[at + 1 : at + 8].lower()
        if name.startswith(_LIVE_TAGS):
            return True
        if not final and at + 1 + len(name) == len(text) and any(tag.startswith(name) for tag in _LIVE_TAGS):
            raise _NeedMore
        return False


# --- The chat body ------------------------------------------------------------------------------------------

# Names that Open WebUI and its custom parameters use -> the field of ktd.v1.Sampling and its type.
SAMPLING: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repeat_penalty": ("repetition_penalty", float),
    "repetition_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "seed": ("seed", int),
    "num_predict": ("max_tokens", int),
    "max_completion_tokens": ("max_tokens", int),
    "max_tokens": ("max_tokens", int),
}

# What an OpenAI-compatible service is sent as it came; everything else in the body is Open WebUI's own.
HTTP_PASSED = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "logit_bias",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "enable_thinking",
    "thinking_budget",
    "chat_template_kwargs",
    "response_format",
    "web_search_options",
    "search_domain_filter",
    "search_recency_filter",
    "return_related_questions",
    "return_progress",
    "enable_search",
    "search_options",
]

# Open WebUI names the attached files in front of the question, for its tools.
_ATTACHED = re.compile(r"\A<attached_files>.*?</attached_files>\s*", re.DOTALL)
_OLD_THOUGHT = re.compile(r"<details type=\"reasoning\"[^>]*>.*?</details>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Target:
    """One upstream. `models` are (id, shown name) from the valves; empty means: ask the server."""

    url: str
    key: str
    models: tuple[tuple[str, str], ...]
    certificates: tuple[
        str, str, str
    ]  # files: CA, client certificate, client key; empty = the system's, none, none

    @property
    def speaks_grpc(self) -> bool:
        return self.url.startswith(("grpc://", "grpcs://"))

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def address(self) -> str:
        """What a person knows the server by: host and port."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def loopback(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Job:
    """One question, as both upstreams take it. Nothing in it is shared with Open WebUI's own objects."""

    target: Target
    model: str
    messages: tuple[Json, ...]
    options: Json
    thinking: bool | None
    low_priority: bool
    opens_thought: bool
    connect_timeout: float
    user: str  # Open WebUI's id, told to ktd alone: there users take turns
    tools: tuple[Json, ...] = ()  # OpenAI's form

    @property
    def continues(self) -> bool:
        return self.messages[-1]["role"] == "assistant" and not self.messages[-1].get("tool_calls")


def whole(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, as browsers send them where a script cut
    an emoji: UTF-8 has none.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def parts_text(content: object) -> str:
    """The text of a message's content: a string, null, or OpenAI's list of parts."""
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") for p in content if isinstance(p, (str, dict))]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def details_text(details: object) -> str:
    """The thought in OpenRouter's `reasoning_details`: texts, or summaries where the text is kept secret."""
    texts = [item.get("text") or item.get("summary") for item in _dicts(details)]
    return "".join(text for text in texts if isinstance(text, str))


def has_image(content: object) -> bool:
    """Whether a message's content holds an image (or audio, or a file) beside text."""
    if not isinstance(content, list):
        return False
    return any(
        isinstance(part, dict) and part.get("type", "text") not in ("text", "input_text") for part in content
    )


def read_messages(body: Mapping[str, Any], *, text_only: bool, tools: bool = False) -> list[Json]:
    """The conversation: role, content, tool calls and the thoughts of turns that called tools
    (`Page.offer_tools`). Dropped are old thoughts that another function left as markup, what `PageText` put
    into old answers and, unless there are tools that need them, the ids of attached files.
    """
    messages: list[Json] = []
    for message in body.get("messages") or []:
        role = str(message.get("role") or "user")
        role = "system" if role == "developer" else role
        content = message.get("content")
        if has_image(content):
            if text_only:
                raise PipeError("images", code="unsupported_content")
            messages.append({"role": role, "content": content})
            continue
        text = whole(parts_text(content))
        if role == "assistant":
            text = _OLD_THOUGHT.sub("", text).replace(_JOINER, "")
        elif not tools:
            text = _ATTACHED.sub("", text)
        kept: Json = {"role": role, "content": text}
        if message.get("tool_calls"):
            kept["tool_calls"] = message["tool_calls"]
        if message.get("tool_call_id"):
            kept["tool_call_id"] = str(message["tool_call_id"])
        if role == "assistant" and (thought := details_text(message.get("reasoning_details"))):
            kept["reasoning_content"] = thought
        messages.append(kept)
    if not messages:
        raise PipeError("no_messages", code="invalid_request")
    return messages


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return parts_text(message.get("content"))
    return ""


def put_sources_into(
    messages: list[Json], sources: SourceList, metadata: Mapping[str, Any], language: Language
) -> None:
    """Replaces the last question by DeepSeek's search form, and undoes what Open WebUI made of the sources.

    Open WebUI puts its sources in front of the question (or into the system message) and keeps both
    originals in the
    metadata.
    """
    question = metadata.get("base_user_prompt") or last_question(messages).rpartition("</context>")[2].strip()
    question = _ATTACHED.sub("", question)
    if _HAN.search(question):
        language = "zh"
    elif any(c.isalpha() for c in question):
        language = "en"
    today = (metadata.get("variables") or {}).get("{{CURRENT_DATE}}") or date.today().isoformat()
    for message in reversed(messages):
        if message["role"] == "user":
            text = search_prompt(sources.prompt, question, str(today), language)
            if has_image(message["content"]):
                images = [part for part in message["content"] if has_image([part])]
                message["content"] = [{"type": "text", "text": text}, *images]
            else:
                message["content"] = text
            break
    if messages[0]["role"] == "system" and "<source id=" in messages[0]["content"]:
        system = metadata.get("base_system_prompt") or ""
        messages[:1] = [{"role": "system", "content": system}] if system else []


def merge_neighbours(messages: Iterable[Json]) -> list[Json]:
    """One message where several of the same role follow each other: DeepSeek's own service refuses those."""
    merged: list[Json] = []
    for message in messages:
        last = merged[-1] if merged else None
        plain = not message.get("tool_calls") and isinstance(message["content"], str)
        if (
            last is not None
            and plain
            and last["role"] == message["role"] != "tool"
            and not last.get("tool_calls")
            and isinstance(last["content"], str)
        ):
            last["content"] = "\n\n".join(text for text in (last["content"], message["content"]) if text)
        else:
            merged.append(dict(message))
    return merged


def read_number(name: str, value: object, kind: type) -> float | int:
    """The number that a parameter was given as; text such as "0.6" counts."""
    wanted = "an integer" if kind is int else "a number"
    try:
        number = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        )
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise PipeError("bad_value", name=name, value=value, wanted=wanted, code="invalid_request")
    return (
        int(value)
        if kind is int and isinstance(value, (int, str)) and str(value).lstrip("+-").isdecimal()
        else kind(number)
    )


def read_options(body: Mapping[str, Any]) -> Json:
    """Sampling fields of ktd.v1.Sampling from the body; what it does not know is ignored."""
    options: Json = {}
    for name, (target, kind) in SAMPLING.items():
        if body.get(name) not in (None, ""):
            options[target] = read_number(name, body[name], kind)
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    options["stop"] = [whole(str(text)) for text in stops if text]
    bias = body.get("logit_bias")
    if isinstance(bias, Mapping) and bias:
        options["logit_bias"] = {
            int(read_number("logit_bias", token, int)): read_number("logit_bias", value, float)
            for token, value in bias.items()
        }
    wanted = body.get("response_format")
    if isinstance(wanted, str) and wanted.lstrip().startswith("{"):  # a custom parameter is typed as text
        with contextlib.suppress(ValueError, RecursionError):
            wanted = json.loads(wanted)
    if wanted not in (None, "", {}):
        options["response_format"] = wanted
    return options


def grpc_format(wanted: object) -> Json:
    """The field of ktd.v1.ChatRequest for OpenAI's response_format; no field for plain text."""
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind == "text":
        return {}
    if isinstance(wanted, dict):
        given = wanted.get("json_schema", wanted)
        schema = given.get("schema") if isinstance(given, dict) else None
        if isinstance(schema, dict) and kind in ("json_object", "json_schema"):
            lenient = given.get("strict") is False
            return {"json_schema": {"schema_json": json.dumps(schema), "lenient": lenient}}
        if kind == "json_object":
            return {"json_object": {}}
    expected = 'text, json_object, or json_schema with a "schema"'
    raise PipeError(
        "bad_value", name="response_format", value=wanted, wanted=expected, code="invalid_request"
    )


def read_thinking(body: Mapping[str, Any], *choices: str) -> bool | None:
    """Whether to think: the chat's own parameter first, then the user's and the admin's choice ("on" or
    "off").
    """
    if isinstance(body.get("think"), bool):
        return bool(body["think"])
    if str(body.get("reasoning_effort") or "").lower() in ("none", "off"):
        return False
    for choice in choices:
        if choice in ("on", "off"):
            return choice == "on"
    return None


# --- Tools: the model calls, Open WebUI runs ----------------------------------------------------------------


def tool_rounds(messages: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """The calls (name, arguments) already made for the last question, round by round.

    Open WebUI hands images of a result over in a user message of their own: it is no new question.
    """
    rounds: list[list[tuple[str, str]]] = []
    for position in range(len(messages) - 1, -1, -1):
        message = messages[position]
        if message.get("role") == "user" and not (position and messages[position - 1].get("role") == "tool"):
            break
        calls = [call.get("function") or {} for call in _dicts(message.get("tool_calls"))]
        if calls:
            rounds.insert(0, [(str(call.get("name")), str(call.get("arguments"))) for call in calls])
    return rounds


def read_tools(body: Mapping[str, Any], most_rounds: int) -> tuple[Json, ...]:
    """The tools to offer. None when the rounds are used up or the last one repeated the one before it:
    Open WebUI would go round 256 times.
    """
    rounds = tool_rounds(body.get("messages") or [])
    if len(rounds) >= most_rounds or (len(rounds) > 1 and rounds[-1] == rounds[-2]):
        return ()
    return tuple(
        tool
        for tool in _dicts(body.get("tools"))
        if isinstance(tool.get("function"), dict) and tool["function"].get("name")
    )


# --- Upstreams: what gRPC and HTTP share --------------------------------------------------------------------


class Links:
    """One channel or client for each target and event loop, kept between calls and closed with the
    function.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[asyncio.AbstractEventLoop, Any]] = {}

    def find(self, target: Target) -> Any | None:
        """The target's link in the running loop, if there is one."""
        loop, link = self._kept.get((target.url, target.certificates), (None, None))
        return link if loop is asyncio.get_running_loop() else None

    def get(self, target: Target, make: Callable[[Target], Any]) -> Any:
        """The same, made if there is none."""
        link = self.find(target)
        if link is None:
            link = make(target)
            self._kept[target.url, target.certificates] = (asyncio.get_running_loop(), link)
        return link

    def forget(self, target: Target) -> None:
        """Lets go of a target's link; whoever still uses it keeps it until then."""
        self._kept.pop((target.url, target.certificates), None)

    async def close(self) -> None:
        """Closes what belongs to the running loop."""
        loop = asyncio.get_running_loop()
        for key, (owner, link) in list(self._kept.items()):
            if owner is loop:
                del self._kept[key]
                await (link.close() if hasattr(link, "close") else link.aclose())

    def __del__(self) -> None:
        # Open WebUI drops an updated function without a word. Answers under way hold this object, so none
        # is cut.
        for loop, link in self._kept.values():
            if loop.is_running():
                close = link.close if hasattr(link, "close") else link.aclose
                loop.call_soon_threadsafe(_start, loop, close)


def _start(loop: asyncio.AbstractEventLoop, close: Callable[[], Any]) -> None:
    loop.create_task(close())


def read_file(path: str) -> bytes | None:
    """The content of a certificate file; None for an empty path."""
    if not path:
        return None
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise PipeError("bad_file", path=path, reason=error.strerror, code="invalid_settings") from error


async def paced(
    events: AsyncIterator[Event], first: float, idle: float, address: str
) -> AsyncGenerator[Event]:
    """The same events, with an end to patience: `first` seconds for the first text, `idle` between texts;
    0 = none.
    """
    limit, valve = first, "FIRST_EVENT_TIMEOUT"
    while True:
        try:
            async with asyncio.timeout(limit or None):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise PipeError("silent", address=address, seconds=round(limit), valve=valve, code=4) from None
        if isinstance(event, (Prefill, Reasoning, Answer)):
            limit, valve = idle, "IDLE_TIMEOUT"
        yield event


# --- Upstream: the ktd daemon over gRPC ---------------------------------------------------------------------
# A pasted file cannot import generated modules, so the schema travels in it. The pool is private: the
# process-wide
# one refuses a second version of the same file, which an updated function would bring.

# >>> embedded by plugin/embed.py: proto/ktd_proto/v1/engine.proto as a FileDescriptorProto, base85
SCHEMA = (
    "3K?s3WM6P{Z**@jb}=tyZf9w3WiD`XZ**@G25WR=E_N{@zyk^kLug@iQe|;<Wpi{A4GINqZ)9a`7y%#wC<ziF3J7gwb8}&5Wpfw;"
    "AOk21G7m0mbYw1eF)mGIb8}&5WfCF^2y<a=aBOLAXBYz@0VoSH5H4$UWG;3wE>mG`aBOLAXA%_(2y|#^Zfj|7XBY$^0VoJa0f+$s"
    "5*`W`V{dMBX>N68UuJ1;VQgP*Wpi_3XJr@#AOR={5)ujua%FLKWpi|2X=E4%AOR=|5+Vu+aB^vHa%psV7zZE$C=N0ZE^BmTE_N|4"
    "P;zN+a%psV5*rEybZ>8La~KF911JkJ3@&SQWG;3wE>v%CY!WF73u<$3ZeMR=YGq?|7zrQ&C<`(YE^BmTE_N|4N^@^+Phx6iV{}LW"
    "5-AD`YIARHUvpz<Wo=;?3LpU}3o;TeYjk8Tb}=qWb8l`_V`yb<VMqWHAPN(3VRB(?Y-Ma;bZ>8LUt?ixY;zb3AOR={NCJof0TK}k"
    "32k+AbYEj(Y-|_|AOR={5)29ib#rBM7!4o+C<#Il3J-E+b8v5Nb7fy<Z*py6bV3UX314(*X>Mz2Zf8Ok3KU;(VRB(?Y-Ma;bZ>8L"
    "Ut?ixY;z(E3JOYdZ*EUwYGq?|A~FgJN^@^+Q)6glZDA4<3JY^%Xk~3-Uutu2ZWsX|0VoL)4+;ltWo~I@Zgdy|AOR={B7X`8O=WX)"
    "VP|C$3<?BtZ){~40U!Y=2@($q2V-w;bY*UI7y=*xC<zi73K4Q;VRLV8X>Mm<V{dMBWo~pB10Vq?2@)g<3UqI8Y+qwxY;1EF1Rw(_"
    "3o;NcYjk8Tb}=qgZ*OcvVQg#?6bcM<Z*Od0V_|G;Uuk3*1t0+^2_ixY1XOQtY!VC#1a4t%Wf%b<0VoL)6ABAtWpiV4X>fFDZ*CX@"
    "AOR=|5*G>&aA9&`ZDn+2a&up5b8l`K10Vq?2_j1h2vl!xY(rseY!V6z0%>Fz0U!Y=2@(tn1a4t%Wf%e=0VoL)777kwa%XjIWo~qH"
    "Uutu2ZWsd~0VoL)4GINmZe(S67z7{zC=DW&1PTaKVQp}1X>Ml{7zzt?Wo>X}a$$6Ja%C6+AOR=>NC1cd0TL1l1$1w4UvL-#AOR=>"
    "NCAie0TL1l1$1w4UuzfxAOR>1NCJof0TL1l1#M|=UvL-%AOR=>NCSug0TLey5^`m5WprtDX>V>{aAj^`Y;<`T1t0+^0!Rdi0Ra*n"
    "3J`E|Wpib2V`X1(Wo}_?ba@yCAOR=>NCk)i0TLbx5oU5_adl;GV|ib2Wo}_?ba@yDAOR=>NCt=j0TK}k1aoC&WEcn_0Vo7W2Z#Xy"
    "5*G>zZDDv{bZ={AZgUt3AOR=?NC=1l0TK)f1aow6a2N_811Jd+GYSf9Z)a(AUt(!ta~KOC11JkJA1-TjWG;3wE>mG`aBOLAXD&={"
    "XK8doX<>6kZgg^a5*Z2%bZ>B9Y;R|9a&KaD7z`i*C=Eynhyei_FbWP#Z)a(ALTO=hMQ(I*c@hf>18Ze@7y%#wC=C(~3I%pyY;|QA"
    "0w4h>0y+XX0YVN63}19*ZE$6BVRUtJWkLuF248e<a9?mj2nq&YbZ>B9YeEPL248JyZeMUh6$%qya%FI3bZK;HZ*E_3Wo}_?ba_G("
    "3K3s$a%FR6ZewL%aAj^`Y;<`-6bcewW^!e5b!Bd2d0%j4ZeeV6c|r#Y1z&SzWn@AP3JYItVR&D3Z);_4b3zXa4PSI`a9?b1XK-?F"
    "Vsj$50tyL3Xkm0kc4cmK5)ujua%FLKWpi|2X=E4yAOR=|5)cXqb7gULWo~0-7y=*xC<GE93I=g?Wp!m_7y}>yC<`(UE^BmTE_N|4"
    "QFUc?Wn@SI5+Vu*aB^j4X>4p51Rwz@3o;KbYjk8Tb}=qca%E;|Y-~sX5+(`>a%Ew2Z*FOBXBY(_0VoSH5iV<VWG;3wE>dM-b8l{G"
    "Zf8gU5+Di&VQzDGWpWq>AOR=~G7c_lbYw1eF)l%Fb9ZHONB|Ng3JG*?Z){&<VQg#|2Ot3`3o;NcYjk8Tb}=qgZ*OcvVQg$j01_Sw"
    "1$A>_XJr@&AOR=~G7T<kbYw1eF)meeVP|DX01_k$2xe(+X>(|0WEcq`0VoSH5H4$UWG;3wE=Fl?X>(|0WJmx)2MPscc4cmKA{q(?"
    "QFUc?Wn>Z%3J7p-b7^#GZ*CX?AOR>1B0&lVP;zBvX>4o~3<?BfZ*FB60U!Y=4H69s1$1w8VQd%zAOR>15*Z2+bZ={AZgXF7WpZD0"
    "Wn*t{WEcY=0Vn|?KMDy_Wnpt~ZfS035)29ibY*yS7y%#wC<ziI3I=p<Yh`Y87y=*zC<`(aE^BmTE_N|4RBvl#ZcJ}yaB^>AB0LHP"
    "L2h$*WpWY>3Iudzcyt&6AOR=|5+n)+bZ={AZgUs{AOk21G88UrbYw1eF)mbZYh`XsZ)b3FZ(<^%0SXLMZ);_4OmAm!a&KZ13JL;g"
    "WEcS;0VoX;3<?BvWq5QL0w4h>3=$6t2W)R=aB^>A7y}>yC;}2K3IlX+a2Nz211JkJATDckWG;3wE>v%8Wo}GwXK-?FVlF{!bY*gG"
    "VRUJBWg0jN3qfpjWpZv|bZK^F5()|eX=E4yAOR>15)29ibY*yS7y=*xC=3!03I}X&XK-?FVi*G;0Vo0@vH=PORdZoyWfBz%4RCUA"
    "ZE$p7bZ={AZgUs`AOR>15)}#!V_{=xWn^D;Z);_4a~J|30VoX;843|&Z*6dFWprt8ZeMh7Yh`Y87y}>yC=C)A3J`K-VRLV8X>Mm<"
    "bZ={AZgUs}AOR>15)}#!adl;NWnXh;V{dL`a~K660Vn|y7YYw>a%E;|Y;0e1Wn*t{WOEn>AOR==5*7*$WMyM-WMyA-Wn*t{WOEn?"
    "AOR==A}|UFMrm$ob7*B`5+n)+a%Ew2Z*CX?AOR>2G88UrbYw1eF)l`FZfSF9Qe|OtZ*C$J3K2|cb97B_WMyn~Qe|;<Wpi{QGYS$+"
    "X>)W<Z)9a`b5dn<aBpsNWfC0<25oO-Wo&a80U!e?3o;EZYjk8Tb}=qZZ)9a`B98$I1x;^cWo!}(3Ib_l7y%#wC<zh~3JGRuY-L|="
    "VQpm?0w4h>2@(_v3}JF(XlZn1V{~<LWf%h>0VoL)5()}%VRB(@Wprh7a~K350Vo6#777kyZ*FvDcywQEWo~D5Xcz?`0VoX;6bcM+"
    "bzyFFX>(z8X>V>A1|R__2@($q2V-(&VRU6=7zZE$C<7uA3J^zSbW?O;baiu5WpQ<7b95r-0tyjFWpq<?VRUtKQe|^+Z*FsC5-th_"
    "b97;JWf%b<0VobKA1-TjWG;3wE=Of_Q*>c;b#qc>b8v5Nb7d}5bYXO55)TRoc4cyNX>V>A0w4h>2@(qm18H+%7y}>yC<zh|3I}v("
    "a%Ev;a~K350VoX;4+;lzb#88HZf6(;AOR>15)TRocVTICX>Mm21|R__4H6Ry3vgj)WpiJ2Z**a77zZE$C=C)43JP#xXJvC=W^!d^"
    "7ziK%C=C)83J!H}bZKp6Uvp(+Z*F9B7zrQ&C;<``3Jq*;VPs!$a&KpHWpi^F3LpU}0TK@i2W@3@b75y?7z-c)C<!8H3I$ViVRU5@"
    "6$%kkR6$flUsX<1P(?#YMoC3P5C9Sp3Jp_KK~zOwOiw{XNlr%)0TK@i3sY1<R7GD>ML|Sa5CRes3Jz0LK~zOwL{dRXPDxHj5Cakr"
    "3Jg<JK~zOwMnOqTMMMw;DoY9oP;zN+a%psV5*P{;P*O=xQb|-<UsX<1P(?#YMoC3P5C9Sr3J*|HNl#KqR9Rn6Pf|@mOb`JQ5DE-X"
    "Qb|uzNmN;1Oix!30xEq93`S{gX>({&Wnpt~ZW0{|8AeG?NmEE)Qbj>iPflM|PE$}tLrF$SMMMw)5*7*)MoCUdQ%GM@ML|<fPG3`0"
    "Pf!p65*P{;MoCUdQ%GM@ML|<fPG3w#PDfNo5CRe$3K&L7PDxWpUs6RuQ%_D`R8LP#UqeAmOj8g8GQj}~21RaXX>Mf_FbV`iXkl~`"
    "6E16XWG;3wE<<QxbW&w;b!BsO8WApQbYw1eF)l-BVRS`yWo~pZ0TM$B3QTEpbWLw$Wo&a287^ydWG;3wE=*~2bWLw$Wo&a&WpQ<7"
    "b95RSE^BmTE_N|4Olfm;O>bmnY;#g&b8v5Nb7c}h3JFJLbW?O;baitQ7%ppcWG;3wE=Of_Q*>c;b#qc>adl;LbQ&2hYjk8Tb}=qT"
    "Wpq<?VRUtKQe|^+Z*FsCVg_(>Z**@n"
)
# <<< embedded


class Wire:
    """Message classes and method paths of ktd.v1."""

    def __init__(self) -> None:
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b85decode(SCHEMA))
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._classes = {
            message.name: message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"{file.package}.{message.name}")
            )
            for message in file.message_type
        }
        self.service = f"/{file.package}.{file.service[0].name}"

    def __getitem__(self, name: str) -> Any:
        return self._classes[name]


WIRE = Wire() if not GRPC_PROBLEM else None

_FINISH = {1: "stop", 2: "length", 3: "tool_calls"}

# A daemon that was just restarted is found again within a second.
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


# Where an address names none.
GRPC_PORT = 50051


def open_channel(target: Target) -> Any:
    """A channel to `grpc://host:port` or, with TLS, `grpcs://host:port`. Connects when used."""
    address = target.address if urlsplit(target.url).port else f"{target.address}:{GRPC_PORT}"
    options = [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if target.loopback else 1)]
    if target.scheme == "grpc":
        return grpc.aio.insecure_channel(address, options=options)
    authority, certificate, key = (read_file(path) for path in target.certificates)
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _wire() -> Wire:
    if WIRE is None:
        raise PipeError("no_grpc", reason=GRPC_PROBLEM)
    return WIRE


async def connected_channel(links: Links, target: Target, patience: float) -> Any:
    """The target's channel, ready to use; PipeError after `patience` seconds."""
    channel = links.get(target, open_channel)
    state = channel.get_state(try_to_connect=True)
    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
        # It waits out its back-off; a new one tries at once.
        links.forget(target)
        channel = links.get(target, open_channel)
    if state is not grpc.ChannelConnectivity.READY:
        try:
            async with asyncio.timeout(patience):
                await channel.channel_ready()
        except TimeoutError:
            if await _listened_to(target):
                reason = f"{patience:g} s"
                raise other_protocol(target, reason, 14) from None
            raise PipeError("unreachable", address=target.address, code=14) from None
    return channel


async def _listened_to(target: Target) -> bool:
    """Whether something takes connections where no gRPC answers: gRPC itself does not tell."""
    parts = urlsplit(target.url)
    try:
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or GRPC_PORT)
    except (OSError, TimeoutError, UnicodeError):
        return False
    writer.close()
    return True


def other_protocol(target: Target, reason: str, code: int) -> PipeError:
    """What listens is no service, or not of the kind that the address says."""
    return PipeError("other_protocol", address=target.address, scheme=target.scheme, reason=reason, code=code)


def _authorization(target: Target) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {target.key}"),) if target.key else ()


def grpc_request(job: Job, wire: Wire) -> Any:
    """The ktd.v1.ChatRequest of a job."""
    request = wire["ChatRequest"](
        **grpc_format(job.options.get("response_format", "text")),
        model=job.model,
        continue_final_message=job.continues,
        request_id=f"owui-{uuid.uuid4().hex[:12]}",
        priority=2 if job.low_priority else 1,
        user=job.user,
    )
    if job.thinking is not None:
        request.thinking = job.thinking
    for message in job.messages:
        added = request.messages.add(role=message["role"], content=message["content"])
        added.tool_call_id = message.get("tool_call_id", "")
        for index, call in enumerate(message.get("tool_calls", ())):
            function = call.get("function") or {}
            arguments = function.get("arguments")
            added.tool_calls.add(
                id=str(call.get("id") or ""),
                name=str(function.get("name") or ""),
                arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments or {}),
                index=index,
            )
    for tool in job.tools:
        function = tool["function"]
        request.tools.add(
            name=str(function["name"]),
            description=str(function.get("description") or ""),
            parameters_json=json.dumps(function.get("parameters") or {}),
        )
    request.sampling.SetInParent()
    for name, value in job.options.items():
        try:
            if name == "response_format":
                continue
            if name == "stop":
                request.sampling.stop.extend(value)
            elif name == "logit_bias":
                for token, bias in value.items():
                    request.sampling.logit_bias[token] = bias
            else:
                setattr(request.sampling, name, value)
        except (ValueError, TypeError, OverflowError) as error:
            raise PipeError(plain=f"{name}: {error}", code="invalid_request") from error
    return request


def grpc_error(error: Any, target: Target, *, started: bool) -> PipeError:
    """What the chat shows for a failed call."""
    code, reason = error.code(), error.details() or error.code().name
    number = code.value[0]
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return PipeError("wrong_key", address=target.address, reason=reason, code=number)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN) and started:
        return PipeError("broke_off", address=target.address, reason=reason, code=number)
    return PipeError(plain=reason, code=number, retry=code is grpc.StatusCode.UNAVAILABLE)


def _rate(tokens: float, seconds: float) -> float:
    return round(tokens / seconds, 2) if seconds > 0 else 0.0


def grpc_usage(usage: Any) -> Usage:
    """Counts, seconds and rates of a ktd.v1.Usage."""
    return Usage(
        {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "prompt_tokens_per_second": _rate(
                usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds
            ),
            "completion_tokens_per_second": _rate(usage.completion_tokens, usage.decode_seconds),
            "queue_seconds": round(usage.queue_seconds, 3),
            "prefill_seconds": round(usage.prefill_seconds, 3),
            "decode_seconds": round(usage.decode_seconds, 3),
        }
    )


def with_thought(figures: Json, prompt: int, tokens: int, seconds: float) -> Json:
    """The figures of an answer whose thought of `tokens` tokens, written in `seconds`, was its prompt."""
    written = figures["completion_tokens"] + tokens
    spent = figures["decode_seconds"] + seconds
    return figures | {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {"reasoning_tokens": tokens},
        "completion_tokens_per_second": _rate(written, spent),
        "decode_seconds": round(spent, 3),
    }


def grpc_event(message: Any) -> Event | None:
    """The event in a ktd.v1.ChatEvent; None for a kind that was added to it later."""
    kind = message.WhichOneof("event")
    if kind == "answer":
        return Answer(message.answer.text)
    if kind == "reasoning":
        return Reasoning(message.reasoning.text)
    if kind == "prefill":
        return Prefill(message.prefill.done, message.prefill.total, message.prefill.tokens_per_second)
    if kind == "queued":
        return Queued(message.queued.position)
    if kind == "tool_call":
        call = message.tool_call
        return ToolCall(call.index, call.id, call.name, call.arguments_json)
    if kind == "usage":
        return grpc_usage(message.usage)
    if kind == "finished":
        return Finished(_FINISH.get(message.finished.reason, "stop"))
    return None


async def grpc_events(links: Links, job: Job) -> AsyncGenerator[Event]:
    """One Chat call. However this generator is left, the call is cancelled and the daemon frees the
    sequence.
    """
    wire = _wire()
    request = grpc_request(job, wire)
    channel = await connected_channel(links, job.target, job.connect_timeout)
    chat = channel.unary_stream(
        f"{wire.service}/Chat",
        request_serializer=wire["ChatRequest"].SerializeToString,
        response_deserializer=wire["ChatEvent"].FromString,
    )
    call = chat(request, metadata=_authorization(job.target))
    started = finished = False
    try:
        async for message in call:
            started = True
            event = grpc_event(message)
            if event is not None:
                finished = isinstance(event, Finished)
                yield event
    except grpc.aio.AioRpcError as error:
        raise grpc_error(error, job.target, started=started) from error
    finally:
        call.cancel()
    if not finished:
        raise PipeError("broke_off", address=job.target.address, reason="no Finished event", code=14)


async def grpc_models(links: Links, target: Target, patience: float) -> list[tuple[str, str]]:
    """(id, shown name) of what the daemon serves."""
    wire = _wire()
    channel = await connected_channel(links, target, patience)
    method = channel.unary_unary(
        f"{wire.service}/ListModels",
        request_serializer=wire["ListModelsRequest"].SerializeToString,
        response_deserializer=wire["ListModelsResponse"].FromString,
    )
    try:
        reply = await method(wire["ListModelsRequest"](), metadata=_authorization(target), timeout=patience)
    except grpc.aio.AioRpcError as error:
        raise grpc_error(error, target, started=False) from error
    return [(model.id, model.id) for model in reply.models]


# --- Upstream: any OpenAI-compatible service over HTTP ------------------------------------------------------

_LINE_END = re.compile(r"\r\n|\r|\n")


class SseDecoder:
    """Server-sent events from bytes cut anywhere: `push` returns the data of the events completed by them."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._data: list[str] = []

    def push(self, chunk: bytes) -> list[str]:
        return self._lines(self._decode.decode(chunk), final=False)

    def flush(self) -> list[str]:
        """The body ends here; what has no closing blank line counts too."""
        return self._lines(self._decode.decode(b"", True) + "\n\n", final=True)

    def _lines(self, text: str, *, final: bool) -> list[str]:
        text = self._line + text
        # A CR at the end may be half of a CRLF.
        rest = "\r" if text.endswith("\r") and not final else ""
        *lines, self._line = _LINE_END.split(text[: len(text) - len(rest)])
        self._line += rest
        events = []
        for line in lines:
            if line.startswith("data:"):
                # Some services leave out the blank line: a whole JSON object is an event.
                if self._data and _is_json("\n".join(self._data)):
                    events.append("\n".join(self._data))
                    self._data = []
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text.strip() == "[DONE]"
    return True


def _dicts(value: object) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _ark_sources(chunk: Json, delta: Json) -> list[Source]:
    """Volcengine Ark bots: `references`; markers 摘要N."""
    found = []
    for item in _dicts(chunk.get("references") or delta.get("references")):
        title = item.get("title") or item.get("doc_title") or item.get("doc_name") or item.get("site_name")
        url = item.get("url") or item.get("mobile_url")
        found.append(clean_source(title, url, item.get("summary") or item.get("chunk_title")))
    return found


def _perplexity_sources(chunk: Json, delta: Json) -> list[Source]:
    """Perplexity: `search_results` and `citations`, in the same order, on every chunk; markers [N]."""
    results = _dicts(chunk.get("search_results"))
    citations = chunk.get("citations")
    links = [link for link in citations if isinstance(link, str)] if isinstance(citations, list) else []
    if len(results) >= len(links):
        return [clean_source(item.get("title"), item.get("url"), item.get("snippet")) for item in results]
    details = {item.get("url"): item for item in results}
    found = []
    for link in links:
        item = details.get(link, {})
        found.append(clean_source(item.get("title"), link, item.get("snippet")))
    return found


def _delta_sources(chunk: Json, delta: Json) -> list[Source]:
    """SiliconFlow: a delta of type search_result. Cloudsway: `reference` in the last chunk. Markers
    [citation:N].
    """
    items = _dicts(delta.get("search_results")) or _dicts(chunk.get("reference"))
    found = []
    for item in items:
        text = item.get("snippet") or item.get("content") or item.get("summary")
        found.append(
            clean_source(item.get("title") or item.get("name"), item.get("url") or item.get("link"), text)
        )
    return found


def _annotated_sources(chunk: Json, delta: Json) -> list[Source]:
    """OpenAI's annotations of type url_citation; they come one by one."""
    found = []
    for note in _dicts(delta.get("annotations")):
        cited = note.get("url_citation")
        if isinstance(cited, dict):
            found.append(clean_source(cited.get("title"), cited.get("url"), cited.get("content")))
    return found


# Where in a chunk or a delta the readers look.
_SOURCE_FIELDS = ("references", "reference", "citations", "search_results", "annotations")

# Reader, the markers that go with it, whether each list adds to the one before.
_SOURCE_READERS: tuple[tuple[Callable[[Json, Json], list[Source]], MarkerStyle, bool], ...] = (
    (_ark_sources, "summary", False),
    (_perplexity_sources, "plain", False),
    (_delta_sources, "citation", False),
    (_annotated_sources, "plain", True),
)


def _prompt_progress(chunk: Json) -> list[Event]:
    """llama-server's progress, which it sends when the request says `return_progress`."""
    progress = chunk.get("prompt_progress")
    if not isinstance(progress, dict):
        return []
    total, done, cached = (int(_count(progress.get(name))) for name in ("total", "processed", "cache"))
    return [Prefill(done, total, _rate(done - cached, _count(progress.get("time_ms")) / 1000))]


def _bot_usage(chunk: Json) -> Json:
    """Volcengine Ark's count for a bot, which may ask several models for one answer."""
    usage = chunk.get("bot_usage")
    models = _dicts(usage.get("model_usage")) if isinstance(usage, dict) else []
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum(_count(model.get(name)) for model in models) for name in names} if models else {}


def _count(value: object) -> float | int:
    """A number from the network; 0 for anything else."""
    return value if isinstance(value, (int, float)) else 0


class ReplyReader:
    """Turns the JSON chunks of any vendor into events."""

    def __init__(self, address: str, *, opens_thought: bool) -> None:
        self._address = address
        self._splitter = ReasoningSplitter(opens_thought)
        self._native_thoughts = False
        self._answered = False
        self._sources: tuple[Source, ...] = ()
        self._named: list[object] = []
        self._calls: dict[int, Json] = {}
        self._usage: Json = {}
        self._timings: Json = {}
        self._reason = ""
        self._done = False
        self._begun = time.monotonic()
        self._first_text: float | None = None

    def read(self, data: str) -> list[Event]:
        """The events of one chunk. Raises PipeError for an error object or an unreadable chunk."""
        if data.strip() == "[DONE]":
            self._done = True
            return []
        try:
            chunk = json.loads(data)
        except ValueError:
            raise PipeError("bad_reply", address=self._address, reason=clean_text(data, 200)) from None
        if not isinstance(chunk, dict):
            raise PipeError("bad_reply", address=self._address, reason=clean_text(data, 200))
        choices = _dicts(chunk.get("choices"))
        if chunk.get("error") or (not choices and "code" in chunk and "message" in chunk):
            raise PipeError(plain=error_sentence(chunk), code=_error_code(chunk))
        choice = choices[0] if choices else {}
        parts = [part for part in (choice.get("delta"), choice.get("message")) if isinstance(part, dict)]
        delta = next(filter(None, parts), {})
        events = _prompt_progress(chunk) + self._read_sources(chunk, delta)
        events += self._read_text(delta)
        self._read_calls(delta)
        self._usage = chunk.get("usage") or choice.get("usage") or _bot_usage(chunk) or self._usage
        self._timings = chunk.get("timings") or self._timings
        self._reason = str(choice.get("finish_reason") or self._reason)
        return events

    def end(self) -> list[Event]:
        """The events that only the end of the body settles."""
        events: list[Event] = list(self._splitter.flush())
        if not self._done and not self._reason:
            raise PipeError("broke_off", address=self._address, reason="the stream ended early", code=502)
        for index, call in sorted(self._calls.items()):
            events.append(ToolCall(index, call["id"], call["name"], call["arguments"] or "{}"))
        figures = self._figures()
        if figures:
            events.append(Usage(figures))
        return [*events, Finished(self._reason or "stop")]

    def _read_calls(self, delta: Json) -> None:
        """Collects tool calls: the first piece names the call, the others go on with its arguments."""
        for position, piece in enumerate(_dicts(delta.get("tool_calls"))):
            index = piece.get("index")
            call = self._calls.setdefault(
                index if isinstance(index, int) else position, {"id": "", "name": "", "arguments": ""}
            )
            function = piece["function"] if isinstance(piece.get("function"), dict) else {}
            arguments = function.get("arguments") or ""
            call["id"] = str(piece.get("id") or call["id"])
            call["name"] = str(function.get("name") or call["name"])
            call["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments)

    def _read_sources(self, chunk: Json, delta: Json) -> list[Event]:
        named = [part[name] for part in (chunk, delta) for name in _SOURCE_FIELDS if part.get(name)]
        if not named or named == self._named:
            return []  # some repeat their list on every chunk
        self._named = named
        for reader, style, adds in _SOURCE_READERS:
            found = tuple(reader(chunk, delta))
            if adds:
                found = self._sources + tuple(source for source in found if source not in self._sources)
            if found and found != self._sources:
                self._sources = found
                return [Sources(found, style)]
        return []

    def _read_text(self, delta: Json) -> list[Event]:
        thought = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("thinking")
        if not isinstance(thought, str) or not thought:
            thought = details_text(delta.get("reasoning_details"))
        text = parts_text(delta.get("content"))
        events: list[Event] = []
        if thought:
            self._native_thoughts = True
            events.append(Reasoning(thought))
        if text and self._native_thoughts:
            if not self._answered:
                text = text.lstrip("\n")
            if text:
                events.append(Answer(text))
        elif text:
            events += self._splitter.push(text)
        self._answered = self._answered or any(isinstance(event, Answer) for event in events)
        if events and self._first_text is None:
            self._first_text = time.monotonic()
        return events

    def _figures(self) -> Json:
        """The service's own counts and rates; where it gives no rates, those seen from here."""
        if not isinstance(self._usage, dict) or not self._usage:
            return {}
        figures = dict(self._usage)
        first = self._first_text or time.monotonic()
        waited, wrote = first - self._begun, time.monotonic() - first
        timings = self._timings if isinstance(self._timings, dict) else {}
        prompt_rate = _count(timings.get("prompt_per_second"))
        prompt_rate = prompt_rate or _rate(_count(figures.get("prompt_tokens")), waited)
        answer_rate = _count(timings.get("predicted_per_second"))
        answer_rate = answer_rate or _rate(_count(figures.get("completion_tokens")), wrote)
        rates = {
            "prompt_tokens_per_second": round(prompt_rate, 2),
            "completion_tokens_per_second": round(answer_rate, 2),
            "first_token_seconds": round(waited, 3),
            "decode_seconds": round(wrote, 3),
        }
        return figures | rates


def error_sentence(reply: Json) -> str:
    """The sentence in a service's error object."""
    problem: Any = reply.get("error") or reply
    if isinstance(problem, dict):
        problem = (
            problem.get("message") or problem.get("detail") or reply.get("message") or json.dumps(problem)
        )
    return clean_text(problem if isinstance(problem, str) else json.dumps(problem), 1000)


def _error_code(reply: Json) -> int | str | None:
    problem = reply.get("error")
    code = problem.get("code") or problem.get("type") if isinstance(problem, dict) else reply.get("code")
    return code if isinstance(code, (int, str)) else None


def open_client(target: Target) -> Any:
    """An HTTP client for one service. HTTP/2 where the `h2` package is there and the service offers it."""
    authority, certificate, key = target.certificates
    verify: Any = True
    if target.url.startswith("https://") and (authority or certificate):
        for path in target.certificates:
            read_file(path)
        verify = ssl.create_default_context(cafile=os.path.expanduser(authority) or None)
        if certificate:
            verify.load_cert_chain(os.path.expanduser(certificate), os.path.expanduser(key) or None)
    return httpx.AsyncClient(
        http2=importlib.util.find_spec("h2") is not None,
        verify=verify,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        trust_env=not target.loopback,
        follow_redirects=True,
    )


def _http_headers(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.key}"} if target.key else {}


def _chat_url(job: Job) -> str:
    url = job.target.url.rstrip("/")
    if job.model.startswith("bot-") and urlsplit(url).path.endswith("/v3"):
        url += "/bots"  # Volcengine Ark keeps its bots beside its models
    return f"{url}/chat/completions"


def http_payload(job: Job, body: Mapping[str, Any]) -> Json:
    """The request of an OpenAI-compatible service."""
    payload: Json = {name: body[name] for name in HTTP_PASSED if body.get(name) is not None}
    options = {name: value for name, value in job.options.items() if value not in ([], {})}
    if "max_completion_tokens" in payload:
        options.pop("max_tokens", None)
    payload |= options
    payload |= {
        "model": job.model,
        "messages": merge_neighbours(job.messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if job.tools:
        payload["tools"] = list(job.tools)
        if body.get("tool_choice") is not None:
            payload["tool_choice"] = body["tool_choice"]
    if job.thinking is not None:
        # An effort that the chat names is a yes too, and a more exact one.
        switch = _thinking_switch(job)
        payload = switch | payload if job.thinking else payload | switch
    _return_thoughts(job, payload["messages"])
    if job.continues:
        _ask_to_continue(job, payload)
    return payload


def wants_thoughts_back(target: Target, model: str) -> bool:
    """Whether the thoughts of turns that call tools must come back with the conversation.

    DeepSeek's newer models refuse the next round without them, on whatever service; for all others a thought
    ends with its answer, and some refuse the field.
    """
    return "deepseek" in f"{urlsplit(target.url).hostname} {model}".lower() and not target.speaks_grpc


def _return_thoughts(job: Job, messages: Sequence[Json]) -> None:
    """Leaves the thoughts in the turns that called tools, and takes them out of all others. A blank stands
    for one that is lost (hidden, or by another model): an empty text is refused.
    """
    wanted, called = wants_thoughts_back(job.target, job.model), False
    for message in messages:
        if message["role"] == "user":
            called = False
        called = called or bool(message.get("tool_calls"))
        thought = message.pop("reasoning_content", " ")
        if wanted and called and message["role"] == "assistant":
            message["reasoning_content"] = thought


_CONTINUE_UNASKED = ("volces.com", "siliconflow.cn", "siliconflow.com", "perplexity.ai", "openrouter.ai")


def _ask_to_continue(job: Job, payload: Json) -> None:
    """Says that the last message is to go on, in vLLM's words where the service has none of its own."""
    host = urlsplit(job.target.url).hostname or ""
    if host.endswith("deepseek.com"):
        payload["messages"][-1]["prefix"] = True
    elif not host.endswith(_CONTINUE_UNASKED):
        payload |= {"continue_final_message": True, "add_generation_prompt": False}


def _thinking_switch(job: Job) -> Json:
    """How the service is told to think or not: each has its own word."""
    host = urlsplit(job.target.url).hostname or ""
    if host.endswith(("deepseek.com", "volces.com")):
        return {"thinking": {"type": "enabled" if job.thinking else "disabled"}}
    if host.endswith(("siliconflow.cn", "siliconflow.com", "aliyuncs.com")):
        return {"enable_thinking": job.thinking}
    if host.endswith("openrouter.ai"):
        return {"reasoning": {"enabled": job.thinking}}
    if host.endswith("ollama.com") or urlsplit(job.target.url).port == 11434:
        return {"reasoning_effort": "medium" if job.thinking else "none"}
    return {"chat_template_kwargs": {"thinking": job.thinking, "enable_thinking": job.thinking}}


async def _http_failure(response: Any, target: Target) -> PipeError:
    """What the chat shows for a reply other than 200."""
    raw = b""
    async for chunk in response.aiter_bytes():
        raw += chunk
        if len(raw) > 65536:
            break
    text = raw.decode("utf-8", "replace")
    try:
        reply = json.loads(text)
    except ValueError:
        reply = {}
    reason = error_sentence(reply) if isinstance(reply, dict) and reply else clean_text(text, 300)
    if response.status_code in (401, 403):
        return PipeError("wrong_key", address=target.address, reason=reason, code=response.status_code)
    return PipeError(
        "http_status",
        address=target.address,
        status=response.status_code,
        reason=reason or response.reason_phrase,
        code=response.status_code,
        retry=response.status_code in (502, 503, 504),
    )


async def _client(links: Links, target: Target) -> Any:
    if HTTPX_PROBLEM:
        raise PipeError("no_httpx", reason=HTTPX_PROBLEM)
    client = links.find(target)
    if client is None:
        # In a thread: it reads all certificate authorities, a tenth of a second in which nobody is served.
        made = await asyncio.to_thread(open_client, target)
        client = links.get(target, lambda _: made)
        if client is not made:
            await made.aclose()
    return client


def _pieces(event: Event) -> list[Event]:
    """A long text in parts, between which the server's other users have their turn."""
    if not isinstance(event, (Reasoning, Answer)):
        return [event]
    return [type(event)(event.text[at : at + 4096]) for at in range(0, len(event.text), 4096)]


async def http_events(links: Links, job: Job, payload: Json) -> AsyncGenerator[Event]:
    """One chat completion. However this generator is left, the response is closed, which stops the
    service.
    """
    target = job.target
    client = await _client(links, target)
    request = client.build_request(
        "POST",
        _chat_url(job),
        json=payload,
        headers=_http_headers(target),
        timeout=httpx.Timeout(None, connect=job.connect_timeout),
    )
    started = False
    reader = ReplyReader(target.address, opens_thought=job.opens_thought)
    try:
        response = await client.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise await _http_failure(response, target)
            if "json" in response.headers.get("content-type", ""):
                whole = (await response.aread()).decode("utf-8", "replace")
                for event in [*reader.read(whole), *reader.end()]:
                    for piece in _pieces(event):
                        yield piece
                        await asyncio.sleep(0)
                return
            decoder = SseDecoder()
            async for raw in response.aiter_bytes():
                for data in decoder.push(raw):
                    for event in reader.read(data):
                        started = True
                        yield event
            for data in decoder.flush():
                for event in reader.read(data):
                    yield event
            for event in reader.end():
                yield event
        finally:
            await response.aclose()
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        if "SSL" in str(error):
            raise other_protocol(target, str(error), 503) from error
        raise PipeError("unreachable", address=target.address, code=503) from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.RemoteProtocolError) and "illegal" in reason:
            raise other_protocol(target, reason, 502) from error
        raise PipeError(
            "broke_off", address=target.address, reason=reason, code=502, retry=not started
        ) from error


async def http_models(links: Links, target: Target, patience: float) -> list[tuple[str, str]]:
    """(id, shown name) of what the service lists."""
    client = await _client(links, target)
    try:
        response = await client.get(
            f"{target.url.rstrip('/')}/models", headers=_http_headers(target), timeout=patience
        )
        response.raise_for_status()
        listed = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise PipeError("unreachable", address=target.address, code=503) from error
    items = _dicts(listed.get("data") if isinstance(listed, dict) else listed)
    return [(str(item["id"]), str(item.get("name") or item["id"])) for item in items if item.get("id")]


# --- The page: events become what Open WebUI shows ----------------------------------------------------------


# Reasons for which a service breaks an answer off without calling it an error.
_ENDED_BY_SERVICE = ("content_filter", "sensitive", "insufficient_system_resource", "error")

# Seconds before a wait is worth a status.
STATUS_DELAY = 0.5


@dataclass(slots=True)
class PageOptions:
    """What the valves and the user say about the page."""

    language: Language
    show_thoughts: bool
    show_status: bool
    show_media: bool
    annotations: bool  # an API client reads annotations; a browser reads source events


class Page:
    """One answer on its way to one browser tab. Takes events, returns chunks, emits statuses and sources
    beside them.
    """

    def __init__(
        self, model: str, sources: SourceList, emitter: Emitter | None, options: PageOptions
    ) -> None:
        self._emitter = emitter
        self._options = options
        self._sources = sources
        self._thought = PageText(sources.resolve, media=options.show_media)
        self._answer = PageText(sources.resolve, media=options.show_media)
        self._frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._begun = time.monotonic()
        self._status_open = False
        self._status_time = 0.0
        self._status_share: float | None = None
        self._prompt_tokens = 0
        self._text_begun = False
        self._thought_begun: float | None = None
        self._next_in_line: asyncio.Task[None] | None = None
        self._search_status: Json | None = None
        self._annotations: list[Json] = []
        self._offers_tools = False
        self._kept_thought: str | None = None
        self._after_call = False
        self._usage: Json | None = None
        self._reason = "stop"
        self._ended = False

    def allow_markers(self) -> None:
        """Markers in this answer mean sources."""
        self._answer.active = True

    def offer_tools(self) -> None:
        """The model was given tools: its calls are passed on."""
        self._offers_tools = True

    def keep_thought(self, *, after_call: bool) -> None:
        """The model wants its thought back in later rounds if it calls a tool, or has called one already
        (`after_call`). Open WebUI forgets those of a Pipe's models, but hands `reasoning_details` back as it
        got them.
        """
        self._kept_thought = "" if self._options.show_thoughts else None
        self._after_call = after_call

    async def emit(self, kind: str, data: Json) -> None:
        if self._emitter is not None:
            await self._emitter({"type": kind, "data": data})

    async def status(self, key: str, *, done: bool = False, **values: object) -> None:
        """Shows one line over the answer."""
        if self._options.show_status:
            self._status_open = not done
            self._status_time = time.monotonic()
            await self.emit(
                "status", {"description": say(self._options.language, key, **values), "done": done}
            )

    async def searching(self, query: str) -> None:
        if self._options.show_status:
            self._status_open = True
            description = say(self._options.language, "searching")
            await self.emit(
                "status", {"action": "web_search", "description": description, "query": query, "done": False}
            )

    async def show_sources(
        self, sources: Sequence[Source], *, query: str = "", to_prompt: bool = False
    ) -> None:
        """Emits the sources that are new, and keeps the list for the search status."""
        for event in self._sources.add(sources, to_prompt=to_prompt):
            link = event["source"].get("url")
            if not self._options.annotations:
                await self.emit("source", event)
            elif link:
                cited = {"url": link, "title": event["source"]["name"]}
                self._annotations.append({"type": "url_citation", "url_citation": cited})
        self.allow_markers()
        items = [
            {"title": source.title or source.url, "link": source.url}
            for source in sources
            if is_public(source.url)
        ]
        if items:
            self._search_status = {
                "action": "web_search",
                "description": say(self._options.language, "searched").replace("{count}", "{{count}}"),
                "query": query,
                "items": items,
                "done": True,
            }

    async def take(self, event: Event) -> list[Json]:
        """The chunks for one event."""
        self._stop_timer()
        if isinstance(event, Answer):
            await self._begin_text()
            await self._end_hidden_thought()
            return self._thought_chunk(self._thought.flush()) + self._content(self._answer.push(event.text))
        if isinstance(event, Reasoning):
            await self._begin_text()
            if self._kept_thought is not None:
                self._kept_thought += event.text
            if self._options.show_thoughts:
                return self._thought_chunk(self._thought.push(event.text))
            if self._thought_begun is None:
                self._thought_begun = time.monotonic()
                await self.status("thinking")
        elif isinstance(event, ToolCall):
            if not self._offers_tools:
                return []
            await self._begin_text()
            await self._end_hidden_thought()
            delta = {"tool_calls": [_call_delta(event)], **self._thought_details()}
            return [*self._rest(), self._chunk(delta)]
        elif isinstance(event, Prefill):
            await self._show_prefill(event)
        elif isinstance(event, Queued):
            await self._show_queue(event)
        elif isinstance(event, Sources):
            self._answer.style = event.style
            await self.show_sources(event.items)
            if self._text_begun:
                await self._show_search()
        elif isinstance(event, Usage):
            self._usage = event.figures
        elif self._offers_tools or event.reason != "tool_calls":
            self._reason = event.reason
        return []

    async def end(self) -> list[Json]:
        """The last chunks of an answer that went well."""
        self._stop_timer()
        await self._begin_text()
        await self._end_hidden_thought()
        chunks = self._rest()
        details = self._thought_details() if self._after_call else {}
        last = self._chunk(details, finish_reason=self._reason)
        if self._usage is not None:
            last["usage"] = self._usage
        if self._reason == "length":
            await self.status("length", done=True)
        elif self._reason in _ENDED_BY_SERVICE:
            await self.status("ended", done=True, reason=self._reason)
        self._ended = True
        return [*chunks, last]

    async def fail(self, error: PipeError) -> list[Json]:
        """The last chunks of an answer that failed: what was held back, then the error. Open WebUI keeps
        the text.
        """
        chunks = self._rest()
        await self._close_status("failed")
        self._stop_timer()
        self._ended = True
        problem: Json = {"message": error.text(self._options.language)}
        if error.code is not None:
            problem["code"] = error.code
        return [*chunks, {"error": problem}]

    async def leave(self) -> None:
        """The reader stopped it: no status may shimmer on for ever."""
        self._stop_timer()
        if not self._ended:
            self._ended = True
            await self._close_status("stopped")

    async def _close_status(self, key: str) -> None:
        if self._status_open:
            await self.status(key, done=True)

    async def _show_queue(self, event: Queued) -> None:
        if event.position:
            await self.status("waiting", n=event.position)
        elif self._status_open:
            await self.status("next")
        else:
            # Every request is next in line for a moment; only a wait is worth a line.
            self._next_in_line = asyncio.create_task(self._show_next_in_line())

    async def _show_next_in_line(self) -> None:
        await asyncio.sleep(STATUS_DELAY)
        await self.status("next")

    def _stop_timer(self) -> None:
        if self._next_in_line is not None:
            self._next_in_line.cancel()
            self._next_in_line = None

    async def _show_prefill(self, event: Prefill) -> None:
        self._prompt_tokens = event.total
        share = event.done / event.total if event.total else 1.0
        now = time.monotonic()
        if self._status_share is None:
            # A prompt that is read at once is not worth a line.
            due = self._status_open or now - self._begun >= STATUS_DELAY
        else:
            # Every status is kept in the chat's history: a long prompt gets a few dozen, not one a second.
            waited = now - self._status_time
            due = waited >= 15 or (waited >= 1 and share - self._status_share >= 0.04)
        if share < 1 and due:
            self._status_share = share
            rate = f"{event.tokens_per_second:.1f}"
            await self.status("prefill", read=event.done, total=event.total, rate=rate)

    async def _begin_text(self) -> None:
        if self._text_begun:
            return
        self._text_begun = True
        if self._status_open:
            seconds = f"{time.monotonic() - self._begun:.1f}"
            key = "prefilled" if self._prompt_tokens else "started"
            await self.status(key, done=True, total=self._prompt_tokens, seconds=seconds)
        await self._show_search()

    async def _show_search(self) -> None:
        if self._search_status is not None and self._options.show_status:
            await self.emit("status", self._search_status)
        self._search_status = None

    async def _end_hidden_thought(self) -> None:
        if self._thought_begun is not None:
            seconds = f"{time.monotonic() - self._thought_begun:.1f}"
            self._thought_begun = None
            await self.status("thought", done=True, seconds=seconds)

    def _rest(self) -> list[Json]:
        """The chunks of what was held back."""
        return self._thought_chunk(self._thought.flush()) + self._content(self._answer.flush())

    def _thought_details(self) -> Json:
        """The whole thought, once, for `keep_thought`."""
        text, self._kept_thought = self._kept_thought, None
        return {"reasoning_details": [{"type": "reasoning.text", "text": text}]} if text else {}

    def _thought_chunk(self, text: str) -> list[Json]:
        return [self._chunk({"reasoning_content": text})] if text else []

    def _content(self, text: str) -> list[Json]:
        if not text:
            return []
        delta: Json = {"content": text}
        if self._annotations:
            delta["annotations"], self._annotations = self._annotations, []
        return [self._chunk(delta)]

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        return {**self._frame, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def _call_delta(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


async def as_completion(chunks: AsyncIterator[Json], model: str) -> Json:
    """The chunks as one chat.completion, for callers that do not stream; an error object as it is."""
    message: Json = {"role": "assistant", "content": ""}
    result: Json = {"id": "", "object": "chat.completion", "created": int(time.time()), "model": model}
    reason = "stop"
    async for chunk in chunks:
        if "error" in chunk:
            return chunk
        result["id"] = chunk["id"]
        choice = chunk["choices"][0]
        for name, value in choice["delta"].items():
            message[name] = message[name] + value if name in message else value
        reason = choice["finish_reason"] or reason
        if "usage" in chunk:
            result["usage"] = chunk["usage"]
    return result | {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


# --- Background tasks: titles and the like, never in the way of an answer -----------------------------------

TASK_TOKENS = {"title_generation": 64, "autocomplete_generation": 48, "emoji_generation": 8}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|[。！？\n]")


def rule_title(question: str) -> str:
    """A title from the first question: its first sentence, shortened at a word."""
    question = question[:20_000]  # it may hold a whole book
    text = re.sub(r"```.*?(```|\Z)", " ", question, flags=re.DOTALL)
    text = clean_text(_SENTENCE_END.split(text.strip(), maxsplit=1)[0], 400)
    text = text or clean_text(question, 400)
    limit = 24 if _HAN.search(text) else 48
    if len(text) > limit:
        cut = text[:limit]
        text = (cut if _HAN.search(cut) else cut.rpartition(" ")[0] or cut).rstrip(" ,;:，；：、") + "…"
    return text


def rule_reply(task: str, task_body: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """The answer to a background task without asking any model."""
    messages = task_body.get("messages") or body.get("messages") or []
    first = next((parts_text(m.get("content")) for m in messages if m.get("role") == "user"), "")
    replies: dict[str, Any] = {
        "title_generation": {"title": rule_title(first)},
        "tags_generation": {"tags": []},
        "follow_up_generation": {"follow_ups": []},
        "query_generation": {"queries": [clean_text(last_question(messages), 200)]},
        "image_prompt_generation": {"prompt": clean_text(last_question(messages), 500)},
        "autocomplete_generation": {"text": ""},
        "function_calling": {"tool_calls": []},
    }
    return json.dumps(replies[task], ensure_ascii=False) if task in replies else ""


# --- Settings -----------------------------------------------------------------------------------------------


def _from_environment(name: str, default: str) -> Callable[[], str]:
    return lambda: os.environ.get(name, default)


def _secret() -> Json:
    return {"input": {"type": "password"}}


def parse_targets(valves: Any) -> list[Target]:
    """The upstreams that the valves name. Raises PipeError for an address that is none."""
    urls = [url.strip() for url in re.split(r"[;\n]", valves.BASE_URL) if url.strip()]
    keys = [key.strip() for key in re.split(r"[;\n]", valves.API_KEY)]
    lists = [models.strip() for models in re.split(r"[;\n]", valves.MODELS)]
    certificates = (
        valves.TLS_CA_FILE.strip(),
        valves.TLS_CERTIFICATE_FILE.strip(),
        valves.TLS_KEY_FILE.strip(),
    )
    targets = []
    for index, url in enumerate(urls):
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("grpc", "grpcs", "http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise PipeError("bad_url", url=url, code="invalid_settings")
        # One key for all, or one each; the same for the model lists.
        key = keys[index] if index < len(keys) else keys[0] if len(keys) == 1 else ""
        if not re.fullmatch("[!-~]*", key):
            raise PipeError("bad_key", code="invalid_settings")
        models = []
        for item in (lists[index] if index < len(lists) else "").replace("，", ",").split(","):
            name, _, shown = item.partition("=")
            if name.strip():
                models.append((name.strip(), shown.strip() or name.strip()))
        targets.append(Target(url, key, tuple(models), certificates))
    if not targets:
        raise PipeError("bad_url", url=valves.BASE_URL, code="invalid_settings")
    return targets


def pick_language(choice: str, metadata: Mapping[str, Any]) -> Language:
    """The user's language: their own setting, else that of the page they use."""
    if choice == "中文":
        return "zh"
    if choice == "English":
        return "en"
    return (
        "zh"
        if str((metadata.get("variables") or {}).get("{{USER_LANGUAGE}}", "")).lower().startswith("zh")
        else "en"
    )


# --- The function that Open WebUI calls ---------------------------------------------------------------------

# The id of the one entry shown while a server does not answer; asking it means: whatever model is loaded.
ANY_MODEL = "any"
LIST_TIMEOUT = 0.4
LIST_AGE = 15.0
LIST_AGE_AFTER_FAILURE = 3.0
SEARCH_TIMEOUT = 30.0
FAST_TASK_TIMEOUT = 30.0


class Pipe:
    """One instance serves all users at once: what belongs to one question never lives on it."""

    class Valves(BaseModel):
        BASE_URL: str = Field(
            default_factory=_from_environment("KTD_BASE_URL", "grpc://127.0.0.1:50051"),
            title="BASE_URL",
            description="Address of the ktd daemon (`grpc://host:port`, `grpcs://…` with TLS) or of any "
            "OpenAI-compatible service (`https://host/v1`); several are separated by `;`. "
            "ktd 守护进程或任何 OpenAI 兼容服务的地址；多个地址用 `;` 分隔。",
        )
        API_KEY: str = Field(
            default_factory=_from_environment("KTD_API_KEY", ""),
            title="API_KEY",
            description="Key of the service; several in the order of BASE_URL, separated by `;`. "
            "服务的密钥；多个密钥按 BASE_URL 的顺序用 `;` 分隔。",
            json_schema_extra=_secret(),
        )
        MODELS: str = Field(
            default_factory=_from_environment("KTD_MODELS", ""),
            title="MODELS",
            description="Models to offer: `id` or `id=Shown name`, separated by commas (services by `;`). "
            "Empty: ask "
            "the server. 要提供的模型：`id` 或 `id=显示名称`，用逗号分隔（不同服务用 `;`）。"
            "留空则询问服务器。",
        )
        TLS_CA_FILE: str = Field(
            default="",
            title="TLS: CA file",
            description="PEM file with the authority of a private certificate. 私有证书的 CA 文件（PEM）。",
        )
        TLS_CERTIFICATE_FILE: str = Field(
            default="", title="TLS: client certificate", description="PEM file. 客户端证书（PEM 文件）。"
        )
        TLS_KEY_FILE: str = Field(
            default="", title="TLS: client key", description="PEM file. 客户端私钥（PEM 文件）。"
        )
        CONNECT_TIMEOUT: float = Field(
            default=5.0,
            gt=0,
            le=120,
            title="Connect time-out / 连接超时",
            description="Seconds until an unreachable server counts as down. "
            "多少秒连不上即视为服务器不可用。",
        )
        FIRST_EVENT_TIMEOUT: float = Field(
            default=900.0,
            ge=0,
            title="First event time-out / 首个事件超时",
            description="Seconds to wait in the queue without a word; 0 = for ever. 排队时最长静默秒数；0 "
            "表示不限。",
        )
        IDLE_TIMEOUT: float = Field(
            default=300.0,
            ge=0,
            title="Idle time-out / 空闲超时",
            description="Seconds without a word in mid-answer; 0 = for ever. 回答过程中最长静默秒数；0 "
            "表示不限。",
        )
        SHOW_THOUGHTS: bool = Field(
            default=True,
            title="Show thoughts / 显示思考",
            description="Show the thought above the answer. 显示思考过程。",
        )
        THINKING: Literal["model", "on", "off"] = Field(
            default="model",
            title="Thinking / 思考模式",
            description="Let the model decide, force a thought, or ask for an answer without one. "
            "由模型决定、强制思考或不思考。",
        )
        OPENS_THOUGHT: bool = Field(
            default=False,
            title="Missing <think> / 缺失 <think>",
            description="For http services whose template opens the thought itself, so that only "
            "`</think>` arrives. "
            "用于模板已自行写入 `<think>`、输出中只有 `</think>` 的 http 服务。",
        )
        SHOW_STATUS: bool = Field(
            default=True,
            title="Show status / 显示状态",
            description="Queue, prompt progress and searches above the answer. 在回答上方显示排队、"
            "读取进度和搜索。",
        )
        SEARCH: Literal["switch", "off"] = Field(
            default="switch",
            title="Web search / 联网搜索",
            description="`switch`: search through Open WebUI when the user has switched web search on. "
            "`switch`：用户打开联网搜索时通过 Open WebUI 搜索。",
        )
        SEARCH_RESULTS: int = Field(
            default=5,
            ge=1,
            le=20,
            title="Search results / 结果数",
            description="Results per search. 每次搜索的结果数。",
        )
        SEARCH_CHARS: int = Field(
            default=2000,
            ge=50,
            le=20000,
            title="Search text / 结果长度",
            description="Characters of each result that the model reads. 模型读取每条结果的字符数。",
        )
        TOOLS: Literal["off", "on"] = Field(
            default="off",
            title="Tools / 工具",
            description="`on`: the model is told of Open WebUI's tools (some thousand tokens) and may call "
            "them. `on`：将 Open WebUI 的工具告知模型（数千 token），模型可以调用。",
        )
        TOOL_ROUNDS: int = Field(
            default=8,
            ge=1,
            le=50,
            title="Tool rounds / 工具轮数",
            description="Rounds of tool calls for one question; then the model must answer. "
            "每个问题最多调用工具的轮数，之后模型必须作答。",
        )
        MEDIA: Literal["link", "show"] = Field(
            default="link",
            title="Images in answers / 回答中的图片",
            description="`link`: images become links and embedded media text, because the browser would "
            "fetch them from any host. `show`: as the model wrote them. "
            "`link`：图片变为链接、嵌入媒体变为文字，因为浏览器会从任意主机加载它们；`show`：按模型原样显示。",
        )
        TASKS: Literal["rule", "fast", "off"] = Field(
            default="rule",
            title="Titles and other tasks / 标题等任务",
            description="`rule`: no model call; `fast`: the model, without thoughts and with low "
            "priority; `off`: none. "
            "`rule`：不调用模型；`fast`：低优先级、不思考；`off`：关闭。",
        )
        TEMPERATURE: float | None = Field(
            default=None,
            ge=0,
            le=5,
            title="Temperature / 温度",
            description="Overrides the chat's. Empty: the chat's, else the server's (0.6). 覆盖对话设置；"
            "留空则不覆盖。",
        )
        MAX_TOKENS: int | None = Field(
            default=None,
            ge=1,
            title="Max tokens / 最大 token 数",
            description="Overrides the chat's; thought and answer together. 覆盖对话设置；思考与回答合计。",
        )

        @field_validator("TEMPERATURE", "MAX_TOKENS", mode="before")
        @classmethod
        def _empty_is_unset(cls, value: object) -> object:
            return None if value == "" else value

    class UserValves(BaseModel):
        THOUGHTS: Literal["default", "show", "hide"] = Field(
            default="default",
            title="Thoughts / 思考内容",
            description="Show or hide the thought. 显示或隐藏思考内容。",
        )
        THINKING: Literal["default", "on", "off"] = Field(
            default="default",
            title="Thinking / 思考模式",
            description="Think before answering. 回答前是否思考。",
        )
        THINKING_BUDGET: int = Field(
            default=0,
            ge=0,
            title="Thinking budget / 思考预算",
            description="Tokens of thought, then the answer must come; 0 = no limit (http services: sent as "
            "`thinking_budget`). 思考的 token 数上限，到达后必须作答；0 表示不限"
            "（http 服务：作为 `thinking_budget` 发送）。",
        )
        LANGUAGE: Literal["auto", "English", "中文"] = Field(
            default="auto",
            title="Language / 语言",
            description="Language of statuses and errors. 状态与错误的语言。",
        )

    def __init__(self) -> None:
        self.valves = self.Valves()
        self._links = Links()
        # Model lists by target: when asked, how long it holds, the list.
        self._lists: dict[Target, tuple[float, float, list[tuple[str, str]]]] = {}

    async def pipes(self) -> list[dict[str, str]]:
        """The models, from the valves or within half a second from the servers."""
        try:
            targets = parse_targets(self.valves)
        except PipeError as error:
            return [{"id": ANY_MODEL, "name": f"ktd: {error.text('en')}"}]
        lists = await asyncio.gather(*(self._models(target) for target in targets))
        entries = []
        for position, models in enumerate(lists):
            # The first service's models keep their names; those of the others say which service they
            # belong to.
            prefix = f"{position + 1}/" if position else ""
            entries += [{"id": prefix + model, "name": shown} for model, shown in models]
        return entries

    async def _models(self, target: Target) -> list[tuple[str, str]]:
        if target.models:
            return list(target.models)
        now = time.monotonic()
        asked, holds, models = self._lists.get(target, (0.0, -1.0, []))
        if now - asked <= holds:
            return models
        ask = grpc_models if target.speaks_grpc else http_models
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                models, holds = await ask(self._links, target, LIST_TIMEOUT), LIST_AGE
        except (PipeError, TimeoutError, OSError) as error:
            log.info("no model list from %s: %s", target.address, error)
            holds = LIST_AGE_AFTER_FAILURE
        if not models:
            models = [(ANY_MODEL, say("en", "unreachable_name", address=target.address))]
        self._lists[target] = (now, holds, models)
        return models

    async def pipe(
        self,
        body: Json,
        __user__: Json | None = None,
        __metadata__: Json | None = None,
        __event_emitter__: Emitter | None = None,
        __task__: str | None = None,
        __task_body__: Json | None = None,
        __tools__: Json | None = None,
    ) -> AsyncIterator[Json] | Json:
        """Answers one request: an async generator of chunks when it streams, else a chat.completion."""
        valves, metadata = self.valves, __metadata__ or {}
        model = str(body.get("model") or "")
        user = str((__user__ or {}).get("id") or "")
        task = str(__task__ or "")
        if task and task != "moa_response_generation":
            text = await self._task(body, task, __task_body__ or {}, valves, user)
            return await as_completion(_one_chunk(text), model)
        own = (__user__ or {}).get("valves") or self.UserValves()
        answer = self._answer(body, valves, own, user, metadata, __event_emitter__, __tools__ or {})
        return answer if body.get("stream") else await as_completion(answer, model)

    async def _answer(
        self,
        body: Json,
        valves: Valves,
        own: Any,
        user: str,
        metadata: Json,
        emitter: Emitter | None,
        tools: Json,
    ) -> AsyncIterator[Json]:
        language = pick_language(own.LANGUAGE, metadata)
        show = {"show": True, "hide": False}.get(own.THOUGHTS, valves.SHOW_THOUGHTS)
        options = PageOptions(
            language,
            show,
            valves.SHOW_STATUS,
            valves.MEDIA == "show",
            annotations=not metadata.get("chat_id"),
        )
        sources = SourceList(metadata.get("sources") or [])
        page = Page(str(body.get("model") or ""), sources, emitter, options)
        try:
            target, model = self._resolve(body, valves)
            offered = read_tools(body, valves.TOOL_ROUNDS) if valves.TOOLS == "on" else ()
            messages = read_messages(body, text_only=target.speaks_grpc, tools=bool(offered))
            called = bool(tool_rounds(messages))
            if offered:
                page.offer_tools()
            if wants_thoughts_back(target, model) and (offered or called):
                page.keep_thought(after_call=called)
            wanted = valves.SEARCH == "switch" and (metadata.get("features") or {}).get("web_search")
            if wanted and not offered and not called:
                await self._search(last_question(messages), tools, valves, page)
            if len(sources):
                put_sources_into(messages, sources, metadata, language)
                page.allow_markers()
            if messages[-1]["role"] == "tool" or not (len(sources) or target.speaks_grpc):
                # Those of a tool are known to Open WebUI alone; a service names its own later.
                sources.expect_late()
                page.allow_markers()
            thinking = read_thinking(body, own.THINKING, valves.THINKING)
            job = replace(self._job(body, valves, target, model, messages, thinking, user), tools=offered)
            if target.speaks_grpc:
                upstream = self._within_budget(job, own.THINKING_BUDGET, valves, language)
            else:
                payload = http_payload(job, body)
                if own.THINKING_BUDGET:
                    payload["thinking_budget"] = own.THINKING_BUDGET
                upstream = self._events(job, payload, valves)
            async with contextlib.aclosing(upstream) as events:
                async for event in events:
                    for chunk in await page.take(event):
                        yield chunk
            for chunk in await page.end():
                yield chunk
        except PipeError as error:
            for chunk in await page.fail(error):
                yield chunk
        except Exception as error:
            # The last stop before Open WebUI, which would lose the text of an answer that ends in an
            # exception.
            log.exception("the ktd function failed")
            for chunk in await page.fail(
                PipeError("bug", reason=f"{type(error).__name__}: {error}", code=500)
            ):
                yield chunk
        finally:
            await page.leave()

    def _resolve(self, body: Mapping[str, Any], valves: Valves) -> tuple[Target, str]:
        """The upstream and the model's name there."""
        targets = parse_targets(valves)
        name = str(body.get("model") or "").partition(".")[2]
        number, slash, rest = name.partition("/")
        position = 0
        if slash and number.isdecimal() and 2 <= int(number) <= len(targets):
            position, name = int(number) - 1, rest
        return targets[position], "" if name == ANY_MODEL else name

    def _job(
        self,
        body: Mapping[str, Any],
        valves: Valves,
        target: Target,
        model: str,
        messages: Sequence[Json],
        thinking: bool | None,
        user: str,
    ) -> Job:
        options = read_options(body)
        if valves.TEMPERATURE is not None:
            options["temperature"] = valves.TEMPERATURE
        if valves.MAX_TOKENS is not None:
            options["max_tokens"] = valves.MAX_TOKENS
        return Job(
            target=target,
            model=model,
            messages=tuple(messages),
            options=options,
            thinking=thinking,
            low_priority=False,
            opens_thought=valves.OPENS_THOUGHT,
            connect_timeout=valves.CONNECT_TIMEOUT,
            user=user,
        )

    async def _events(self, job: Job, payload: Json | None, valves: Valves) -> AsyncGenerator[Event]:
        """The upstream's events; a failure before the first of them is tried once more."""
        for last_try in (False, True):
            upstream = (
                grpc_events(self._links, job) if payload is None else http_events(self._links, job, payload)
            )
            started = False
            try:
                async with contextlib.aclosing(upstream):
                    pace = paced(
                        upstream, valves.FIRST_EVENT_TIMEOUT, valves.IDLE_TIMEOUT, job.target.address
                    )
                    async with contextlib.aclosing(pace):
                        async for event in pace:
                            started = True
                            yield event
                return
            except PipeError as error:
                if started or last_try or not error.retry:
                    raise

    async def _within_budget(
        self, job: Job, budget: int, valves: Valves, language: Language
    ) -> AsyncGenerator[Event]:
        """The daemon's events. A thought of more than `budget` tokens is ended, and the model goes on from
        there with its answer; 0 = no budget.
        """
        prompt, thought, tokens, begun = 0, "", 0, 0.0
        async with contextlib.aclosing(self._events(job, None, valves)) as events:
            async for event in events:
                yield event
                if isinstance(event, Prefill):
                    prompt, begun = event.total, time.monotonic()
                elif isinstance(event, Reasoning):
                    thought, tokens = thought + event.text, tokens + 1  # the daemon sends them one by one
                    if tokens == budget and not job.continues:
                        break
            else:
                return
        end = say(language, "thought_enough")
        yield Reasoning(end)
        opening: Json = {"role": "assistant", "content": f"<think>\n{thought}{end}\n</think>\n\n"}
        options = dict(job.options)
        if "max_tokens" in options:
            options["max_tokens"] = max(1, options["max_tokens"] - tokens)
        job = replace(job, messages=(*job.messages, opening), options=options, thinking=None)
        paused = time.monotonic()
        async with contextlib.aclosing(self._events(job, None, valves)) as events:
            async for event in events:
                if isinstance(event, Usage):
                    yield Usage(with_thought(event.figures, prompt, tokens, paused - begun))
                elif not isinstance(event, (Queued, Prefill)):
                    yield event

    async def _search(self, query: str, tools: Json, valves: Valves, page: Page) -> None:
        """Searches with Open WebUI's own tool: with native function calling nothing else does."""
        search = (tools.get("search_web") or {}).get("callable")
        query = clean_text(query, 300)
        if search is None or not query:
            return
        await page.searching(query)
        try:
            async with asyncio.timeout(SEARCH_TIMEOUT):
                found = json.loads(await search(query=query, count=valves.SEARCH_RESULTS))
        except Exception as error:
            # Whatever a search engine raises, the question can be answered without it.
            log.warning("web search failed", exc_info=True)
            await page.status(
                "search_failed", done=True, reason=clean_text(str(error), 200) or type(error).__name__
            )
            return
        if isinstance(found, dict):
            reason = clean_text(found.get("error"), 200) or "no results"
            await page.status("search_failed", done=True, reason=reason)
            return
        sources = []
        for item in _dicts(found)[: valves.SEARCH_RESULTS]:
            text = item.get("snippet")
            sources.append(clean_source(item.get("title"), item.get("link"), text, valves.SEARCH_CHARS))
            await asyncio.sleep(0)  # whole pages may come, and others wait
        await page.show_sources(sources, query=query, to_prompt=True)

    async def _task(self, body: Json, task: str, task_body: Json, valves: Valves, user: str) -> str:
        """The text for a background task."""
        if valves.TASKS == "off":
            return ""
        if valves.TASKS == "fast":
            try:
                async with asyncio.timeout(FAST_TASK_TIMEOUT):
                    text = await self._ask_fast(body, task, valves, user)
                if "{" in text or task == "emoji_generation":
                    return text
            except (PipeError, TimeoutError) as error:
                log.info("task %s answered by rule: %s", task, error)
        return rule_reply(task, task_body, body)

    async def _ask_fast(self, body: Json, task: str, valves: Valves, user: str) -> str:
        target, model = self._resolve(body, valves)
        most = {"max_tokens": TASK_TOKENS.get(task, 256)}
        job = Job(
            target=target,
            model=model,
            messages=tuple(read_messages(body, text_only=target.speaks_grpc)),
            options=most,
            thinking=False,
            low_priority=True,
            opens_thought=False,
            connect_timeout=valves.CONNECT_TIMEOUT,
            user=user,
        )
        payload = None if target.speaks_grpc else http_payload(job, most)
        text = ""
        async with contextlib.aclosing(self._events(job, payload, valves)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    text += event.text
        return text


async def _one_chunk(text: str) -> AsyncIterator[Json]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    yield {"id": f"chatcmpl-{uuid.uuid4().hex}", "choices": [choice]}
