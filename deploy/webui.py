"""Open WebUI on the loopback with the Pipe in it.

    .venv/bin/python deploy/webui.py start                    what `make webui` does; safe to repeat
    .venv/bin/python deploy/webui.py stop
    .venv/bin/python deploy/webui.py install URL EMAIL      puts the Pipe into an Open WebUI that runs already

`start` wants Open WebUI in the environment KTD_WEBUI_ENV (`make webui-env` makes it) and takes its port from
KTD_WEBUI_PORT. The daemon's address and key are those of its settings; KTD_BASE_URL names another service.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ktd.commands.wait import address_of
from ktd.errors import KtdError
from ktd.server.listeners import listeners
from ktd.settings import Settings
from ktd.settings_sources import load

ROOT = Path(__file__).resolve().parent.parent
PIPE = ROOT / "plugin" / "ktd_pipe.py"
FUNCTION = "ktd"
ADMIN = "admin@localhost"
START_SECONDS = 300

# No model hub, no telemetry, no update check: nothing leaves the machine.
OFFLINE = {
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "AUDIO_STT_ENGINE": "openai",
    "ENABLE_OLLAMA_API": "false",
    "ENABLE_OPENAI_API": "false",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "true",
    "SCARF_NO_ANALYTICS": "true",
}


class WebuiError(Exception):
    """Open WebUI could not be started or set up; the message says why."""


@dataclass(frozen=True)
class Login:
    email: str
    password: str


class Server:
    """Open WebUI as a process of its own, with its data, log, pid file and login in `folder`."""

    def __init__(self, environment: Path, folder: Path, port: int) -> None:
        self.environment, self.folder, self.port = environment, folder, port
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "webui.log"
        self._pid_file = folder / "webui.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def login(self) -> Login:
        """The administrator's login, made on the first use."""
        file = self.folder / "login.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {
                "email": ADMIN,
                "password": secrets.token_urlsafe(9),
                "secret": secrets.token_urlsafe(32),
            }
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                json.dump(content, out)
        kept = json.loads(file.read_text())
        return Login(kept["email"], kept["password"])

    def pid(self) -> int | None:
        """The running server's process id."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if b"open-webui" in command else None

    def start(self, settings: Mapping[str, str] = {}) -> None:
        """Starts the server if it does not run yet. `settings` are further environment variables."""
        if self.pid() is not None:
            return
        program = self.environment / "bin" / "open-webui"
        if not program.exists():
            raise WebuiError(
                f"Open WebUI is not installed in {self.environment}: run `make webui-env` first."
            )
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                who = next(map(str, listeners(self.port)), "another program")
                raise WebuiError(
                    f"Port {self.port} is taken by {who}: choose another with KTD_WEBUI_PORT."
                ) from None
        login = self.login
        variables = {
            **os.environ,
            **OFFLINE,
            "DATA_DIR": str(self.folder / "data"),
            "WEBUI_SECRET_KEY": json.loads((self.folder / "login.json").read_text())["secret"],
            "WEBUI_ADMIN_EMAIL": login.email,
            "WEBUI_ADMIN_PASSWORD": login.password,
            "CORS_ALLOW_ORIGIN": f"{self.url};http://localhost:{self.port}",
            **settings,
        }
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [program, "serve", "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=self.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pid_file.write_text(str(self._process.pid))

    def wait(self) -> None:
        """Blocks until the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.pid() is None:
                raise WebuiError(
                    f"Open WebUI ended while it started. Its log, {self.log}, ends with:\n{self._tail()}"
                )
            time.sleep(0.5)
        raise WebuiError(
            f"Open WebUI is silent after {START_SECONDS} s. Its log, {self.log}, ends with:\n{self._tail()}"
        )

    def stop(self) -> bool:
        """Ends the server; whether one ran."""
        pid = self.pid()
        if pid is not None:
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + 15
            while self.pid() is not None and time.monotonic() < deadline:
                time.sleep(0.1)
            if self.pid() is not None:
                os.killpg(pid, signal.SIGKILL)
            if self._process is not None:
                self._process.wait()
        self._pid_file.unlink(missing_ok=True)
        return pid is not None

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-8:])


