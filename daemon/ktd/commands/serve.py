"""`ktd serve`: the daemon in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ktd.errors import UserError
from ktd.settings import Settings, add_arguments
from ktd.settings_sources import load

if TYPE_CHECKING:
    from ktd.server.host import Loaded

NAME = "serve"
HELP = "serve a model over gRPC and HTTP (without arguments: the embedded one)"

log = logging.getLogger(__name__)

# Of open files and connections; shells and systemd allow 1,024 unless asked.
_DESCRIPTORS = 1 << 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktd serve`: all settings."""
    add_arguments(parser, "model", "engine", "answers", "doors", "process")


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Raises UserError for what the user can mend, which is not to be retried."""
    from ktd.server import logs
    from ktd.server.lifecycle import stop_signals
    from ktd.server.run_record import RunRecordFile

    settings = load(args)
    faulthandler.enable(2)  # last words of a fault in what is not Python
    survive_user_signals()
    raise_descriptor_limit()
    file = RunRecordFile(settings.grpc_port)
    last = file.read()
    if last and last.serving:
        # That daemon's record stays as it is; this one will find its port taken.
        try:
            logs.configure(settings)
            return _serve(settings, lambda: None)
        except UserError as error:
            logs.last_words(str(error))
            raise
    record = file.begin()
    # Until the event loop handles them, these just end the process: that is no crash.
    for number in stop_signals():
        signal.signal(number, lambda number, frame: sys.exit(0))
    try:
        logs.configure(settings)
        if record.pause:
            log.warning("%d crashes in ten minutes: starting in %g s", len(record.crashes), record.pause)
            file.write(record.now("pausing", f"It crashed {len(record.crashes)} times in ten minutes."))
            time.sleep(record.pause)
        file.write(record.now("starting"))
        code = _serve(settings, lambda: file.write(record.now("ready")))
    except UserError as error:
        file.write(record.now("refused", str(error)))
        logs.last_words(str(error))
        raise
    except Exception as error:
        file.write(record.now("failed", str(error)))
        raise
    except (SystemExit, KeyboardInterrupt):
        file.write(record.now("stopped"))
        raise
    file.write(record.now("stopped"))
    return code


def survive_user_signals() -> None:
    """SIGUSR1 and SIGUSR2, as scripts that rotate logs send them, end no answers: they have every thread say
    where it is, on stderr.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        faulthandler.register(number, 2)


def raise_descriptor_limit() -> None:
    """Allows this process as many file descriptors as it may ask for, or enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _serve(settings: Settings, on_ready: Callable[[], None]) -> int:
    from ktd import launch
    from ktd.server.lifecycle import Lifecycle

    prepared = launch.prepare(settings)
    log.info("%s", launch.describe(prepared))

    def load_model(progress: Callable[[float], None]) -> Loaded:
        tell = launch.Progress("Loading")

        def both(fraction: float) -> None:
            progress(fraction)
            tell(fraction)

        return launch.load(prepared, both)

    async def live() -> None:
        defaults = settings.request_defaults()
        await Lifecycle(settings, prepared.served, defaults, load_model, on_ready).run()

    asyncio.run(live())
    return 0
