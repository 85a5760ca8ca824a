from collections.abc import Sequence
from typing import Annotated, Final

import numpy
from numpy.typing import NDArray


def isa_list() -> list[str]:
    """Names of the instruction sets this CPU and system support, best first."""

def cpu_features() -> list[str]:
    """CPU features, finer than isa_list, that the system has enabled."""

def amx_refusal() -> str:
    """Why the AMX that this CPU has cannot be used, or an empty string."""

def memory_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """
    Bytes a second that `threads` threads together read from memory, measured over `seconds`.
    """

class Topology:
    """
    The CPUs that a pool of threads is pinned to, and how many are worth it.
    """

    @property
    def cores(self) -> list[int]:
        """
        A CPU of each physical core, the nodes of memory taking turns: the order of pinning.
        """

    @property
    def nodes(self) -> list[int]:
        """The node of memory that each of `cores` is next to."""

    @property
    def threads(self) -> int:
        """Default size of a pool."""

    @property
    def limited(self) -> bool:
        """Whether a cgroup grants less time than `cores` have."""

def read_topology(root: str = '', cpus: Sequence[int] | None = None) -> Topology:
    """
    root: where the files /proc and /sys of a machine are, '' for this one; cpus: those to use, by default what the calling thread may run on.
    """

class ReadGuard:
    """
    While it lives, reading what a mapped file no longer has gives zeros, not SIGBUS.
    """

    def __init__(self, data: Annotated[NDArray[numpy.uint8], dict(device='cpu', writable=False)]) -> None:
        """data: uint8 [bytes], the whole mapping of a file; not kept alive."""

    @property
    def broken(self) -> bool:
        """
        Whether a page could not be read: it and what follows it are zeros from then on.
        """

