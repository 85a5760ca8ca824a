"""One model of all settings, with the flags that stand for them."""

from __future__ import annotations

import argparse
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    model_validator,
)

from ktd.tutorial_flags import ALIASES, flag

if TYPE_CHECKING:
    from ktd.chat.request import RequestDefaults

MOST_THREADS = 1024  # of a pool of the kernels
Group = Literal["model", "engine", "answers", "doors", "process"]

_SIZES = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZES |= {
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def parse_size(value: object) -> object:
    """Bytes of "60GiB", "60G" (the same), "60GB" (decimal) or a plain number. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].lower() not in _SIZES:
        raise ValueError("it should be a size such as 60GiB")
    return int(float(match[1]) * _SIZES[match[2].lower()])


def parse_sizes(value: object) -> tuple[object, ...]:
    """Bytes of each part of "14GiB,24GiB", as parse_size says. Raises ValueError."""
    if isinstance(value, tuple):
        return value
    return tuple(map(parse_size, value.split(",") if isinstance(value, str) else [value]))


def parse_off(value: object) -> object:
    """None for "off"."""
    return None if value == "off" else value


def _setting(group: Group, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


class Settings(BaseModel):
    """Every setting of `ktd serve` and `ktd chat`. Immutable; made by `ktd.settings_sources.load`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    gguf_path: Path | None = _setting(
        "model",
        None,
        "GGUF to serve: a file, one shard of a split, or a folder (default: the embedded model)",
    )
    model_path: Path | None = _setting(
        "model", None, "Hugging Face folder whose tokenizer and template replace the GGUF's own"
    )
    model_name: str | None = _setting(
        "model", None, "name that clients see (default: the file's name)", min_length=1, max_length=200
    )

    cpu_infer: int | None = _setting(
        "engine", None, "threads of the kernels (default: the physical cores)", ge=1, le=MOST_THREADS
    )
    isa: str | None = _setting(
        "engine", None, "instruction set of the kernels (default: the best that this CPU has)"
    )
    ram: Annotated[int | None, BeforeValidator(parse_size)] = _setting(
        "engine", None, "memory to use, such as 60GiB (default: what is available)", ge=2**20
    )
    vram: Annotated[tuple[NonNegativeInt, ...] | None, BeforeValidator(parse_sizes)] = _setting(
        "engine",
        None,
        "memory to use of each GPU, such as 14GiB, or 14GiB,24GiB of the first and the second; 0 uses no GPU"
        " (default: what is free)",
    )
    repack: bool = _setting(
        "engine", True, "copy low-bit experts into a faster layout of up to 20 % more memory, where it fits"
    )
    repack_cache: Annotated[Path | None, BeforeValidator(parse_off)] = _setting(
        "engine",
        None,
        "folder to keep what was repacked in, or `beside` the model: later starts map it (default: off, as it"
        " takes as much of the disk as the experts)",
    )
    context: int | None = _setting(
        "engine", None, "tokens of prompt and answer together (default: what the memory allows)", ge=16
    )
    max_sequences: int = _setting("engine", 8, "requests answered at once", ge=1, le=1024)
    queue_limit: int = _setting("engine", 64, "requests that may wait; one more is refused", ge=0, le=100_000)
    chunk_tokens: int | None = _setting(
        "engine", None, "tokens computed in one step (default: 512, with a GPU up to 4096)", ge=1, le=65_536
    )
    cache_type: Literal["bf16", "f32"] = _setting("engine", "bf16", "number type of the latent cache")
    use_cuda_graph: bool = _setting("engine", True, "record the decode step of a GPU; no effect without one")
    optimize_config_path: Path | None = _setting(
        "engine",
        None,
        "placement rules: YAML of names and devices, KTransformers' or one's own",
    )

    max_new_tokens: int | None = _setting(
        "answers",
        None,
        "length of an answer whose request sets none (default: what the context leaves)",
        ge=1,
    )
    force_think: bool = _setting("answers", False, "open every answer with a thought")
    temperature: float = _setting("answers", 0.6, "temperature of requests that set none", ge=0, le=5)
    top_p: float = _setting("answers", 0.95, "top_p of requests that set none", gt=0, le=1)

    host: str = _setting("doors", "127.0.0.1", "address of HTTP; any but the loopback needs an API key")
    port: int = _setting("doors", 10002, "port of HTTP", ge=0, le=65535)
    grpc_host: str = _setting("doors", "127.0.0.1", "address of gRPC; any but the loopback needs an API key")
    grpc_port: int = _setting("doors", 50051, "port of gRPC", ge=0, le=65535)
    api_key: str | None = _setting("doors", None, "key that clients must send as a bearer token", repr=False)
    ssl_certfile: Path | None = _setting("doors", None, "certificate chain in PEM, for both doors")
    ssl_keyfile: Path | None = _setting("doors", None, "private key in PEM, for both doors")

    drain_seconds: float = _setting(
        "process", 30.0, "how long running answers may finish after a stop", ge=0, le=3600
    )
    log_dir: Path | None = _setting("process", None, "folder for a rotating log (default: stderr)")
    log_file: str = _setting("process", "ktd.log", "name of the log in --log-dir", min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "process", "info", "how much is logged"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile belong together: give both or neither")
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError(
                "the API key (--api-key, KTD_API_KEY or api_key) holds blanks or characters beyond ASCII,"
                " which clients cannot send: choose another"
            )
        if self.api_key is None:
            for given, host in (("--host", self.host), ("--grpc-host", self.grpc_host)):
                if not is_loopback(host):
                    raise ValueError(
                        f"{given} {host} lets other machines in: set an API key with KTD_API_KEY or "
                        "--api-key, or listen on 127.0.0.1"
                    )
        if self.port and self.port == self.grpc_port and self.host == self.grpc_host:
            raise ValueError(f"HTTP and gRPC cannot share port {self.port}: change --port or --grpc-port")
        if self.chunk_tokens is not None and self.chunk_tokens < self.max_sequences:
            raise ValueError(
                f"--chunk-tokens {self.chunk_tokens} is less than the {self.max_sequences} sequences of "
                "--max-sequences, which write one token each in a step: raise it"
            )
        if Path(self.log_file).name != self.log_file:
            raise ValueError(f"--log-file {self.log_file} is a path: name the folder with --log-dir")
        return self

    def request_defaults(self) -> RequestDefaults:
        """What requests get that leave a field out."""
        from ktd.chat.request import RequestDefaults
        from ktd.types import SamplingParams

        return RequestDefaults(
            sampling=SamplingParams(temperature=self.temperature, top_p=self.top_p),
            max_tokens=self.max_new_tokens,
            thinking=True if self.force_think else None,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def add_arguments(parser: argparse.ArgumentParser, *groups: Group) -> None:
    """Adds `--config` and a flag for every setting of `groups`. Given flags land in the namespace as text."""
    titles = {
        "model": "the model",
        "engine": "the engine",
        "answers": "answers",
        "doors": "HTTP and gRPC",
        "process": "the process",
    }
    parser.add_argument(
        "--config", type=Path, help="settings file (default: ./ktd.toml, then the user's own)"
    )
    for group in groups:
        section = parser.add_argument_group(titles[group])
        for name, field in Settings.model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or extra["group"] != group:
                continue
            names = [name, *(alias for alias, known in ALIASES.items() if known == name)]
            default = "" if field.default is None else f" (default: {shown(field.default)})"
            options: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            choices = ("true", "false") if options else get_args(field.annotation)
            words = [choice for choice in choices if isinstance(choice, str)]
            section.add_argument(
                *map(flag, names),
                dest=name,
                default=argparse.SUPPRESS,
                metavar="|".join(words) or name.rsplit("_", 1)[-1].upper(),
                help=f"{field.description}{default}".replace("%", "%%"),
                **options,
            )


def shown(value: object) -> str:
    """A value as one writes it in a flag."""
    return str(value).lower() if isinstance(value, bool) else str(value)
