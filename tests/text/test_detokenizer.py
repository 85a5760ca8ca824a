"""Answers come as whole characters, with the tags that clients are told about and no others."""

from __future__ import annotations

import kit
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit_text import ModelOf


def test_a_cut_character_is_held_back(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    tokens = list(model.vocabulary.tokens)
    # 好 is E5 A5 BD: in the byte-level alphabet å ¥ ½.
    first, second, third = (tokens.index(byte) for byte in "å¥½")
    detokenizer = model.detokenizer()
    assert [detokenizer.push([n]) for n in (first, second, third)] == ["", "", "好"]
    assert detokenizer.flush() == ""
    assert detokenizer.push([first, second]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_broken_character_shows_where_text_goes_on(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    tokens = list(model.vocabulary.tokens)
    detokenizer = model.detokenizer()
    assert detokenizer.push([tokens.index("å")]) == ""
    assert detokenizer.push([tokens.index("A")]) == "\ufffdA"
    assert detokenizer.push([tokens.index("½"), tokens.index("B")]) == "\ufffdB"
    assert detokenizer.push([tokens.index("å"), tokens.index("</think>")]) == "\ufffd</think>"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), data=st.data())
def test_pieces_join_to_the_text_however_they_are_cut(
    model_of: ModelOf, text: str, data: st.DataObject
) -> None:
    model = model_of("deepseek-r1")
    ids = model.encode(text)
    detokenizer = model.detokenizer()
    joined, start = "", 0
    while start < len(ids):
        end = data.draw(st.integers(start + 1, len(ids)))
        joined += detokenizer.push(ids[start:end])
        assert text.startswith(joined)
        start = end
    assert joined + detokenizer.flush() == text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("<think>", True),
        ("</think>", True),
        ("<｜tool▁calls▁begin｜>", True),
        ("<｜tool▁call▁end｜>", True),
        ("<｜tool▁sep｜>", True),
        ("<｜begin▁of▁sentence｜>", False),
        ("<｜end▁of▁sentence｜>", False),
        ("<｜▁pad▁｜>", False),
        ("<｜User｜>", False),
        ("<｜Assistant｜>", False),
    ],
)
def test_structural_tokens(model_of: ModelOf, token: str, shown: bool) -> None:
    model = model_of("deepseek-r1")
    assert model.detokenizer().push([model.vocabulary.structural[token]]) == (token if shown else "")


def test_tool_markers_of_kimi_show_and_its_turns_do_not(model_of: ModelOf) -> None:
    model = model_of("kimi-k2")
    for token in ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"):
        assert model.detokenizer().push([model.vocabulary.structural[token]]) == token
    for token in ("<|im_end|>", "<|im_user|>", "<|im_middle|>", "[EOS]"):
        assert model.detokenizer().push([model.vocabulary.structural[token]]) == ""


def test_rows_without_a_token_say_nothing(model_of: ModelOf) -> None:
    metadata = kit.tiny_vocab()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    types: list[int] = metadata["tokenizer.ggml.token_type"]  # type: ignore[assignment]
    changes = {"tokenizer.ggml.tokens": [*tokens, "[PAD9]"], "tokenizer.ggml.token_type": [*types, 5]}
    model = model_of("deepseek-r1", changes)
    assert model.detokenizer().push([len(tokens), len(tokens) + 7, -1]) == ""


def test_user_defined_text_is_shown_as_it_is(model_of: ModelOf) -> None:
    metadata = kit.tiny_vocab()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    types: list[int] = metadata["tokenizer.ggml.token_type"]  # type: ignore[assignment]
    changes = {"tokenizer.ggml.tokens": [*tokens, "Öl 油"], "tokenizer.ggml.token_type": [*types, 4]}
    model = model_of("deepseek-r1", changes)
    assert model.detokenizer().push([len(tokens)]) == "Öl 油"


def test_an_end_of_turn_never_shows_whatever_its_type(model_of: ModelOf) -> None:
    tokens: list[str] = kit.tiny_vocab()["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    model = model_of("deepseek-r1", {"tokenizer.ggml.eot_token_id": tokens.index("Z")})
    assert model.detokenizer().push([tokens.index("Z"), tokens.index("Y")]) == "Y"