class Weight:
    """
    A matrix, or a stack of them, of GGUF blocks; keeps `data` alive, copies nothing.
    """

    def __init__(self, data: Annotated[NDArray[numpy.uint8], dict(device='cpu', writable=False)], ggml_type: int, shape: Sequence[int]) -> None:
        """
        data: uint8 [bytes]; ggml_type: GGUF tensor type; shape: (rows, cols) or (count, rows, cols).
        """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ggml_type(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def layout(self) -> str:
        """
        'file' for GGUF blocks, else the name of the layout that Cpu.pack chose.
        """

    @property
    def slices(self) -> list[int]:
        """
        How many of `bytes` each node of memory owns, one after the other; all where it is not sliced.
        """

    @property
    def copied(self) -> bool:
        """
        Whether Cpu.pack has copied it to memory of its own; else its bytes are those it was made of.
        """

    @property
    def bytes(self) -> NDArray[numpy.uint8]:
        """
        The bytes of the weight as they lie in memory, uint8 [nbytes], read-only; keeps them alive.
        """

    def part(self, first: int, count: int) -> Weight:
        """`count` matrices of a stack from `first` on; copies nothing."""

    def dequantize(self) -> NDArray[numpy.float32]:
        """float32 array of `shape`, bit-equal to gguf.quants.dequantize."""

class Cpu:
    """A pinned thread pool and the kernels of one instruction set."""

    def __init__(self, threads: int | None = None, isa: str | None = None, nodes: Sequence[Sequence[int]] | None = None) -> None:
        """
        threads: default one per physical core within the cgroup's quota; isa: default KTD_ISA or the best; nodes: CPUs next to each node of memory, to pin threads to, default as the system says.
        """

    @property
    def nodes(self) -> list[int]:
        """
        Numbers of the nodes of memory that own a slice each of what is packed so; empty where there is one.
        """

    @property
    def isa(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def hand_off(self, loops: int = 1000, gap: float = 0.0) -> float:
        """
        Seconds until all threads have met in a parallel loop: the median of `loops`, `gap` seconds apart.
        """

    def multiply_registers(self, loops: int, floats: bool = False) -> int:
        """
        Runs `loops` rounds of nothing but multiply-adds on registers, of int8 or of floats, on all threads: what no product can be faster than. The number of operations, two a multiply-add; 0 for 'scalar'.
        """

    def linear(self, w: Weight, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')], accumulate: bool = False) -> None:
        """
        out[n, rows] (+)= x[n, cols] @ w[rows, cols].T; float32, rows may be strided.
        """

    def linear_heads(self, w: Weight, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')]) -> None:
        """
        out[n, h, :] = w[h] @ x[n, h, :] for a stack w[H, rows, cols]; float32, outer dimensions may be strided.
        """

    def mlp(self, gate: Weight, up: Weight, down: Weight, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')], accumulate: bool = False) -> None:
        """
        out[n, d] (+)= down(silu(gate x) * (up x)) for gate, up [f, d] and down [d, f].
        """

    def moe(self, gate: Weight, up: Weight, down: Weight, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')], accumulate: bool = False) -> None:
        """
        Sum over j of weights[n, j] * expert ids[n, j] of x[n], added in the order of j; gate, up [E, f, d], down [E, d, f], ids int32 [n, k], weights float32 [n, k].
        """

    def packed_bytes(self, ggml_type: int, shape: Sequence[int]) -> int:
        """
        Bytes of such a weight after `pack`, or 0 where the file's own blocks are multiplied best.
        """

    def pack(self, w: Weight, sliced: bool = False) -> Weight:
        """
        A copy of w, of the same values, in the layout that this Cpu multiplies fastest; results are the same bits. It lies where the calling thread's memory policy says; `sliced`, for `moe` alone: each of `nodes` owns some rows of every matrix, which its threads write. Raises ValueError where packed_bytes is 0.
        """

    def packed(self, data: Annotated[NDArray[numpy.uint8], dict(device='cpu', writable=False)], ggml_type: int, shape: Sequence[int]) -> Weight:
        """
        The weight whose `bytes` an earlier `pack` has made, by a Cpu with the same layout for this type; keeps `data`, uint8 [packed_bytes], 64-byte aligned, alive, copies nothing.
        """

    def embed(self, w: Weight, ids: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')]) -> None:
        """out[i] = row ids[i] of w[vocab, d]; ids int32 [n], out [n, d]."""

    def rms_norm(self, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], weight: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], eps: float, out: Annotated[NDArray[numpy.float32], dict(device='cpu')]) -> None:
        """
        out = x / sqrt(mean(x²) + eps) · weight; x and out [n, d] with strided rows, may be the same; weight [d].
        """

    def rope(self, x: Annotated[NDArray[numpy.float32], dict(device='cpu')], positions: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], table: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)]) -> None:
        """
        Rotate the pairs (2i, 2i+1) of x [n, H, dr] (strided) in place; positions int32 [n], table [max_pos, dr] holds cos, sin per pair.
        """

    def store_latent(self, latent: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int64], dict(device='cpu', writable=False)], cache: Annotated[NDArray, dict(device='cpu')]) -> None:
        """
        Write latent [n, w] (strided rows) to slots int64 [n] of cache [pages, page_size, w], float32 or bfloat16 as uint16 (rounded to nearest even); slot = page · page_size + offset.
        """

    def store_normed(self, kv: Annotated[NDArray[numpy.float32], dict(device='cpu')], weight: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], eps: float, positions: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], table: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int64], dict(device='cpu', writable=False)], cache: Annotated[NDArray, dict(device='cpu')]) -> None:
        """
        rms_norm of kv[:, :r], rope of the rest, store_latent of both; kv [n, r + dr], weight [r], the others as there. What kv holds afterwards is undefined.
        """

    def mla_attention(self, q_latent: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], q_rope: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], cache: Annotated[NDArray, dict(device='cpu', writable=False)], page_table: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], seq_of_row: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], context: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], scale: float, out: Annotated[NDArray[numpy.float32], dict(device='cpu')]) -> None:
        """
        out [n, H, r] = softmax(scale · (q_latent · c + q_rope · k)) · c over the first context[i] tokens of sequence seq_of_row[i]. q_latent [n, H, r] and q_rope [n, H, dr] may be strided; cache [pages, page_size, r + dr] float32 or bfloat16 as uint16; page_table int32 [sequences, max_pages], whose unused slots are never read.
        """

    def route(self, logits: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)] | None, gating: str, groups: int, groups_used: int, group_score: str, used: int, normalise: bool, scale: float, ids_out: Annotated[NDArray[numpy.int32], dict(device='cpu')], weights_out: Annotated[NDArray[numpy.float32], dict(device='cpu')]) -> None:
        """
        Choose experts: logits [n, E], bias [E] or None, gating 'softmax' or 'sigmoid', group_score 'max' or 'top2'; ids_out int32 [n, used] in descending order of choice, weights_out [n, used].
        """

    def draw(self, logits: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], rules: Annotated[NDArray[numpy.float64], dict(device='cpu', writable=False)], tokens_out: Annotated[NDArray[numpy.int32], dict(device='cpu')]) -> None:
        """
        A token for each of the `rows`, int32 [m], of logits [n, vocab] (strided rows). rules float64 [m, 5]: temperature (0: the largest logit), top_k (0: all), top_p of what top_k left, min_p of the likeliest, and a random number in [0, 1). tokens_out int32 [m], -1 where a row has a NaN or no finite maximum. Of equals the lowest id counts as the likeliest.
        """

    def score(self, logits: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], totals_out: Annotated[NDArray[numpy.float64], dict(device='cpu')], ids_out: Annotated[NDArray[numpy.int32], dict(device='cpu')]) -> None:
        """
        Of each of the `rows`, int32 [m], of logits [n, vocab] (strided rows): log(sum(exp(logits))) in totals_out float64 [m], NaN where `draw` says -1, and the tokens of the k largest logits, the largest first, of equals the lowest id, in ids_out int32 [m, k].
        """

class MoeJob:
    """
    Cpu.moe bound to its arguments, to be run whenever another device has filled them: by a host function of a CUDA stream, or in a MoeSequence.
    """

    def __init__(self, cpu: Cpu, gate: Weight, up: Weight, down: Weight, x: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int32], dict(device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float32], dict(device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(device='cpu')], first: int = 0, here: int | None = None) -> None:
        """
        Arguments as of Cpu.moe; read and written at each run, so the arrays must stay where they are. Experts below `first` are elsewhere, and those of a token behind its first `here` (none: all are here): they add nothing.
        """

    function: Final[int] = ...
    """Address of void run(void* data), which throws nothing."""

    @property
    def data(self) -> int:
        """Address to call `function` with."""

    def take_error(self) -> str:
        """
        What went wrong in a run since the last call, and left zeros in `out`; else an empty string.
        """

class MoeSequence:
    """Jobs that a device asks for one after the other in each step."""

    def __init__(self, jobs: Sequence[MoeJob], flags: Annotated[NDArray[numpy.int32], dict(device='cpu')]) -> None:
        """
        flags int32 [jobs, 2, 16], which the device reads and writes too: it sets [i, 0, 0] to ask for job i and waits for [i, 1, 0].
        """

    def begin(self) -> None:
        """Before a step: none is asked for, none done."""

    def serve(self, seconds: float) -> bool:
        """
        Runs jobs as they are asked for; True when all are done, False after `seconds` in which the next was not asked for.
        """

    def release(self) -> None:
        """Calls all jobs done, so that a device that waits goes on."""
