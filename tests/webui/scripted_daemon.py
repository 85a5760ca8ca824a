"""A daemon with written answers and a slow reader: `python tests/webui/scripted_daemon.py PORT`."""

from __future__ import annotations

import asyncio
import sys

from fake_daemon import fake_daemon

QUESTION = "# The user's message is:\n"

# 150 characters are written and 1,000 read in a second: time enough to look at the page in between.
STEP = 0.02
READ = 20


def script(prompt: str) -> str:
    """The answer to the last message; a message with search results is answered with citations."""
    cited = " [citation:1] It is also wide [citation:2], they say [citation:9]." if QUESTION in prompt else ""
    asked = prompt.rpartition(QUESTION)[2].strip()
    if asked.startswith("/long"):
        return "<think>\nThis takes long.\n</think>\n\n" + "again and " * 10_000
    if asked.startswith("/think"):
        return "<think>\n" + "Let me think about it. " * 2_000
    if asked.startswith("/say "):
        return asked.removeprefix("/say ").replace("\\n", "\n")
    first = asked[:60]
    thought = f"The question is: {first}\nLet me see: **two** and `two` is $4$."
    return f"<think>\n{thought}\n</think>\n\nYou asked: {first}.{cited}"


async def main(port: int) -> None:
    async with fake_daemon(script, port=port, step_seconds=STEP, prefill_per_step=READ):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
