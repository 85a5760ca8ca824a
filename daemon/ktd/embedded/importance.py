"""python -m ktd.embedded.importance: how much each input of each matrix matters on training dialogues.

llama.cpp's quantiser weighs its rounding by the mean square of what flows into a matrix ("imatrix"), and
refuses the smallest types without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ktd.embedded.checkpoint import load_checkpoint
from ktd.embedded.corpus import Split, draw_dialogue
from ktd.embedded.tokenizer import Encoder
from ktd.model.hf_convert import gguf_name

Importance = dict[str, npt.NDArray[np.float32]]


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes an npz file."""
    parser = argparse.ArgumentParser(prog="python -m ktd.embedded.importance", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder that ktd.embedded.train wrote")
    parser.add_argument("npz", type=Path, help="file to write")
    parser.add_argument("--dialogues", type=int, default=400)
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    found = measure_importance(load_checkpoint(args.checkpoint), tokenizer, args.dialogues)
    np.savez(args.npz, **found)  # type: ignore[arg-type]  # numpy's stub takes the names for flags


class Watch:
    """Sums of squares of what flows into the matrices of a model, gathered by hooks."""

    def __init__(self, model: Any) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._hooks = []
        self._hidden = model.config.hidden_size
        heads = model.config.num_attention_heads
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                tensor = gguf_name(f"{name}.weight")
                self._hooks.append(module.register_forward_pre_hook(self._linear(tensor, heads)))
            elif name.endswith("mlp.experts"):
                layer = name.split(".")[2]
                self._hooks.append(module.register_forward_pre_hook(self._experts(f"blk.{layer}")))

    def close(self) -> Importance:
        """Takes the hooks off; float32 [columns] for each matrix, [n · columns] for a stack of n."""
        for hook in self._hooks:
            hook.remove()
        means = {name: total / self._counts[name].clamp(min=1) for name, total in self._sums.items()}
        found = {name: mean.flatten().numpy().astype(np.float32) for name, mean in means.items()}
        # Rows of the embedding are looked up, not multiplied: all their columns matter alike.
        return found | {"token_embd.weight": np.ones(self._hidden, np.float32)}

    def _add(self, name: str, squares: Tensor, count: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros(())) + squares
        self._counts[name] = self._counts.get(name, torch.zeros(())) + count

    def _linear(self, name: str, heads: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            squares, count = x.square().sum(0), torch.tensor(len(x))
            if name.endswith(
                "attn_kv_b.weight"
            ):  # its lower half goes into the file as attn_v_b, a matrix a head
                self._add(name.replace("kv_b", "v_b"), squares.expand(heads, -1), count)
            self._add(name, squares, count)

        return hook

    def _experts(self, prefix: str) -> Any:
        def hook(experts: Any, inputs: tuple[Tensor, ...]) -> None:
            x, chosen, _ = inputs
            shape = (experts.num_experts, experts.hidden_dim)
            outer, inner = torch.zeros(shape), torch.zeros(experts.num_experts, experts.intermediate_dim)
            counts = torch.zeros(experts.num_experts, 1)
            for expert in range(experts.num_experts):
                rows = x[(chosen == expert).any(-1)]
                gate, up = torch.nn.functional.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
                outer[expert] = rows.square().sum(0)
                inner[expert] = (experts.act_fn(gate) * up).square().sum(0)
                counts[expert] = len(rows)
            self._add(f"{prefix}.ffn_gate_exps.weight", outer, counts)
            self._add(f"{prefix}.ffn_up_exps.weight", outer, counts)
            self._add(f"{prefix}.ffn_down_exps.weight", inner, counts)

        return hook


@torch.inference_mode()
def measure_importance(model: Any, tokenizer: Tokenizer, dialogues: int, seed: int = 3) -> Importance:
    """Importance by GGUF tensor name, from that many training dialogues."""
    watch, encoder, rng = Watch(model), Encoder(tokenizer), Random(seed)
    for _ in range(dialogues):
        ids, _ = encoder.dialogue(draw_dialogue(rng, Split.TRAIN))
        model(torch.tensor([ids]), use_cache=False)
    return watch.close()


if __name__ == "__main__":
    main()
