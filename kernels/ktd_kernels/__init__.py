"""CPU kernels of ktd: products with GGUF blocks and the other ops of a layer, in several instruction sets.

All arrays are float32 on the CPU unless a method says otherwise; numpy arrays and torch tensors are taken
alike. A wrong shape, type or layout raises ValueError or TypeError before anything runs; results are written
into `out`.
"""

from ktd_kernels._C import (
    Cpu,
    MoeJob,
    MoeSequence,
    ReadGuard,
    Topology,
    Weight,
    amx_refusal,
    cpu_features,
    isa_list,
    memory_bandwidth,
    read_topology,
)

__all__ = [
    "Cpu",
    "MoeJob",
    "MoeSequence",
    "ReadGuard",
    "Topology",
    "Weight",
    "amx_refusal",
    "cpu_features",
    "isa_list",
    "memory_bandwidth",
    "read_topology",
]
