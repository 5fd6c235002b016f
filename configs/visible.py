"""Text of models, rewards and other programs, made safe for terminals, logs and pages."""

import codecs
import os
import sys
from contextlib import suppress
from threading import Thread
from typing import IO

_HIDDEN_RANGES = (
    (0x00, 0x08),  # control characters: all but tab and newline
    (0x0B, 0x1F),
    (0x7F, 0x9F),
    (0x061C, 0x061C),  # marks that turn the direction of the text after them, and invisible ones
    (0x200E, 0x200F),
    (0x2028, 0x202E),
    (0x2060, 0x2069),
    (0xFEFF, 0xFEFF),
    (0xD800, 0xDFFF),  # halves of surrogate pairs, which can't be encoded
    (0xE0000, 0xE007F),
)
ESCAPES = {
    code: chr(code).encode("unicode_escape").decode("ascii")
    for first, last in _HIDDEN_RANGES
    for code in range(first, last + 1)
}
"""Escapes of the characters that are not shown, by their numbers."""


_HIDDEN_VALUES: dict[str, str] = {}
_SHORTEST_HIDDEN = 6
"""Characters of a value from which on it is hidden; a shorter one stands in too many other words."""


def hide(value: str, name: str) -> None:
    """Have `visible` write `name` wherever this value stands from now on."""
    if len(value) >= _SHORTEST_HIDDEN:
        _HIDDEN_VALUES[value] = name


def by_name(text: str) -> str:
    """Replace hidden values by their names, the longest first."""
    for value in sorted(_HIDDEN_VALUES, key=len, reverse=True):
        text = text.replace(value, _HIDDEN_VALUES[value])
    return text


def visible(text: str) -> str:
    """Replace characters that control a terminal or are not seen by their escapes, such as `\\x1b`, and hidden values
    by their names; lines and tabs stay.

    Example:
        visible("\\x1b[2Jhello")  # the text \\x1b[2Jhello, in which nothing clears a screen
    """
    return by_name(text).translate(ESCAPES)


def copy_output(output: IO[bytes] | None) -> Thread:
    """Start a thread that copies a process's piped bytes to this process's stderr as they come, with control characters
    escaped, until the pipe is closed."""
    assert output is not None

    def copy() -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with output:
            while data := os.read(output.fileno(), 1 << 16):
                with suppress(OSError, ValueError):  # a closed stderr: the process must not wait for it
                    sys.stderr.write(visible(decoder.decode(data)))
                    sys.stderr.flush()

    thread = Thread(target=copy, daemon=True)
    thread.start()
    return thread
