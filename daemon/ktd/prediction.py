"""The speed that a plan will have, measured before anything is loaded.

The graph of the whole model is built as the plan says, on the devices it names, but over random weights, of
which layers share copies: a step then computes, reads, sends and waits as it will with the file. There are
as many copies as it takes for no layer to find its weights in a cache because another has just read them.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from ktd.bench.session import Session
from ktd.bench.timing import last_level_cache_bytes
from ktd.engine import Engine, EngineConfig
from ktd.gguf import GgufFile, TensorInfo
from ktd.model.config import ModelConfig
from ktd.model.device import Device
from ktd.model.loader import build_model
from ktd.model.ops import Matrix
from ktd.model.placement import ROUTED
from ktd.model.source import WeightSource
from ktd.plan import PAGE_SIZE, Plan
from ktd.synth.blocks import random_bytes
from ktd_kernels import Cpu
from ktd_kernels.numa import interleaved

_BLOCK = re.compile(r"blk\.(\d+)\.")
# Each layer has its own: with one router for all, near layers would choose the same experts.
_ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.")
# Bytes that a token reads between two uses of a copy, and bytes of the experts it may choose from, as
# multiples of the caches: the second leaves one byte in sixteen there at most.
_READ_BETWEEN, _CHOICE = 4, 16
_TILE_VALUES = 1 << 22
# Tokens of a prompt, of an answer that warms up, and the time to spend on the one that is measured.
_PROMPT, _WARM_UP, _SECONDS = 32, 4, 3.0
_LEAST_TOKENS, _MOST_TOKENS = 8, 64

_Weights = TypeVar("_Weights")


class Sample:
    """The model of `plan` over shared random weights."""

    def __init__(self, gguf: GgufFile, plan: Plan, cpu: Cpu) -> None:
        self._config = ModelConfig.from_gguf(gguf)
        self._plan, self._cpu = plan, cpu
        tensors = {t.name: t for t in gguf.tensors.values() if _layer(t) < self._config.layers}
        self._file = _RandomFile(gguf.name, tensors, _copies(tensors, plan, self._config))

    @property
    def nbytes(self) -> int:
        """What it takes of the memory or of the GPU's, and of the memory in passing."""
        tensors = self._file.tensors.values()
        kept = sum({self._file.key(tensor): self._kept(tensor) for tensor in tensors}.values())
        return kept + max(tensor.nbytes for tensor in tensors)

    def _kept(self, tensor: TensorInfo) -> int:
        matrix = len(tensor.shape) > 1 and self._plan.repacked
        packed: int = self._cpu.packed_bytes(int(tensor.ggml_type), tensor.shape) if matrix else 0
        return packed or tensor.nbytes

    def seconds_a_token(self) -> float:
        """Of an answer behind a short prompt, alone."""
        plan, cpu = self._plan, self._cpu
        context = _PROMPT + max(_WARM_UP, _MOST_TOKENS) + 1
        source = _SharedWeights(self._file, cpu if plan.repacked else None)
        with interleaved():
            model = build_model(source, self._config, cpu, context, plan.placement)
        pages = math.ceil(context / PAGE_SIZE) + 1
        engine = Engine(model, EngineConfig(context, 1, PAGE_SIZE, pages, _PROMPT, queue_limit=1))
        engine.start()
        try:
            session = Session(engine, self._config.vocab_size)
            warm = session.decode(1, _PROMPT, _WARM_UP)
            tokens = min(max(int(_SECONDS / warm), _LEAST_TOKENS), _MOST_TOKENS)
            return session.decode(1, _PROMPT, tokens)
        finally:
            engine.stop()


class _RandomFile:
    """As `Tensors` says: the tensors of a file, each time with new random blocks."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], copies: int) -> None:
        self.name, self.tensors = name, tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._keys: dict[str, object] = {}
        seen = Counter[tuple[str, int]]()
        for tensor in tensors.values():
            role = (_BLOCK.sub("", tensor.name), int(tensor.ggml_type))
            self._keys[tensor.name] = (
                tensor.name if _ROUTER.match(tensor.name) else (*role, seen[role] % copies)
            )
            seen[role] += 1

    def key(self, tensor: TensorInfo) -> object:
        """The same for tensors that share their weights."""
        return self._keys[tensor.name]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Shared memory: it has small pages, as a mapped file has."""
        tensor = self.tensors[name]
        kind = GGMLQuantizationType(int(tensor.ggml_type))
        *rows, cols = tensor.shape
        tile_rows = min(math.prod(rows), max(_TILE_VALUES // cols, 1))
        mean = 0.0 if rows else 1.0  # of vectors, most are norms
        tile = random_bytes(kind, tile_rows * cols, cols**-0.5, np.random.default_rng(), mean)
        blocks = np.frombuffer(mmap.mmap(-1, tensor.nbytes), np.uint8)

        def fill(start: int) -> None:
            part = blocks[start : start + tile.size]
            part[:] = tile[: part.size]

        with ThreadPoolExecutor() as pool:  # the system's part, clearing pages, is most of it
            list(pool.map(fill, range(0, tensor.nbytes, tile.size)))
        return blocks

    def release(self, name: str) -> None:
        """Nothing: blocks go with the last view of them."""


class _SharedWeights(WeightSource):
    """Hands out the same weights for tensors of one key."""

    def __init__(self, file: _RandomFile, packer: Cpu | None) -> None:
        super().__init__(file, lambda fraction: None, packer)
        self._file = file
        self._known: dict[object, object] = {}

    @property
    def sendable(self) -> bool:
        """As of WeightSource."""
        return False

    def on(self, target: Device) -> WeightSource:
        """As of WeightSource."""
        source = _SharedWeights(self._file, None)
        source._target = target
        return source

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """As of WeightSource."""
        return self._once(name, lambda: WeightSource.matrix(self, name, rows, cols))

    def stack(self, name: str, count: int, rows: int, cols: int, *, sliced: bool = False) -> Matrix:
        """As of WeightSource."""
        return self._once(name, lambda: WeightSource.stack(self, name, count, rows, cols, sliced=sliced))

    def halves(
        self, name: str, count: int, rows: int, cols: int, *, sliced: bool = False
    ) -> tuple[Matrix, Matrix]:
        """As of WeightSource."""
        return self._once(name, lambda: WeightSource.halves(self, name, count, rows, cols, sliced=sliced))

    def split_kv_b(self, name: str, heads: int, nope: int, value: int, kv_lora: int) -> tuple[Matrix, Matrix]:
        """As of WeightSource."""
        return self._once(name, lambda: WeightSource.split_kv_b(self, name, heads, nope, value, kv_lora))

    def _once(self, name: str, make: Callable[[], _Weights]) -> _Weights:
        key = self._file.key(self._file.tensors[name])
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]  # type: ignore[return-value]


def _layer(tensor: TensorInfo) -> int:
    block = _BLOCK.match(tensor.name)
    return int(block[1]) if block else -1


def _copies(tensors: Mapping[str, TensorInfo], plan: Plan, config: ModelConfig) -> int:
    cache = last_level_cache_bytes()
    read = (plan.ram_per_token + sum(plan.gpu_per_token)) / config.layers
    copies = math.ceil(_READ_BETWEEN * cache / max(read, 1))
    routed = sum(t.nbytes for t in tensors.values() if ROUTED.match(t.name))
    if routed:
        choice = routed / (config.layers - config.dense_layers)
        copies = max(copies, math.ceil(_CHOICE * cache / choice))
    return min(copies, config.layers)
