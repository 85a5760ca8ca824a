"""`ktd chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading

from ktd.errors import Unavailable
from ktd.settings import Settings, add_arguments
from ktd.settings_sources import load

NAME = "chat"
HELP = "chat in the terminal, with a model loaded here or with a running daemon (--connect)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktd chat`."""
    parser.add_argument(
        "--connect", metavar="ADDRESS", help="use the daemon at grpc://host:port instead of loading a model"
    )
    add_arguments(parser, "model", "engine", "answers")
    parser.add_argument(
        "--api-key", dest="api_key", default=argparse.SUPPRESS, help="key of the daemon (better: KTD_API_KEY)"
    )


def run(args: argparse.Namespace) -> int:
    """Chats until the end of the input. Returns 1 when a question from a pipe got no answer. Raises UserError
    as `ktd serve` does.
    """
    settings = load(args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return asyncio.run(_remote(settings, args.connect) if args.connect else _local(settings))


async def _remote(settings: Settings, address: str) -> int:
    from ktd.client import Address, Client
    from ktd.terminal import Terminal, printable

    async with Client(Address.parse(address), settings.api_key, settings.ssl_certfile) as client:
        models = await client.models()
        if not models:
            raise Unavailable(f"{address} serves no model.")
        model = models[0]
        print(f"{printable(model.id)} at {address}, context {model.context_length}", file=sys.stderr)
        return await Terminal(client.chat, settings.request_defaults()).run()


async def _local(settings: Settings) -> int:
    from ktd import launch
    from ktd.terminal import Terminal, loading_bar

    prepared = launch.prepare(settings)
    print(launch.describe(prepared), file=sys.stderr)
    given_up = threading.Event()
    with loading_bar() as bar:

        def progress(fraction: float) -> None:
            if given_up.is_set():
                raise KeyboardInterrupt
            bar(fraction)

        try:
            loaded = await asyncio.to_thread(launch.load, prepared, progress)
        except asyncio.CancelledError:  # Ctrl-C: the loading thread ends at its next step
            given_up.set()
            raise
    try:
        return await Terminal(loaded.chat.chat, settings.request_defaults()).run()
    finally:
        await asyncio.to_thread(loaded.engine.stop)
