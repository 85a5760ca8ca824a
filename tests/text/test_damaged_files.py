"""Whatever bytes of a file are wrong, its text side is refused with a sentence or works."""

from __future__ import annotations

import kit
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit_text import template_source

from ktd.errors import UserError
from ktd.gguf import GgufFile
from ktd.text import TextModel
from ktd.types import Message


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    metadata = kit.tiny_vocab(template_source("deepseek-v3.1"))
    return kit.write_gguf(tmp_path_factory.mktemp("valid") / "m.gguf", metadata).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_changed_anywhere(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(valid)
    changes = st.tuples(st.integers(0, len(valid) - 1), st.sampled_from([0, 1, 4, 32, 65, 123, 125, 255]))
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged-text.gguf"
    path.write_bytes(damaged)
    try:
        with GgufFile.open(path) as gguf:
            model = TextModel.from_gguf(gguf)
            model.render([Message("user", "hé <think>")])
            model.detokenizer().push(range(-2, model.vocab_size + 5))
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
