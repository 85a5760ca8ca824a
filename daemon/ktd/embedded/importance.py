"""How much each input of each matrix matters: the mean square of what flows into it on training dialogues.

llama.cpp's quantiser weighs its rounding by this ("imatrix") and refuses the smallest types without it.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ktd.embedded.corpus import Split, draw_dialogue
from ktd.embedded.tokenizer import Encoder
from ktd.model.hf_convert import hf_name

Importance = dict[str, npt.NDArray[np.float32]]


@torch.inference_mode()
def measure_importance(model: Any, tokenizer: Tokenizer, dialogues: int = 400, seed: int = 3) -> Importance:
    """GGUF tensor name → float32 [experts x columns] for expert stacks, [columns] for other matrices."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(_watch(f"{name}.weight", sums, counts)))
        elif name.endswith("mlp.experts"):
            handles.append(module.register_forward_pre_hook(_watch_experts(name, sums, counts)))
    encoder, rng = Encoder(tokenizer), Random(seed)
    for _ in range(dialogues):
        ids, _ = encoder.dialogue(draw_dialogue(rng, Split.TRAIN))
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    found: Importance = {}
    for name, total in sums.items():
        mean = total / counts[name].clamp(min=1)[..., None]
        found[hf_name(name)] = mean.flatten().numpy().astype(np.float32)
    return found
