"""Where settings come from: flags, KTD_ variables, ktd.toml, defaults, in this order of precedence."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ktd.errors import SettingsError
from ktd.files import read_text
from ktd.settings import Settings, shown
from ktd.tutorial_flags import ALIASES, flag

log = logging.getLogger(__name__)

PREFIX = "KTD_"

# Variables of the build, the tests and the Pipe, which are no settings of the daemon.
_OTHER_VARIABLES = re.compile(r"KTD_(CACHE|CONFIG|HUB|BASE_URL|MODELS|WEBUI_\w+|PEERS_\w+|TEST_\w+)")


def load(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of one run. Raises SettingsError for an unknown key or a value out of range, saying where
    it stands and what is allowed.
    """
    environ = os.environ if environ is None else environ
    labels: dict[str, str] = {}
    values: dict[str, Any] = {}
    named = getattr(args, "config", None) or environ.get(f"{PREFIX}CONFIG")
    path = _find_file(Path(named) if named else None, environ)
    sources: list[tuple[Mapping[str, Any], Callable[[str], str]]] = []
    if path:
        sources.append((_read_file(path), lambda name: f"{name} in {path}"))
    sources.append((_read_environment(environ), lambda name: f"{PREFIX}{name.upper()}"))
    given = {name: value for name, value in vars(args).items() if name in Settings.model_fields}
    sources.append((given, flag))
    for source, label in sources:
        for name, value in source.items():
            # An empty text is how compose files and shells say "not set".
            values[name] = None if value == "" else value
            labels[name] = label(name)
    values = {name: value for name, value in values.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_sentence(error, labels)) from None


def _find_file(named: Path | None, environ: Mapping[str, str]) -> Path | None:
    if named:
        return named
    # Not Path.home(), which raises for a user that the system does not know, as in `docker run --user`.
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (Path("ktd.toml"), Path(home) / "ktd" / "ktd.toml"):
        if path.is_file():
            return path
    return None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"The settings file {path} is not TOML: {error}.") from error
    values = {}
    for key, value in table.items():
        name = canonical(key)
        if name not in Settings.model_fields:
            hint = suggest(name, Settings.model_fields) or "."
            raise SettingsError(f"{path} has the unknown key {key}{hint}")
        if isinstance(value, dict | list):
            raise SettingsError(f"{key} in {path} is a table or a list, but must be one value.")
        if isinstance(value, bool) and Settings.model_fields[name].annotation is not bool:
            # Python counts true as 1.
            raise SettingsError(f"{key} in {path} is {shown(value)}, but is no switch: give its value.")
        values[name] = value
    return values


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or _OTHER_VARIABLES.fullmatch(variable):
            continue
        name = canonical(variable.removeprefix(PREFIX).lower())
        if name in Settings.model_fields:
            values[name] = value
        elif hint := suggest(name, Settings.model_fields, show=lambda n: PREFIX + n.upper()):
            raise SettingsError(f"The environment has the unknown variable {variable}{hint}")
        else:
            log.warning("The environment variable %s is no setting of ktd and has no effect", variable)
    return values


def canonical(key: str) -> str:
    """The setting that a flag, variable or key names: `--chunk-size` and `chunk_size` are chunk_tokens."""
    name = key.replace("-", "_")
    return ALIASES.get(name, name)


def suggest(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """A hint ": did you mean …?" where something known is close; else nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.7)
    return f": did you mean {' or '.join(map(show, close))}?" if close else ""


def _sentence(error: ValidationError, labels: Mapping[str, str]) -> str:
    first = error.errors()[0]
    message = re.sub(r"^(Value error, |Input )", lambda m: "it " if m[1] == "Input " else "", first["msg"])
    if not first["loc"]:
        return f"{message}."
    name = str(first["loc"][0])
    shown = "" if name == "api_key" else f" is {first['input']!r}"
    return f"{labels.get(name, name)}{shown}: {message}."
