"""The program inside a completion.

Only the text after the thinking counts, and only the part between `<answer>` tags where they hold code. The last fenced
block (`rewards.markdown`) whose tag names the language wins, then the last without a tag, then the last; without a
fence it is the whole text. Two more rules:

* Where the tests name the function they call, the last block that defines it comes before any other: what follows may
  be an example or tests. Python's blocks are completed by others: by the one that imports or defines what it uses.
* Where a closing fence is the only one, as behind a prompt that ends with the opening one, it ends the program.

A block that is never closed ends with the text, as it does where the completion was cut off; whether that is a program
is for the compiler to say.
"""

import builtins
import re
from collections.abc import Sequence

from rewards.code.truth import global_names
from rewards.markdown import LANGUAGE_TAGS, Block, blocks, with_newlines
from rewards.thinking import after_thinking, real_tags

_MAIN = {
    "c": r"\bmain\s*\(",
    "cpp": r"\bmain\s*\(",
    "rust": r"\bfn\s+main\s*\(",
    "go": r"\bfunc\s+main\s*\(",
    "java": r"\bvoid\s+main\s*\(",
}
"""The entry function of a program that can be run, by language."""
_ANSWER = re.compile(r"<(/?)answer>")
_BYTE_ORDER_MARKS = re.compile("^[ \t]*\ufeff+", re.MULTILINE)
_COMMENT = ("#", "//", "/*", '"', "'")
_SENTENCE = re.compile(r"\W{0,3}[A-Z][\w'\u2019]*\b(?!.*(?:[=;{}<>]|\w[(\[]))(?=.*[.:!?,]\W{0,3}\Z|(?:.* ){3})")
_CODE = re.compile(r"[=;{}]|\w\(|^[ \t]*(?:import|from|def|class|use|package|fn|func|echo)\b", re.MULTILINE)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_IN_EVERY_MODULE = frozenset(dir(builtins)) | {"__file__"}
_MOST_BLOCKS = 50
"""Most blocks of a completion that are put together into one program."""


def program(completion: str, language: str, *, names: Sequence[str] = (), runs: bool = False) -> str | None:
    """The source text in `language`, or None where there is nothing but blanks.

    names: the functions and classes that the tests take from it. runs: whether it is a program that is to run.
    """
    text = with_newlines(_BYTE_ORDER_MARKS.sub("", after_thinking(completion)))
    text, found = _in_answer(text)
    fitting = LANGUAGE_TAGS.get(language, {language})
    ranks = [[block for block in found if block.tag in fitting], [block for block in found if not block.tag], found]
    chosen = _defining(ranks, language, names, runs) or next((rank[-1] for rank in ranks if rank), None)
    source = text if chosen is None else chosen.source
    if chosen and language == "python" and len(found) <= _MOST_BLOCKS:
        mine = found.index(chosen)
        parts = [block.source if block.tag in fitting or not block.tag else "" for block in found]
        source = _completed(source, parts[:mine], parts[mine + 1 :])
    return source if source.strip() else None


def _in_answer(text: str) -> tuple[str, list[Block]]:
    """The text between the answer's tags, or all of `text` where they are missing or hold no code; and its blocks."""
    whole = _opened(text)
    tags = real_tags(text, _ANSWER)
    opening = next((place for place in range(len(tags) - 1, -1, -1) if not tags[place][1]), None)
    if opening is None:
        return whole
    end = tags[opening + 1].start() if opening + 1 < len(tags) else len(text)
    inside = _opened(text[tags[opening].end() : end])
    return inside if inside[1] or (inside[0].strip() and not whole[1]) else whole


def _opened(text: str) -> tuple[str, list[Block]]:
    """`text` and its blocks. Where the first fence can only be a closing one, the text before it is a block too."""
    found = blocks(text)
    if not found or found[0].tag:
        return text, found
    lines = text[: found[0].start].split("\n")
    last = max((number for number, line in enumerate(lines) if _is_prose(line)), default=-1)
    closes = last < 0 or (len(found) == 1 and not found[0].closed and not found[0].source.strip())
    code = "\n".join(lines[last + 1 :]).strip()
    if not closes or code.endswith(":") or not _CODE.search(code):
        return text, found
    start = sum(len(line) + 1 for line in lines[: last + 1])
    text = f"{text[:start]}{text[found[0].start] * 3}\n{text[start:]}"
    return text, blocks(text)


def _is_prose(line: str) -> bool:
    text = line.strip()
    return not text.startswith(_COMMENT) and bool(_SENTENCE.match(text) or _CHINESE.search(text))


def _defining(ranks: Sequence[Sequence[Block]], language: str, names: Sequence[str], runs: bool) -> Block | None:
    """The last block that defines one of `names`, or else the entry function, of the first rank that has one."""
    if names:
        name = "|".join(map(re.escape, names))
        definition = re.compile(rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(?:{name})\b|^(?:{name})\b[^=\n]*=", re.M)
    elif runs and language in _MAIN:
        definition = re.compile(_MAIN[language])
    else:
        return None
    return next((block for rank in ranks for block in reversed(rank) if definition.search(block.source)), None)


def _completed(source: str, before: Sequence[str], after: Sequence[str]) -> str:
    """`source` with those of the parts before and after it that define what it lacks, in order."""
    needs = _needs(source)
    taken: set[int] = set()
    parts = [*before, source, *after]
    order = [*range(len(before) - 1, -1, -1), *range(len(before) + 1, len(parts))]
    names = {number: _names(parts[number]) for number in order if needs and parts[number].strip()}
    while needs:
        number = next((n for n in order if n in names and n not in taken and needs & names[n][1]), None)
        if number is None:
            break
        taken.add(number)
        used, defined = names[number]
        needs = (needs | used) - defined - _IN_EVERY_MODULE
        for other in taken:
            needs -= names[other][1]
        needs -= _names(source)[1]
    if not taken:
        return source
    whole = "\n".join(part for number, part in enumerate(parts) if number == len(before) or number in taken)
    return "".join(_FUTURE.findall(whole)) + _FUTURE.sub("", whole)


def _needs(source: str) -> set[str]:
    used, defined = _names(source)
    return set() if "*" in defined else used - defined - _IN_EVERY_MODULE


def _names(source: str) -> tuple[set[str], set[str]]:
    """Global names that `source` uses and defines; none where it is no Python."""
    try:
        return global_names(source)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return set(), set()
