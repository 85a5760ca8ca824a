"""A model's text side: tokenizer, chat template and detokenizer, from one GGUF."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ktd.errors import GgufError, RequestError
from ktd.gguf import GgufFile
from ktd.text.chat_template import THINKING_SWITCHES, ChatTemplate, load_template
from ktd.text.conversation import (
    CLOSE,
    OPEN,
    Turn,
    begun_answer,
    opened_turn,
    template_message,
    template_tool,
    turns,
)
from ktd.text.detokenizer import IncrementalDetokenizer, token_bytes
from ktd.text.grammar import Grammars, ReplyConstraint
from ktd.text.guard import Guard
from ktd.text.tokenizer import BpeTokenizer
from ktd.text.tools import CALLS_BEGIN, DeepSeekTools
from ktd.text.vocabulary import Vocabulary
from ktd.types import ChatRequest, Message, Tool, ToolCall

log = logging.getLogger(__name__)

# An owner and a model, such as deepseek-ai/DeepSeek-V2-Lite-Chat.
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OPENED = re.compile(rf"{OPEN}\s*\Z")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation; `opens_thought` says that the model's first words belong to its thought."""

    ids: list[int]
    opens_thought: bool


class TextModel:
    """Immutable after construction; all methods may be called from several threads at once."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        """Raises GgufError when tokenizer or template cannot work."""
        self.vocabulary = vocabulary
        self.template = template
        self._tokenizer = BpeTokenizer(vocabulary)
        self._grammars = Grammars(vocabulary, self._tokenizer.encode)
        #: whether thoughts mean anything to this model
        self.thinks = OPEN in vocabulary.structural or OPEN in template.source
        self._parsed_arguments = False
        self._prints_tools = self._probe()
        fenced = "```json" in template.source or "tool▁call" not in template.source
        self._tools = (
            DeepSeekTools(fenced, vocabulary.text_of(vocabulary.eos_id))
            if CALLS_BEGIN in vocabulary.structural
            else None
        )

    @classmethod
    def from_gguf(cls, gguf: GgufFile, model_path: Path | None = None) -> TextModel:
        """Tokenizer and template of the file; `model_path`, a Hugging Face folder, overrides what it holds.

        A name on the Hugging Face hub, which tutorials give there, is warned of: nothing is downloaded.
        Raises GgufError for what is missing, damaged or of another model family, SettingsError for a path
        that is no folder or one that holds neither a tokenizer nor a template.
        """
        if model_path and not model_path.exists() and _HUB_NAME.fullmatch(str(model_path)):
            log.warning(
                "--model-path %s is no folder here and nothing is downloaded: the tokenizer and the template "
                "of %s are used",
                model_path,
                gguf.name,
            )
            model_path = None
        template = load_template(gguf, model_path)
        tokenizer_json = model_path / "tokenizer.json" if model_path else None
        if tokenizer_json and tokenizer_json.is_file():
            return cls(Vocabulary.from_tokenizer_json(tokenizer_json, gguf), template)
        return cls(Vocabulary.from_gguf(gguf), template)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.vocabulary.stop_ids

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def longest_token(self) -> int:
        """Bytes of UTF-8 that one token of a user's text stands for, at most."""
        return self._tokenizer.longest_token

    @property
    def takes_tools(self) -> bool:
        """Whether tools can be offered to this model."""
        return self._prints_tools or self._tools is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, never a special token. Raises RequestError for invalid Unicode."""
        return self._tokenizer.encode(text)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer, one per answer."""
        return IncrementalDetokenizer(self.vocabulary)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to an answer: UTF-8, at times a part of a character, or nothing."""
        return token_bytes(self.vocabulary, token)

    def token_name(self, token: int) -> bytes:
        """As `token_bytes`, and for one that adds nothing the name it has in the vocabulary."""
        known = 0 <= token < self.vocab_size
        return self.token_bytes(token) or (self.vocabulary.tokens[token].encode() if known else b"")

    def constraint(self, request: ChatRequest, ids: Sequence[int], opens_thought: bool) -> ReplyConstraint:
        """What keeps the reply to the prompt `ids` to the calls that must be, or to the request's schema;
        compiling it may take seconds.

        Raises RequestError for a schema that cannot be enforced.
        """
        grammars, last = self._grammars, request.messages[-1]
        begun = ""
        if request.continue_final_message and not opens_thought:
            begun = begun_answer(last, thinks=self.thinks)
        beside: set[int] = set()
        if request.must_call:
            if begun.strip():
                raise RequestError(
                    "The answer that is to be continued is text: it cannot become a tool call."
                )
            fenced = self._tools is not None and self._tools.fenced
            matcher = grammars.call_matcher(request.tools, fenced=fenced, one=not request.parallel_tool_calls)
        elif request.schema is None:
            raise ValueError("the request has neither a schema nor calls that must be")
        else:
            if request.tools and not grammars.calls:
                raise RequestError("This model takes no tools beside a response_format: send one of the two.")
            matcher = grammars.matcher(request.schema, begun)
            beside |= grammars.calls if request.tools and not begun else set()
        may_think = not request.continue_final_message and request.thinking is not False
        if may_think and grammars.opens is not None and not grammars.closed_thought(ids):
            beside.add(grammars.opens)
        return ReplyConstraint(grammars, matcher, thinking=opens_thought, beside=beside)

    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        most_tokens: int | None = None,
    ) -> Prompt:
        """The prompt of a conversation.

        thinking: True opens a thought, False closes it at once, None leaves it to the template.
        continue_final_message: the last message, an assistant's, is left open and goes on.
        Raises RequestError when the conversation cannot be rendered, ContextExceeded where it has far more
        than `most_tokens`.
        """
        if not messages:
            raise RequestError("messages is empty: send at least one message")
        if continue_final_message and messages[-1].role != "assistant":
            raise RequestError("continue_final_message needs an assistant message at the end")
        if thinking and not self.thinks:
            raise RequestError("this model does not think: leave out the wish for a thought")
        guard = Guard(_texts(messages, tools, self.template.source), self.vocabulary.structural)
        text, opened = self._render(messages, guard, thinking, continue_final_message, tools)
        ids = self._tokenizer.encode_structured(text, guard.character, most_tokens)
        return Prompt(self._with_one_bos(ids), opened)

    def _render(
        self,
        messages: Sequence[Message],
        guard: Guard,
        thinking: bool | None,
        continued: bool,
        tools: Sequence[Tool],
    ) -> tuple[str, bool]:
        """The prompt's text, users' parts guarded, and whether it ends inside a thought."""
        tail, opened = "", False
        if continued:
            tail, opened = opened_turn(messages[-1], guard, thinks=self.thinks)
            messages = messages[:-1]
        conversation = turns(messages, guard, split_thoughts=CLOSE in self.template.source)
        if continued and tail:
            conversation.append(Turn("assistant", tail))
        offered: list[dict[str, object]] | None = None
        if tools or any(turn.calls or turn.role == "tool" for turn in conversation):
            if self._prints_tools:
                offered = [template_tool(tool, guard) for tool in tools] or None
            elif self._tools is None:
                raise RequestError(
                    "this model's chat template has no place for tools: send the request without"
                )
            else:
                if tools:
                    conversation = self._tools.offer(conversation, tools, guard)
                conversation, results_last = self._tools.fold(conversation, guard)
                if results_last or tail:
                    tail = conversation[-1].content
        variables = self._variables(thinking) | {"tools": offered}
        if tail:
            conversation[-1] = replace(conversation[-1], content=guard.sentinel)
            return self._joined(self._apply(conversation, guard, variables), guard, tail), opened
        text = self._apply(conversation, guard, variables | {"add_generation_prompt": True})
        return self._with_thought(text, thinking)

    def _apply(self, conversation: Sequence[Turn], guard: Guard, variables: dict[str, object]) -> str:
        messages = [
            template_message(turn, guard, parsed_arguments=self._parsed_arguments) for turn in conversation
        ]
        return self.template.render(variables | {"messages": messages})

    def _joined(self, text: str, guard: Guard, tail: str) -> str:
        """`text` up to where the last turn's content stands, then `tail`."""
        before, found, _ = text.rpartition(guard.sentinel)
        if not found:
            raise RequestError("this model's chat template cannot leave the last message open")
        # A template that closes the thought before every answer (V3.1) must not do so before one.
        return (before.removesuffix(CLOSE) if tail.startswith(OPEN) else before) + tail

    def _with_thought(self, text: str, thinking: bool | None) -> tuple[str, bool]:
        forced = _OPENED.search(text)
        if thinking is False and forced:
            return f"{text[: forced.start()]}{OPEN}\n\n{CLOSE}\n\n", False
        if thinking is False and self.thinks and not self.template.has_thinking_switch:
            return f"{text}{OPEN}\n\n{CLOSE}\n\n", False
        if thinking and not forced:
            return f"{text}{OPEN}\n", True
        return text, forced is not None

    def _variables(self, thinking: bool | None) -> dict[str, object]:
        """What Hugging Face passes to every template."""
        variables: dict[str, object] = {
            "add_generation_prompt": False,
            "bos_token": self.vocabulary.text_of(self.vocabulary.bos_id),
            "eos_token": self.vocabulary.text_of(self.vocabulary.eos_id),
            "documents": None,
        }
        if thinking is not None:
            variables |= dict.fromkeys(THINKING_SWITCHES, thinking)
        return variables

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self.vocabulary.bos_id
        if bos is None:
            return ids
        written = next((index for index, number in enumerate(ids) if number != bos), len(ids))
        wanted = bool(written) or self.vocabulary.add_bos
        return [bos] * wanted + ids[written:]

    def _probe(self) -> bool:
        """Whether the template prints the tools it is given; notes how it wants their arguments.

        Raises GgufError when it cannot even render one question.
        """
        guard = Guard((), ())
        variables = self._variables(None)
        question = Turn("user", "ktd_question")
        try:
            text = self._apply([question], guard, variables | {"add_generation_prompt": True})
        except RequestError as error:
            raise GgufError(str(error)) from None
        if question.content not in text:
            raise GgufError(
                f"the chat template of {self.template.origin} does not print the user's message:"
                " give a working one in the folder of --model-path"
            )
        tool = Tool("ktd_tool", "", '{"type": "object", "properties": {}}')
        arguments = '{"ktd_key": 1}'
        call = Turn("assistant", "", calls=[ToolCall("functions.ktd_tool:0", tool.name, arguments)])
        try:
            text = self._apply([question], guard, variables | {"tools": [template_tool(tool, guard)]})
            if tool.name not in text:
                return False
            self._parsed_arguments = arguments not in self._apply([question, call], guard, variables)
        except RequestError:
            return False
        return True


def _texts(messages: Sequence[Message], tools: Sequence[Tool], source: str) -> chain[str]:
    said = (text for m in messages for text in (m.content, m.reasoning_content, m.tool_call_id))
    calls = (call for m in messages for call in m.tool_calls)
    called = (text for call in calls for text in (call.id, call.name, call.arguments))
    offered = (text for tool in tools for text in (tool.name, tool.description, tool.parameters))
    return chain([source], said, called, offered)
