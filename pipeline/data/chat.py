"""Tokenise conversations with the tokenizer's chat template, and mark the assistant's tokens.

A rendered conversation is cut where answers begin and end, and the pieces are tokenised one by one, so the loss mask is
exact without tracking character offsets.

Training and rollout agree: the text before an answer is the text of the prompt for that answer. The token ids are the
same too if the prompt holds no earlier answer. A prompt with earlier answers is tokenised as a whole, as servers do,
and a tokenizer may merge the first characters of an earlier answer with the text before them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from os.path import commonprefix
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from pipeline.data.messages import (
    Message,
    Reasoning,
    missing_part,
    parse_messages,
    parse_tools,
    texts_in,
    texts_of,
    without_reasoning,
)
from pipeline.data.rows import BadRowError
from pipeline.data.template import CALL_PROBE, INLINE_PROBE, PROBE, THINKING, Span, Template, Tools

Doubt = Callable[[str, str], None]
"""Called with reason and detail for a conversation that looks wrong but is used."""
_SEAM_PROBE = ["Hello", " world", "\n\n12", "34"]


class ChatFormat:
    """A tokenizer with its chat template.

    Example:

        chat = ChatFormat(load_tokenizer("runs/demo/sft/hf"))
        chat.prompt_ids([{"role": "user", "content": "2+2?"}])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError without a chat template, and if text tokenised in pieces decodes to another text."""
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        joined = tokenizer.decode(list(chain(*self._encode(_SEAM_PROBE))), clean_up_tokenization_spaces=False)
        if joined != "".join(_SEAM_PROBE):
            raise ValueError(
                f"the tokenizer adds to text at its start ({_SEAM_PROBE} tokenised piece by piece reads {joined!r}); "
                "use one that does not put a space before it"
            )

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Tokenise a conversation up to the beginning of the next answer.

        Raises BadRowError if the template refuses the conversation, or omits more than the reasoning of answers.
        """
        text, _ = self._template.render(messages, tools, add_generation_prompt=True)
        self._template.refuse_omissions(messages, tools, text)
        return self._encode([text])[0]

    def training_ids(
        self,
        messages: list[Message],
        tools: Tools = None,
        reasoning: Reasoning = "train",
        doubt: Doubt = lambda reason, detail: None,
    ) -> tuple[list[int], list[int]]:
        """Tokenise a whole conversation, with a loss mask: 1 on answers and the tokens that end them.

        An answer of weight 0 has mask 0. If the template has `{% generation %}` tags, an answer is the text between
        them without the part that the prompt of a rollout holds. Otherwise it is the text after that prompt, to the end
        of the turn. `reasoning` is the setting of ConversationData. Raises BadRowError if the template refuses the
        conversation or omits a part to learn, and ValueError for a template that can't be used for training.
        """
        if fault := self._fault:
            raise ValueError(fault)
        if reasoning == "drop":
            messages = without_reasoning(messages)
        text, spans_by_turn = self._learned_spans(messages, tools, doubt)
        self._template.refuse_omissions(messages, tools, text)
        for turn, spans in spans_by_turn.items():
            answer = "".join(text[start:end] for start, end in spans)
            if problem := missing_part([messages[turn]], answer, reasoning):
                raise BadRowError(*problem)
        cuts = [0, *(cut for spans in spans_by_turn.values() for span in spans for cut in span), len(text)]
        pieces = self._encode([text[start:end] for start, end in pairwise(cuts)])
        token_ids = list(chain(*pieces))
        loss_mask = [index % 2 for index, piece in enumerate(pieces) for _ in piece]
        return token_ids, loss_mask

    def check(self, value: Any, last_role: str) -> list[Message]:
        """Parse `value` as messages (see parse_messages), and refuse special tokens in their texts.

        A special token could forge a turn. An assistant's message may hold those that the template puts around no
        turn, such as <think>. Raises BadRowError.
        """
        messages = parse_messages(value, last_role)
        for message in messages:
            forbidden = self._template.turn_tokens if message["role"] == "assistant" else None
            self._refuse_special(texts_of(message), forbidden)
        return messages

    def check_tools(self, value: Any) -> list[dict[str, Any]]:
        """Parse `value` as definitions of tools (see parse_tools), and refuse special tokens in their texts."""
        tools = parse_tools(value)
        self._refuse_special(texts_in(tools), None)
        return tools

    def end_ids(self) -> list[int]:
        """Return the tokens that end an answer; none if the template ends answers with no special token.

        The first is the token that training teaches as the end of an answer. The others are the token after the last
        answer in the template, and the end of a tool call.
        """
        ends = [self._learned_end(PROBE[:2]), *self._template.ends[-1:], self._learned_end([PROBE[0], CALL_PROBE])]
        return [cast(int, self._tokenizer.convert_tokens_to_ids(end)) for end in dict.fromkeys(ends) if end]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _refuse_special(self, texts: Iterable[str], forbidden: set[str] | None) -> None:
        """Raise BadRowError for a special token in `texts`, or only for those in `forbidden`."""
        for text in texts:
            for token in self._template.special_token.findall(text):
                if forbidden is None or token in forbidden:
                    raise BadRowError("special token in the text", token)

    def _learned_end(self, messages: list[Message]) -> str | None:
        """Return the token that training teaches as the end of the last message, None if it can't be trained on."""
        try:
            token_ids, loss_mask = self.training_ids(messages)
        except (BadRowError, ValueError):
            return None
        last = [token_id for token_id, learned in zip(token_ids, loss_mask, strict=True) if learned][-1]
        return str(self._tokenizer.convert_ids_to_tokens(last))

    @cached_property
    def _fault(self) -> str | None:
        """The reason that no conversation can be trained on; None if one can, or if the template refuses all probes.

        A template whose prompt opens a thought accepts only answers with a thought, so three probes are tried.
        """
        faults: list[str] = []
        for answer in (PROBE[1], PROBE[1] | {"reasoning_content": "Beta"}, PROBE[1] | {"content": INLINE_PROBE}):
            try:
                self._learned_spans([PROBE[0], answer], None, lambda reason, detail: None)
            except BadRowError as error:
                faults.append(str(error))
            else:
                return None
        return faults[0] if self._template.render_or_empty(PROBE[:2]) else None

    def _learned_spans(self, messages: list[Message], tools: Tools, doubt: Doubt) -> tuple[str, dict[int, list[Span]]]:
        """Return the rendered text and, by turn, the spans of the answers that are learned."""
        text, marked = self._template.render(messages, tools)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [turn for turn in answers if messages[turn].get("weight") != 0]
        prompts = {
            turn: self._template.render(messages[:turn], tools, add_generation_prompt=True)[0] for turn in answers
        }
        if not self._template.marks_answers:
            spans = {turn: [self._answer_span(text, prompts[turn])] for turn in learned}
        else:
            blocks = blocks_of_turns(text, marked, self._template.special_token)
            by_turn = _assign_blocks(blocks, text, prompts)
            marked_turns = [turn for turn in learned if turn in by_turn]
            spans = {turn: _after_prompt(prompts[turn], by_turn[turn], text, doubt) for turn in marked_turns}
            if len(spans) < len(learned):
                doubt("answer outside {% generation %}", "it is not learned")
        if not spans:
            raise BadRowError("no answer to train on", "weight 0, or outside the template's {% generation %} blocks")
        return text, spans

    def _answer_span(self, text: str, prompt: str) -> Span:
        """Return the span of the answer after `prompt`, to the first token that ends a turn.

        Each prompt is searched in the final text. So a template may drop the thinking of earlier turns, as long as it
        drops it from their prompts too.
        """
        start = len(prompt)
        ends = [text.index(end, start) + len(end) for end in self._template.ends if text.find(end, start) >= 0]
        tokens = self._template.special_token.findall(text[start : min(ends, default=start)])
        inner_turn_tokens = [token for token in tokens[:-1] if token in self._template.turn_tokens]
        if not text.startswith(prompt) or not ends or inner_turn_tokens:
            raise BadRowError(
                "answers that can't be located",
                f"the chat template does not render an answer as its prompt followed by the answer and a special token "
                f"(prompt {prompt[-80:]!r}, whole conversation {text[-160:]!r}); put {{% generation %}} and "
                "{% endgeneration %} around the assistant's words in it, and set model.chat_template",
            )
        return start, min(ends)


