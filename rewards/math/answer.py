r"""Find the final answer in a completion.

Only the text after the thinking counts. The strongest mark wins, wherever it stands, and the last of several of a kind:

1. "the final answer is .... I hope it is correct.", the form of the Minerva prompt;
2. `\boxed{...}` or `\fbox{...}`;
3. `<answer>...</answer>`;
4. a line `#### ...` (GSM8K);
5. a sentence: "the answer is ...", "Answer: ...", "答案是...",
   "答案为...", "答案: ...", "故选..."; a phrase that chooses letters: "I choose B", "option C is correct",
   "我选择 B", "選項C正確"; or a last line "A: ...";
6. no mark: a completion of one line without prose is an answer as a whole. In prose the answer is the last expression:
   a formula between `$`, `\(` or `\[`, or a number outside of formulas. Words like "therefore" and "所以" aren't marks,
   since they lead to the last expression. One line of prose with no expression ("Paris") is its own answer.

Boxes, formulas or numbers that are listed ("\boxed{1} and \boxed{2}", "5, 6 or 7") are one answer of several parts, so
naming every candidate doesn't pay. A reason right after an answer ("12 (since 3*4 = 12)", "C, because ...") is
no part of it. Every search takes time linear in the text, since a policy under training writes anything.
"""

import re
from collections.abc import Iterable, Iterator

from rewards.math.wording import LATIN_WORD, before_reason, chosen_options
from rewards.thinking import after_thinking

MAX_ANSWER_CHARS = 1000
"""A longer text is no final answer. Checkers take time exponential in the length of an expression."""

_BARE_CHARS = 200  # a longer line without prose is no answer

# A comma before one or two last digits is a decimal comma; three digits after it are thousands.
_UNSIGNED = r"(?:\d+,\d{1,2}(?![\d,.])|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_REPEATING = (
    r"\d*+\.\d*+(?:\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)(?:\d*+\\dot\s*\{\d\})?"
    r"|\(\d+\)|(?<=\d)(?:\.{3}|\u2026|\\[lc]?dots))"
)
_TIME = r"\d{1,2}:[0-5]\d(?:\s?[AaPp]\.?[Mm]\b)"
# A minus right after a digit, letter or closing bracket subtracts ("3-4"); elsewhere it is a sign ("= -4").
_QUANTITY = re.compile(
    rf"(?:(?<![A-Za-z\d_)\]}}])-)?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|{_REPEATING}|{_TIME}|{_UNSIGNED}(?:/\d+)?)(?:\s?\\?%)?"
)
_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(
    r"\banswer(?:\s+(?:is|should be|must be|would be)\b(?!\s+not\b)|\s*:)\s*:?|^a:(?=.*+\s*+\Z)"
    r"|答案\s*(?:应该|应当|应|應該|應當|應)?(?:是|为|為|[:\uff1a])\s*[:\uff1a]?"
    r"|(?:[故应應]|所以|因此)[选選][择擇]?(?![项項])\s*[:\uff1a]?",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<!\.\.)(?<!\b[ap])(?<!\b[ap]\.m)[.!?](?=\s|$)|\n|[。\uff01\uff1f]")
_THE_X_IS = re.compile(r"\Athe\b[^.\n]{0,200}?\b(?:is|are|equals)\b:?\s*", re.IGNORECASE)  # "Answer: the sum is 5"
_CHOICE = re.compile(r"\(?[A-J](?:[).:,;\]]|\s+\()")
_DELIMITER = re.compile(r"\\\\|\\\$|\$\$|\$|\\[()\[\]]")
_CLOSING = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_PROSE = re.compile(rf"{LATIN_WORD.pattern}|[\u4e00-\u9fff]")
_SHORT_WORD = re.compile(r"[A-Za-z][a-z]+|[\u4e00-\u9fff]")
_COMMANDS_WITH_WORDS = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)[a-z]*\s*\{[^{}]*\}|\\[A-Za-z]+")
_SPACES = re.compile(r"\\q?quad|\\text")
_NO_PROSE = re.compile(
    r"(?<![A-Za-z])(?:a?(?:sin|cos|tan)h?|sqrt|cot|sec|csc|log|exp|inf(?:inity)?|ln|pi|oo|or|and"
    r"|[cdkm]?m|k?g|m?[lL]|ft|oz|lb)(?![a-z])"
)
_LISTING = re.compile(r"(?:[,、\uff0c]|\b(?:and|or)\b|[和或及与])\W*(?:\w{1,5}\s*=\s*)?\Z")
_ADJACENT = re.compile(r"[\s$+.\\]*")

