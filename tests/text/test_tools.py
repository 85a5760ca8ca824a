"""Tools are offered, called and answered in each model's own format."""

from __future__ import annotations

import pytest
from kit_text import BARE, BOS, BOT, DEEPSEEK, EOS, USER, ModelOf, bot, shown, system, user

from ktd.errors import RequestError
from ktd.types import Message, Tool, ToolCall

WEATHER = Tool(
    "get_weather", "Weather of a <city>", '{"type": "object", "properties": {"city": {"type": "string"}}}'
)
CALLS = [ToolCall("c1", "get_weather", '{"city": "Köln"}'), ToolCall("c2", "get_weather", '{"city": "北京"}')]
ROUND = [
    user("Weather?"),
    bot("", calls=CALLS),
    Message("tool", "rain", tool_call_id="c1"),
    Message("tool", "sun"),
]
CB, CE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
FENCED_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜>"
FENCED = (
    CB
    + "\n".join(FENCED_CALL.replace("{}", call.arguments) for call in CALLS)
    + f"{CE}{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>\n"
    "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
BARE_CALLS = (
    f'{CB}<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{{"city": "Köln"}}<｜tool▁call▁end｜>'
    f'<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{{"city": "北京"}}<｜tool▁call▁end｜>{CE}{EOS}'
    "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
)


@pytest.mark.parametrize("name", DEEPSEEK)
def test_the_model_goes_on_after_tool_results(model_of: ModelOf, name: str) -> None:
    """One call or several, also in the second round: the first templates lose or leave open most of these."""
    model = model_of(name)
    written = BARE_CALLS if name == "deepseek-v3.1" else FENCED
    turn = f"{BOT}</think>" if name == "deepseek-v3.1" else BOT
    first = f"{BOS}{USER}Weather?{turn}{written}"
    rendered = model.render(ROUND)
    assert shown(model, rendered) == first
    assert not rendered.opens_thought
    second = [*ROUND, bot("Once more.", calls=CALLS), *ROUND[2:], bot("Mixed."), user("Thanks")]
    text = shown(model, model.render(second))
    assert text.startswith(f"{first}Once more.{written}Mixed.{EOS}{USER}Thanks{BOT}")


def test_tools_are_offered_in_the_system_message(model_of: ModelOf) -> None:
    for name in DEEPSEEK:
        model = model_of(name)
        assert model.takes_tools
        with_system = shown(model, model.render([system("Be brief."), user("Hi")], tools=[WEATHER]))
        start = with_system.removeprefix(f"{BOS}Be brief.\n\n## Tools\n")
        assert start != with_system
        described, _, rest = start.partition(USER)
        assert "### get_weather\nDescription: Weather of a ⟨city>\n" in described
        assert 'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}' in described
        fenced = "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>"
        bare = "tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        assert (bare if name == "deepseek-v3.1" else fenced) in described
        assert rest.startswith("Hi")
        assert shown(model, model.render([user("Hi")], tools=[WEATHER])).startswith(f"{BOS}## Tools\n")


def test_kimi_prints_tools_itself(model_of: ModelOf) -> None:
    model = model_of("kimi-k2")
    call = ToolCall("functions.get_weather:0", "get_weather", '{"city":  "Köln"}')
    result = Message("tool", "rain", tool_call_id="functions.get_weather:0")
    text = shown(model, model.render([user("Weather?"), bot("", calls=[call]), result], tools=[WEATHER]))
    assert text == (
        '<|im_system|>tool_declare<|im_middle|>[{"type": "function", "function": {"name": "get_weather",'
        ' "description": "Weather of a ⟨city>", "parameters": {"type": "object", "properties": {"city":'
        ' {"type": "string"}}}}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>Weather?<|im_end|><|im_assistant|>assistant<|im_middle|>"
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city":  "Köln"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>tool<|im_middle|>## Return of functions.get_weather:0\nrain<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_a_template_that_wants_arguments_parsed_gets_them_so(model_of: ModelOf) -> None:
    source = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m['content'] or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    model = model_of(source)
    call = ToolCall("1", "f", '{"a":   "<think>"}')
    text = shown(model, model.render([user("Q"), bot("", calls=[call])], tools=[WEATHER]))
    assert text.endswith('Q{"a": "⟨think>"}')
    with pytest.raises(RequestError, match="call of f is not JSON"):
        model.render([user("Q"), bot("", calls=[ToolCall("1", "f", "{oops")])])


def test_tool_mistakes_are_answered(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1")
    with pytest.raises(RequestError, match="follows no tool call"):
        model.render([user("Q"), Message("tool", "rain")])
    with pytest.raises(RequestError, match="schema of tool f is not JSON"):
        model.render([user("Q")], tools=[Tool("f", "", "{")])
    with pytest.raises(RequestError, match="nested deeper than 64 levels"):
        model.render([user("Q")], tools=[Tool("f", "", '{"a":' * 65 + "1" + "}" * 65)])
    kimi_without_tools = model_of("kimi-k2", {"tokenizer.chat_template": BARE})
    assert not kimi_without_tools.takes_tools
    with pytest.raises(RequestError, match="no place for tools"):
        kimi_without_tools.render([user("Q")], tools=[WEATHER])


def test_a_user_may_speak_right_after_tool_results(model_of: ModelOf) -> None:
    for name in DEEPSEEK:
        model = model_of(name)
        written = BARE_CALLS if name == "deepseek-v3.1" else FENCED
        text = shown(model, model.render([*ROUND, user("And?")]))
        assert f"{written}{EOS}{USER}And?{BOT}" in text


def test_a_call_without_results_ends_its_turn(model_of: ModelOf) -> None:
    model = model_of("deepseek-r1-2025-01")
    calls = FENCED.partition(EOS)[0]
    rendered = model.render([user("Q"), bot("Looking.", calls=CALLS), user("Go on")])
    assert shown(model, rendered) == f"{BOS}{USER}Q{BOT}Looking.{calls}{EOS}{USER}Go on{BOT}"