class Admin:
    """An administrator's session on Open WebUI's API."""

    def __init__(self, url: str, login: Login) -> None:
        try:
            self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        except httpx.InvalidURL as error:
            raise WebuiError(f"{url} is no address ({error}): write it as http://host:8080.") from None
        answer = self._call(
            "POST", "/api/v1/auths/signin", {"email": login.email, "password": login.password}
        )
        if not isinstance(answer, dict) or not {"token", "role"} <= answer.keys():
            raise WebuiError(f"What answers at {url} is no Open WebUI.")
        self._http.headers["Authorization"] = f"Bearer {answer['token']}"
        if answer["role"] != "admin":
            raise WebuiError(
                f"{login.email} is no administrator of {url}: functions can be installed by one only."
            )

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        try:
            answer = self._http.request(method, path, json=content)
        except httpx.HTTPError as error:
            raise WebuiError(f"{self._http.base_url} does not answer ({error}).") from error
        if answer.status_code != 200:
            raise WebuiError(f"{method} {path} was answered {answer.status_code}: {answer.text[:300]}")
        try:
            return answer.json()
        except ValueError:
            raise WebuiError(f"What answers at {self._http.base_url} is no Open WebUI.") from None

    def install_pipe(self, valves: Mapping[str, object], source: str | None = None) -> None:
        """Creates or updates the function, switches it on and sets the valves that are named."""
        form = {
            "id": FUNCTION,
            "name": "ktd",
            "content": source or PIPE.read_text(encoding="utf-8"),
            "meta": {"description": "DeepSeek-R1 from one GGUF on your own machine", "manifest": {}},
        }
        there = {item["id"]: item for item in self._call("GET", "/api/v1/functions/")}
        action = f"id/{FUNCTION}/update" if FUNCTION in there else "create"
        function = self._call("POST", f"/api/v1/functions/{action}", form)
        if not there.get(FUNCTION, function).get("is_active", False):
            self._call("POST", f"/api/v1/functions/id/{FUNCTION}/toggle")
        self.set_valves(valves)

    def set_valves(self, valves: Mapping[str, object]) -> None:
        """Sets the valves that are named; the others stay as they are."""
        path = f"/api/v1/functions/id/{FUNCTION}/valves"
        kept = self._call("GET", path) or {}
        self._call("POST", f"{path}/update", {**kept, **valves})

    def models(self) -> list[dict[str, Any]]:
        """The function's models as Open WebUI lists them now."""
        listed = self._call("GET", "/api/models?refresh=true")["data"]
        return [model for model in listed if model["id"].startswith(f"{FUNCTION}.")]

    def publish(self, model: Mapping[str, Any]) -> None:
        """Lets every user see the model; without a grant only administrators do.

        A new record also switches Open WebUI's own search for think tags off: the Pipe delivers thoughts
        apart, and an answer that quotes the tag would be torn. A record that is there keeps its parameters.
        """
        grant = {"principal_type": "user", "principal_id": "*", "permission": "read"}
        record = {"id": model["id"], "name": model["name"], "access_grants": [grant]}
        if "info" in model:
            self._call("POST", "/api/v1/models/model/access/update", record)
        else:
            settings = {"meta": {}, "params": {"reasoning_tags": False}}
            self._call("POST", "/api/v1/models/create", record | settings)

    def add_user(self, login: Login, name: str) -> None:
        form = {"name": name, "email": login.email, "password": login.password, "role": "user"}
        self._call("POST", "/api/v1/auths/add", form)


def set_up(admin: Admin, settings: Settings) -> list[str]:
    """Installs the Pipe and shows its models to everybody; returns their names."""
    valves = {
        "BASE_URL": os.environ.get("KTD_BASE_URL") or str(address_of(settings)),
        "API_KEY": settings.api_key or "",
    }
    admin.install_pipe(valves)
    models = admin.models()
    served = [model for model in models if model["id"] != f"{FUNCTION}.any"]
    for model in served:
        admin.publish(model)
    if not served:
        reason = models[0]["name"] if models else "the function lists none"
        print(f"No model yet: {reason}. Start the daemon (make up),")
        print("then repeat this command, which lets ordinary users see its model.")
    return [model["name"] for model in served]


def start(server: Server, settings: Settings) -> None:
    if server.pid() is None:
        print(f"Starting Open WebUI (half a minute to a minute; log: {server.log})", flush=True)
        server.start()
    server.wait()
    print("Installing the Pipe", flush=True)
    with Admin(server.url, server.login) as admin:
        names = set_up(admin, settings)
    print(f"\nOpen WebUI   {server.url}")
    print(f"login        {server.login.email}   password {server.login.password}")
    if names:
        print(f"model        {', '.join(names)}")
    print("\nmake down    stops it")


def chosen_port() -> int:
    """The port of Open WebUI. Raises WebuiError."""
    chosen = os.environ.get("KTD_WEBUI_PORT") or "8080"
    if not chosen.isascii() or not chosen.isdecimal() or not 0 < int(chosen[:6]) < 65536:
        raise WebuiError(f"KTD_WEBUI_PORT is {chosen!r}, but must be a port from 1 to 65535.")
    return int(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start")
    commands.add_parser("stop")
    install = commands.add_parser("install")
    install.add_argument("url")
    install.add_argument("email")
    arguments = parser.parse_args()
    environment = Path(os.environ.get("KTD_WEBUI_ENV", Path.home() / ".cache/ktd/webui-0.12.4"))
    try:
        server = Server(environment, ROOT / "run" / "webui", chosen_port())
        if arguments.command == "start":
            start(server, load(argparse.Namespace()))
        elif arguments.command == "stop":
            print("Open WebUI stopped" if server.stop() else "Open WebUI was not running")
        else:
            password = os.environ.get("KTD_WEBUI_PASSWORD") or getpass.getpass(
                f"Password of {arguments.email}: "
            )
            with Admin(arguments.url.rstrip("/"), Login(arguments.email, password)) as admin:
                names = set_up(admin, load(argparse.Namespace()))
            print(f"Installed. Models: {', '.join(names) or 'none yet'}")
    except (WebuiError, KtdError) as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