Part = tuple[int, int, str]
"""A piece of the answer: its start and end in the text, and its content."""


def final_answer(completion: str) -> str | None:
    """Return the marked answer, else the last expression, or None; see the module for the order.

    Example:
        final_answer("So he has 3 + 4 = 7 apples.")  # "7"
    """
    if (marked := marked_answer(completion)) is not None:
        return marked
    text = _without_last_reason(after_thinking(completion).strip())
    is_line = len(text) <= _BARE_CHARS and not re.search(r"\n|\\f?box", text)
    if is_line and ";" not in text and not _words(text):
        return text or None
    answer = _last_run(text, _expressions(text))
    if answer is None and is_line:
        return text
    return answer if answer and len(answer) <= MAX_ANSWER_CHARS else None


def marked_answer(completion: str) -> str | None:
    """Return the text that a mark names as the answer, stripped, or None."""
    text = after_thinking(completion)
    for mark in (_minerva, _boxed, _tagged, _hashed, _stated):
        answer = mark(text)
        if answer is not None and answer.strip():
            return before_reason(answer.strip()) if len(answer) <= MAX_ANSWER_CHARS else None
    return None


def last_number(completion: str) -> str | None:
    """Return the last integer, decimal, percentage or simple fraction after the thinking, as written, or None."""
    *_, last = ["", *(content for _, _, content in _quantities(after_thinking(completion)))]
    return last.strip() if last and len(last) <= MAX_ANSWER_CHARS else None


def _without_last_reason(text: str) -> str:
    """Return `text` without the reason that follows the answer in its last sentence."""
    start = max(text.rfind("\n"), len(text) - 2 * MAX_ANSWER_CHARS) + 1
    *_, start = [start, *(end.end() for end in _SENTENCE_END.finditer(text, start, max(start, len(text) - 1)))]
    return text[:start] + before_reason(text[start:], is_marked=False)


def _minerva(text: str) -> str | None:
    """Read the last sentence "The final answer is ... I hope it is correct"."""
    end = text.rfind("I hope it is correct")
    start = text.rfind("inal answer is", 0, max(end, 0))
    if start < 0 or end - start > MAX_ANSWER_CHARS:
        return None
    sentence = text[start + 1 : end].strip().removesuffix(".")
    return _boxed(sentence) or _stated(sentence)


