"""Thought and answer are told apart however the stream is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktd.chat.plain_splitter import PlainSplitter
from ktd.chat.splitter import MOST_HELD, ReasoningSplitter
from ktd.types import Answer, Reasoning


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    """Joined thought and answer; checks the order of events on the way."""
    splitter = ReasoningSplitter(opened)
    events = [event for piece in pieces for event in splitter.push(piece)] + splitter.flush()
    assert all(event.text for event in events), "an empty event says nothing"
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=(Reasoning, Answer).index), "a thought never follows an answer"
    return (
        "".join(e.text for e in events if isinstance(e, Reasoning)),
        "".join(e.text for e in events if isinstance(e, Answer)),
    )


FENCED = "Format:\n```\n<think>\nhm\n</think>\n```\nso 4"
CASES = [
    # opened, text, thought, answer
    (False, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (True, "Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),
    (True, "<think>\nTwo and two.</think>Four.", "Two and two.", "Four."),
    (True, "\n\n<think>\nTwo.</think>Four.", "Two.", "Four."),
    (False, "\n <think>a</think>b", "a", "b"),
    (False, "Four.", "", "Four."),
    (False, "\n Four.\n", "", "\n Four.\n"),
    (False, "", "", ""),
    (True, "", "", ""),
    (False, "<think></think>", "", ""),
    (False, "<think>\n\n</think>\n\nFour.", "", "Four."),
    (True, "\n</think>\n\nFour.", "", "Four."),
    (False, "<think>never ended", "never ended", ""),
    (True, "never ended </thin", "never ended </thin", ""),
    (False, "<thi", "", "<thi"),
    (True, "<thi", "<thi", ""),
    (False, "<thinking>a</think>", "", "<thinking>a</think>"),
    (False, "<think>a</think>Use <think> and </think>.", "a", "Use <think> and </think>."),
    (False, "Say <think>a</think>", "", "Say <think>a</think>"),
    (False, "a</think>b", "", "a</think>b"),
    (True, "a < b </ c </thinks> <think> d</think>e", "a < b </ c </thinks> <think> d", "e"),
    (True, "x</think>\n\n    code\n  end", "x", "    code\n  end"),
    (True, "the tag `</think>` ends it\n</think>\nYes", "the tag `</think>` ends it", "Yes"),
    (True, "``a ` </think>`` b</think>Yes", "``a ` </think>`` b", "Yes"),
    (True, "a stray ` tick</think>Yes\nor `no`", "a stray ` tick", "Yes\nor `no`"),
    (True, "`x` is odd</think>Yes `y`", "`x` is odd", "Yes `y`"),
    (True, FENCED + "\n</think>\n\nYes", FENCED, "Yes"),
    (True, "~~~\n</think>\n~~~\n</think>Yes", "~~~\n</think>\n~~~", "Yes"),
    (True, "```py\nx = 1\n</think>\n\nForgot to close", "```py\nx = 1", "Forgot to close"),
    (True, "```py\nx\n</think>\n\n```py\nx\n```\nok", "```py\nx", "```py\nx\n```\nok"),
    (True, "```\nx\n```</think>\n\nok\n```\ny\n```", "```\nx\n```", "ok\n```\ny\n```"),
    (True, "```\nx\n</think>" + "y" * 2 * MOST_HELD + "\n```\n", "```\nx", "y" * 2 * MOST_HELD + "\n```\n"),
    (True, "```py\nx\n</think>\n \nDone\n```\ny\n```\n", "```py\nx", "Done\n```\ny\n```\n"),
    (
        True,
        "```\n<think>\nhm\n</think>\n\nso\n```\n</think>Yes",
        "```\n<think>\nhm\n</think>\n\nso\n```",
        "Yes",
    ),
    (True, "甲</think>乙", "甲", "乙"),
]


@pytest.mark.parametrize(("opened", "text", "thought", "answer"), CASES)
def test_known_texts(opened: bool, text: str, thought: str, answer: str) -> None:
    assert split([text], opened) == (thought, answer)
    assert split(list(text), opened) == (thought, answer), "one character at a time"


PARTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<",
            "/think>",
            "`",
            "``",
            "```",
            "\n```",
            "```\n",
            "```py\n",
            "~~~",
            "\n",
            " ",
            "a",
            "甲",
        ]
    ),
    max_size=24,
).map("".join)


@given(text=PARTS, cuts=st.lists(st.integers(1, 100), max_size=20), opened=st.booleans())
def test_any_cut_gives_the_same(text: str, cuts: list[int], opened: bool) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = split([text], opened)
    assert split(pieces, opened) == whole
    assert split(list(text), opened) == whole


@given(text=PARTS, opened=st.booleans())
def test_nothing_but_tags_and_blanks_is_lost(text: str, opened: bool) -> None:
    def letters(value: str) -> str:
        return "".join(value.replace("<think>", "").replace("</think>", "").split())

    thought, answer = split([text], opened)
    assert letters(thought) + letters(answer) == letters(text)


def test_text_is_passed_on_at_once() -> None:
    splitter = ReasoningSplitter(opened=True)
    assert splitter.push("Let") == [Reasoning("Let")]
    assert splitter.thinking
    assert splitter.push(" me") == [Reasoning(" me")]
    assert splitter.push("\n</th") == []
    assert splitter.push("ink>\n") == []
    assert not splitter.thinking
    assert splitter.push("\nA") == [Answer("A")]
    assert splitter.push("<think>") == [Answer("<think>")]


def test_a_fence_left_open_in_the_thought_holds_the_answer_up_no_longer_than_a_blank_line() -> None:
    splitter = ReasoningSplitter(opened=True)
    splitter.push("```py\nx = 1")
    assert splitter.push("\n</think>\n") == []
    assert splitter.push("\n") == []
    assert splitter.push("So") == [Answer("So")]


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
@pytest.mark.parametrize("thought", ["a `code", "x\n```\n<think> {", "plain </thin"])
def test_a_plain_thought_ends_at_the_first_tag(thought: str, step: int) -> None:
    text = f"{thought}\n</think>\n\n{{}} ``` </think>"
    splitter = PlainSplitter(opened=True)
    events = [e for at in range(0, len(text), step) for e in splitter.push(text[at : at + step])]
    events += splitter.flush()
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == thought
    assert "".join(e.text for e in events if isinstance(e, Answer)) == "{} ``` </think>"
