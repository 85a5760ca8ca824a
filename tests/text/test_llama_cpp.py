"""The same file gives the same tokens in llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import cast

import kit
import pytest
from kit_text import ModelOf

PYTHON = os.environ.get("KTD_PEERS_PYTHON", "")
TEXTS = [
    "Hello, world! How many letters are there in 2024?",
    "  leading, trailing  \n\n  x",
    "你好,世界!今天的天气怎么样?12345",
    "def f(x):\n    return x[1:]  # naïve\r\n\tend",
    "こんにちは、世界。안녕하세요 Привет",
    "It's I'M we'LL HTMLParser3000",
]
SCRIPT = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(sys.stdin)
print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=False) for t in texts]))
"""


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="KTD_PEERS_PYTHON names no Python with llama-cpp-python (make peers)")
@pytest.mark.parametrize("pre", ["deepseek-v3", "deepseek-llm", "kimi-k2"])
def test_llama_cpp_gives_the_same_tokens(model_of: ModelOf, tmp_path: Path, pre: str) -> None:
    path = kit.write_gguf(tmp_path / "vocab.gguf", kit.tiny_vocab(pre=pre))
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, str(path)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peer = cast(list[list[int]], json.loads(done.stdout.splitlines()[-1]))
    model = model_of("deepseek-r1", pre=pre)
    for text, ids in zip(TEXTS, peer, strict=True):
        assert model.encode(text) == ids, text
