"""Render conversations with a chat template, and find the tokens around turns by rendering short conversations."""

import json
import re
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.data.messages import REASONING_KEYS, Message, missing_part, missing_tool
from pipeline.data.rows import BadRowError

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

PROBE: list[Message] = [
    {"role": "user", "content": "Ping"},
    {"role": "assistant", "content": "Alpha"},
    {"role": "user", "content": "Pong"},
    {"role": "assistant", "content": "Omega"},
]
"""A conversation that shows the tokens between turns."""
INLINE_PROBE = "<think>\nBeta\n</think>\n\nAlpha"
"""An answer with its reasoning in the text."""
CALL_PROBE: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {"n": 1}}}],
}
THINKING = re.compile("think|thought|reason", re.IGNORECASE)
"""Special tokens with such a name occur within answers, for example <think>."""
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError for a tokenizer without chat template or special tokens."""
        if tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; set model.chat_template to a Jinja file or a shipped template"
            )
        self._tokenizer = tokenizer
        self._text: str = tokenizer.get_chat_template()
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._text) is not None
        keys = [key for key in REASONING_KEYS if re.search(rf"\b{key}\b", self._text)]
        self._reasoning_key = (keys or REASONING_KEYS)[0]
        added = tokenizer.added_tokens_decoder.values()
        special_tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        if not special_tokens:
            raise ValueError("the tokenizer has no special token, so nothing could end an answer")
        self.special_token = re.compile("|".join(re.escape(token) for token in special_tokens))

    def render(
        self, messages: list[Message], tools: Tools = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text, and the spans that the template marks in it. Raises BadRowError if the template refuses."""
        if any("tool_calls" in message for message in messages) and self._expects_json_arguments:
            messages = [_with_json_arguments(message) for message in messages]
        render: Any = render_jinja_template  # its annotations lack the marked spans
        try:
            texts, marked = render(
                conversations=[[self._with_template_keys(message) for message in messages]],
                tools=tools,
                chat_template=self._text,
                return_assistant_tokens_mask=self.marks_answers,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRowError("refused by the chat template", str(error)) from error
        return texts[0], marked[0] if self.marks_answers else []

    def _with_template_keys(self, message: Message) -> Message:
        """Rename the message's reasoning to the key that the template reads, and remove its weight."""
        names = {"reasoning_content": self._reasoning_key}
        return {names.get(key, key): value for key, value in message.items() if key != "weight"}

    def render_or_empty(self, messages: list[Message], *, prompt: bool = False) -> str:
        """Return the rendered text, "" if the template refuses the conversation."""
        try:
            return self.render(messages, add_generation_prompt=prompt)[0]
        except BadRowError:
            return ""

    def refuse_omissions(self, messages: list[Message], tools: Tools, text: str) -> None:
        """Raise BadRowError if the template leaves out something other than reasoning."""
        problem = missing_part(messages, text) or (missing_tool(tools, text) if tools else None)
        if problem:
            raise BadRowError(*problem)
        unnamed = [
            {key: value for key, value in message.items() if key != "name" or message["role"] == "tool"}
            for message in messages
        ]
        if unnamed != messages:
            prompt = messages[-1]["role"] != "assistant"
            if self.render(unnamed, tools, add_generation_prompt=prompt)[0] == text:
                raise BadRowError("name that the chat template leaves out", "remove it, or write it into the content")

    @cached_property
    def _expects_json_arguments(self) -> bool:
        """True for a template that accepts the arguments of tool calls only as JSON text, like OpenAI's servers."""
        render: Any = render_jinja_template
        try:
            render(
                conversations=[[PROBE[0], CALL_PROBE]], chat_template=self._text, **self._tokenizer.special_tokens_map
            )
        except (TemplateError, TypeError, ValueError):
            return True
        return False

    @cached_property
    def turn_tokens(self) -> set[str]:
        """The special tokens that no answer may contain: the tokenizer's named ones, and those around messages."""
        with_role = {str(getattr(self._tokenizer, name)) for name in _NAMED_TOKENS if getattr(self._tokenizer, name)}
        system: Message = {"role": "system", "content": "Sigma"}
        text = "".join(self.render_or_empty([*start, *PROBE[:3]], prompt=True) for start in ([], [system]))
        around_turns = {token for token in self.special_token.findall(text) if not THINKING.search(token)}
        return with_role | around_turns | set(self.ends)

    @cached_property
    def ends(self) -> list[str]:
        """The special tokens after an earlier and after the last answer; most templates have one for both."""
        text = self.render_or_empty(PROBE) or self.render_or_empty(PROBE[:2])
        starts = [text.rfind(message["content"]) for message in PROBE if message["role"] == "assistant"]
        after = [self.special_token.finditer(text, start) for start in starts if start >= 0]
        ends = [next((token[0] for token in tokens if not THINKING.search(token[0])), None) for tokens in after]
        return [end for end in ends if end is not None]


def _with_json_arguments(message: Message) -> Message:
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message
