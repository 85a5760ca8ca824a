"""The `ktd` command: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 a fault of ours or of the daemon, 2 the user's input is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ktd
from ktd import commands
from ktd.errors import KtdError, UserError

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand that is known by name and not imported yet."""

    name: str
    help: str
    module: str


class Parser(argparse.ArgumentParser):
    """Mistakes are raised as UserError, and an unknown flag is answered with the nearest known one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        sentence = message[0].upper() + message[1:].rstrip(".?")
        raise UserError(f"{sentence}{'?' if message.endswith('?') else '.'} See {self.prog} --help.")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments. Raises UserError."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            from ktd.settings_sources import suggest

            name = unknown[0].split("=")[0]
            if not name.startswith("-") and "--gguf-path" in self._option_string_actions:
                self.error(f"unknown argument {unknown[0]}: a model is named with --gguf-path {unknown[0]}")
            self.error(f"unknown argument {name}{suggest(name, self._option_string_actions)}")
        return args


def find_commands() -> dict[str, Command]:
    """Every subcommand by name, read from its source: importing them all would take seconds."""
    found = {}
    for module in pkgutil.iter_modules(commands.__path__):
        source = Path(commands.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
        literals = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("NAME", "HELP")
        }
        command = Command(literals["NAME"], literals["HELP"], f"{commands.__name__}.{module.name}")
        found[command.name] = command
    return found


def run(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. Raises what the command raises."""
    known = find_commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(known))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"ktd {ktd.__version__}")
        return 0
    if argv[0] not in known:
        from ktd.settings_sources import suggest

        hint = suggest(argv[0], known) or f": commands are {', '.join(sorted(known))}."
        raise UserError(f"There is no command {argv[0]}{hint}")
    command = known[argv[0]]
    module = importlib.import_module(command.module)
    parser = Parser(prog=f"ktd {command.name}", description=command.help)
    module.configure(parser)
    from ktd.tutorial_flags import split_ignored

    rest, ignored = split_ignored(argv[1:])
    if ignored:
        print(
            f"ktd: without effect here, as in most releases they come from: {', '.join(ignored)}",
            file=sys.stderr,
        )
    code: int = module.run(parser.parse_strictly(rest))
    return code


def _overview(known: dict[str, Command]) -> str:
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {known[name].help}" for name in sorted(known)]
    return "\n".join(["usage: ktd COMMAND [--help] [options]", "", str(ktd.__doc__), "", "commands:", *lines])


def main() -> int:
    """Entry point of the console script."""
    _mend_streams()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"ktd: {error}", file=sys.stderr)
        return USER_ERROR
    except KtdError as error:
        print(f"ktd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # the reader left (`ktd inspect f.gguf | head`)
        return BROKEN_PIPE
    except OSError as error:
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        print(f"ktd: {where}{error.strerror or error}.", file=sys.stderr)
        _drop_output()  # which may be what failed, as on a full disk
        return 1


def _mend_streams() -> None:
    """Makes up for streams that whoever started ktd has closed, and for an encoding that lacks characters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """Keeps the interpreter from complaining at exit about output that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
