"""The model: a `deepseek2` GGUF as one graph over the kernels."""

from ktd.model.batch import Batch, Piece
from ktd.model.config import ModelConfig, MoeConfig, YarnConfig
from ktd.model.deepseek import Model, Tick
from ktd.model.loader import load_model, packed_sizes
from ktd.model.placement import GpuNeeds, Placement, VramBytes, vram_bytes

__all__ = [
    "Batch",
    "GpuNeeds",
    "Model",
    "ModelConfig",
    "MoeConfig",
    "Piece",
    "Placement",
    "Tick",
    "VramBytes",
    "YarnConfig",
    "load_model",
    "packed_sizes",
    "vram_bytes",
]
