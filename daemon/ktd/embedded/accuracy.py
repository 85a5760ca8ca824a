"""Held-out accuracy by teacher forcing.

Greedy text equals the expected reply exactly when every token of the reply is the model's first choice
after the tokens before it, so one forward pass tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import torch
from tokenizers import Tokenizer

from ktd.embedded.corpus import TASKS, Split, draw_dialogue
from ktd.embedded.fast_forward import FastForward
from ktd.embedded.tokenizer import Encoder

EncodedDialogue = tuple[list[int], int]


def held_out_set(tokenizer: Tokenizer, per_task: int, seed: int = 7) -> dict[str, list[EncodedDialogue]]:
    """`per_task` held-out dialogues of each task, encoded."""
    encoder = Encoder(tokenizer)
    found = {}
    for task in TASKS:
        rng = Random(f"{seed}:{task}")
        dialogues = [draw_dialogue(rng, Split.HELD_OUT, task, plain=True) for _ in range(per_task)]
        found[task] = [encoder.dialogue(dialogue) for dialogue in dialogues]
    return found


@torch.inference_mode()
def exact_match(
    model: FastForward, sets: Mapping[str, list[EncodedDialogue]], device: str, rows: int = 64
) -> dict[str, float]:
    """Share of dialogues, by task, whose whole reply the model would write greedily."""
    return {task: _matches(model, items, device, rows) / len(items) for task, items in sets.items()}


def _matches(model: FastForward, items: list[EncodedDialogue], device: str, rows: int) -> int:
    right = 0
    for start in range(0, len(items), rows):
        part = items[start : start + rows]
        length = max(len(ids) for ids, _ in part)
        ids = torch.zeros(len(part), length, dtype=torch.long)
        wanted = torch.zeros(len(part), length, dtype=torch.bool)
        for row, (tokens, prompt) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            wanted[row, prompt : len(tokens)] = True
        ids, wanted = ids.to(device), wanted.to(device)
        positions = torch.arange(length, device=device).expand_as(ids)
        hidden, _ = model(ids, positions, torch.zeros_like(ids))
        choice = model.logits(hidden).argmax(-1)
        right += int(((choice[:, :-1] == ids[:, 1:]) | ~wanted[:, 1:]).all(1).sum())
    return right