def _boxed(text: str) -> str | None:
    """Read the last complete box, nested braces and all, and the boxes listed right before it."""
    boxes: list[Part] = []
    opened: list[tuple[bool, int, int]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            is_box, start, inside = opened.pop() if opened else (False, 0, 0)
            if is_box:
                while boxes and boxes[-1][0] > start:  # a box in a box
                    boxes.pop()
                boxes.append((start, token.end(), text[inside : token.start()].strip()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token[0] != "{", token.start(), token.end()))
    return _last_run(text, boxes)


def _tagged(text: str) -> str | None:
    """Read the last complete pair of answer tags."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, content = before.rpartition("<answer>")
    return content if opening and closing else None


def _hashed(text: str) -> str | None:
    """Read the last line `#### x` (GSM8K) whose x is no prose, since in Markdown the mark opens a heading."""
    for line in reversed(text.splitlines()):
        _, mark, rest = line.rpartition("####")
        if mark and rest.strip() and not _PROSE.search(rest):
            return rest
    return None


def _stated(text: str) -> str | None:
    """Read the last sentence "the answer is ...": its first formulas, else its numbers, else its words."""
    *_, end = [0, *(mark.end() for mark in _ANSWER_IS.finditer(text))]
    *_, (chosen_end, letters) = [(0, ""), *chosen_options(text)]
    if chosen_end > end:
        return letters
    if not end:
        return None
    rest = text[end:][: 2 * MAX_ANSWER_CHARS].lstrip(" *:\n")
    if rest.count("}") > rest.count("{"):  # of \text{the answer is }
        rest = rest.strip("} ")
    formula = next(_formulas(rest), None)
    if formula and not rest[: formula[0]].strip(r" *:$\([") and "\n" in rest[: formula[1]]:
        return formula[2]  # a display, which need not be on one line
    sentence = before_reason(_SENTENCE_END.split(rest, maxsplit=1)[0].strip(" *:"))
    sentence = _THE_X_IS.sub("", sentence)
    formulas = _first_run(sentence, _formulas(sentence))
    if formulas:
        return formulas
    result = sentence.rpartition("=")[2].strip() if _PROSE.search(sentence) else sentence
    numbers = _first_run(result, _quantities(result))
    return numbers if numbers and _PROSE.search(result) and not _CHOICE.match(result) else result


def _expressions(text: str) -> list[Part]:
    """Return formulas, and numbers outside of formulas, in order."""
    formulas = [formula for formula in _formulas(text) if any(map(str.isalnum, formula[2]))]
    edges = [0, *(edge for start, end, _ in formulas for edge in (start, end)), len(text)]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    outside = [part for start, end in gaps for part in _quantities(text, start, end)]
    return sorted([*formulas, *outside])


def _quantities(text: str, start: int = 0, end: int | None = None) -> Iterator[Part]:
    """Yield numbers in `text[start:end]`, but for those between letters ("K2A"), which belong to a name."""
    for number in _QUANTITY.finditer(text, start, len(text) if end is None else end):
        around = text[max(number.start() - 1, 0) : number.start()] + text[number.end() : number.end() + 1]
        if not (len(around) == 2 and around.isascii() and around.isalpha()):
            yield *number.span(), number[0]


def _formulas(text: str) -> Iterator[Part]:
    """Yield the text between math delimiters. Prose between two dollar signs is no formula: they may mean money."""
    opening = None
    for token in _DELIMITER.finditer(text):
        if opening is None or token[0] in (r"\(", r"\["):
            opening = token if token[0] in _CLOSING else None
        elif token[0] == _CLOSING[opening[0]]:
            content = text[opening.end() : token.start()]
            inline = token[0] in ("$", r"\)")
            before_digit = token[0] == "$" and text[token.end() : token.end() + 1].isdigit()
            if before_digit or (inline and ("\n" in content or len(_words(content)) > 1)):
                opening = token if token[0] == "$" else None
                continue
            if content.strip():
                yield opening.start(), token.end(), content.strip()
            opening = None


def _words(text: str) -> list[str]:
    """Return words that are neither LaTeX, nor functions, nor units."""
    return _SHORT_WORD.findall(_NO_PROSE.sub(" ", _COMMANDS_WITH_WORDS.sub(" ", text)))


def _last_run(text: str, parts: Iterable[Part]) -> str | None:
    """Return the last of `parts` with those listed right before it, joined by commas."""
    *_, last = [None, *_runs(text, parts)]
    return last or None


def _first_run(text: str, parts: Iterable[Part]) -> str | None:
    """Return the first of `parts` with those listed right after it, joined by commas."""
    return next(_runs(text, parts), None) or None


def _runs(text: str, parts: Iterable[Part]) -> Iterator[str]:
    run: list[Part] = []
    for part in parts:
        if run and not _are_listed(text, run[-1], part):
            yield ", ".join(content for _, _, content in run)
            run = []
        run.append(part)
    if run:
        yield ", ".join(content for _, _, content in run)


def _are_listed(text: str, left: Part, right: Part) -> bool:
    """Return whether only a comma, "and" or "or" and a few words separate two different parts."""
    gap = _SPACES.sub("", text[left[1] : min(right[0], left[1] + 100)])
    touch = text[right[0]] in "\\$" and _ADJACENT.fullmatch(gap)
    return len(gap) <= 70 and left[2] != right[2] and bool(touch or _LISTING.search(gap))
