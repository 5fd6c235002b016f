"""Conversations to token ids, through the tokenizer's chat template: once, and with the assistant's words marked.

A rendered conversation is cut where the assistant begins and ends to speak, and the pieces are tokenised one by one.
So the ids before an answer are exactly the ids a rollout is prompted with, whatever a tokenizer would merge across the
cut, and the loss mask is exact without any bookkeeping of character offsets.
"""

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.data.rows import BadRowError

Message = dict[str, str]
Span = tuple[int, int]

SEAM_PROBE = ["Hello", " world", "\n\n12", "34"]


class ChatFormat:
    """A tokenizer together with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError when there is no chat template, or when text tokenised in pieces does not join up again."""
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set model.chat_template to a Jinja file")
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template()
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        added = tokenizer.added_tokens_decoder.values()
        special_tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        if not special_tokens:
            raise ValueError("the tokenizer has no special token, so nothing could end an answer")
        self._special_token = re.compile("|".join(re.escape(token) for token in special_tokens))
        joined = tokenizer.decode(list(chain(*self._encode(SEAM_PROBE))), clean_up_tokenization_spaces=False)
        if joined != "".join(SEAM_PROBE):
            raise ValueError(
                f"the tokenizer adds to text at its start ({SEAM_PROBE} tokenised piece by piece reads {joined!r}); "
                "use one that does not put a space before it"
            )

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Token ids of a conversation that is to be answered. Raises BadRowError if the template refuses it."""
        return self._encode([self._render(messages, add_generation_prompt=True)[0]])[0]

    def training_ids(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a whole conversation, and a mask of the same length: 1 on what the assistant says, the token
        that ends its turn included.

        An answer is what the template puts between `{% generation %}` and `{% endgeneration %}`; without those, it is
        what follows the generation prompt up to the next special token. Raises BadRowError if the template refuses the
        conversation, and ValueError if the answers can't be located in what it renders.
        """
        text, spans = self._marked(messages) if self._marks_answers else self._located(messages)
        cuts = [0, *(cut for span in spans for cut in span), len(text)]
        pieces = self._encode([text[start:end] for start, end in pairwise(cuts)])
        token_ids = list(chain(*pieces))
        loss_mask = [place % 2 for place, piece in enumerate(pieces) for _ in piece]
        return token_ids, loss_mask

    def check(self, value: Any, last_role: str) -> list[Message]:
        """`value` as messages (see checked_messages). Raises BadRowError also for text that spells a special token: it
        would be read as one, and could forge a turn."""
        messages = checked_messages(value, last_role)
        for message in messages:
            if found := self._special_token.search(message["content"]):
                raise BadRowError("special token in the text", found[0])
        return messages

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks in it."""
        render: Any = render_jinja_template  # its own annotations don't know of the marks
        try:
            texts, marked = render(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_answers,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise BadRowError("refused by the chat template", str(error)) from error
        return texts[0], marked[0] if self._marks_answers else []

    def _marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text, and the answers' spans as the template marks them, each cut after its last special token."""
        text, marked = self._render(messages)
        spans: list[Span] = []
        for start, end in marked:
            special_tokens = list(self._special_token.finditer(text, start, end))
            if not special_tokens or text[special_tokens[-1].end() : end].strip():
                raise ValueError(
                    f"the chat template's {{% generation %}} block {text[start:end]!r} doesn't end with a special "
                    "token, so the model would not learn to stop; move the token that ends the turn into the block"
                )
            spans.append((start, special_tokens[-1].end()))
        return text, spans

    def _located(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text, and the answers' spans in it: each from where its prompt ends to the next special token.

        The prompt of every answer is looked for in the one final text. So a template may drop the thinking of earlier
        turns, as long as it drops it from their prompts alike.
        """
        text, _ = self._render(messages)
        spans: list[Span] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(messages[:turn], add_generation_prompt=True)
            end = self._special_token.search(text, len(prompt))
            if not text.startswith(prompt) or end is None or not _says(text[len(prompt) : end.start()], message):
                raise ValueError(
                    f"the chat template does not render an answer as its prompt followed by the answer and a special "
                    f"token (prompt {prompt[-80:]!r}, whole conversation {text[-160:]!r}); put {{% generation %}} and "
                    "{% endgeneration %} around the assistant's words in it, and set model.chat_template"
                )
            spans.append((len(prompt), end.end()))
        return text, spans


def checked_messages(value: Any, last_role: str) -> list[Message]:
    """`value` as messages, if it is a list of {role, content}: perhaps a system message, then user and assistant in
    turns, the last of `last_role`. Raises BadRowError otherwise, and for an empty message."""
    if not isinstance(value, list) or not all(_is_message(message) for message in value):
        raise BadRowError("not a list of {role, content}", repr(value)[:80])
    messages = [{"role": message["role"], "content": message["content"]} for message in value]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise BadRowError("roles don't alternate", " ".join(roles)[:80])
    if roles[-1] != last_role:
        raise BadRowError(f"does not end with the {last_role}", " ".join(roles)[:80])
    for message in messages:
        if not message["content"].strip():
            raise BadRowError(f"empty {message['role']} message")
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _says(turn: str, message: Message) -> bool:
    """Whether a rendered turn ends as the message does. Its beginning may differ: templates move or drop thinking."""
    if not turn.strip():
        return False
    rendered, given = turn.strip().splitlines()[-1], message["content"].strip().splitlines()[-1]
    return rendered.endswith(given) or given.endswith(rendered)
