"""Find tags such as `<think>` and `</think>` that divide a text, apart from those that it only mentions.

A tag in a fenced block, between backticks, in quotes or in the middle of a sentence ("it removes all up to </think> in
the text") is a mention.
"""

import re
from collections.abc import Sequence

from rewards.markdown import code_ranges, with_newlines

_THINKING = re.compile(r"<(/?)think(?:ing)?>")
_BEFORE_MENTION = re.compile(r"(?:[a-z,] |[\"'\u201c\u2018(\[])\Z")
_AFTER_MENTION = re.compile(r" [a-z]|[\"'\u201d\u2019)\],;]|[.?!](?:\s|\Z)")


def after_thinking(completion: str) -> str:
    """Return the text after the last `</think>`, or before a `<think>` that is never closed; else all of it.

    Example:
        after_thinking("<think>7?</think>It is 8.")  # "It is 8."
    """
    if not _THINKING.search(completion):
        return completion
    text = with_newlines(completion)
    *_, last = [None, *real_tags(text, _THINKING)]
    if last is None:
        return text
    return text[last.end() :] if last[1] else text[: last.start()]


def answer_alone(completion: str) -> str:
    """Return `after_thinking` without the white space around it: the part that an answer-only judge reads."""
    return after_thinking(completion).strip()


def thought(completion: str) -> str:
    """Return the chain of thought: the text up to the last `</think>`, after the `<think>` that opens it.

    Without `<think>` the prompt has opened the thought; without `</think>` it was cut short. "" if there is neither.

    Example:
        thought("<think>7?</think>It is 8.")  # "7?"
    """
    if not _THINKING.search(completion):
        return ""
    text = with_newlines(completion)
    tags = real_tags(text, _THINKING)
    if not tags:
        return ""
    start = 0 if tags[0][1] else tags[0].end()
    return text[start : tags[-1].start()] if tags[-1][1] else text[start:]


def unmentioned(text: str, tags: re.Pattern[str]) -> str:
    """Return `text` with (think) for each `<think>` among `tags` that is only mentioned."""
    if not tags.search(text):
        return text
    text = with_newlines(text)
    real = {tag.start() for tag in real_tags(text, tags)}
    return tags.sub(lambda tag: tag[0] if tag.start() in real else f"({tag[0][1:-1]})", text)


def real_tags(text: str, tags: re.Pattern[str]) -> list[re.Match[str]]:
    """Return the `tags` that divide `text`, whose lines end in "\\n". Group 1 of `tags` is "/" in a closing one.

    If the last of them is an opening one, the first closing tag after it counts even if it looks like a mention.
    """
    all_tags = list(tags.finditer(text))
    opens_and_closes = [tag[1] for tag in all_tags] == ["", "/"] and text[all_tags[1].start() - 1] == "\n"
    if opens_and_closes and not text[: all_tags[0].start()].strip():
        return all_tags  # the usual form needs no search for code
    outside = _outside(all_tags, code_ranges(text))
    real = [tag for tag in outside if not _is_mention(text, tag)]
    if real and not real[-1][1]:
        closing = next((tag for tag in outside if tag[1] and tag.start() > real[-1].start()), None)
        return real if closing is None else [*real, closing]
    return real


def _outside(tags: Sequence[re.Match[str]], ranges: Sequence[tuple[int, int]]) -> list[re.Match[str]]:
    """Return the tags that lie in none of the sorted ranges."""
    outside: list[re.Match[str]] = []
    index = 0
    for tag in tags:
        while index < len(ranges) and ranges[index][1] <= tag.start():
            index += 1
        if index == len(ranges) or tag.start() < ranges[index][0]:
            outside.append(tag)
    return outside


def _is_mention(text: str, tag: re.Match[str]) -> bool:
    before, after = text[max(tag.start() - 2, 0) : tag.start()], text[tag.end() : tag.end() + 2]
    return bool(_BEFORE_MENTION.search(before) and _AFTER_MENTION.match(after))
