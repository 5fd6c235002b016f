"""Extract the program from a completion.

Only the text after the thinking counts, and only the part between `<answer>` tags if they hold code. The last fenced
block (`rewards.markdown`) whose tag names the language wins, then the last without a tag, then the last; without a
fence the whole text is the program. Two more rules:

* If the tests name the function they call, the last block that defines it wins, since later blocks may be examples or
  tests. In Python, blocks that import or define the names it uses are added.
* A lone closing fence ends the program: the prompt ended with the opening one.

A block that is never closed ends with the text, as in a completion that was cut off; the compiler decides whether it is
a program.
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
"""Pattern of the entry function, by language."""
_ANSWER = re.compile(r"<(/?)answer>")
_BYTE_ORDER_MARKS = re.compile("^[ \t]*\ufeff+", re.MULTILINE)
_COMMENT = ("#", "//", "/*", '"', "'")
_SENTENCE = re.compile(r"\W{0,3}[A-Z][\w'\u2019]*\b(?!.*(?:[=;{}<>]|\w[(\[]))(?=.*[.:!?,]\W{0,3}\Z|(?:.* ){3})")
_CODE = re.compile(r"[=;{}]|\w\(|^[ \t]*(?:import|from|def|class|use|package|fn|func|echo)\b", re.MULTILINE)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_IN_EVERY_MODULE = frozenset(dir(builtins)) | {"__file__"}
_MOST_BLOCKS = 50
"""Most blocks of a completion that are joined into one program."""


def extract_program(completion: str, language: str, *, names: Sequence[str] = (), runs: bool = False) -> str | None:
    """Return the source text in `language`, or None if there are only blanks.

    names: functions and classes that the tests use. runs: the program needs an entry function.

    Example:
        extract_program("Sure:\n```python\nprint(1)\n```", "python")  # "print(1)\n"
    """
    text = with_newlines(_BYTE_ORDER_MARKS.sub("", after_thinking(completion)))
    text, all_blocks = _in_answer(text)
    tags = LANGUAGE_TAGS.get(language, {language})
    tagged = [block for block in all_blocks if block.tag in tags]
    untagged = [block for block in all_blocks if not block.tag]
    ranks = [tagged, untagged, all_blocks]
    block = _defining(ranks, language, names, runs) or next((rank[-1] for rank in ranks if rank), None)
    source = text if block is None else block.source
    if block and language == "python" and len(all_blocks) <= _MOST_BLOCKS:
        number = all_blocks.index(block)
        parts = [block.source if block.tag in tags or not block.tag else "" for block in all_blocks]
        source = _completed(source, parts[:number], parts[number + 1 :])
    return source if source.strip() else None


def _in_answer(text: str) -> tuple[str, list[Block]]:
    """Return the text between the answer tags and its blocks; all of `text` if they are missing or hold no code."""
    whole = _opened(text)
    tags = real_tags(text, _ANSWER)
    opening = next((number for number in range(len(tags) - 1, -1, -1) if not tags[number][1]), None)
    if opening is None:
        return whole
    end = tags[opening + 1].start() if opening + 1 < len(tags) else len(text)
    inside = _opened(text[tags[opening].end() : end])
    return inside if inside[1] or (inside[0].strip() and not whole[1]) else whole


def _opened(text: str) -> tuple[str, list[Block]]:
    """Return `text` and its blocks. If the first fence can only be a closing one, open a block before it."""
    all_blocks = blocks(text)
    if not all_blocks or all_blocks[0].tag:
        return text, all_blocks
    first = all_blocks[0]
    lines = text[: first.start].split("\n")
    last_prose = max((number for number, line in enumerate(lines) if _is_prose(line)), default=-1)
    closes = last_prose < 0 or (len(all_blocks) == 1 and not first.closed and not first.source.strip())
    code = "\n".join(lines[last_prose + 1 :]).strip()
    if not closes or code.endswith(":") or not _CODE.search(code):
        return text, all_blocks
    start = sum(len(line) + 1 for line in lines[: last_prose + 1])
    text = f"{text[:start]}{text[first.start] * 3}\n{text[start:]}"
    return text, blocks(text)


def _is_prose(line: str) -> bool:
    text = line.strip()
    return not text.startswith(_COMMENT) and bool(_SENTENCE.match(text) or _CHINESE.search(text))


def _defining(ranks: Sequence[Sequence[Block]], language: str, names: Sequence[str], runs: bool) -> Block | None:
    """Return the last block that defines one of `names`, or else the entry function, in the first rank with one."""
    if names:
        name = "|".join(map(re.escape, names))
        definition = re.compile(rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(?:{name})\b|^(?:{name})\b[^=\n]*=", re.M)
    elif runs and language in _MAIN:
        definition = re.compile(_MAIN[language])
    else:
        return None
    return next((block for rank in ranks for block in reversed(rank) if definition.search(block.source)), None)


def _completed(source: str, before: Sequence[str], after: Sequence[str]) -> str:
    """Return `source` joined with the blocks before and after it that define the names it lacks, in order."""
    used, defined = _names(source)
    missing = set[str]() if "*" in defined else used - defined - _IN_EVERY_MODULE
    own = len(before)
    parts = [*before, source, *after]
    order = [*range(own - 1, -1, -1), *range(own + 1, len(parts))]  # the nearest before it first
    names = {number: _names(parts[number]) for number in order if missing and parts[number].strip()}
    added: set[int] = set()
    while missing:
        number = next((n for n in order if n in names and n not in added and missing & names[n][1]), None)
        if number is None:
            break
        added.add(number)
        missing = (missing | names[number][0]) - _IN_EVERY_MODULE - defined
        missing = missing.difference(*(names[other][1] for other in added))
    if not added:
        return source
    whole = "\n".join(part for number, part in enumerate(parts) if number == own or number in added)
    return "".join(_FUTURE.findall(whole)) + _FUTURE.sub("", whole)


def _names(source: str) -> tuple[set[str], set[str]]:
    """Return the global names that `source` uses and defines; none if it is no Python."""
    try:
        return global_names(source)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return set(), set()
