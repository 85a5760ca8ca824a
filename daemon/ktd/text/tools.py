"""Tool use in DeepSeek's formats, for templates that cannot write it themselves.

DeepSeek's own templates never print the tools a client offers, and the first ones lose or leave open most
calls of a history. So ktd writes both: the tools into the system message, and every round of calls and
results into the text of the assistant's turn it belongs to, where the model saw it in training.
Formats: the chat templates of DeepSeek-R1/V3 ("fenced": the word function, arguments in a code fence) and
the model card of DeepSeek-V3.1 (bare).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktd.errors import RequestError
from ktd.text.conversation import Turn, template_tool
from ktd.text.guard import Guard
from ktd.types import Tool, ToolCall

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_OUTPUTS_BEGIN, _OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
_OUTPUT_BEGIN, _OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"


@dataclass(frozen=True)
class DeepSeekTools:
    """One of the two formats; `end_of_turn` is the text of the token that ends an assistant's turn."""

    fenced: bool
    end_of_turn: str

    def offer(self, conversation: Sequence[Turn], tools: Sequence[Tool], guard: Guard) -> list[Turn]:
        """The conversation with the tools described at the end of its first system message."""
        described = self._description(tools, guard)
        for index, turn in enumerate(conversation):
            if turn.role == "system":
                with_tools = replace(turn, content=f"{turn.content}\n\n{described}")
                return [*conversation[:index], with_tools, *conversation[index + 1 :]]
        return [Turn("system", described), *conversation]

    def fold(self, conversation: Sequence[Turn], guard: Guard) -> tuple[list[Turn], bool]:
        """The conversation with every tool round written into one assistant's turn.

        The flag says that the last turn ends in tool results, so the model goes on with it.
        Raises RequestError for a result that follows no call.
        """
        folded: list[Turn] = []
        results: list[str] = []
        in_round = False  # the last folded turn ends in calls or results
        for turn in conversation:
            if turn.role == "tool":
                if not in_round:
                    raise RequestError(
                        "a tool message follows no tool call: send the assistant's call before it"
                    )
                results.append(f"{_OUTPUT_BEGIN}{turn.content}{_OUTPUT_END}")
                continue
            text = turn.content + self._calls(turn.calls, guard)
            if results and turn.role == "assistant":
                text = folded.pop().content + self._results(results) + text
                folded.append(Turn("assistant", text))
            else:
                if results:
                    folded[-1] = replace(folded[-1], content=folded[-1].content + self._results(results))
                folded.append(replace(turn, content=text, calls=()))
            results = []
            in_round = bool(turn.calls)
        if results:
            folded[-1] = replace(folded[-1], content=folded[-1].content + self._results(results))
        return folded, bool(results)

    def _calls(self, calls: Sequence[ToolCall], guard: Guard) -> str:
        if not calls:
            return ""
        written = [self._call(call.name, guard.mark(call.arguments)) for call in calls]
        return CALLS_BEGIN + ("\n" if self.fenced else "").join(written) + CALLS_END

    def _call(self, name: str, arguments: str) -> str:
        if self.fenced:
            body = f"function{SEPARATOR}{name}\n```json\n{arguments}\n```"
        else:
            body = f"{name}{SEPARATOR}{arguments}"
        return CALL_BEGIN + body + CALL_END

    def _results(self, results: Sequence[str]) -> str:
        if self.fenced:
            return self.end_of_turn + _OUTPUTS_BEGIN + "\n".join(results) + _OUTPUTS_END
        return self.end_of_turn + "".join(results)

    def _description(self, tools: Sequence[Tool], guard: Guard) -> str:
        lines = ["## Tools\nYou have access to the following tools:\n"]
        for tool in tools:
            function = template_tool(tool, guard)["function"]
            parameters = json.dumps(function["parameters"], ensure_ascii=False)
            lines.append(
                f"### {function['name']}\nDescription: {function['description']}\n\n"
                f"Parameters: {parameters}\n"
            )
        chaining = "with a newline between them" if self.fenced else "directly without separators or spaces"
        lines.append(
            "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
            f"{CALLS_BEGIN}{self._call('tool_call_name', 'tool_call_arguments')}"
            f"{{additional_tool_calls}}{CALLS_END}\n\n"
            "Where:\n"
            "- `tool_call_name` must be an exact match to one of the available tools\n"
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            f"- For multiple tool calls, chain them {chaining}"
        )
        return "\n".join(lines)
