"""What the graph asks of a device: `ktd_kernels.Cpu` over numpy arrays, `ktd_kernels.gpu.GpuOps` over
tensors of one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

#: A numpy array for the CPU, a torch tensor for a GPU; shapes and types as `ktd_kernels.Cpu` says.
Array = Any
#: Blocks of a GGUF tensor where the device can reach them: ktd_kernels.Weight, ktd_kernels.cuda.GpuWeight.
Matrix = Any


class Ops(Protocol):
    """The ops of a layer. Meaning, shapes and types are those of `ktd_kernels.Cpu`'s methods."""

    def linear(self, w: Matrix, x: Array, out: Array, accumulate: bool = False) -> None: ...

    def linear_heads(self, w: Matrix, x: Array, out: Array) -> None: ...

    def mlp(
        self, gate: Matrix, up: Matrix, down: Matrix, x: Array, out: Array, accumulate: bool = False
    ) -> None: ...

    def moe(
        self,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        x: Array,
        ids: Array,
        weights: Array,
        out: Array,
        accumulate: bool = False,
    ) -> None: ...

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None: ...

    def rope(self, x: Array, positions: Array, table: Array) -> None: ...

    def store_normed(
        self, kv: Array, weight: Array, eps: float, positions: Array, table: Array, slots: Array, cache: Array
    ) -> None: ...

    def mla_attention(
        self,
        q_latent: Array,
        q_rope: Array,
        cache: Array,
        page_table: Array,
        seq_of_row: Array,
        context: Array,
        scale: float,
        out: Array,
    ) -> None: ...

    def route(
        self,
        logits: Array,
        bias: Array | None,
        gating: str,
        groups: int,
        groups_used: int,
        group_score: str,
        used: int,
        normalise: bool,
        scale: float,
        ids_out: Array,
        weights_out: Array,
    ) -> None: ...


class PromptOps(Ops, Protocol):
    """What a device to which experts are sent has besides. Meaning, shapes and types are those of
    `ktd_kernels.cuda`."""

    def pairs(self, x: Array, ids: Array, weights: Array, experts: int) -> Any: ...

    def add_experts(
        self, gate: Matrix, up: Matrix, down: Matrix, pairs: Any, first: int, out: Array
    ) -> None: ...


class Rows(Protocol):
    """Where the rows of a step stand and what they see: fields of Batch, where the device can read them."""

    @property
    def positions(self) -> Array: ...

    @property
    def slots(self) -> Array: ...

    @property
    def seq_of_row(self) -> Array: ...

    @property
    def context(self) -> Array: ...

    @property
    def page_table(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class RowsPart:
    """Some of the rows of a step."""

    positions: Array
    slots: Array
    seq_of_row: Array
    context: Array
    page_table: Array

    @classmethod
    def of(cls, rows: Rows, which: slice | Array) -> RowsPart:
        """A stretch of the rows, or those that an array of int64 numbers names."""
        return cls(
            rows.positions[which],
            rows.slots[which],
            rows.seq_of_row[which],
            rows.context[which],
            rows.page_table,
        )
