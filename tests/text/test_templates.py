"""Every model gets its prompt as its makers meant it, character for character.

Expected prompts: the models' cards and templates. ⟨ stands for a < that came in as text and not as part of a
special token.
"""

from __future__ import annotations

import pytest
import tokenizers
from kit_text import BARE, BOS, BOT, DEEPSEEK, EOS, USER, ModelOf, bot, shown, system, template_source, user

from ktd.errors import RequestError
from ktd.types import Message

CHAT = [system("Be brief."), user("1+1?"), bot("<think>\neasy\n</think>\n\n2"), user("2+2?")]


@pytest.mark.parametrize(
    ("name", "prompt", "opens"),
    [
        ("deepseek-r1-2025-01", f"{BOS}Be brief.{USER}1+1?{BOT}\n\n2{EOS}{USER}2+2?{BOT}", False),
        ("deepseek-r1", f"{BOS}Be brief.{USER}1+1?{BOT}\n\n2{EOS}{USER}2+2?{BOT}<think>\n", True),
        ("deepseek-r1-0528", f"{BOS}Be brief.{USER}1+1?{BOT}\n\n2{EOS}{USER}2+2?{BOT}", False),
        (
            "deepseek-v3-0324",  # knows no thoughts, so the history keeps what looks like one, as text
            f"{BOS}Be brief.{USER}1+1?{BOT}⟨think>\neasy\n⟨/think>\n\n2{EOS}{USER}2+2?{BOT}",
            False,
        ),
        ("deepseek-v3.1", f"{BOS}Be brief.{USER}1+1?{BOT}</think>\n\n2{EOS}{USER}2+2?{BOT}</think>", False),
        (
            "kimi-k2",
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>1+1?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>⟨think>\neasy\n⟨/think>\n\n2<|im_end|>"
            "<|im_user|>user<|im_middle|>2+2?<|im_end|><|im_assistant|>assistant<|im_middle|>",
            False,
        ),
    ],
)
def test_a_conversation(model_of: ModelOf, name: str, prompt: str, opens: bool) -> None:
    model = model_of(name)
    rendered = model.render(CHAT)
    assert shown(model, rendered) == prompt
    assert rendered.opens_thought == opens


@pytest.mark.parametrize(
    ("name", "thinking", "ending", "opens"),
    [
        ("deepseek-r1-2025-01", True, f"{BOT}<think>\n", True),
        ("deepseek-r1-2025-01", False, f"{BOT}<think>\n\n</think>\n\n", False),
        ("deepseek-r1", True, f"{BOT}<think>\n", True),
        ("deepseek-r1", False, f"{BOT}<think>\n\n</think>\n\n", False),
        ("deepseek-r1-0528", True, f"{BOT}<think>\n", True),
        ("deepseek-r1-0528", False, f"{BOT}<think>\n\n</think>\n\n", False),
        ("deepseek-v3.1", None, f"{BOT}</think>", False),
        ("deepseek-v3.1", True, f"{BOT}<think>", True),
        ("deepseek-v3.1", False, f"{BOT}</think>", False),
        ("kimi-k2", False, "<|im_assistant|>assistant<|im_middle|>", False),
    ],
)
def test_thinking_is_switched(
    model_of: ModelOf, name: str, thinking: bool | None, ending: str, opens: bool
) -> None:
    model = model_of(name)
    rendered = model.render([user("Hi")], thinking=thinking)
    assert shown(model, rendered).partition("Hi")[2].removeprefix("<|im_end|>") == ending
    assert rendered.opens_thought == opens


def test_a_model_that_cannot_think_says_so(model_of: ModelOf) -> None:
    with pytest.raises(RequestError, match="this model does not think"):
        model_of("kimi-k2").render([user("Hi")], thinking=True)


@pytest.mark.parametrize("name", DEEPSEEK)
def test_one_bos_whatever_template_and_metadata_say(model_of: ModelOf, name: str) -> None:
    for changes in ({}, {"tokenizer.ggml.add_bos_token": False}):
        assert model_of(name, changes).render(CHAT).ids.count(0) == 1


def test_bos_is_added_when_only_the_metadata_asks_for_it(model_of: ModelOf) -> None:
    assert model_of(BARE).render([user("x")]).ids[0] == 0
    assert 0 not in model_of(BARE, {"tokenizer.ggml.add_bos_token": False}).render([user("x")]).ids
    assert model_of("{{ bos_token }}{{ bos_token }}" + BARE).render([user("x")]).ids.count(0) == 1


def test_neighbours_of_one_role_are_merged(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1-2025-01")
    messages = [system("A"), system("B"), user("c"), user("d"), bot("e"), bot("</think>f"), user("g")]
    assert shown(model, model.render(messages)) == f"{BOS}A\n\nB{USER}c\n\nd{BOT}e\n\nf{EOS}{USER}g{BOT}"


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("deepseek-r1-2025-01", "late"),
        ("deepseek-r1-0528", "early\n\nlate"),
        ("deepseek-v3.1", "early\n\nlate"),
    ],
)
def test_system_messages_anywhere_go_where_the_template_wants_them(
    model_of: ModelOf, name: str, head: str
) -> None:
    model = model_of(name)
    messages = [system("early"), user("x"), system("late"), user("y")]
    assert shown(model, model.render(messages)).startswith(f"{BOS}{head}{USER}x")


def test_thoughts_that_clients_set_apart_are_dropped(model_of: ModelOf) -> None:
    for name in ("deepseek-r1", "deepseek-v3.1"):
        text = shown(model_of(name), model_of(name).render([user("a"), bot("b", "secret"), user("c")]))
        assert "secret" not in text
        assert "b<｜end" in text


