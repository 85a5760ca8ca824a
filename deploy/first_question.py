"""Asks the daemon one real question and shows its thought and answer; the embedded model's is checked.

Exits with 1 when no answer comes or the embedded model answers wrongly twice.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from contextlib import aclosing

from ktd.chat.request import new_request_id
from ktd.client import Client
from ktd.commands.wait import address_of
from ktd.embedded.questions import check, draw_question
from ktd.errors import KtdError
from ktd.settings import Settings, load
from ktd.types import Answer, ChatRequest, Message, Reasoning, SamplingParams

ANY_MODEL = "Which is larger, 9.11 or 9.9? Answer in one sentence."
# Even a small model is right nearly always; twice wrong in a row is a fault.
TRIES = 2


async def ask(settings: Settings, question: str, sampling: SamplingParams) -> tuple[str, str]:
    """Streams the thought and the answer to the terminal and returns them."""
    request = ChatRequest(
        new_request_id("up"), [Message("user", question)], sampling=sampling, max_tokens=2048
    )
    thought, answer = "", ""
    async with (
        Client(address_of(settings), settings.api_key, settings.ssl_certfile) as client,
        aclosing(client.chat(request)) as events,
    ):
        async for event in events:
            if isinstance(event, Reasoning):
                print(event.text if thought else f"Thought:  {event.text}", end="", flush=True)
                thought += event.text
            elif isinstance(event, Answer):
                lead = ("\n" if thought else "") + "Answer:   "
                print(event.text if answer else lead + event.text, end="", flush=True)
                answer += event.text
    print()
    return thought, answer


def main() -> int:
    settings = load(argparse.Namespace())
    if settings.gguf_path:
        print(f"Question: {ANY_MODEL}")
        asyncio.run(ask(settings, ANY_MODEL, SamplingParams()))
        return 0
    for _ in range(TRIES):
        question = draw_question(random.Random())
        print(f"Question: {question.text}")
        thought, answer = asyncio.run(ask(settings, question.text, SamplingParams(temperature=0)))
        if check(question, thought, answer):
            print("That is right.")
            return 0
        print("That is wrong: even a model this small should know. Asking another one.")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KtdError as error:
        sys.exit(f"ktd: {error}")
