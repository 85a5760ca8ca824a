"""How long the Pipe keeps the server's other users waiting: never ten milliseconds at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_daemon import fake_daemon
from pipe_grpc_kit import STOP, module, scripted_daemon, text
from pipe_kit import Reply, ask, browser_body, delta, sse, vendor_server
from pipe_stretches import Stretch, measured

SENTENCE = "The Alder Tower was built in 1921 and is **forty** metres high, they say [1]. "
MOST = 0.010


@pytest.fixture
def stretches() -> Iterator[list[Stretch]]:
    """The collector would count what all other tests left behind."""
    gc.collect()
    gc.disable()
    yield []
    gc.enable()


def answerer(url: str, stretches: list[Stretch], **valves: Any) -> Any:
    pipe = measured(module.Pipe, stretches)()
    pipe.valves = pipe.Valves(BASE_URL=url, MODELS="r1", **valves)
    return pipe


def longest(stretches: list[Stretch]) -> float:
    """Seconds of the processor: what other programs take meanwhile is not the Pipe's."""
    assert len(stretches) > 10
    return max(stretch.cpu for stretch in stretches)


async def test_an_answer_with_sources(stretches: list[Stretch]) -> None:
    sources = [
        {"source": {"id": f"{n}"}, "document": [SENTENCE * 250], "metadata": [{"source": f"{n}"}]}
        for n in range(20)
    ]
    async with scripted_daemon([*[text(word) for word in (SENTENCE * 20).split(" ")], STOP]) as (address, _):
        pipe = answerer(f"grpc://{address}", stretches)
        shown = await ask(pipe, browser_body("q", model="ktd.any"), metadata={"sources": sources})
        await pipe._links.close()
    assert shown.text.startswith("TheAlderTower")
    assert longest(stretches) < MOST


async def test_a_search_with_all_that_the_valves_allow(stretches: list[Stretch]) -> None:
    page = {"title": "T", "link": "https://a.example/", "snippet": SENTENCE * 300}

    found = json.dumps([{**page, "link": f"{page['link']}{n}"} for n in range(20)])

    async def search_web(**_: Any) -> str:
        return found

    async with fake_daemon() as daemon:
        pipe = answerer(f"grpc://{daemon.address}", stretches, SEARCH_RESULTS=20, SEARCH_CHARS=20000)
        pipe.valves.MODELS = ""
        about = {"features": {"web_search": True}}
        tools = {"search_web": {"callable": search_web}}
        shown = await ask(pipe, browser_body("q", model="ktd.any"), metadata=about, __tools__=tools)
        await pipe._links.close()
    assert len(shown.sources) == 20
    assert longest(stretches) < MOST


async def test_a_list_of_sources_on_every_chunk(stretches: list[Stretch]) -> None:
    results = [
        {"title": f"T{n}", "url": f"https://a.example/{n}", "snippet": SENTENCE * 20} for n in range(20)
    ]
    named = {"search_results": results, "citations": [item["url"] for item in results]}
    chunks = [delta(f"{n} ") | named for n in range(100)]
    async with vendor_server(lambda request: Reply([sse(*chunks, delta(None, "stop"))])) as server:
        pipe = answerer(server.url, stretches)
        shown = await ask(pipe, browser_body("q", model="ktd.r1"))
        await pipe._links.close()
    assert len(shown.sources) == 20
    assert longest(stretches) < MOST
    tokens = sorted(stretch.cpu for stretch in stretches if not stretch.first)
    assert tokens[len(tokens) // 2] < 0.002, "the list was read again for every token"


async def test_a_long_answer_in_one_piece(stretches: list[Stretch]) -> None:
    message = {"role": "assistant", "reasoning_content": SENTENCE * 1000, "content": SENTENCE * 2500}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}], "citations": ["https://a.example/"]}
    whole = Reply([json.dumps(reply).encode()], content_type="application/json")
    async with vendor_server(lambda request: whole) as server:
        pipe = answerer(server.url, stretches)
        shown = await ask(pipe, browser_body("q", model="ktd.r1"))
        await pipe._links.close()
    assert shown.text == SENTENCE * 2500
    assert longest(stretches) < MOST
