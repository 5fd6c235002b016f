"""The final answer inside a completion.

What the writer marked as the answer wins, in this order: `\\boxed{...}`, `<answer>...</answer>`, a line `#### ...`, a
sentence "the answer is ..." or a last line "A: ..."; of several the last. Without a mark it is the last number. Every
search is linear in the text, since a policy under training writes anything.
"""

import re

MAX_ANSWER_CHARS = 1000
"""A longer text is not a final answer. Checkers take time exponential in the size of what they parse."""

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# A minus right after a digit, letter or closing bracket subtracts ("3-4"); elsewhere it is a sign ("= -4").
_QUANTITY = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|{_UNSIGNED}(?:/\d+)?)(?:\s?\\?%)?")
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\s*:)\s*:?|^a:(?=.*\s*\Z)", re.IGNORECASE | re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")


def final_answer(completion: str) -> str | None:
    """The marked answer, else the last number, or None where there is neither."""
    marked = marked_answer(completion)
    return last_number(completion) if marked is None else marked


def after_thinking(completion: str) -> str:
    """What follows the last `</think>`; the whole completion where there is none."""
    return completion.rpartition("</think>")[2]


def marked_answer(completion: str) -> str | None:
    """What the writer marked as the answer, stripped, or None. Only text after `</think>` counts."""
    text = after_thinking(completion)
    for found in (_boxed(text), _tagged(text), _hashed(text), _answer_is(text)):
        if found is not None and found.strip():
            return found.strip() if len(found) <= MAX_ANSWER_CHARS else None
    return None


def last_number(completion: str) -> str | None:
    """The last integer, decimal, percentage or simple fraction after `</think>`, as written, or None."""
    quantities = _QUANTITY.findall(after_thinking(completion))
    return quantities[-1].strip() if quantities and len(quantities[-1]) <= MAX_ANSWER_CHARS else None


def _boxed(text: str) -> str | None:
    """Content of the last complete box, nested braces and all."""
    content, opened = None, []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            is_box, start = opened.pop() if opened else (False, 0)
            content = text[start : token.start()] if is_box else content
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token[0] != "{", token.end()))
    return content


def _tagged(text: str) -> str | None:
    """Content of the last complete pair of answer tags."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, content = before.rpartition("<answer>")
    return content if opening and closing else None


def _hashed(text: str) -> str | None:
    """The last line `#### x` (GSM8K) whose x is not prose: in Markdown the same mark opens a heading."""
    for line in reversed(text.splitlines()):
        _, mark, rest = line.rpartition("####")
        if mark and rest.strip() and not _WORD.search(rest):
            return rest
    return None


def _answer_is(text: str) -> str | None:
    """The answer in the last sentence "the answer is ...": its formula, else its quantity, else its words."""
    *_, rest = _ANSWER_IS.split(text)
    if len(rest) == len(text):
        return None
    sentence = _SENTENCE_END.split(rest.lstrip(), maxsplit=1)[0].strip(" *:")
    formula = _INLINE_MATH.search(sentence)
    if formula:
        return formula[1] or formula[2]
    result = sentence.rpartition("=")[2].strip() if _WORD.search(sentence) else sentence
    quantity = _QUANTITY.search(result)
    return quantity[0] if quantity and _WORD.search(result) else result
