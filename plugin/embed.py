"""Writes into the Pipe what one pasteable file cannot import: the wire's schema and the splitter.

    python plugin/embed.py

Each goes between its `# >>> embedded` and `# <<< embedded` lines. Run it after a change to proto/ or to the
splitter: a test fails while the Pipe holds anything else.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIPE = ROOT / "plugin" / "ktd_pipe.py"
SPLITTER = ROOT / "daemon" / "ktd" / "chat" / "splitter.py"
WIDTH = 100


def schema() -> str:
    """The FileDescriptorProto of engine.proto, as a Python constant."""
    from ktd_proto.v1 import engine_pb2

    text = base64.b85encode(engine_pb2.DESCRIPTOR.serialized_pb).decode("ascii")
    lines = [f'    "{text[at : at + WIDTH]}"\n' for at in range(0, len(text), WIDTH)]
    return "SCHEMA = (\n" + "".join(lines) + ")\n"


def splitter() -> str:
    """The splitter's source without its docstring and imports, which the Pipe has already."""
    source = SPLITTER.read_text(encoding="utf-8")
    body = re.sub(r'\A""".*?"""\n', "", source, flags=re.DOTALL)
    return re.sub(r"^(?:from|import) .*\n", "", body, flags=re.MULTILINE).strip() + "\n\n\n"


def render(pipe: str) -> str:
    """The Pipe's text with both regions up to date."""
    pipe = _fill(pipe, "proto/ktd_proto/v1/engine.proto", schema())
    return _fill(pipe, "daemon/ktd/chat/splitter.py", "\n" + splitter())


def _fill(pipe: str, origin: str, content: str) -> str:
    first = re.search(rf"^# >>> embedded by plugin/embed\.py: {re.escape(origin)}.*\n", pipe, re.MULTILINE)
    end = pipe.find("# <<< embedded", first.end()) if first else -1
    if first is None or end < 0:
        sys.exit(f"{PIPE} has no region for {origin}: put its two marking lines back")
    return pipe[: first.end()] + content + pipe[end:]


if __name__ == "__main__":
    PIPE.write_text(render(PIPE.read_text(encoding="utf-8")), encoding="utf-8")
