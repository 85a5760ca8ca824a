"""Bytes from a hub into a folder: space is looked for first, what is there stays, every file is checked."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpx

from ktd.errors import Unreachable, UserError
from ktd.pull.hub import Hub, RemoteFile, unreachable
from ktd.pull.quants import size_text

# Connections at once: one alone seldom fills the line.
_AT_ONCE = 4
_PIECE = 1 << 20
# Left free on the disk, for what else is written meanwhile.
_RESERVE = 256 * 2**20
# How often in a row a connection may break without a byte having come, and what is waited each time.
_TRIES = 6
_PAUSE_SECONDS = 1.0

Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Download:
    """Files of one repository on their way into `folder`, under their paths in the repository."""

    hub: Hub
    repo: str
    folder: Path
    _given_up: threading.Event = field(default_factory=threading.Event)

    async def run(self, client: httpx.AsyncClient, files: Sequence[RemoteFile], report: Report) -> list[Path]:
        """Fetches what is missing and returns where the files are. `report` is told every byte that is there
        or was fetched, and a negative number when some are fetched anew.

        Cancelled, it leaves partial files that the next run goes on with. Raises UserError for a disk that is
        too small or full, a file of other content in the way, or bytes that are not those that the hub
        promised; Unreachable.
        """
        self._refuse_full_disk(files)
        turns = asyncio.Semaphore(_AT_ONCE)

        async def fetch(file: RemoteFile) -> Path:
            async with turns:
                return await self._fetch(client, file, report)

        tasks = [asyncio.create_task(fetch(file)) for file in files]
        try:
            return await asyncio.gather(*tasks)
        finally:
            self._given_up.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def place(self, file: RemoteFile) -> Path:
        """Where a file ends up."""
        return self.folder.joinpath(*file.path.parts)

    def _refuse_full_disk(self, files: Sequence[RemoteFile]) -> None:
        there = [place for file in files for place in (self.place(file), _partial(self.place(file)))]
        try:
            missing = sum(file.size for file in files) - sum(p.stat().st_size for p in there if p.is_file())
            standing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(standing).free
        except OSError as error:
            raise UserError(f"{self.folder} cannot be used: {error.strerror or error}.") from None
        if missing > 0 and missing + _RESERVE > free:
            raise UserError(
                f"{size_text(missing)} are to be downloaded, but {self.folder.absolute()} has "
                f"{size_text(free)} left: free some, or choose another disk with --to."
            )

    async def _fetch(self, client: httpx.AsyncClient, file: RemoteFile, report: Report) -> Path:
        place = self.place(file)
        partial = _partial(place)
        try:
            if place.is_file():
                await asyncio.to_thread(self._check_standing, place, file, report)
                return place
            place.parent.mkdir(parents=True, exist_ok=True)
            digest = await asyncio.to_thread(self._begin, partial, file, report)
            await self._fill(client, file, partial, digest, report)
            _accept(partial, place, file, digest)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"The disk of {self.folder.absolute()} is full: free some space and run this again, it "
                    "goes on where it stopped."
                ) from None
            raise UserError(f"{place} cannot be written: {error.strerror or error}.") from None
        return place

    def _check_standing(self, place: Path, file: RemoteFile, report: Report) -> None:
        same = place.stat().st_size == file.size
        if not same or self._digest_of(place, report).hexdigest() != file.sha256:
            raise UserError(
                f"{place} is there already and is not the hub's file: move it away, or choose another folder "
                "with --to."
            )

    def _digest_of(self, path: Path, report: Report) -> _Digest:
        """Of what is in a file, if there is one. Its thread ends when the download is given up."""
        digest = _Digest()
        if path.is_file():
            with path.open("rb") as file:
                while not self._given_up.is_set() and (piece := file.read(_PIECE)):
                    digest.update(piece)
                    report(len(piece))
        return digest

    def _begin(self, partial: Path, file: RemoteFile, report: Report) -> _Digest:
        """What an earlier run left; that of another version of the file is dropped where it shows."""
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        partial.touch()
        return self._digest_of(partial, report)

    async def _fill(
        self, client: httpx.AsyncClient, file: RemoteFile, partial: Path, digest: _Digest, report: Report
    ) -> None:
        """Fetches what `partial` lacks, however often the connection breaks."""
        failures = 0
        while digest.length < file.size:
            before = digest.length
            try:
                await self._receive(client, file, partial, digest, report)
            except (httpx.HTTPError, Unreachable) as error:
                failures = 0 if digest.length > before else failures + 1
                if failures == _TRIES:
                    url = self.hub.address(self.repo, file)
                    raise error if isinstance(error, Unreachable) else unreachable(url, error) from None
                await asyncio.sleep(_PAUSE_SECONDS * 2**failures)

    async def _receive(
        self, client: httpx.AsyncClient, file: RemoteFile, partial: Path, digest: _Digest, report: Report
    ) -> None:
        """One connection's worth of bytes, appended to `partial`."""
        headers = self.hub.headers | {"accept-encoding": "identity"}
        if digest.length:
            headers["range"] = f"bytes={digest.length}-"
        async with client.stream("GET", self.hub.address(self.repo, file), headers=headers) as response:
            self.hub.refuse(response, self.repo)
            begins = f"bytes {digest.length}-"
            if digest.length and not response.headers.get("content-range", "").startswith(begins):
                report(-digest.length)  # a server that cannot go on begins anew
                digest.restart()
            with partial.open("ab") as sink:
                _lock(sink)
                if sink.tell() > digest.length:
                    sink.truncate(digest.length)
                async for piece in response.aiter_raw():
                    piece = piece[: file.size - digest.length]  # of what is too much the checksum tells
                    sink.write(piece)
                    digest.update(piece)
                    report(len(piece))


class _Digest:
    """SHA-256 and length of the bytes of a file so far."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._hash, self.length = hashlib.sha256(), 0

    def update(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.length += len(piece)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _accept(partial: Path, place: Path, file: RemoteFile, digest: _Digest) -> None:
    """Gives a complete file its name. Raises UserError for one that is not what the hub promised."""
    if digest.hexdigest() != file.sha256:
        partial.unlink()
        raise UserError(
            f"{file.path} arrived with another checksum than the hub states and was thrown away: run this "
            "again, or take it from elsewhere with --endpoint or --hub."
        )
    partial.rename(place)


def _lock(file: BinaryIO) -> None:
    """Two that append to one file would spoil it. Raises UserError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another ktd pull writes {file.name}: wait for it, or end it.") from None


def _partial(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")
