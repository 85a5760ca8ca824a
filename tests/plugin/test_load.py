"""The file as Open WebUI takes it: executed in a fresh module, its text searched and replaced."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pipe_kit import PIPE_FILE, load_pipe_module

SOURCE = PIPE_FILE.read_text(encoding="utf-8")


def embed_module() -> Any:
    spec = importlib.util.spec_from_file_location("embed", PIPE_FILE.with_name("embed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_embedded_schema_and_splitter_are_current() -> None:
    assert embed_module().render(SOURCE) == SOURCE, "run `python plugin/embed.py`"


def test_embedded_splitter_is_the_daemons_own() -> None:
    from ktd.chat.splitter import ReasoningSplitter

    assert inspect.getsource(ReasoningSplitter) in SOURCE


def test_open_webui_rewrites_nothing() -> None:
    for phrase in ("from utils", "from apps", "from main", "from config"):
        assert phrase not in SOURCE
    assert not re.search(r"^\s*requirements:", SOURCE, re.MULTILINE)


def test_frontmatter_begins_on_the_first_line() -> None:
    first, *rest = SOURCE.splitlines()
    assert first == '"""'
    pairs = [line.partition(": ") for line in rest[: rest.index('"""')]]
    assert {"title", "version", "description"} <= {key for key, _, _ in pairs}
    assert all(re.fullmatch(r"[a-z_]+", key) and value for key, _, value in pairs)


def test_loads_twice_in_one_process_even_with_a_changed_schema() -> None:
    load_pipe_module()
    embed = embed_module()
    from google.protobuf import descriptor_pb2

    from ktd_proto.v1 import engine_pb2

    changed = descriptor_pb2.FileDescriptorProto.FromString(engine_pb2.DESCRIPTOR.serialized_pb)
    changed.message_type[0].field.add(name="added", number=99, type=9, label=1)
    text = embed.base64.b85encode(changed.SerializeToString()).decode()
    module = load_pipe_module(re.sub(r"SCHEMA = \([\s\S]*?\n\)\n", lambda _: f'SCHEMA = "{text}"\n', SOURCE))
    assert module.WIRE["ChatRequest"](added="x").added == "x"
    assert not hasattr(load_pipe_module().WIRE["ChatRequest"](), "added")


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf", "httpx"])
async def test_a_missing_package_is_named_in_the_chat(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    module = load_pipe_module()
    pipe = module.Pipe()
    url = "http://127.0.0.1:1/v1" if missing == "httpx" else "grpc://127.0.0.1:1"
    pipe.valves = pipe.Valves(BASE_URL=url)
    body = {"model": "ktd.any", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    chunks = [chunk async for chunk in await pipe.pipe(body)]
    assert missing.split(".")[0] in chunks[-1]["error"]["message"]


def test_imports_nothing_of_ours(tmp_path: Path) -> None:
    copy = tmp_path / "pasted.py"
    copy.write_text(SOURCE, encoding="utf-8")
    code = f"""
import sys
exec(open({str(copy)!r}).read())
print([name for name in sys.modules if name.partition(".")[0] in ("ktd", "ktd_proto", "ktd_kernels")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "[]"


def test_valves_are_described_in_both_languages_and_keys_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTD_BASE_URL", "grpc://elsewhere:1")
    monkeypatch.setenv("KTD_API_KEY", "secret")
    pipe = load_pipe_module().Pipe()
    assert (pipe.valves.BASE_URL, pipe.valves.API_KEY) == ("grpc://elsewhere:1", "secret")
    for valves in (pipe.Valves, pipe.UserValves):
        schema = valves.model_json_schema()
        assert "$defs" not in schema, "an enum is shown as a bare text box"
        for name, spec in schema["properties"].items():
            assert re.search(r"[\u4e00-\u9fff]", spec["description"]), name
            assert re.search(r"[A-Za-z]{3}", spec["description"]), name
            assert (spec.get("input", {}).get("type") == "password") == (name == "API_KEY")


def test_a_cleared_number_valve_is_unset() -> None:
    valves = load_pipe_module().Pipe.Valves(TEMPERATURE="", MAX_TOKENS="")
    assert valves.TEMPERATURE is None
    assert valves.MAX_TOKENS is None
    assert load_pipe_module().Pipe.Valves(TEMPERATURE="0.7").TEMPERATURE == 0.7
