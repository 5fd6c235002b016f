"""The program inside a completion.

The last fenced block whose tag names the language wins, then the last without a tag, then the last; without a fence it
is the whole text. Only what follows `</think>` counts. A block that is never closed ends with the text, as it does
where the completion was cut off; whether that is a program is for the compiler to say.
"""

import re

from rewards.answer import after_thinking

# Group 1: the fence. Group 2: the rest of the line, of which the first word is the tag.
_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_TAG = re.compile(r"[\w+#-]+")
_TAGS = {
    "python": {"py", "python3", "py3", "python2", "ipython", "pycon"},
    "c": {"h", "c99", "c11", "c17"},
    "cpp": {"c++", "cc", "cxx", "hpp", "c++11", "c++14", "c++17", "c++20", "cpp17", "cpp20"},
    "rust": {"rs"},
    "go": {"golang"},
    "java": {"java8", "java17"},
    "javascript": {"js", "node", "nodejs", "mjs", "cjs", "jsx"},
    "typescript": {"ts", "tsx", "mts"},
    "bash": {"sh", "shell", "zsh"},
}


def program(completion: str, language: str) -> str | None:
    """The source text in `language`, or None where there is nothing but blanks."""
    text = after_thinking(completion)
    blocks = _blocks(text)
    fitting = {language, *_TAGS.get(language, ())}
    candidates = (
        [source for tag, source in blocks if tag in fitting]
        or [source for tag, source in blocks if not tag]
        or [source for _, source in blocks]
        or [text]
    )
    return candidates[-1] if candidates[-1].strip() else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Tag in lower case and content of every fenced block, in order."""
    blocks: list[tuple[str, str]] = []
    opened: tuple[str, str, int] | None = None  # fence, tag, where the content begins
    for line in _FENCE.finditer(text):
        fence, rest = line[1], line[2].strip()
        if opened is None:
            tag = _TAG.match(rest.removeprefix("{.").lower())
            opened = fence, tag[0] if tag else "", line.end() + 1
        elif not rest and fence.startswith(opened[0]):
            blocks.append((opened[1], text[opened[2] : line.start()]))
            opened = None
    if opened:
        blocks.append((opened[1], text[opened[2] :]))
    return blocks
