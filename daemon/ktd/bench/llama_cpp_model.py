"""What `ktd bench model --against llama.cpp` runs with the peer environment's Python, as a script.

    python llama_cpp_model.py '{"model": "…", "threads": 2, "prompts": [512], "sequences": [1],
                                "contexts": [32], "answer": 16, "chunk": 512, "repack": false,
                                "flash_attention": false, "gpu": false}'

With `gpu` everything but the routed experts is on the GPU, as with llama.cpp's `-ngl 999 -ot exps=CPU`.

Prints one JSON object: `prefill`, seconds of each prompt, and `decode`, seconds a step for each context and,
in it, each number of sequences. Imports nothing of ktd, which that environment lacks.
"""

import ctypes
import json
import random
import sys
import time

import llama_cpp  # type: ignore[import-not-found]
import llama_cpp._ggml  # type: ignore[import-not-found]

_LOAD_MODE_NONE = 0  # llama.h's, which llama-cpp-python does not name


def main() -> None:
    """Loads, measures, prints."""
    asked = json.loads(sys.argv[1])
    most = max(asked["sequences"])
    longest = max(*asked["prompts"], max(asked["contexts"]) + asked["answer"])
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 999 if asked["gpu"] else 0
    if asked["gpu"]:
        overrides = _experts_on_the_cpu()
        model_params.tensor_buft_overrides = ctypes.addressof(overrides)
        # What llama.cpp itself advises with such overrides: its own copy of the weights, in pinned memory.
        model_params.load_mode = _LOAD_MODE_NONE
    model_params.use_extra_bufts = asked["repack"]
    model = llama_cpp.llama_model_load_from_file(asked["model"].encode(), model_params)
    if not model:
        sys.exit("llama.cpp did not load the model")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = most * (longest + 1)
    params.n_seq_max = most
    params.n_batch = params.n_ubatch = max(asked["chunk"], most)
    params.n_threads = params.n_threads_batch = asked["threads"]
    params.flash_attn_type = int(asked["flash_attention"])
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp made no context")
    run = _Run(
        context, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)), params.n_batch
    )
    run.decode(1, 32, 4)  # touches every page of the dense part once
    prefill = [run.prefill(1, tokens) for tokens in asked["prompts"]]
    decode = [
        [run.decode(count, before, asked["answer"]) for count in asked["sequences"]]
        for before in asked["contexts"]
    ]
    print(json.dumps({"prefill": prefill, "decode": decode}))


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _experts_on_the_cpu() -> ctypes.Array[_Override]:
    """llama.cpp's list of overrides, ended by an empty one."""
    if not llama_cpp.llama_supports_gpu_offload():
        sys.exit("this llama-cpp-python was built without a GPU backend")
    find = llama_cpp._ggml.libggml.ggml_backend_cpu_buffer_type
    find.restype = ctypes.c_void_p
    return (_Override * 2)(_Override(b"exps", find()), _Override())


class _Run:
    def __init__(self, context: object, vocab_size: int, chunk: int) -> None:
        self._context, self._vocab_size, self._chunk = context, vocab_size, chunk
        self._batch = llama_cpp.llama_batch_init(chunk, 0, 1)
        self._random = random.Random(0)

    def _feed(self, places: "list[tuple[int, int, bool]]") -> None:
        """Decodes a random token at each (sequence, position, whether logits are wanted)."""
        self._batch.n_tokens = len(places)
        for i, (sequence, position, wanted) in enumerate(places):
            self._batch.token[i] = self._random.randrange(self._vocab_size)
            self._batch.pos[i] = position
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = sequence
            self._batch.logits[i] = wanted
        if llama_cpp.llama_decode(self._context, self._batch):
            sys.exit("llama.cpp did not decode the batch")
        llama_cpp.llama_synchronize(self._context)

    def prefill(self, sequences: int, tokens: int) -> float:
        """Seconds to read a prompt for each sequence, after forgetting everything."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        start = time.perf_counter()
        for sequence in range(sequences):
            for first in range(0, tokens, self._chunk):
                last = min(first + self._chunk, tokens)
                self._feed([(sequence, position, position == tokens - 1) for position in range(first, last)])
        return time.perf_counter() - start

    def decode(self, sequences: int, before: int, tokens: int) -> float:
        """Mean seconds of a step in which every sequence gets a token."""
        self.prefill(sequences, before)
        start = time.perf_counter()
        for step in range(tokens):
            self._feed([(sequence, before + step, True) for sequence in range(sequences)])
        return (time.perf_counter() - start) / tokens


main()