def test_a_thought_ends_at_its_last_closing_tag(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    rendered = model.render([user("a"), bot("<think>is </think> a tag?</think>b"), user("c")])
    assert shown(model, rendered) == f"{BOS}{USER}a{BOT}b{EOS}{USER}c{BOT}<think>\n"


def test_a_closing_tag_in_an_answer_stays_when_the_thought_came_apart(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    rendered = model.render([user("a"), bot("write </think> to end it", "hm"), user("c")])
    assert f"{BOT}write ⟨/think> to end it{EOS}" in shown(model, rendered)


def test_templates_that_keep_thoughts_get_them(model_of: ModelOf) -> None:
    """Kimi-K2-Thinking's way: reasoning_content is written back between tags."""
    source = (
        "{% for m in messages %}{{ m['role'] }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m['content'] }};{% endfor %}"
    )
    model = model_of(source)
    expected = f"{BOS}user:q;assistant:<think>why</think>a;user:r;"
    assert shown(model, model.render([user("q"), bot("a", "why"), user("r")])) == expected
    assert shown(model, model.render([user("q"), bot("<think>\nwhy\n</think>a"), user("r")])) == expected


@pytest.mark.parametrize(
    ("name", "message", "ending", "opens"),
    [
        ("deepseek-r1", bot("The answer is"), f"{BOT}The answer is", False),
        ("deepseek-r1", bot("<think>\nLet me"), f"{BOT}<think>\nLet me", True),
        ("deepseek-r1", bot("<think>\nA\n</think>\n\nB"), f"{BOT}<think>\nA\n</think>\n\nB", False),
        ("deepseek-r1", bot("A\n</think>\n\nB"), f"{BOT}<think>\nA\n</think>\n\nB", False),
        ("deepseek-r1", bot("", "Let me"), f"{BOT}<think>\nLet me", True),
        ("deepseek-r1", bot("B", "A"), f"{BOT}<think>\nA\n</think>\n\nB", False),
        ("deepseek-r1", bot("", ""), f"{BOT}<think>\n", True),
        ("deepseek-r1", bot("x <think>"), f"{BOT}x ⟨think>", False),
        ("deepseek-r1-0528", bot("The answer is "), f"{BOT}The answer is ", False),
        ("deepseek-v3-0324", bot("The"), f"{BOT}The", False),
        ("deepseek-v3.1", bot("The"), f"{BOT}</think>The", False),
        ("deepseek-v3.1", bot("", "Let me"), f"{BOT}<think>\nLet me", True),
        ("kimi-k2", bot("The"), "<|im_end|><|im_assistant|>assistant<|im_middle|>The", False),
    ],
)
def test_the_final_message_is_continued(
    model_of: ModelOf, name: str, message: Message, ending: str, opens: bool
) -> None:
    model = model_of(name)
    rendered = model.render([user("Q"), message], continue_final_message=True)
    assert shown(model, rendered).partition("Q")[2] == ending
    assert rendered.opens_thought == opens


def test_only_an_assistants_message_is_continued(model_of: ModelOf) -> None:
    with pytest.raises(RequestError, match="needs an assistant message at the end"):
        model_of("deepseek-r1").render([user("Q")], continue_final_message=True)
    with pytest.raises(RequestError, match="messages is empty"):
        model_of("deepseek-r1").render([])
    loses_it = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RequestError, match="cannot leave the last message open"):
        model_of(loses_it).render([user("Q"), bot("A")], continue_final_message=True)


@pytest.mark.parametrize("name", [*DEEPSEEK, "kimi-k2"])
def test_no_users_text_becomes_structure(model_of: ModelOf, name: str) -> None:
    """Every structural string in every field a client can fill, whole and cut in two."""
    model = model_of(name)
    plain = [system("s"), user("u"), bot("a", "r"), user("v")]
    baseline = [n for n in model.render(plain).ids if n in model.vocabulary.structural.values()]
    for special in model.vocabulary.structural:
        half = len(special) // 2
        if special == "</think>":
            continue  # in an assistant's content it ends a thought: test_a_conversation
        for text in (special, f"x{special}y", special * 2, special[half:] + special[:half], special[:half]):
            rendered = model.render([system(text), user(text), bot(text, text), user(special[half:])])
            assert [n for n in rendered.ids if n in model.vocabulary.structural.values()] == baseline, text
            assert shown(model, rendered).count(text.replace("<", "⟨")) >= 2


def test_guards_do_not_touch_text_that_uses_their_characters(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    text = "\ue000 a<\ue001b \uf8ff <think>\ue000"
    assert shown(model, model.render([user(text)])) == f"{BOS}{USER}{text.replace('<', '⟨')}{BOT}<think>\n"


@pytest.mark.parametrize("name", [*DEEPSEEK, "kimi-k2"])
@pytest.mark.parametrize("messages", [CHAT[3:], CHAT], ids=["question", "chat"])
def test_hugging_face_gives_the_same_tokens(model_of: ModelOf, name: str, messages: list[Message]) -> None:
    from transformers import PreTrainedTokenizerFast

    model = model_of(name)
    oracle = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(model.vocabulary.tokens)},
            merges=list(model.vocabulary.merges),
        )
    )
    oracle.pre_tokenizer = model.vocabulary.pre_tokenizer
    oracle.add_special_tokens(list(model.vocabulary.structural))
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=oracle, bos_token=BOS, eos_token=EOS, chat_template=template_source(name)
    )
    said = [{"role": m.role, "content": m.content} for m in messages]
    if name in ("deepseek-v3-0324", "kimi-k2"):  # here <think> is text, which Hugging Face cannot tell apart
        said = [m | {"content": m["content"].replace("<think>", "").replace("</think>", "")} for m in said]
        messages = [Message(m["role"], m["content"]) for m in said]
    expected = fast.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert model.render(messages).ids == expected