def turn_ends(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens at which a completion ends besides the tokenizer's own end (see ChatFormat.end_ids).

    A tokenizer without a usable chat template has none: its model only continues texts.
    """
    try:
        return ChatFormat(tokenizer).end_ids()
    except ValueError:
        return []


def blocks_of_turns(text: str, marked: list[Span], special_token: re.Pattern[str]) -> list[list[Span]]:
    """Group the blocks that a template marks by turn.

    Adjacent blocks are joined. A turn ends with the block that ends with a special token, and is cut after the token.
    Raises BadRowError if the next turn begins before that.
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


def _assign_blocks(blocks: list[list[Span]], text: str, prompts: dict[int, str]) -> dict[int, list[Span]]:
    """Assign blocks to turns: in order if there are as many, else to the last turn whose prompt precedes the block."""
    if len(blocks) == len(prompts):
        return dict(zip(prompts, blocks, strict=True))
    starts = {turn: len(commonprefix([text, prompt])) for turn, prompt in prompts.items()}  # noqa: RUF071  characters
    by_turn: dict[int, list[Span]] = {}
    for block in blocks:
        turn = max((turn for turn, start in starts.items() if start <= block[0][0]), default=min(starts))
        by_turn.setdefault(turn, []).extend(block)
    return by_turn


def _after_prompt(prompt: str, spans: list[Span], text: str, doubt: Doubt) -> list[Span]:
    """Remove the part that `prompt` holds from the spans; call `doubt` if the text before them is not the prompt."""
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
