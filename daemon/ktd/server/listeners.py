"""Who listens on a TCP port of this machine, for the sentences that say why a port cannot be had."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Listener:
    """`pid` and `name` are those of the process; None and empty where the system shows them to nobody but its
    user, as in another container.
    """

    user: str
    pid: int | None = None
    name: str = ""

    def __str__(self) -> str:
        """As in "process 812 (ktd) of user bob"."""
        process = "a process" if self.pid is None else f"process {self.pid} ({self.name})"
        return f"{process} of user {self.user}"


def listeners(port: int) -> list[Listener]:
    """The processes that listen on `port`, on whichever address; none where the system does not tell."""
    found = dict(_sockets(port))
    owners = dict(_owners(set(found))) if found else {}
    return [Listener(_user_name(uid), *owners.get(inode, (None, ""))) for inode, uid in sorted(found.items())]


def _sockets(port: int) -> Iterator[tuple[str, int]]:
    """Inode and user id of every socket that listens on `port`."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9], int(fields[7])


def _owners(inodes: set[str]) -> Iterator[tuple[str, tuple[int, str]]]:
    """Inode, process id and name for each of `inodes` whose process may be looked into."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        # Processes end meanwhile, and those of others are closed.
        with suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if inode := wanted.get(os.readlink(f"/proc/{pid}/fd/{descriptor}")):
                        yield inode, (int(pid), _name(pid))


def _name(pid: str) -> str:
    name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "".join(c if c.isprintable() else "?" for c in name)[:_LONGEST_NAME]


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
