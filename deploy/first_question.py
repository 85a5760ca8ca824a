"""`first_question.py PID`: asks the daemon with this process id one real question, shows its thought and
answer, and says what to do next. The embedded model's answer is checked.

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
from ktd.errors import KtdError, SettingsError
from ktd.server.listeners import listeners
from ktd.settings import Settings
from ktd.settings_sources import load
from ktd.types import Answer, ChatRequest, Message, Reasoning, SamplingParams

ANY_MODEL = "Which is larger, 9.11 or 9.9? Answer in one sentence."
# Even a small model is right nearly always; twice wrong in a row is a fault.
TRIES = 2

NEXT = """
The daemon runs under supervisor; `make down` stops both:
  .venv/bin/supervisorctl -c deploy/supervisord.conf status|stop|start|restart|tail ktd
In Open WebUI (make webui installs one with all of this done) paste plugin/ktd_pipe.py under
Admin Panel -> Functions -> Create, save, switch it on, and set its valves:
  BASE_URL  {address}
  API_KEY   {key}
  MODELS    (leave it empty: the daemon is asked)
Next:  make webui     or talk in this terminal:  .venv/bin/ktd chat --connect {address}"""


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


def check_daemon(settings: Settings, pid: int) -> None:
    """Raises SettingsError when it is another daemon that answers on the port."""
    taken = listeners(settings.grpc_port)
    if taken and all(listener.pid != pid for listener in taken):
        raise SettingsError(
            f"Another daemon answers on {address_of(settings)}, not the supervised one: {taken[0]} holds the"
            " port. Stop it, or set KTD_GRPC_PORT and KTD_PORT to free ports."
        )


def main(pid: int) -> int:
    settings = load(argparse.Namespace())
    check_daemon(settings, pid)
    if not first_answer(settings):
        return 1
    key = "(the key of KTD_API_KEY)" if settings.api_key else "(leave it empty)"
    print(NEXT.format(address=address_of(settings), key=key))
    return 0


def first_answer(settings: Settings) -> bool:
    """Whether a question was answered, rightly as far as that can be told."""
    if settings.gguf_path:
        print(f"Question: {ANY_MODEL}")
        asyncio.run(ask(settings, ANY_MODEL, SamplingParams()))
        return True
    for _ in range(TRIES):
        question = draw_question(random.Random())
        print(f"Question: {question.text}")
        thought, answer = asyncio.run(ask(settings, question.text, SamplingParams(temperature=0)))
        if check(question, thought, answer):
            print("That is right.")
            return True
        print("That is wrong: even a model this small should know. Asking another one.")
    return False


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1])))
    except KtdError as error:
        sys.exit(f"ktd: {error}")
