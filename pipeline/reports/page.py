"""A page of HTML, put together so that no text can become markup.

Everything on a page is made by `tag`, which escapes whatever was not made by `tag` itself. The page's own policy then
forbids every script but ours and everything that would have to be loaded, so that it opens without a network, years
later.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TypeAlias

from pipeline.disk.files import write_atomic
from pipeline.reports.style import SCRIPT, STYLE


class Markup(str):
    """HTML made by `tag`; any other text is escaped where it is put into one."""

    __slots__ = ()


Inside: TypeAlias = "str | int | Iterable[Inside]"

VOID = ("meta", "br")
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What would not be seen, or would turn the direction of the text after it: controls, and halves of characters."""

RELOAD_SECONDS = 20

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


def tag(name: str, /, *inside: Inside, **attributes: str | float | None) -> Markup:
    """One element. Text inside it and its attributes are escaped; an attribute that is None is left out.

    A `_` in an attribute's name is a `-`, one at its end is dropped: `class_`, `stroke_width`.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(f"{value:.6g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{joined(inside)}</{name}>")


def joined(inside: Inside) -> Markup:
    """What stands in an element, one after the other."""
    if isinstance(inside, Markup):
        return inside
    if isinstance(inside, str | int):
        return text(str(inside))
    return Markup("".join(map(joined, inside)))


def text(raw: str) -> Markup:
    """`raw` as the page shows it: itself, its invisible characters written out."""
    return Markup(escape(UNSEEN.sub(_written_out, raw), quote=True))


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def section(title: str, *inside: Inside, about: str = "") -> Markup:
    """A part of the page under a heading that can be linked to; nothing where nothing stands in it."""
    content = joined(inside)
    if not content:
        return Markup()
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return tag("section", tag("h2", title), tag("p", about, class_="about") if about else "", content, id=name)


def folded(title: str, *inside: Inside, opened: bool = False) -> Markup:
    """What is shown when its title is pressed."""
    return tag("details", tag("summary", title), *inside, open="" if opened else None)


def table(head: Iterable[str], rows: Iterable[Iterable[Inside]], numbers: Iterable[int] = ()) -> Markup:
    """A table that scrolls by itself where it is too wide; `numbers` are the columns whose cells stand to the right."""
    right = set(numbers)

    def cells(name: str, row: Iterable[Inside]) -> list[Markup]:
        return [tag(name, cell, class_="number" if place in right else None) for place, cell in enumerate(row)]

    body = [tag("tr", cells("td", row)) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body)), class_="wide")


def pill(state: str, kind: str) -> Markup:
    """A state in one word; `kind` says what to think of it: `good`, `bad`, `busy` or `idle`."""
    return tag("span", state, class_=f"pill {kind}")


def tiles(figures: Iterable[tuple[str, str, str]]) -> Markup:
    """The figures to see first: of each its name, value and a word on it."""
    shown = [
        tag("div", tag("span", name), tag("strong", value), tag("span", note), class_="tile")
        for name, value, note in figures
    ]
    return tag("div", shown, class_="tiles") if shown else Markup()


def write_page(file: Path, title: str, *inside: Inside, reload: bool) -> None:
    """Writes the page whole; with `reload` a browser that shows it looks again every 20 seconds."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="refresh", content=str(RELOAD_SECONDS)) if reload else "",
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    body = tag("body", tag("main", *inside), tag("script", Markup(SCRIPT)))
    write_atomic(file, "<!doctype html>\n" + tag("html", tag("head", head), "\n", body, lang="en") + "\n")
