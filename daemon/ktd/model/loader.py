"""A GGUF becomes a model."""

from __future__ import annotations

from collections.abc import Callable

from ktd.errors import SettingsError
from ktd.gguf import GgufFile
from ktd.model.config import ModelConfig
from ktd.model.deepseek import DeepseekModel
from ktd.model.source import WeightSource
from ktd_kernels import Cpu


def load_model(gguf: GgufFile, cpu: Cpu, *, context: int, progress: Callable[[float], None]) -> DeepseekModel:
    """Maps the tensors of `gguf` and prepares the graph for sequences of up to `context` tokens.

    `progress` is told fractions from 0 to 1. Draft-head (nextn) layers are left out. Raises GgufError naming
    the key or tensor that is missing, misshapen or unsupported, SettingsError for a context the model cannot
    have.
    """
    config = ModelConfig.from_gguf(gguf)
    if not 1 <= context <= config.context:
        raise SettingsError(
            f"A context of {context} tokens was asked for; {gguf.name} can have 1 to {config.context}."
        )
    model = DeepseekModel(WeightSource(gguf, progress), config, cpu, context)
    progress(1.0)
    return model
