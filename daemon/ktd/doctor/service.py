"""The checks of what the daemon needs to serve: its model, disk, ports and supervisor."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ktd.doctor.check import Check
from ktd.errors import UserError
from ktd.launch import embedded_model
from ktd.plan import GIB
from ktd.server.listeners import listeners
from ktd.server.run_record import RunRecordFile
from ktd.settings import Settings
from ktd_kernels import Cpu


def model(settings: Settings) -> Iterator[Check]:
    """Whether the model's file can be served."""
    from ktd.gguf import GgufFile
    from ktd.model import ModelConfig

    try:
        path = settings.gguf_path or embedded_model()
        with GgufFile.open(path) as gguf:
            config = ModelConfig.from_gguf(gguf)
            found = f"{gguf.name}, {gguf.nbytes / GIB:.2f} GiB, context up to {config.context}"
    except UserError as error:
        yield Check("model", "bad", str(error), "name a GGUF that ktd runs with --gguf-path")
    else:
        yield Check("model", "ok", found)


def repacked(settings: Settings) -> Iterator[Check]:
    """The state of the file that `--repack-cache` names."""
    from ktd.gguf import GgufFile
    from ktd.model.sidecar import look, sidecar_path
    from ktd.model.sidecar_table import UnfitError

    if not (settings.repack and settings.repack_cache):
        return
    name, again = "repacked weights", "the next start makes it again"
    try:
        with GgufFile.open(settings.gguf_path or embedded_model()) as gguf:
            path = sidecar_path(settings.repack_cache, gguf)
            size = look(path, gguf, Cpu(1, settings.isa))
        yield Check(name, "ok", f"{path}, {size / GIB:.2f} GiB, fits the model and this CPU")
    except FileNotFoundError:
        yield Check(name, "ok", f"the next start makes {path}, if there is something to repack")
    except UnfitError as error:
        yield Check(name, "note", f"{path} {error}", again)
    except OSError as error:
        yield Check(name, "note", str(error), "name another folder with --repack-cache")
    except (UserError, ValueError):
        return  # told of the model and of the instruction set


def disk(settings: Settings) -> Iterator[Check]:
    """How much of the disk is free."""
    place = settings.gguf_path if settings.gguf_path and settings.gguf_path.exists() else Path.cwd()
    usage = shutil.disk_usage(place)
    yield Check("disk", "ok", f"{usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} GiB free at {place}")


def ports(settings: Settings) -> Iterator[Check]:
    """Who has the ports of gRPC and HTTP."""
    record = RunRecordFile(settings.grpc_port).read()
    ours = record.pid if record and record.serving else None
    for door, host, port in (
        ("gRPC", settings.grpc_host, settings.grpc_port),
        ("HTTP", settings.host, settings.port),
    ):
        name = f"port of {door}"
        if not _listening(host, port):
            yield Check(name, "ok", f"{host}:{port} is free")
            continue
        taken = listeners(port)
        if ours and (not taken or any(listener.pid == ours for listener in taken)):
            yield Check(name, "ok", f"{host}:{port} is served by the ktd of process {ours}")
        else:
            by = taken[0] if taken else "another program"
            flag = "--grpc-port" if door == "gRPC" else "--port"
            yield Check(name, "bad", f"{host}:{port} is taken by {by}", f"choose another with {flag}")


def _listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=1):
            return True
    except OSError:
        return False


def supervisor(settings: Settings) -> Iterator[Check]:
    """Whether supervisord is there."""
    beside = str(Path(sys.executable).parent)
    if found := shutil.which("supervisord") or shutil.which("supervisord", path=beside):
        yield Check("supervisor", "ok", found)
    else:
        remedy = "pip install supervisor, or start `ktd serve` by other means"
        yield Check("supervisor", "note", "supervisord is not on the PATH", remedy)
