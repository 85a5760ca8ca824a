"""A model as a few files small enough to send around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ktd.embedded.architecture import new_model

SHARD_BYTES = 15 << 20


def save_checkpoint(model: Any, folder: Path) -> list[Path]:
    """Writes all parameters and buffers in float32 as model-N.safetensors of at most 15 MiB."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        kept = tensor.detach().float().cpu().contiguous()
        if size + kept.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = kept
        size += kept.nbytes
    paths = [folder / f"model-{i}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    return paths


def load_checkpoint(folder: Path) -> Any:
    """The model that `save_checkpoint` wrote into the folder, in float32 on the CPU."""
    model = new_model()
    state = {
        name: t for path in sorted(folder.glob("model-*.safetensors")) for name, t in load_file(path).items()
    }
    model.load_state_dict(state)
    model.train(False)
    return model
