"""Tags such as `<think>` and `</think>` that divide a text, told from those that the text only mentions.

A tag inside code is text, be it in a fenced block or between backticks, and so is one in the middle of a sentence or
in quotes ("it removes all up to </think> in the text").
"""

import re
from collections.abc import Sequence

from rewards.markdown import code_ranges, with_newlines

_THINKING = re.compile(r"<(/?)think(?:ing)?>")
_BEFORE_MENTION = re.compile(r"(?:[a-z,] |[\"'\u201c\u2018(\[])\Z")
_AFTER_MENTION = re.compile(r" [a-z]|[\"'\u201d\u2019)\],;]|[.?!](?:\s|\Z)")


def after_thinking(completion: str) -> str:
    """The text after the last `</think>`, or before a `<think>` that is never closed; else the whole completion."""
    if not _THINKING.search(completion):
        return completion
    text = with_newlines(completion)
    *_, last = [None, *real_tags(text, _THINKING)]
    if last is None:
        return text
    return text[last.end() :] if last[1] else text[: last.start()]


def unmentioned(text: str, tags: re.Pattern[str]) -> str:
    """`text` with (think) for each `<think>` among `tags` that is only mentioned, so that the others can be counted."""
    if not tags.search(text):
        return text
    text = with_newlines(text)
    real = {tag.start() for tag in real_tags(text, tags)}
    return tags.sub(lambda tag: tag[0] if tag.start() in real else f"({tag[0][1:-1]})", text)


def real_tags(text: str, tags: re.Pattern[str]) -> list[re.Match[str]]:
    """The `tags` that divide `text`, whose lines end in "\\n". Group 1 of `tags` is "/" in a closing one.

    Where the last of them is an opening one, the first closing tag after it counts even if it looks like a mention.
    """
    found = list(tags.finditer(text))
    opens_and_closes = [tag[1] for tag in found] == ["", "/"] and text[found[1].start() - 1] == "\n"
    if opens_and_closes and not text[: found[0].start()].strip():
        return found  # as nearly always: no need to look for code
    outside = _outside(found, code_ranges(text))
    real = [tag for tag in outside if not _is_mention(text, tag)]
    if real and not real[-1][1]:
        closing = next((tag for tag in outside if tag[1] and tag.start() > real[-1].start()), None)
        return real if closing is None else [*real, closing]
    return real


def _outside(tags: Sequence[re.Match[str]], ranges: Sequence[tuple[int, int]]) -> list[re.Match[str]]:
    """The tags that lie in none of the sorted ranges."""
    kept: list[re.Match[str]] = []
    index = 0
    for tag in tags:
        while index < len(ranges) and ranges[index][1] <= tag.start():
            index += 1
        if index == len(ranges) or tag.start() < ranges[index][0]:
            kept.append(tag)
    return kept


def _is_mention(text: str, tag: re.Match[str]) -> bool:
    before, after = text[max(tag.start() - 2, 0) : tag.start()], text[tag.end() : tag.end() + 2]
    return bool(_BEFORE_MENTION.search(before) and _AFTER_MENTION.match(after))
