"""Asks an HTTP/2 service through the Pipe, in Open WebUI's environment, and prints what was negotiated."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h2.config
import h2.connection
import h2.events
from certificates import Authority
from pipe_kit import load_pipe_module

LINES = [{"reasoning_content": "Hm"}, {"content": "Yes"}]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    print(writer.get_extra_info("ssl_object").selected_alpn_protocol())
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    writer.write(connection.data_to_send())
    while data := await reader.read(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.StreamEnded):
                stream = event.stream_id
                headers = [(":status", "200"), ("content-type", "text/event-stream")]
                connection.send_headers(stream, headers)
                for delta in LINES:
                    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                    connection.send_data(stream, f"data: {json.dumps(chunk)}\n\n".encode())
                connection.send_data(stream, b"data: [DONE]\n\n", end_stream=True)
        writer.write(connection.data_to_send())
        await writer.drain()


async def main(folder: Path) -> None:
    authority = Authority(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("localhost"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    module: Any = load_pipe_module()
    pipe = module.Pipe()
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"
    pipe.valves = pipe.Valves(BASE_URL=url, MODELS="m", TLS_CA_FILE=str(authority.certificate))
    body = {"model": "ktd.m", "stream": True, "messages": [{"role": "user", "content": "?"}]}
    async for chunk in await pipe.pipe(body):
        delta = chunk["choices"][0]["delta"] if "choices" in chunk else chunk
        for name, label in (("reasoning_content", "thought"), ("content", "answer")):
            if name in delta:
                print(f"{label}:{delta[name]}")
    await pipe._links.close()
    server.close()
    await asyncio.sleep(0.1)  # the connection ends


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        asyncio.run(main(Path(work)))
