"""The two hubs: where a repository's list of files is, and where their bytes are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from ktd.errors import Unreachable, UserError

HUBS = ("huggingface", "modelscope")
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_PAGES = 100


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `size` in bytes; `sha256` in hex, as the hub states it."""

    path: PurePosixPath
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Hub:
    """One hub at one address, asked with one token."""

    name: str
    endpoint: str
    token: str | None

    @classmethod
    def find(cls, name: str, endpoint: str | None, environ: Mapping[str, str]) -> Hub:
        """The hub `name` at its own address or at `endpoint`, with the token that its own tools use.

        Raises UserError for an address that is none.
        """
        if name == "modelscope":
            endpoint = endpoint or environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
            token = environ.get("MODELSCOPE_API_TOKEN")
        else:
            endpoint = endpoint or environ.get("HF_ENDPOINT") or "https://huggingface.co"
            token = environ.get("HF_TOKEN") or _saved_token(environ)
        try:
            url = httpx.URL(endpoint if "://" in endpoint else f"https://{endpoint}")
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"{endpoint} is no address of a hub: write it as https://hf-mirror.com, say.")
        return cls(name, str(url).rstrip("/"), token)

    def page(self, repo: str) -> str:
        """Where a person looks at `repo`."""
        return f"{self.endpoint}/{'models/' if self.name == 'modelscope' else ''}{repo}"

    def address(self, repo: str, file: RemoteFile) -> str:
        """Where the bytes of a file are."""
        path = quote(str(file.path))
        if self.name == "modelscope":
            return f"{self.endpoint}/api/v1/models/{repo}/repo?Revision=master&FilePath={path}"
        return f"{self.endpoint}/{repo}/resolve/main/{path}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries. httpx drops both when another server is redirected to."""
        if not self.token:
            return {}
        return (
            {"cookie": f"m_session_id={self.token}"}
            if self.name == "modelscope"
            else {"authorization": f"Bearer {self.token}"}
        )

    async def files(self, client: httpx.AsyncClient, repo: str) -> list[RemoteFile]:
        """The GGUF files of `repo`. Raises UserError when there is no such repository, or none for this
        token; Unreachable.
        """
        if self.name == "modelscope":
            query = "repo/files?Revision=master&Recursive=True"
            body = await self._get(client, repo, f"{self.endpoint}/api/v1/models/{repo}/{query}")
            entries = _mapping(_mapping(body).get("Data")).get("Files")
            return list(_modelscope_files(entries))
        url = f"{self.endpoint}/api/models/{repo}/tree/main?recursive=true"
        found: list[RemoteFile] = []
        for _ in range(_MOST_PAGES):
            response = await self._ask(client, repo, url)
            found += _huggingface_files(_json(response))
            following = response.links.get("next", {}).get("url")
            if not following:
                break
            # A mirror may pass the hub's own address on.
            parts = urlsplit(following)
            url = f"{self.endpoint}{parts.path}?{parts.query}"
        return found

    async def _get(self, client: httpx.AsyncClient, repo: str, url: str) -> object:
        return _json(await self._ask(client, repo, url))

    async def _ask(self, client: httpx.AsyncClient, repo: str, url: str) -> httpx.Response:
        try:
            response = await client.get(url, headers=self.headers)
        except httpx.HTTPError as error:
            raise unreachable(url, error) from None
        self.refuse(response, repo)
        return response

    def refuse(self, response: httpx.Response, repo: str) -> None:
        """Raises UserError or Unreachable for an answer that is no success."""
        if response.is_success:
            return
        token = "MODELSCOPE_API_TOKEN" if self.name == "modelscope" else "HF_TOKEN"
        if response.headers.get("x-error-code") == "GatedRepo" or response.status_code == 403:
            raise UserError(
                f"{repo} is given only to those who asked for it: accept its conditions at "
                f"{self.page(repo)}, then set {token} to your token."
            )
        if response.status_code in (401, 404):
            raise UserError(
                f"There is no {repo} at {self.endpoint}, or not for everybody: look for it there, or set "
                f"{token} if it is private."
            )
        raise Unreachable(f"{self.endpoint} answers with status {response.status_code}: try again later.")


def parse_repo(text: str, hub: str | None) -> tuple[str, str]:
    """(hub, ORG/NAME) of a repository's name or of the address of its page. Raises UserError."""
    if "://" in text:
        _, _, address = text.partition("://")
        host, *path = address.partition("?")[0].strip("/").split("/")
        hub = hub or ("modelscope" if "modelscope" in host else "huggingface")
        text = "/".join(path[1:3] if path[:1] == ["models"] else path[:2])
    if not _REPO.fullmatch(text) or ".." in text:
        raise UserError(f"{text} is no repository: name it as ORG/NAME, such as unsloth/DeepSeek-R1-GGUF.")
    return hub or "huggingface", text


def unreachable(url: str, error: Exception) -> Unreachable:
    """What to say when no answer came."""
    host = urlsplit(url).netloc
    reason = str(error) or type(error).__name__
    return Unreachable(
        f"{host} cannot be reached ({reason}): check the network, or name a mirror with --endpoint or "
        "another hub with --hub."
    )


def _huggingface_files(entries: object) -> Iterator[RemoteFile]:
    for entry in _list(entries):
        lfs = _mapping(entry.get("lfs") or {})
        if entry.get("type") == "file" and str(entry.get("path")).endswith(".gguf"):
            yield _file(entry.get("path"), lfs.get("size", entry.get("size")), lfs.get("oid"))


def _modelscope_files(entries: object) -> Iterator[RemoteFile]:
    for entry in _list(entries):
        if entry.get("Type") != "tree" and str(entry.get("Path")).endswith(".gguf"):
            yield _file(entry.get("Path"), entry.get("Size"), entry.get("Sha256"))


def _file(path: object, size: object, sha256: object) -> RemoteFile:
    """A checked entry: it decides where bytes are written. Raises Unreachable for one that cannot be."""
    place = PurePosixPath(str(path))
    inside = not place.is_absolute() and not {"..", ""}.intersection(place.parts)
    if not (inside and str(place).isprintable() and "\\" not in str(place)):
        raise Unreachable(f"The hub lists a file with the impossible name {path!r}: nothing was downloaded.")
    if not isinstance(size, int) or size < 0 or not _SHA256.fullmatch(str(sha256)):
        raise Unreachable(f"The hub states no size and SHA-256 of {place}: it cannot be checked.")
    return RemoteFile(place, size, str(sha256))


def _json(response: httpx.Response) -> object:
    try:
        return response.json()
    except ValueError:
        raise _foreign() from None


def _list(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _foreign()
    return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _foreign()
    return value


def _foreign() -> Unreachable:
    return Unreachable("What answers there is no hub, or one that changed: check --hub and --endpoint.")


def _saved_token(environ: Mapping[str, str]) -> str | None:
    """What `hf auth login` left."""
    home = Path(environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    try:
        return Path(environ.get("HF_TOKEN_PATH") or home / "token").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
