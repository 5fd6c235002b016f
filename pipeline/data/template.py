"""Chat templates: conversations rendered as text, and the tokens that a template puts around turns, found by rendering
short conversations."""

import json
import re
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.data.messages import REASONING_KEYS, Message, lost, lost_tools
from pipeline.data.rows import BadRowError

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

PROBE: list[Message] = [
    {"role": "user", "content": "Ping"},
    {"role": "assistant", "content": "Alpha"},
    {"role": "user", "content": "Pong"},
    {"role": "assistant", "content": "Omega"},
]
"""A conversation that shows which tokens a template puts between turns."""
INLINE_PROBE = "<think>\nBeta\n</think>\n\nAlpha"
"""An answer with its reasoning within the text."""
CALL_PROBE: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {"n": 1}}}],
}
THINKING = re.compile("think|thought|reason", re.IGNORECASE)
"""Special tokens of that name stand within answers, such as <think>."""
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError when there is none, and for a tokenizer without special tokens."""
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
        """The text, and the spans that the template marks in it."""
        if any("tool_calls" in message for message in messages) and self._takes_text:
            messages = [_with_arguments_as_text(message) for message in messages]
        render: Any = render_jinja_template  # its own annotations don't know of the marks
        try:
            texts, marked = render(
                conversations=[[self._under_its_keys(message) for message in messages]],
                tools=tools,
                chat_template=self._text,
                return_assistant_tokens_mask=self.marks_answers,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRowError("refused by the chat template", str(error)) from error
        return texts[0], marked[0] if self.marks_answers else []

    def _under_its_keys(self, message: Message) -> Message:
        """The message with its reasoning under the key that the template reads, and without its weight."""
        names = {"reasoning_content": self._reasoning_key}
        return {names.get(key, key): value for key, value in message.items() if key != "weight"}

    def shown(self, messages: list[Message], *, prompt: bool = False) -> str:
        """The rendered text; "" for a conversation that the template refuses."""
        try:
            return self.render(messages, add_generation_prompt=prompt)[0]
        except BadRowError:
            return ""

    def check_kept(self, messages: list[Message], tools: Tools, text: str) -> None:
        """Raises BadRowError where the template leaves out something other than reasoning."""
        problem = lost(messages, text) or (lost_tools(tools, text) if tools else None)
        if problem:
            raise BadRowError(*problem)
        unnamed = [message if message["role"] == "tool" else _without_name(message) for message in messages]
        if unnamed != messages:
            prompt = messages[-1]["role"] != "assistant"
            if self.render(unnamed, tools, add_generation_prompt=prompt)[0] == text:
                raise BadRowError("name that the chat template leaves out", "remove it, or write it into the content")

    @cached_property
    def _takes_text(self) -> bool:
        """True for a template that takes the arguments of tool calls only as JSON text, as OpenAI's servers do."""
        render: Any = render_jinja_template
        called = [[PROBE[0], CALL_PROBE]]
        try:
            render(conversations=called, chat_template=self._text, **self._tokenizer.special_tokens_map)
        except (TemplateError, TypeError, ValueError):
            return True
        return False

    @cached_property
    def turn_tokens(self) -> set[str]:
        """The special tokens that no answer may spell: those with a role of their own in the tokenizer, and those that
        the template puts around messages."""
        with_role = {str(getattr(self._tokenizer, name)) for name in NAMED_TOKENS if getattr(self._tokenizer, name)}
        system: Message = {"role": "system", "content": "Sigma"}
        text = "".join(self.shown([*start, *PROBE[:3]], prompt=True) for start in ([], [system]))
        around_turns = {token for token in self.special_token.findall(text) if not THINKING.search(token)}
        return with_role | around_turns | set(self.ends)

    @cached_property
    def ends(self) -> list[str]:
        """The special tokens that follow an earlier and the last answer; the same, for most templates."""
        text = self.shown(PROBE) or self.shown(PROBE[:2])
        places = [text.rfind(message["content"]) for message in PROBE if message["role"] == "assistant"]
        after = [self.special_token.finditer(text, place) for place in places if place >= 0]
        ends = [next((token[0] for token in tokens if not THINKING.search(token[0])), None) for tokens in after]
        return [end for end in ends if end is not None]


def _with_arguments_as_text(message: Message) -> Message:
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message


def _without_name(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "name"}
