"""Find fenced code in the Markdown that models write.

Blocks are CommonMark's (markdown-it-py): fences within list items and quotes, longer fences around shorter ones, and
tildes. Models also write forms that CommonMark reads differently. They are read as they are meant:

* Indentation never makes code, so a fence may stand at any depth. A closing fence is indented by less than four columns
  more than its opening one, and lines of a list item's block may be indented by less than the item.
* A fence inside a triple-quoted string of Python belongs to the program.
* A fence glued to text: "The code: ```python" opens a block, and "return 1```" and "``` It returns 1." close one.
* A fence with a language after it, inside a block, begins a new block: the first one was never closed.
* A line that begins or ends with `</think>` or `</answer>` ends a block.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock

PYTHON_TAGS = frozenset({"python", "py", "python3", "py3", "ipython"})
LANGUAGE_TAGS: dict[str, frozenset[str]] = {
    language: frozenset({language, *tags.split()})
    for language, tags in {
        "python": f"{' '.join(PYTHON_TAGS)} python2",
        "c": "h c99 c11 c17",
        "cpp": "c++ cc cxx hpp c++11 c++14 c++17 c++20 cpp17 cpp20",
        "rust": "rs",
        "go": "golang",
        "java": "java8 java17",
        "javascript": "js node nodejs mjs cjs jsx",
        "typescript": "ts tsx mts",
        "bash": "sh shell zsh",
    }.items()
}
"""Words after a fence that name a language of the code reward."""
_OTHER_TAGS = "pycon console text txt plaintext output json yaml xml html css sql markdown md diff latex tex"
_TAGS = frozenset(_OTHER_TAGS.split()).union(*LANGUAGE_TAGS.values())
"""Words after a fence that certainly name a language."""

_FENCE = re.compile(r"(`{3,}|~{3,})(.*)")
_ENDS = re.compile(r"`{3}|~{3}|</")
_RUN = re.compile(r"`{3,}")
_CLOSING = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*$", re.MULTILINE)
_TAG = re.compile(r"[\w+#-]+")
_INFO_WORD = re.compile(r"[\w+#.{}:=-]*[\w+#}-]")
_END = re.compile(r"</(?:think(?:ing)?|answer)>")
_STATEMENT = re.compile(
    r"(?:def|class|import|from|package|use|using|fn|func|function|const|let|var|public)\s|#include|@"
)
_QUOTE = re.compile("[#\"']")
_LITERAL = re.compile(r"""#[^\n]*|\"""|'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    tag: the language after its fence, in lower case, or "". source: its text, without the container's indentation.
    start, end: its range in the text. closed: a fence ends it.
    """

    tag: str
    source: str
    start: int
    end: int
    closed: bool


def with_newlines(text: str) -> str:
    """Return `text` with the line endings of Windows and of old Macs as "\\n"."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@lru_cache(maxsize=4)  # a text is searched twice, for tags outside of code and for code
