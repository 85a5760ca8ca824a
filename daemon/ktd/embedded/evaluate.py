"""python -m ktd.embedded.evaluate: held-out accuracy of GGUF files through ktd's own kernels.

An answer counts when thought and answer are, token by token, what the model should write. Greedy text is that
exactly when each token is the model's first choice after those before it, so one pass over prompt and
reply tells, and batching does not change a row's bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import track

from ktd.cache import LatentCache
from ktd.embedded.corpus import TASKS, Split, draw_dialogue
from ktd.embedded.corpus.exchange import Dialogue
from ktd.embedded.template import END_THINK
from ktd.gguf import GgufFile
from ktd.model import Batch, Model, Piece, load_model
from ktd.text import TextModel
from ktd.types import Message
from ktd_kernels import Cpu

_LONGEST = 2048  # tokens of a dialogue, and about as many in one step


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, prints a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m ktd.embedded.evaluate", description=__doc__)
    parser.add_argument(
        "--gguf", type=Path, action="append", required=True, help="file to measure; repeatable"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--each", type=int, default=100, help="held-out dialogues per task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    results = {
        path.stem.removeprefix("ktd-demo-"): measure(path, args.tasks, args.each, args.seed)
        for path in args.gguf
    }
    print(json.dumps(results, indent=1) if args.json else table(results, args.tasks))


def measure(path: Path, tasks: Iterable[str], each: int, seed: int = 7) -> dict[str, float]:
    """Share of exact replies to `each` held-out dialogues of every task."""
    found = {}
    with GgufFile.open(path) as gguf:
        text = TextModel.from_gguf(gguf)
        model = load_model(gguf, Cpu(), context=_LONGEST, progress=lambda fraction: None)
        for task in track(list(tasks), path.name, console=Console(stderr=True)):
            rng = Random(f"{seed}:{task}")
            dialogues = [draw_dialogue(rng, Split.HELD_OUT, task, plain=True) for _ in range(each)]
            exact = exact_replies(model, [encode(text, dialogue) for dialogue in dialogues])
            found[task] = sum(exact) / each
    return found


def messages_of(dialogue: Dialogue) -> list[Message]:
    """The dialogue up to the question as a client would send it."""
    messages = [Message("system", dialogue.system)] if dialogue.system else []
    for question, answer in dialogue.history:
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", dialogue.last.question)]


def encode(text: TextModel, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """(prompt, reply) in token ids, through the same tokenizer and template that serve."""
    prompt = text.render(messages_of(dialogue), thinking=None if dialogue.thinking else False).ids
    reply = text.encode(f"{dialogue.last.thought}\n")
    reply.append(text.vocabulary.structural[END_THINK])
    reply += text.encode(f"\n\n{dialogue.last.answer}")
    return prompt, [*reply, min(text.stop_ids)]


def exact_replies(model: Model, dialogues: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """For each (prompt, reply): whether the model would write that reply greedily."""
    exact: list[bool] = []
    for group in _groups(dialogues):
        # One page holds a whole dialogue here: nothing is shared and nothing is kept.
        cache = LatentCache(model.config.layers, len(group), _LONGEST, model.config.latent)
        pieces = [
            Piece(tokens=[*prompt, *reply][:-1], start=0, pages=[page], logits=len(reply))
            for page, (prompt, reply) in enumerate(group)
        ]
        choices = model.forward(Batch.of(pieces, _LONGEST), cache).argmax(-1).tolist()
        for _, reply in group:
            exact.append(choices[: len(reply)] == reply)
            del choices[: len(reply)]
    return exact


def table(results: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """A Markdown table, a row a task and a column a file, in percent."""
    lines = [f"| task | {' | '.join(results)} |", f"|---|{'---:|' * len(results)}"]
    for task in tasks:
        lines.append(f"| {task} | {' | '.join(f'{100 * result[task]:.1f}' for result in results.values())} |")
    return "\n".join(lines)


def _groups(
    dialogues: Sequence[tuple[list[int], list[int]]],
) -> Iterable[list[tuple[list[int], list[int]]]]:
    group: list[tuple[list[int], list[int]]] = []
    size = 0
    for prompt, reply in dialogues:
        if group and size + len(prompt) + len(reply) > _LONGEST:
            yield group
            group, size = [], 0
        group.append((prompt, reply))
        size += len(prompt) + len(reply)
    if group:
        yield group


if __name__ == "__main__":
    main()
