"""Run by the peer environment's Python: logits of a token sequence through llama.cpp.

    python llama_cpp_logits.py MODEL.gguf TOKENS.npy LOGITS.npy BETA_FAST

The KV cache is f32, so that what differs is arithmetic and not the cache's rounding.
"""

import ctypes
import sys

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

model_path, tokens_path, logits_path, beta_fast = sys.argv[1:]
tokens = [int(token) for token in np.load(tokens_path)]
F32 = 0  # ggml's number of the type

llama_cpp.llama_backend_init()
model_params = llama_cpp.llama_model_default_params()
model_params.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(model_path.encode(), model_params)
if not model:
    sys.exit("llama.cpp did not load the model")
params = llama_cpp.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
params.n_threads = params.n_threads_batch = 2
params.type_k = params.type_v = F32
params.flash_attn_type = 0  # off: its CPU path rounds to half precision on the way
params.yarn_beta_fast = float(beta_fast)  # llama-cpp-python 0.3.36 leaves the file's key unread for deepseek2
context = llama_cpp.llama_init_from_model(model, params)
if not context:
    sys.exit("llama.cpp made no context")
batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
batch.n_tokens = len(tokens)
for i, token in enumerate(tokens):
    batch.token[i] = token
    batch.pos[i] = i
    batch.n_seq_id[i] = 1
    batch.seq_id[i][0] = 0
    batch.logits[i] = 1
if llama_cpp.llama_decode(context, batch):
    sys.exit("llama.cpp did not decode the batch")
vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
pointer = llama_cpp.llama_get_logits(context)
values = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (len(tokens), vocab))
np.save(logits_path, values)
