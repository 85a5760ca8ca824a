"""`ktd wait`: blocks until the daemon answers."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import TYPE_CHECKING

from ktd.errors import SettingsError, Unavailable, UserError
from ktd.server.listeners import listeners
from ktd.settings import Settings, add_arguments
from ktd.settings_sources import load

if TYPE_CHECKING:
    from ktd.client import Address, Client
    from ktd.server.run_record import RunRecord

NAME = "wait"
HELP = "wait until the daemon is ready, or say why it will not be"

POLL_SECONDS = 0.2
# A daemon that was just told to start may need this long to say so.
START_SECONDS = 5.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktd wait`: how long, and the settings that say where the daemon listens."""
    parser.add_argument("--timeout", default="600", metavar="SECONDS", help="give up after (default: 600)")
    add_arguments(parser, "doors")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the daemon serves; raises UserError or Unavailable with the reason otherwise."""
    settings = load(args)
    try:
        timeout = float(args.timeout)
    except ValueError:
        timeout = -1.0
    if not 0 <= timeout < float("inf"):
        raise SettingsError(f"--timeout is {args.timeout}, but must be a number of seconds.")
    asyncio.run(_wait(settings, timeout))
    return 0


def address_of(settings: Settings) -> Address:
    """Where a client on this machine reaches the daemon of these settings."""
    from ktd.client import Address

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.grpc_host.strip("[]"), settings.grpc_host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return Address.parse(f"grpc{'s' if settings.ssl_certfile else ''}://{host}:{settings.grpc_port}")


async def _wait(settings: Settings, patience: float) -> None:
    from ktd.client import Client
    from ktd.server.run_record import RunRecordFile

    file = RunRecordFile(settings.grpc_port)
    began = time.monotonic()
    told = ""
    async with Client(address_of(settings), settings.api_key, settings.ssl_certfile) as client:
        while True:
            waited = time.monotonic() - began
            record = file.read()
            try:
                serving = await client.serving()
                await _refuse_stranger(settings, record, client)
                if serving:
                    return
                state = await _progress(client)
            except Unavailable as error:
                if waited > min(START_SECONDS, patience):
                    _give_up_if_refused(record)
                state = str(error)
                if record and record.serving:
                    state = record.message or "It is starting."
            if waited >= patience:
                raise Unavailable(f"Not ready after {patience:g} s. {state}")
            if state != told and waited > 1:
                print(f"waiting: {state}", file=sys.stderr, flush=True)
                told = state
            await asyncio.sleep(POLL_SECONDS)


async def _refuse_stranger(settings: Settings, record: RunRecord | None, client: Client) -> None:
    """Raises UserError when the daemon that answers was there before the one that was started here and has
    not got the port, or was refused it."""
    if record is None or record.stage not in ("pausing", "starting", "refused"):
        return
    if record.stage != "refused" and not record.alive:
        return  # it crashed
    try:
        older = (await client.status()).uptime_seconds > record.age
    except UserError:
        older = True  # it does not take the key of these settings
    if older:
        holders = listeners(settings.grpc_port)
        raise UserError(
            f"Another daemon answers on {address_of(settings)}, not the one that was started here: "
            f"{holders[0] if holders else 'somebody else'} holds the port. Stop it, or set KTD_GRPC_PORT and "
            "KTD_PORT to free ports."
        )


async def _progress(client: Client) -> str:
    try:
        status = await client.status()
    except UserError:
        return "It is not ready yet (and the API key here is wrong or missing)."
    return f"{status.message} ({int(status.load_progress * 10) * 10} %)"


def _give_up_if_refused(record: RunRecord | None) -> None:
    """A start that was refused for a user's mistake is not tried again by supervisor."""
    if record and record.stage == "refused" and not record.alive:
        at = time.strftime("%H:%M:%S", time.localtime(record.since))
        raise UserError(f"The daemon refused to start at {at}: {record.message}")
