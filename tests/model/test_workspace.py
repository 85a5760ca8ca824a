"""The buffers of a step: the system has handed them out when the first prompt comes."""

from __future__ import annotations

import resource
from types import SimpleNamespace
from typing import Any

import numpy as np

from ktd.model.workspace import Workspace

_SIZES = {"hidden": 512, "q_lora": 64, "heads": 16, "nope": 32, "rope": 16, "latent": 80, "kv_lora": 64}


def test_no_page_is_new_to_the_first_prompt() -> None:
    config: Any = SimpleNamespace(moe=None, value=32, vocab_size=1000, **_SIZES)
    workspace = Workspace(config)
    workspace.reserve(4096, 512)
    views, logits = workspace.rows(4096), workspace.logits(512)
    part = views.attention[0]
    buffers = [views.x, views.h, part.q_a, part.q, part.kv, part.q_latent, part.o_latent, part.o, logits]
    pages = sum(buffer.nbytes for buffer in buffers) // resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for buffer in buffers:
        np.asarray(buffer).fill(1.0)
    assert pages > 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10