def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of `text`, whose lines end in "\\n", in order.

    Example:
        blocks("```py\\nx = 1\\n```")[0].source  # "x = 1\\n"
    """
    if "```" not in text and "~~~" not in text:
        return []
    state: dict[str, Any] = {"blocks": [], "fences": list(_CLOSING.finditer(text))}
    _parser().parse(text, state)
    return state["blocks"]


def code_ranges(text: str) -> list[tuple[int, int]]:
    """Return the ranges of code in `text`, whose lines end in "\\n": fenced blocks and between backticks."""
    fenced = [(block.start, block.end) for block in blocks(text)]
    edges = [0, *(edge for part in fenced for edge in part), len(text)]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return sorted([*fenced, *(span for start, end in gaps for span in _spans(text, start, end))])


def _spans(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield code spans in `text[start:end]`; each ends at the next run of as many backticks in its paragraph."""
    for paragraph in re.finditer(r"(?:[^\n]|\n(?![ \t]*\n))+", text[start:end]):
        runs = [(run.start(), run.end()) for run in re.finditer("`+", paragraph[0])]
        following: dict[int, int] = {}
        closing: list[int | None] = []
        for number, (first, last) in reversed([*enumerate(runs)]):
            closing.append(following.get(last - first))
            following[last - first] = number
        closing.reverse()
        number, offset = 0, start + paragraph.start()
        while number < len(runs):
            other = closing[number]
            if other is not None:
                yield offset + runs[number][0], offset + runs[other][1]
            number = number + 1 if other is None else other + 1


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").disable(["code", "html_block", "reference", "inline"])
    parser.block.ruler.at("fence", _fence, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    parser.block.ruler.before("heading", "glued_fence", _glued_fence, {"alt": ["paragraph", "reference"]})
    return parser


def _fence(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Parse a line that begins with a fence."""
    line = _line(state, first)
    opening = _FENCE.fullmatch(line)
    if opening is None:
        return False
    fence, info = opening[1], opening[2].strip()
    if fence[0] == "`" and "`" in info:
        if not info.endswith(fence) or "`" in info.removesuffix(fence):
            return False
        if not silent:  # a block on one line
            inside = info.removesuffix(fence).strip()
            word, _, rest = inside.partition(" ")
            is_tagged = word.lower() in _TAGS and bool(rest.strip())
            source = rest.strip() if is_tagged else inside
            tag = word.lower() if is_tagged else ""
            _add(state, Block(tag, f"{source}\n", _start(state, first), state.eMarks[first], True))
            state.line = first + 1
        return True
    if not silent:
        _read(state, first, end, fence, info, _start(state, first))
    return True


def _glued_fence(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Parse a line that ends with an opening fence."""
    line = _line(state, first)
    runs = list(_RUN.finditer(line))
    if len(runs) % 2 == 0 or not line[: runs[-1].start()].strip():
        return False
    info = line[runs[-1].end() :].strip()
    if info and not _TAG.fullmatch(info):
        return False
    if not silent:
        _read(state, first, end, runs[-1][0], info, _start(state, first) + runs[-1].start())
    return True


def _read(state: StateBlock, first: int, end: int, fence: str, info: str, start: int) -> None:
    """Add the block whose opening fence is on the line `first`, and move the parser behind the block."""
    tag_found = _TAG.match(info.removeprefix("{."))
    tag = tag_found[0].lower() if tag_found else ""
    statement = info[tag_found.end() :].strip() if tag_found else ""
    head = f"{statement}\n" if tag in _TAGS and _STATEMENT.match(statement) else ""
    strings = _Strings(state.src, state.eMarks[first]) if tag in PYTHON_TAGS or not tag else None
    indent, after, stop = state.sCount[first], end, state.eMarks[end - 1]
    tail: str | None = None
    closed = False
    for number in range(first + 1, end):
        line = _line(state, number)
        outdented = bool(line) and state.sCount[number] < state.blkIndent
        if outdented and not _closes_later(state, number, end, fence, indent):
            after, stop = number, state.bMarks[number]
            break
        place = _start(state, number)
        if not _ENDS.search(line) or (strings and strings.contain(place)):
            continue
        if inner := _FENCE.fullmatch(line):
            kind = _inner_fence(inner[1], inner[2].strip(), fence) if state.sCount[number] - indent < 4 else ""
            if kind:
                closed, after = kind == "closing", number
                stop = place + len(inner[1]) if closed else place
                break
        elif (end_of_block := _glued_end(line, fence, strings, place)) is not None:
            text_end, stop_at, closed = end_of_block
            tail, after, stop = line[:text_end], number, place + stop_at
            break
    source = state.getLines(first + 1, after, indent, True) if after > first + 1 else ""
    if tail and tail.strip():
        source += " " * max(state.sCount[after] - indent, 0) + tail.rstrip() + "\n"
    state.line = after + 1 if closed or tail else after
    _add(state, Block(tag, head + source, start, stop, closed))


def _inner_fence(marks: str, info: str, fence: str) -> str:
    """Return the role of a fence inside a block opened by `fence`: "closing", "opening", or "" for none."""
    if not marks.startswith(fence) or "`" in info:
        return ""
    word = _TAG.match(info.removeprefix("{."))
    if info and (_INFO_WORD.fullmatch(info) or (word and word[0].lower() in _TAGS)):
        return "opening" if marks == fence else ""
    return "closing"


def _glued_end(line: str, fence: str, strings: "_Strings | None", place: int) -> tuple[int, int, bool] | None:
    """Find the end of a block inside a line that doesn't begin with a fence, or return None.

    Returns the columns at which the text and the whole block end, and whether a fence ends it. A tag such as `</think>`
    ends a block too, and lies outside of it.
    """
    runs = [run for run in _RUN.finditer(line) if run[0].startswith(fence)]
    if len(runs) == 1 and not (strings and strings.contain(place + runs[0].start())):
        return *runs[0].span(), True
    tag = _END.match(line) or next((tag for tag in _END.finditer(line) if tag.end() == len(line)), None)
    if tag and not (strings and strings.contain(place + tag.start())):
        return tag.start(), tag.start(), False
    return None


def _closes_later(state: StateBlock, number: int, end: int, fence: str, indent: int) -> bool:
    """Return whether the next fence closes the block at the depth of the opening one: only the code is outdented."""
    fences: list[re.Match[str]] = state.env["fences"]
    place = bisect_left(fences, state.bMarks[number], key=re.Match.start)
    if place == len(fences) or fences[place].start() >= state.eMarks[end - 1]:
        return False
    return indent > 0 and fences[place][2].startswith(fence) and len(fences[place][1].expandtabs(4)) == indent


class _Strings:
    """The strings and comments of a Python program that begins at `start`, for queries in order of position."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self._at = start  # end of the newest string or comment
        self._never_closed = False

    def contain(self, place: int) -> bool:
        """Return whether `place` is in a comment, or in a string that is closed later."""
        while self._at <= place:
            opening = _QUOTE.search(self._text, self._at, place + 1)
            if opening is None:
                self._at = place
                return False
            token = _LITERAL.match(self._text, opening.start())
            end = opening.end() if token is None else token.end()
            if token is not None and token[0] in ('"""', "'''"):
                end = self._text.find(token[0], end) + 3
                if end < 3:
                    self._never_closed = True
            if self._never_closed:
                return False
            self._at = end
        return True


def _line(state: StateBlock, number: int) -> str:
    """Return a line without its container's marks and without blanks at either end."""
    return state.src[_start(state, number) : state.eMarks[number]].rstrip()


def _start(state: StateBlock, number: int) -> int:
    return state.bMarks[number] + state.tShift[number]


def _add(state: StateBlock, block: Block) -> None:
    state.env["blocks"].append(block)
    state.push("fence", "code", 0)
