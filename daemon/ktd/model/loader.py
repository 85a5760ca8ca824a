"""A GGUF becomes a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ktd.errors import SettingsError
from ktd.gguf import WEIGHT_TYPES, GgufFile
from ktd.model.config import ModelConfig
from ktd.model.deepseek import DeepseekModel, Model
from ktd.model.placement import Placement
from ktd.model.sidecar import opened
from ktd.model.source import WeightSource
from ktd_kernels import Cpu, Weight
from ktd_kernels.numa import interleaved, pages_at_home, pages_by_node

log = logging.getLogger(__name__)

# A node with less than this part of its fair share of the weights is worth a warning, as are slices of which
# less lies on their own nodes.
_UNEVEN, _ASTRAY = 0.5, 0.9


def packed_sizes(gguf: GgufFile, cpu: Cpu, placement: Placement) -> dict[str, int]:
    """Bytes of the tensors that loading with `repack` packs, after that, by name."""
    sizes = {}
    for tensor in gguf.tensors.values():
        matrix = len(tensor.shape) in (2, 3) and tensor.ggml_type in WEIGHT_TYPES
        if matrix and not placement.on_gpu(tensor.name):
            packed = cpu.packed_bytes(int(tensor.ggml_type), tensor.shape)
            if packed:
                sizes[tensor.name] = packed
    return sizes


def load_model(
    gguf: GgufFile,
    cpu: Cpu,
    *,
    context: int,
    progress: Callable[[float], None],
    repack: bool = False,
    repack_cache: Path | None = None,
    placement: Placement | None = None,
) -> Model:
    """Maps the tensors of `gguf`, copies those that `placement` gives to GPUs (None: none), and prepares the
    graph for sequences of up to `context` tokens.

    With `repack`, tensors of the types that `cpu` packs are copied into its faster layout; `packed_sizes`
    says what that takes. Results are the same bits. `repack_cache` names a file that keeps the copies (see
    sidecar): it is made, or mapped.
    `progress` is told fractions from 0 to 1. Draft-head (nextn) layers are left out. Raises GgufError naming
    the key or tensor that is missing, misshapen or unsupported, SettingsError for a context the model cannot
    have and for a GPU that is not there or too small.
    """
    config = ModelConfig.from_gguf(gguf)
    if not 1 <= context <= config.context:
        raise SettingsError(
            f"A context of {context} tokens was asked for; {gguf.name} can have 1 to {config.context}."
        )
    placement = placement or Placement()
    sizes = packed_sizes(gguf, cpu, placement) if repack else {}
    with interleaved() as policy, opened(repack_cache, gguf, cpu, sizes, progress) as sidecar:
        source = WeightSource(gguf, progress, cpu if repack else None, sidecar)
        model = build_model(source, config, cpu, context, placement)
    if policy.refusal:
        log.warning("Weights are not spread over the nodes of memory: %s. %s", policy.refusal, policy.remedy)
    elif policy.nodes and source.areas:
        _tell_spread(source.areas, policy.nodes)
    if source.sliced:
        _tell_slices(source.sliced, cpu.nodes)
    progress(1.0)
    return model


def _tell_spread(areas: Sequence[tuple[int, int]], nodes: Sequence[int]) -> None:
    """Logs where weights for the CPU lie, as the system says of some of their pages."""
    try:
        pages = pages_by_node(areas)
    except OSError as error:
        log.warning("Where the weights lie cannot be seen: %s", error.strerror)
        return
    present = sum(count for node, count in pages.items() if node is not None)
    shares = {node: pages.get(node, 0) / max(present, 1) for node in nodes}
    log.info(
        "Weights in memory by node: %s (%d pages looked at, %d not read yet)",
        ", ".join(f"node {node}: {share:.0%}" for node, share in shares.items()),
        sum(pages.values()),
        pages.get(None, 0),
    )
    if present and min(shares.values()) < _UNEVEN / len(nodes):
        log.warning(
            "Weights lie unevenly: a node was full, or the file was in the page cache before, whose pages"
            " stay where they are. Free the cache (as root: echo 1 > /proc/sys/vm/drop_caches) and start"
            " again."
        )


def _tell_slices(weights: Sequence[Weight], nodes: Sequence[int]) -> None:
    """Logs how much of what nodes share lies where the threads are that multiply it, as the system says."""
    try:
        share = pages_at_home(weights, nodes)
    except OSError as error:
        log.warning("Where the slices of experts lie cannot be seen: %s", error.strerror)
        return
    log.info("Experts lie in slices for %d nodes of memory: %.0f%% at home", len(nodes), 100 * share)
    if share < _ASTRAY:
        log.warning(
            "Threads read a part of their slices from other nodes of memory: one was full, or the process was"
            " started with a memory policy (numactl, systemd). Free memory, or start it without."
        )


def build_model(
    source: WeightSource, config: ModelConfig, cpu: Cpu, context: int, placement: Placement
) -> Model:
    """The graph that `placement` asks for, with weights of `source`."""
    if not placement.devices:
        return DeepseekModel(source, config, cpu, context)
    # Imported here: they need torch, which takes seconds to import, and CUDA.
    from ktd.model.hybrid import HybridModel
    from ktd_kernels.gpu import Gpu

    return HybridModel(source, config, cpu, [Gpu(name) for name in placement.devices], placement, context)
