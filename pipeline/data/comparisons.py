"""Load comparisons of answers to a prompt from five forms of rows, and tokenise them for a reward model or a policy."""

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from configs.base import neighbour
from configs.data import ComparisonColumn, ComparisonData
from pipeline.data.chat import ChatFormat
from pipeline.data.messages import Message, has_tools, parse_message, parse_messages, text_only
from pipeline.data.order import batch_indices
from pipeline.data.rows import BadRowError, BadRows, Row, check_characters, read_rows
from pipeline.data.scored import scored_ids
from rewards.thinking import answer_alone

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to a conversation that ends with the user.

    answers: different texts from best to worst; a single answer has a score.
    scores: falling, one for each answer; None if only the order is known.
    row: file and line, or data set and number.
    values: the row's columns, for a judge's prompt; empty for comparisons that are only scored.
    """

    messages: list[Message]
    answers: list[str]
    scores: list[float] | None
    source: str
    domain: str
    row: str
    values: dict[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)

    @property
    def margin(self) -> float | None:
        """The score of the best minus that of the worst answer; None without scores, or for one answer."""
        return None if self.scores is None or len(self.scores) == 1 else self.scores[0] - self.scores[-1]


@dataclass(frozen=True, slots=True)
class TokenizedComparison:
    """A comparison and its token ids; each of `answer_ids` continues `prompt_ids`.

    ref_logprobs: log-probabilities of each answer's tokens by a frozen reference, if they were computed.
    """

    comparison: Comparison
    prompt_ids: list[int]
    answer_ids: list[list[int]]
    ref_logprobs: list[NDArray[np.float32]] | None = None


class Comparisons:
    """The good rows of a source, tokenised, and the record of the bad ones.

    Example: `Comparisons.load(config, tokenizer, seed=0).take(step=1, n=8)`
    """

    def __init__(
        self, comparisons: list[Comparison], token_ids: list[list["array[int]"]], bad_rows: BadRows, seed: int
    ):
        self._comparisons = comparisons
        self._token_ids = token_ids  # of the prompt, then of each answer
        self.bad_rows = bad_rows
        self._seed = seed
        self.ref_logprobs: list[list[NDArray[np.float32]]] | None = None  # by comparison and answer

    @classmethod
    def load(cls, config: ComparisonData, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> "Comparisons":
        """Read and tokenise `config.source`; `seed` decides the order of `take`.

        Raises ValueError for an unreadable source, a share of bad rows above `config.max_bad_share`, and a tokenizer
        without chat template.
        """
        chat, bad_rows = ChatFormat(tokenizer), BadRows()
        comparisons: list[Comparison] = []
        token_ids: list[list[array[int]]] = []
        for comparison in read_comparisons(config, bad_rows):
            try:
                chat.check(comparison.messages, last_role="user")
                scored = [scored_ids(comparison.messages, answer, tokenizer) for answer in comparison.answers]
                prompt_ids, answer_ids = scored[0][0], [answer_ids for _, answer_ids in scored]
                length = len(prompt_ids) + max(map(len, answer_ids))
                if length > config.max_length:
                    raise BadRowError("longer than max_length", f"{length} tokens > {config.max_length}")
            except BadRowError as error:
                bad_rows.add(comparison.row, error)
            else:
                comparisons.append(replace(comparison, values={}))
                token_ids.append([array("i", ids) for ids in (prompt_ids, *answer_ids)])
        bad_rows.check(config.max_bad_share)
        return cls(comparisons, token_ids, bad_rows, seed)

    def __len__(self) -> int:
        return len(self._comparisons)

    def __getitem__(self, index: int) -> TokenizedComparison:
        prompt_ids, *answer_ids = (ids.tolist() for ids in self._token_ids[index])
        reference = None if self.ref_logprobs is None else self.ref_logprobs[index]
        return TokenizedComparison(self._comparisons[index], prompt_ids, answer_ids, reference)

    def parts(self, size: int) -> Iterator[list[TokenizedComparison]]:
        """Yield all comparisons in their order, at most `size` at a time."""
        for first in range(0, len(self), size):
            yield [self[index] for index in range(first, min(first + size, len(self)))]

    def token_hash(self) -> str:
        """Hash the token ids of all comparisons, in their order."""
        hashed = hashlib.sha256()
        for comparison in self._token_ids:
            for ids in comparison:
                hashed.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return hashed.hexdigest()

    def take(self, step: int, n: int) -> list[TokenizedComparison]:
        """Return the comparisons of a step, which counts from 1; the same for every call."""
        return [self[index] for index in batch_indices(step, n, len(self), self._seed)]


def read_comparisons(config: ComparisonData, bad_rows: BadRows) -> Iterator[Comparison]:
    """Yield the comparisons of `config.source` as text; bad rows go to `bad_rows`, which the caller checks.

    Rows that don't name their source have their file or data set. Raises ValueError for an unreadable source, and for a
    domain of `config.domains` without comparisons.
    """
    domains: set[str] = set()
    for comparison in _all_comparisons(config, bad_rows):
        domains.add(comparison.domain)
        if config.domains and comparison.domain not in config.domains:
            continue
        try:
            yield _without_thoughts(comparison) if config.reasoning == "drop" else comparison
        except BadRowError as error:
            bad_rows.add(comparison.row, error)
    if missing := sorted(set(config.domains) - domains):
        raise ValueError(f"domains: no comparison of domain '{missing[0]}'; {neighbour(missing[0], sorted(domains))}")


def _all_comparisons(config: ComparisonData, bad_rows: BadRows) -> Iterator[Comparison]:
    rows = read_rows(config.source, bad_rows)
    if config.form == "scored":
        yield from _by_prompt(config, rows, bad_rows)
        return
    read = {"comparison": _comparison, "pair": _pair, "dialogue": _dialogue, "ranking": _ranking}[config.form]
    for row in rows:
        try:
            if config.form == "comparison" and "answers" not in row.values and "chosen" in row.values:
                yield _recognised(config, row, bad_rows)
            else:
                yield read(config, row)
        except BadRowError as error:
            bad_rows.add(row.where, error)


def _comparison(config: ComparisonData, row: Row) -> Comparison:
    source, domain, origin = (row.values.get(name) for name in ("source", "domain", "row"))
    if not (isinstance(source, str) and isinstance(domain, str) and isinstance(origin, str)):
        raise BadRowError("not as the stage `preferences` writes it", "source, domain and row are texts")
    answers, values = _texts(row.column("answers")), row.values.get("scores")
    if values is None and len(answers) == 1:
        raise BadRowError("one answer without a score")
    if values is not None and (not isinstance(values, list) or len(values) != len(answers)):
        raise BadRowError("not a score for every answer", f"{values!r}"[:120])
    scores = None if values is None else [_number(value) for value in values]
    if scores is not None and scores != sorted(scores, reverse=True):
        raise BadRowError("scores that contradict the order", f"{scores}"[:120])
    return Comparison(_prompt(row.column("messages")), answers, scores, source, domain, origin, row.values)


def _recognised(config: ComparisonData, row: Row, bad_rows: BadRows) -> Comparison:
    """Read a row with `chosen` and `rejected` where the setting `form` is left at its default."""
    chosen = row.values["chosen"]
    is_dialogue = isinstance(chosen, str) and "prompt" not in row.values and _TURN.match(f"\n\n{chosen.strip()}")
    comparison = (_dialogue if is_dialogue else _pair)(config, row)
    bad_rows.forms[f"comparisons of the form '{'dialogue' if is_dialogue else 'pair'}'"] += 1
    return comparison


def _pair(config: ComparisonData, row: Row) -> Comparison:
    chosen, rejected = row.column(_name(config, "chosen")), row.column(_name(config, "rejected"))
    prompt = row.values.get(_name(config, "prompt"))
    if _is_conversation(chosen) and _is_conversation(rejected):
        messages, answers = _last_turns(chosen, rejected)
        question = prompt[-1].get("content") if _is_conversation(prompt) else prompt
        if prompt is not None and question not in [message["content"] for message in messages]:
            raise BadRowError("a prompt that the conversations don't hold", f"{prompt!r}"[:120])
    else:
        messages = _prompt(row.column(_name(config, "prompt")))
        answers = _texts([_answer(chosen), _answer(rejected)])
    scores = [row.values.get(_name(config, column)) for column in ("chosen_score", "rejected_score")]
    if scores == [None, None]:
        return _build(config, row, messages, answers, None)
    better, worse = map(_number, scores)
    if better < worse:
        raise BadRowError("scores that contradict the order", f"chosen {better:g}, rejected {worse:g}")
    return _build(config, row, messages, answers, [better, worse])


def _dialogue(config: ComparisonData, row: Row) -> Comparison:
    chosen, rejected = (_turns(row.column(_name(config, column))) for column in ("chosen", "rejected"))
    return _build(config, row, *_last_turns(chosen, rejected), None)


def _ranking(config: ComparisonData, row: Row) -> Comparison:
    answers = row.column(_name(config, "answers"))
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRowError("not a list of two answers or more", f"{answers!r}"[:120])
    messages = _prompt(row.column(_name(config, "prompt")))
    return _build(config, row, messages, _texts([_answer(answer) for answer in answers]), None)


def _by_prompt(config: ComparisonData, rows: Iterable[Row], bad_rows: BadRows) -> Iterator[Comparison]:
    """Yield the scored answers of each prompt as one comparison, from best to worst."""
    firsts: dict[tuple[str, str], Comparison] = {}
    groups: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for row in rows:
        try:
            messages = _prompt(row.column(_name(config, "prompt")))
            [answer] = _texts([_answer(row.column(_name(config, "answer")))])
            score = _number(row.column(_name(config, "score")))
            comparison = _build(config, row, messages, [answer], [score])
            prompt = json.dumps(messages), comparison.domain
            if answer.strip() in groups.get(prompt, {}):
                raise BadRowError("an answer scored before", f"{answer!r}"[:120])
        except BadRowError as error:
            bad_rows.add(row.where, error)
        else:
            firsts.setdefault(prompt, comparison)
            groups.setdefault(prompt, {})[answer.strip()] = score, answer
    for prompt, group in groups.items():
        scored = sorted(group.values(), key=lambda pair: -pair[0])
        yield replace(firsts[prompt], answers=[answer for _, answer in scored], scores=[score for score, _ in scored])


def _without_thoughts(comparison: Comparison) -> Comparison:
    """Keep the final answers. Raises BadRowError where one is empty, or two differ in their thoughts alone."""
    return replace(comparison, answers=_texts([answer_alone(answer) for answer in comparison.answers]))


def _build(
    config: ComparisonData, row: Row, messages: list[Message], answers: list[str], scores: list[float] | None
) -> Comparison:
    if has_tools(row.values.get("tools")):
        raise BadRowError("tools in a comparison", "a reward model reads text; remove or rename the column 'tools'")
    domain = row.values.get(_name(config, "domain")) or ""
    if not isinstance(domain, str):
        raise BadRowError("a domain that is no text", f"{domain!r}"[:120])
    return Comparison(messages, answers, scores, row.where.rpartition(":")[0], domain, row.where, row.values)


def _name(config: ComparisonData, column: ComparisonColumn) -> str:
    return config.columns.get(column, column)


def _prompt(value: Any) -> list[Message]:
    """Parse a text or a list of {role, content} as a conversation to answer."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return _conversation(value, last_role="user")


