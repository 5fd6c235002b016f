"""Conversations to token ids, through the tokenizer's chat template, with the assistant's words marked.

A rendered conversation is cut where the assistant begins and ends to speak, and the pieces are tokenised one by one, so
that the loss mask is exact without any bookkeeping of character offsets.

Training text must agree with a rollout's: the text before an answer is the text of the prompt for that answer. Its ids
are the prompt's too where the prompt holds no earlier answer; a prompt that holds some is tokenised as a whole, as
every server does it, and a tokenizer may merge the first characters of an earlier answer with what stands before them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from pipeline.data.messages import (
    Message,
    Reasoning,
    checked_messages,
    checked_tools,
    lost,
    texts_in,
    texts_of,
    without_reasoning,
)
from pipeline.data.rows import BadRowError
from pipeline.data.template import CALL_PROBE, INLINE_PROBE, PROBE, THINKING, Span, Template, Tools

Doubt = Callable[[str, str], None]
"""Takes reason and detail where a conversation looks wrong and is used all the same."""

SEAM_PROBE = ["Hello", " world", "\n\n12", "34"]


class ChatFormat:
    """A tokenizer together with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError when there is no chat template, or when text tokenised in pieces does not join up again."""
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        joined = tokenizer.decode(list(chain(*self._encode(SEAM_PROBE))), clean_up_tokenization_spaces=False)
        if joined != "".join(SEAM_PROBE):
            raise ValueError(
                f"the tokenizer adds to text at its start ({SEAM_PROBE} tokenised piece by piece reads {joined!r}); "
                "use one that does not put a space before it"
            )

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Token ids of a conversation that is to be answered. Raises BadRowError if the template refuses it, or leaves
        out some of it other than the reasoning of earlier answers."""
        text, _ = self._template.render(messages, tools, add_generation_prompt=True)
        self._template.check_kept(messages, tools, text)
        return self._encode([text])[0]

    def training_ids(
        self,
        messages: list[Message],
        tools: Tools = None,
        reasoning: Reasoning = "train",
        doubt: Doubt = lambda reason, detail: None,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a whole conversation, and a mask of the same length: 1 on what the assistant says, the token
        that ends its turn included. An answer of weight 0 has mask 0.

        An answer is the text that the template puts between `{% generation %}` and `{% endgeneration %}`, without the
        part that the prompt of a rollout already holds; in a template without those tags it is the text after that
        prompt, to the end of the turn. `reasoning` is that of ConversationData. Raises BadRowError if the template
        refuses the conversation or leaves out a part that is to be learned, and ValueError if it is no template to
        train with.
        """
        if fault := self._fault:
            raise ValueError(fault)
        if reasoning == "drop":
            messages = without_reasoning(messages)
        text, spans = self._learned(messages, tools, doubt)
        self._template.check_kept(messages, tools, text)
        for turn, of_turn in spans.items():
            answer = "".join(text[start:end] for start, end in of_turn)
            if problem := lost([messages[turn]], answer, reasoning):
                raise BadRowError(*problem)
        cuts = [0, *(cut for of_turn in spans.values() for span in of_turn for cut in span), len(text)]
        pieces = self._encode([text[start:end] for start, end in pairwise(cuts)])
        token_ids = list(chain(*pieces))
        loss_mask = [place % 2 for place, piece in enumerate(pieces) for _ in piece]
        return token_ids, loss_mask

    def check(self, value: Any, last_role: str) -> list[Message]:
        """`value` as messages (see checked_messages). Raises BadRowError also for text that spells a special token: it
        would be read as one, and could forge a turn. In an assistant's message only those are refused that begin or
        end something in the template; others, such as <think>, are its own to say."""
        messages = checked_messages(value, last_role)
        for message in messages:
            forbidden = self._template.turn_tokens if message["role"] == "assistant" else None
            self._refuse_special(texts_of(message), forbidden)
        return messages

    def check_tools(self, value: Any) -> list[dict[str, Any]]:
        """`value` as definitions of tools (see checked_tools), which may spell no special token either."""
        tools = checked_tools(value)
        self._refuse_special(texts_in(tools), None)
        return tools

    def end_ids(self) -> list[int]:
        """The tokens that end an answer. The first is the last one that training teaches, by which an answer is known
        to have ended; others are the first of several, and that of a tool call. Empty for a template that ends its
        answers with no special token."""
        ends = [self._learned_end(PROBE[:2]), *self._template.ends[-1:], self._learned_end([PROBE[0], CALL_PROBE])]
        return [cast(int, self._tokenizer.convert_tokens_to_ids(end)) for end in dict.fromkeys(ends) if end]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _refuse_special(self, texts: Iterable[str], forbidden: set[str] | None) -> None:
        """Raises BadRowError for a special token in one of `texts`; with `forbidden`, for one of those alone."""
        for text in texts:
            for token in self._template.special_token.findall(text):
                if forbidden is None or token in forbidden:
                    raise BadRowError("special token in the text", token)

    def _learned_end(self, messages: list[Message]) -> str | None:
        """The token that training teaches as the end of the last message; None where the template can't be trained
        with, or refuses or leaves out the message."""
        try:
            token_ids, loss_mask = self.training_ids(messages)
        except (BadRowError, ValueError):
            return None
        last = [token_id for token_id, learned in zip(token_ids, loss_mask, strict=True) if learned][-1]
        return str(self._tokenizer.convert_ids_to_tokens(last))

    @cached_property
    def _fault(self) -> str | None:
        """The reason that no conversation can be trained on with this template; None where one can, or where the
        template refuses even a plain one.

        A template whose prompt opens a thought takes only answers that have one.
        """
        faults: list[str] = []
        for answer in (PROBE[1], PROBE[1] | {"reasoning_content": "Beta"}, PROBE[1] | {"content": INLINE_PROBE}):
            try:
                self._learned([PROBE[0], answer], None, lambda reason, detail: None)
            except BadRowError as error:
                faults.append(str(error))
            else:
                return None
        return faults[0] if self._template.shown(PROBE[:2]) else None

    def _learned(self, messages: list[Message], tools: Tools, doubt: Doubt) -> tuple[str, dict[int, list[Span]]]:
        """The text, and by turn the spans of the answers in it that are learned."""
        text, marked = self._template.render(messages, tools)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [turn for turn in answers if messages[turn].get("weight") != 0]
        prompts = {
            turn: self._template.render(messages[:turn], tools, add_generation_prompt=True)[0] for turn in answers
        }
        if not self._template.marks_answers:
            spans = {turn: [self._located(text, prompts[turn])] for turn in learned}
        else:
            blocks = turns_of(text, marked, self._template.special_token)
            by_turn = _dealt(blocks, text, prompts)
            spans = {turn: _after(prompts[turn], by_turn[turn], text, doubt) for turn in learned if turn in by_turn}
            if len(spans) < len(learned):
                doubt("answer outside {% generation %}", "it is not learned")
        if not spans:
            raise BadRowError("no answer to train on", "weight 0, or outside the template's {% generation %} blocks")
        return text, spans

    def _located(self, text: str, prompt: str) -> Span:
        """The span of the answer that follows `prompt`, to the first token that ends a turn.

        The prompt of every answer is looked for in the one final text. So a template may drop the thinking of earlier
        turns, as long as it drops it from their prompts alike.
        """
        start = len(prompt)
        ends = [text.index(end, start) + len(end) for end in self._template.ends if text.find(end, start) >= 0]
        tokens = self._template.special_token.findall(text[start : min(ends, default=start)])
        within = [token for token in tokens[:-1] if token in self._template.turn_tokens]
        if not text.startswith(prompt) or not ends or within:
            raise BadRowError(
                "answers that can't be located",
                f"the chat template does not render an answer as its prompt followed by the answer and a special token "
                f"(prompt {prompt[-80:]!r}, whole conversation {text[-160:]!r}); put {{% generation %}} and "
                "{% endgeneration %} around the assistant's words in it, and set model.chat_template",
            )
        return start, min(ends)


def turn_ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens at which a completion ends beside the tokenizer's own end (see ChatFormat.end_ids); none for a
    tokenizer that can't be spoken to in turns, whose model only goes on with texts."""
    try:
        return ChatFormat(tokenizer).end_ids()
    except ValueError:
        return []


def turns_of(text: str, marked: list[Span], special_token: re.Pattern[str]) -> list[list[Span]]:
    """The blocks that a template marks, those of one turn together.

    Blocks that touch are one. A turn ends with a block that ends with a special token, and is cut after it. Raises
    BadRowError where the next turn begins before that.
    """
    blocks: list[Span] = []
    for start, end in marked:
        if blocks and blocks[-1][1] == start:
            start = blocks.pop()[0]
        blocks.append((start, end))
    blocks = [(start, end) for start, end in blocks if start < end]
    turns: list[list[Span]] = []
    turn: list[Span] = []
    for (start, end), following in zip(blocks, [*(start for start, _ in blocks[1:]), len(text)], strict=True):
        stops = [token for token in special_token.finditer(text, start, end) if not THINKING.search(token[0])]
        if stops and not text[stops[-1].end() : end].strip():
            turns.append([*turn, (start, stops[-1].end())])
            turn = []
        elif following == len(text) or any(
            not THINKING.search(token) for token in special_token.findall(text, end, following)
        ):
            raise BadRowError(
                "an answer without an end",
                f"the chat template's {{% generation %}} block {text[start:end]!r} doesn't end with a special token, "
                "so the model would not learn to stop; move the token that ends the turn into the block, or make it a "
                "special token of the tokenizer",
            )
        else:
            turn.append((start, end))
    return turns


def _dealt(blocks: list[list[Span]], text: str, prompts: dict[int, str]) -> dict[int, list[Span]]:
    """The blocks by turn: one after the other where there are as many, else each to the last turn whose prompt agrees
    with the text up to there."""
    if len(blocks) == len(prompts):
        return dict(zip(prompts, blocks, strict=True))
    begins = {turn: _agreement(text, prompt) for turn, prompt in prompts.items()}
    by_turn: dict[int, list[Span]] = {}
    for block in blocks:
        turn = max((turn for turn, begin in begins.items() if begin <= block[0][0]), default=min(begins))
        by_turn.setdefault(turn, []).extend(block)
    return by_turn


def _agreement(one: str, other: str) -> int:
    """The number of characters that two texts share at their start."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _after(prompt: str, spans: list[Span], text: str, doubt: Doubt) -> list[Span]:
    """The spans without the part that `prompt` already holds. Calls `doubt` where the text before them is not the
    prompt."""
    start = spans[0][0]
    if not text.startswith(prompt):
        doubt(
            "an answer follows other text than the prompt of a rollout, by the chat template",
            f"{text[:start][-40:]!r} in training, {prompt[-40:]!r} in a rollout",
        )
        return spans
    if len(prompt) < start:
        doubt(
            "the chat template has text between the prompt of a rollout and the answer, which is not learned",
            f"{text[len(prompt) : start][-40:]!r}; put it into the {{% generation %}} block or into the prompt",
        )
    return [(max(first, len(prompt)), last) for first, last in spans if last > len(prompt)]
