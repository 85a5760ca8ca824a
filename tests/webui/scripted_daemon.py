"""A daemon with written answers and a slow reader: `python tests/webui/scripted_daemon.py PORT`."""

from __future__ import annotations

import asyncio
import re
import sys

from fake_daemon import fake_daemon

# How the Pipe puts the question behind sources.
QUESTION = re.compile(r"\A.*^# (?:The user's message is:|用户消息为：)\n", re.DOTALL | re.MULTILINE)
CITED = " [citation:1] It is also wide [citation:2], they say [citation:9]. Both [citation:1][citation:2]."

LIGHTHOUSE = (
    "A lighthouse is known by its rhythm. Every lamp along a coast keeps its own pattern of light and dark, "
    "so that a sailor who counts the seconds knows which tower he sees, and where the rocks are. "
)

# 150 characters are written and 1,000 read in a second: time enough to look at the page in between.
STEP = 0.02
READ = 20


def hostile(url: str) -> str:
    """Every way we know to make a page fetch something from `url`."""
    return "\n\n".join(
        [
            f"![a]({url}/image?q=secret)",
            f"[![b]({url}/linked)]({url}/link)",
            f"![c][ref] an open ` tick ![d]({url}/tick)",
            f"<iframe src='{url}/frame'></iframe>",
            f'<iframe src="{url}/frame2"></iframe>',
            f"<video>{url}/video</video>",
            f"<audio>{url}/audio</audio>",
            f"<div>\n```\n<video>{url}/fenced</video>\n```\n</div>",
            f'<details type="reasoning">\n<summary>x</summary>\n![e]({url}/details)\n</details>',
            f"<img src='{url}/img'> <script>document.title='owned'</script> [x](javascript:alert(1))",
            f"[ref]: {url}/reference",
        ]
    )


def call(name: str, arguments: str) -> str:
    """A tool call as R1 writes it."""
    inner = f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
    return f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{inner}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def script(prompt: str) -> str:
    """The answer to the last message; a message with search results is answered with citations."""
    asked = QUESTION.sub("", prompt).strip()
    cited = CITED if QUESTION.match(prompt) else ""
    if asked.startswith("/long"):
        return "<think>\nThis takes long.\n</think>\n\n" + "again and " * 10_000
    if asked.startswith("Use a tool"):
        return call("get_current_timestamp", "{}")
    if "current_timestamp" in asked:  # the tool's result
        return f"The tool said: {asked}"
    if asked.startswith("Search for ever") or '"snippet"' in asked:  # searches whatever it finds
        return call("search_web", '{"query": "more"}')
    if asked.startswith("Tell me"):
        return f"<think>\nThey want to hear about it.\n</think>\n\n{LIGHTHOUSE * 50}"
    if asked.startswith("/think"):
        return "<think>\n" + "Let me think about it. " * 2_000
    if asked.startswith("/fetch "):
        text = hostile(asked.removeprefix("/fetch "))
        return f"<think>\n{text}\n</think>\n\n{text}\n\nDone."
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