def _answer(value: Any) -> Any:
    """Return the text of the assistant's single message; other values unchanged."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
        raise BadRowError("an answer that is not one message of the assistant", f"{value!r}"[:120])
    return text_only([parse_message(value[0])])[0]["content"]


def _texts(answers: Any) -> list[str]:
    """Return `answers`; raise BadRowError unless they are texts, not empty, and all different."""
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRowError("an answer that is no text", f"{answers!r}"[:120])
    if not all(answer.strip() for answer in answers):
        raise BadRowError("empty answer")
    if len({answer.strip() for answer in answers}) < len(answers):
        raise BadRowError("equal answers", f"{answers[0]!r}"[:120])
    for answer in answers:
        check_characters(answer)
    return answers


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError("a score that is no number", f"{value!r}"[:120])
    return float(value)


def _is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Return True for a list of messages with a prompt, False for an answer alone."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _last_turns(chosen: Any, rejected: Any) -> tuple[list[Message], list[str]]:
    """Return the messages that two conversations share, and their last answers."""
    better, worse = _conversation(chosen, last_role="assistant"), _conversation(rejected, last_role="assistant")
    if better[:-1] != worse[:-1]:
        raise BadRowError("conversations that differ before the last answer")
    return better[:-1], _texts([better[-1]["content"], worse[-1]["content"]])


def _turns(text: Any) -> list[Message]:
    """Parse HH-RLHF's form: each turn begins with a blank line and "Human:" or "Assistant:"."""
    if not isinstance(text, str):
        raise BadRowError("a dialogue that is no text", f"{text!r}"[:120])
    before, *turns = _TURN.split(f"\n\n{text.strip()}")
    if before.strip() or not turns:
        raise BadRowError("a dialogue that does not begin with 'Human:'", text[:80])
    return [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]


def _conversation(value: Any, last_role: str) -> list[Message]:
    return text_only(parse_messages(value, last_role))
