"""Streams in the shapes that OpenAI-compatible services send, field for field, and the page each must give.

The shapes are those of the vendors' own client libraries and documentation; the texts are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Chunk = dict[str, Any]

CREATED = 1_740_000_000
WEB = [
    {"title": "One", "url": "https://one.example/a", "text": "first"},
    {"title": "Two", "url": "https://two.example/b", "text": "second"},
]
LINKS = [item["url"] for item in WEB]
USAGE = {"prompt_tokens": 9, "completion_tokens": 20, "total_tokens": 29}


@dataclass(frozen=True)
class Recorded:
    """What a service sends for one question, and what the page must show."""

    stream: bytes
    thought: str
    text: str
    titles: Sequence[str] = ()
    usage: Mapping[str, Any] = field(default_factory=lambda: USAGE)  # at least these figures


def sse(*chunks: Chunk | str, end: str = "\n\n", before: str = "", done: bool = True) -> bytes:
    """Chunks as server-sent events; a chunk that is a str goes out as it is, with its own line ends."""
    texts = [
        chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk, ensure_ascii=False)}{end}"
        for chunk in chunks
    ]
    return (before + "".join(texts) + (f"data: [DONE]{end}" if done else "")).encode()


def _chunk(delta: Chunk, finish: str | None, choice: Chunk, top: Chunk) -> Chunk:
    return {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}],
        **top,
    }


def deepseek() -> Recorded:
    """api.deepseek.com, deepseek-reasoner: comments while it waits, null for whichever text is not meant."""
    usage = {
        **USAGE,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 12},
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": 9,
    }

    def chunk(finish: str | None = None, usage: Chunk | None = None, **delta: Any) -> Chunk:
        top = {"model": "deepseek-reasoner", "system_fingerprint": "fp_5417b77867_prod", "usage": usage}
        return _chunk(delta, finish, {"logprobs": None}, top)

    stream = sse(
        chunk(role="assistant", content=None, reasoning_content=""),
        ": keep-alive\n\n",
        chunk(content=None, reasoning_content="Hm, "),
        chunk(content=None, reasoning_content="well 🐟.\n"),
        chunk(content="\n\nYes", reasoning_content=None),
        chunk(content=" 是的", reasoning_content=None),
        chunk(content=".", reasoning_content=None),
        chunk("stop", usage, content="", reasoning_content=None),
        before=": keep-alive\n\n: keep-alive\n\n",
    )
    return Recorded(stream, "Hm, well 🐟.\n", "Yes 是的.", usage=usage)


def ark_model() -> Recorded:
    """Volcengine Ark, a model: the usage comes in a chunk of its own, without choices."""

    def chunk(finish: str | None = None, **delta: Any) -> Chunk:
        top = {"model": "deepseek-r1-250120", "service_tier": "default", "usage": None}
        return _chunk({"role": "assistant", **delta}, finish, {}, top)

    last = chunk() | {"choices": [], "usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": 0}}}
    stream = sse(
        chunk(content="", reasoning_content="想一想"),
        chunk(content="好"),
        chunk(content=""),
        chunk("stop", content="的"),
        last,
    )
    return Recorded(stream, "想一想", "好的")


def ark_bot() -> Recorded:
    """Volcengine Ark, a bot that searches: `references` in the first chunk, null or empty later; 摘要N."""
    references = [
        {
            "url": item["url"],
            "logo_url": "https://logo.example/x.png",
            "mobile_url": item["url"],
            "site_name": "Site",
            "title": item["title"],
            "summary": item["text"],
            "publish_time": "2025年02月20日 10:00:00(CST)",
            "cover_image": {"url": "https://img.example/x.png", "width": 1, "height": 1},
            "extra": {"rel_info": "x"},
        }
        for item in WEB
    ]

    # One model looks at the question, another answers it.
    parts = [{"name": "m", **dict.fromkeys(USAGE, 4)}, {"name": "m", **{k: n - 4 for k, n in USAGE.items()}}]

    def chunk(finish: str | None = None, references: Any = None, **delta: Any) -> Chunk:
        top = {
            "model": "deepseek-r1-250120",
            "metadata": {},
            "references": references,
            "bot_usage": {"model_usage": [parts[0], parts[1]], "action_usage": None} if finish else None,
            "usage": None,
        }
        return _chunk({"role": "assistant", **delta}, finish, {}, top)

    stream = sse(
        chunk(references=references, content=""),
        chunk(content="", reasoning_content="想"),
        chunk(content="据摘要1、"),
        chunk(content="2报道。"),
        chunk("stop", references=[], content="完"),
    )
    return Recorded(stream, "想", "据[1][2]报道。完", ["One", "Two"])


def perplexity() -> Recorded:
    """Perplexity, sonar-reasoning: tags in the text, lists and usage on every chunk, CRLF, no [DONE]."""
    results = [
        {
            "title": item["title"],
            "url": item["url"],
            "date": "2025-02-20",
            "last_updated": "2025-03-01",
            "snippet": item["text"],
            "source": "web",
        }
        for item in WEB
    ]

    def chunk(content: str, finish: str | None = None) -> Chunk:
        delta = {"role": "assistant", "content": content}
        top = {
            "model": "sonar-reasoning",
            "usage": {**USAGE, "search_context_size": "low", "cost": {"total_cost": 0.006}},
            "citations": LINKS,
            "search_results": results,
            "images": None,
            "related_questions": None,
            "type": "message",
            "status": "COMPLETED" if finish else "PENDING",
        }
        message = {"role": "assistant", "content": "<think>\nlook</think>\nIt is so[1][2] [9]."}
        return _chunk(delta, finish, {"message": message}, top)

    stream = sse(
        chunk("<think>\nlook</th"),
        chunk("ink>\nIt is"),
        chunk(" so[1"),
        chunk("][2] [9]."),
        chunk("", "stop"),
        end="\r\n\r\n",
        done=False,
    )
    return Recorded(stream, "look", "It is so[1][2] .", ["One", "Two"])


def perplexity_without_details() -> Recorded:
    """Perplexity's older form: addresses only."""
    top = {"model": "sonar", "citations": LINKS, "search_results": None, "usage": USAGE}
    stream = sse(_chunk({"role": "assistant", "content": "So[2]."}, "stop", {}, top))
    return Recorded(stream, "", "So[2].", ["one.example", "two.example"])


def siliconflow() -> Recorded:
    """SiliconFlow: a delta with the search's results, usage in every chunk."""
    results = [{"title": item["title"], "url": item["url"], "snippet": item["text"]} for item in WEB]

    def chunk(finish: str | None = None, **delta: Any) -> Chunk:
        top = {
            "model": "Pro/deepseek-ai/DeepSeek-R1",
            "system_fingerprint": "",
            "usage": USAGE if finish else {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        }
        return _chunk({"role": "assistant", **delta}, finish, {"content_filter_results": {}}, top)

    stream = sse(
        chunk(type="search_result", search_results=results),
        chunk(content=None, reasoning_content="x"),
        chunk(content="See [citation:2]", reasoning_content=None),
        chunk(content="[citation:1].", reasoning_content=None),
        chunk("stop", content="", reasoning_content=None),
    )
    return Recorded(stream, "x", "See [2][1].", ["One", "Two"])


def vllm(name: str) -> Recorded:
    """vLLM with a reasoning parser; the field was renamed from reasoning_content to reasoning."""

    def chunk(finish: str | None = None, **delta: Any) -> Chunk:
        choice = {"logprobs": None, "stop_reason": None, "token_ids": None}
        return _chunk(delta, finish, choice, {"model": "deepseek-ai/DeepSeek-R1"})

    last = chunk() | {"choices": [], "usage": {**USAGE, "prompt_tokens_details": None}}
    stream = sse(
        chunk(role="assistant", content=""),
        chunk(**{name: "a"}),
        chunk(**{name: "b"}),
        chunk(content="\n\nc"),
        chunk("stop", content=""),
        last,
    )
    return Recorded(stream, "ab", "c")


def vllm_without_parser() -> Recorded:
    """vLLM as it starts without --reasoning-parser: the tags are text."""

    def chunk(content: str, finish: str | None = None) -> Chunk:
        return _chunk({"content": content}, finish, {"logprobs": None}, {"model": "r1"})

    last = chunk("") | {"choices": [], "usage": USAGE}
    stream = sse(
        chunk("<thi"), chunk("nk>\nI `</think>` on\n</th"), chunk("ink>\n\nDone <think>.", "stop"), last
    )
    return Recorded(stream, "I `</think>` on", "Done <think>.")


def llama_server() -> Recorded:
    """llama.cpp's llama-server: progress when asked for, its own speeds in `timings`, usage apart."""
    timings = {
        "cache_n": 0,
        "prompt_n": 9,
        "prompt_ms": 178.2,
        "prompt_per_token_ms": 19.8,
        "prompt_per_second": 50.5,
        "predicted_n": 20,
        "predicted_ms": 2758.6,
        "predicted_per_token_ms": 137.9,
        "predicted_per_second": 7.25,
    }

    def chunk(finish: str | None = None, **delta: Any) -> Chunk:
        return _chunk(delta, finish, {}, {"model": "r1", "system_fingerprint": "b6500-abc"})

    stream = sse(
        chunk(role="assistant", content=None)
        | {"prompt_progress": {"total": 9, "cache": 1, "processed": 5, "time_ms": 80}},
        chunk(role="assistant", content=None)
        | {"prompt_progress": {"total": 9, "cache": 1, "processed": 9, "time_ms": 160}},
        chunk(reasoning_content="a"),
        chunk(content="one\u2028two"),
        chunk("stop"),
        chunk() | {"choices": [], "usage": USAGE, "timings": timings},
    )
    rates = {"prompt_tokens_per_second": 50.5, "completion_tokens_per_second": 7.25}
    return Recorded(stream, "a", "one\u2028two", usage=USAGE | rates)


def ollama() -> Recorded:
    """Ollama's OpenAI door: thoughts in `reasoning`, content empty beside them."""

    def chunk(finish: str | None = None, **delta: Any) -> Chunk:
        top = {"model": "deepseek-r1:671b", "system_fingerprint": "fp_ollama"}
        return _chunk({"role": "assistant", "content": "", **delta}, finish, {}, top)

    last = chunk() | {"choices": [], "usage": USAGE}
    stream = sse(chunk(reasoning="a"), chunk(reasoning="b"), chunk(content="c"), chunk("stop"), last)
    return Recorded(stream, "ab", "c")


def openrouter() -> Recorded:
    """OpenRouter: comments while it waits, the thought twice, or in `reasoning_details` alone."""

    def chunk(finish: str | None = None, usage: Chunk | None = None, **delta: Any) -> Chunk:
        top = {"provider": "DeepInfra", "model": "deepseek/deepseek-r1", "usage": usage}
        choice = {"native_finish_reason": finish, "logprobs": None}
        return _chunk({"role": "assistant", "content": "", **delta}, finish, choice, top)

    def details(text: str) -> list[Chunk]:
        return [{"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}]

    cited = {"type": "url_citation", "url_citation": {"title": "One", "url": LINKS[0], "content": "first"}}
    stream = sse(
        ": OPENROUTER PROCESSING\n\n",
        chunk(reasoning="a", reasoning_details=details("a")),
        ": OPENROUTER PROCESSING\n\n",
        chunk(reasoning=None, reasoning_details=details("b")),
        chunk(reasoning=None, reasoning_details=[{"type": "reasoning.encrypted", "data": "x", "index": 1}]),
        chunk(content="c [1]", annotations=[cited]),
        chunk("stop", content=""),
        chunk(None, USAGE),
    )
    return Recorded(stream, "ab", "c [1]", ["One"])


def openai_annotations() -> Recorded:
    """OpenAI's search models, and gateways that follow them: one annotation at a time."""

    def note(item: Chunk, start: int) -> Chunk:
        cited = {"title": item["title"], "url": item["url"], "start_index": start, "end_index": start + 3}
        return {"type": "url_citation", "url_citation": cited}

    def chunk(content: str, finish: str | None = None, **delta: Any) -> Chunk:
        top = {"model": "gpt-search", "usage": USAGE if finish else None, "obfuscation": "x"}
        return _chunk({"content": content, "refusal": None, **delta}, finish, {"logprobs": None}, top)

    stream = sse(
        chunk("So [1]", annotations=[note(WEB[0], 3)]),
        chunk(" [2].", annotations=[note(WEB[1], 7)]),
        chunk("", "stop"),
    )
    return Recorded(stream, "", "So [1] [2].", ["One", "Two"])


def sources_last() -> Recorded:
    """Cloudsway: the list comes with the last chunk, after the text that cites it."""
    found = [{"name": item["title"], "url": item["url"], "snippet": item["text"]} for item in WEB]
    stream = sse(
        _chunk({"content": "See [citation:2]."}, None, {}, {}),
        _chunk({"content": None}, "stop", {}, {"reference": found, "usage": USAGE}),
    )
    return Recorded(stream, "", "See [2].", ["One", "Two"])


def loose_framing() -> Recorded:
    """What proxies make of it: event and id lines, no space after the colon, one line end per event."""
    chunks = [
        _chunk({"content": "a"}, None, {}, {}),
        _chunk({"content": "b"}, "stop", {}, {"usage": USAGE}),
    ]
    lines = [f"event: message\nid: {n}\ndata:{json.dumps(chunk)}\n" for n, chunk in enumerate(chunks)]
    return Recorded(sse(*lines, before=": ping\n\n", end="\n"), "", "ab")


VENDORS: dict[str, Recorded] = {
    "DeepSeek": deepseek(),
    "Volcengine Ark model": ark_model(),
    "Volcengine Ark bot": ark_bot(),
    "Perplexity": perplexity(),
    "Perplexity without details": perplexity_without_details(),
    "SiliconFlow": siliconflow(),
    "vLLM, reasoning_content": vllm("reasoning_content"),
    "vLLM, reasoning": vllm("reasoning"),
    "vLLM without a parser": vllm_without_parser(),
    "llama-server": llama_server(),
    "Ollama": ollama(),
    "OpenRouter": openrouter(),
    "OpenAI annotations": openai_annotations(),
    "sources last": sources_last(),
    "loose framing": loose_framing(),
}
