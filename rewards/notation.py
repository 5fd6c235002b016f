"""Simple forms of an answer, read from canonical text without a parser.

They are read exactly and in microseconds, and make up most answers in data sets of school mathematics: integers,
decimals, fractions, mixed numbers, percentages and powers of ten, with or without a unit or a currency; times of day;
letters of multiple choice; words. `rewards/canonical.py` makes the canonical text.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 400
"""Longest number that is read, in digits, and the largest power of ten."""

UPRIGHT = re.compile(r"\\(?:text[a-z]{0,6}|math(?:rm|bf|it|sf)|mbox|rm|operatorname)\s*\{\s*([^{}]*?)\s*\}")
_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:\ \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_LITERAL = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>\\?\$|[€£¥]|(?:USD|RMB|CNY|EUR|Rs\.?)\s)?\s*(?P<sign2>[-+]?)\s*
    (?:(?:(?P<whole>\d+)(?:\s+|(?=\\)))?
       (?:\\[dtc]?frac\s*(?:\{{\s*(?P<over>-?{_DECIMAL})\s*\}}|(?P<over1>\d))\s*
                         (?:\{{\s*(?P<under>{_DECIMAL})\s*\}}|(?P<under1>\d))
         |(?P<top>{_INTEGER})\s*/\s*(?P<bottom>{_INTEGER}))
     |(?P<number>{_DECIMAL})
      (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d+)\s*\}}?|[eE](?P<e>[-+]?\d+))?)
    (?P<space>\s*)(?P<unit>\D.*)?""",
    re.VERBOSE | re.DOTALL,
)
_ASSIGNMENT = re.compile(r"([A-Za-z])\s*=\s*(.+)")
_NAME = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\(\w+\))?|\\[a-z]+")
_PERCENT = re.compile(r"\\?%|(?:percent|percentage|pct|per\ cent)\b")
_DEGREE = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree")
_UNIT = re.compile(
    r"[A-Za-z\u4e00-\u9fff€£¥$](?:[A-Za-z\u4e00-\u9fff/ .()-]|\^\s*\{?\s*-?\d\s*\}?|(?<=[A-Za-z])[23](?!\d))*"
)
_NOT_IN_UNIT = re.compile(r"\b(?:and|or|to|mod|if|is|are|for|when|where|repeating|recurring)\b")
_LAST_UNIT = re.compile(
    rf"(?:\s*{UPRIGHT.pattern}(?:\s*\^\s*\{{?\d\}}?)?|{_DEGREE.pattern}|(?<=[\d)}}])\s+[a-z]{{3,}}[a-z ]*)\s*\.?$"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "\u4e07": 4, "\u4ebf": 8}
_SCALE = re.compile("|".join(rf"{word}(?![A-Za-z])" for word in _SCALES))
_CHOICE = re.compile(
    r"""\(?\s*([A-Ja-j])\s*\)?[.:]?
    |\(?([A-J])(?:[).]|:\s)\s*[^\W_=].*
    |[(\[]([A-J])[)\]][\s.,:-]*[^\s.,:-].*
    |([A-J])(?:\s*(?:->|\\(?:right|to)arrow|\\to)\s*|\]\s*|\s*[:;]\s*|,(?:\s|(?=[\u4e00-\u9fff]))|\s+-+\s*|-+\s+|\s+\(|-(?=[A-Za-z]+\s[A-Za-z]))
        (?=.*(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|exp|sqrt|and|mod)\b)[^\W\d_]{3}|[\u4e00-\u9fff]).*""",
    re.DOTALL | re.VERBOSE,
)
_CHOICE_LEAD = re.compile(
    r"\A(?:(?:the\s+)?(?:option|choice|answer|letter)\s*:?\s*(?=\W*[A-J]\b)"
    r"|[\u9009\u9078](?:[\u9879\u9805]|[\u62e9\u64c7])?:?\s*(?=\W*[A-J]))",
    re.IGNORECASE,
)
_OTHER_CHOICE = re.compile(
    r"(?:\b(?:or|and)\b|[,;/])\s*\(?[A-J]\b|\b[A-J][.):\]]|[(\[][A-J][)\]]|[.):\]-]\s*[A-J]\s*\Z|(?<![A-Za-z])[A-J]\s+-"
)
_LISTED_CHOICE = re.compile(r"[)\]\s]*(?:[,;/]|and|or)\s*\(?[A-J]\b")
_CHOICES = re.compile(r"[A-H](?:\s*(?:,|;|and|,\s*and)?\s*[A-H])+")
_TIME = re.compile(
    r"""(?P<before>[\u4e0a\u4e0b]\u5348|\u665a\u4e0a|\u51cc\u6668)?\s*
    (?P<hour>\d{1,2})(?:\s*[:.\u70b9\u9ede]\s*(?P<minute>[0-5]\d)\s*\u5206?(?:\s*:\s*(?P<second>[0-5]\d))?
       |\s*\u70b9|\s*o'?clock)?
    \s*(?P<after>[ap]\s?\.?\s?m\b\.?|noon|midnight|in\ the\ (?:morning|afternoon|evening))?""",
    re.IGNORECASE | re.VERBOSE,
)
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.,-])*[^\W\d_]{2}|[\u4e00-\u9fff]+")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre \u6beb\u7c73", "cm centimeter centimetre \u5398\u7c73",
        "dm decimeter decimetre \u5206\u7c73", "m meter metre \u7c73",
        "km kilometer kilometre \u5343\u7c73 \u516c\u91cc",
        "inch in inches", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram \u514b",
        "kg kilogram \u5343\u514b \u516c\u65a4", "lb pound", "oz ounce", "ml milliliter millilitre \u6beb\u5347",
        "l liter litre \u5347", "s sec second \u79d2", "min minute \u5206\u949f", "h hr hour \u5c0f\u65f6",
        "day \u5929", "week", "month", "year yr", "dollar $ usd", "cent", "euro \u20ac eur",
        "yuan \u5143 \u00a5 rmb cny", "degree", "radian rad",
    )
    for name in names.split()
}  # fmt: skip
_UNIT_PART = re.compile(r"[A-Za-z]+|[\u4e00-\u9fff]+|[€£¥$]|/|\d")


class Literal(NamedTuple):
    """A number as written.

    `last_place` is what one in the last place of a decimal is worth, None for an exact number; `unit` is "" where there
    is none, or none that is known.
    """

    value: Fraction
    last_place: Fraction | None
    is_percent: bool
    unit: str


class Numbers(NamedTuple):
    """Several numbers as written. `brackets` is "()", "[)", ..., "{}" for a set, or "" for a list."""

    brackets: str
    items: tuple[Literal, ...]


def without_rounding(text: str) -> tuple[str, str]:
    r"""Canonical `text` without the rounded value behind \approx, and that value; "x \approx 5" is an equation."""
    exact, sign, rounded = text.partition(r"\approx")
    if not sign:
        return text, ""
    if exact.strip() and literal(rounded.strip()) and not _NAME.fullmatch(exact.strip()):
        return exact.strip(), rounded.strip()
    return (text.replace(r"\approx", "=") if exact.strip() else rounded).strip(), ""


def time_of_day(text: str) -> tuple[int, bool] | None:
    """Seconds since midnight and whether a half of the day is named, of canonical `text` that is a time, or None."""
    if text.casefold() in ("noon", "midnight"):
        text = f"12 {text}"
    elif not text[:1].isdigit() and "\u5348" not in text:
        return None
    found = _TIME.fullmatch(UPRIGHT.sub(r" \1", text).strip())
    if not found or not (found["minute"] or found["after"] or found["before"]):
        return None
    hour, half = int(found["hour"]), (found["before"] or found["after"] or "").lower()
    if not half and not re.search("[:\u70b9\u9ede]", text):
        return None  # 4.30 is a time with its half of the day only
    if hour > 23 or (half and not 1 <= hour <= 12):
        return None
    if half:
        is_late = half[0] in "pn\u4e0b\u665a" or half.endswith(("afternoon", "evening"))
        hour = hour % 12 + 12 * is_late
    return 3600 * hour + 60 * int(found["minute"] or 0) + int(found["second"] or 0), bool(half)


def listed(text: str) -> list[str]:
    """The parts of canonical `text` between commas that stand in no brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def both_signs(text: str) -> str:
    """Canonical `text` with each \\pm in a list written out as two items; math-verify reads lone ones only."""
    parts = listed(text)
    if len(parts) == 1 or r"\pm" not in text:
        return text
    split = [part for part in parts if r"\pm" in part and part.strip()[0] not in "([\\"]
    both = {part: ",".join(part.replace(r"\pm", sign) for sign in "+-") for part in split}
    return ",".join(both.get(part, part) for part in parts)


def literal(text: str) -> Literal | None:
    """The number that canonical `text` is, or None. Reads up to MAX_DIGITS digits."""
    found = _LITERAL.fullmatch(text)
    if not found or len(text) > MAX_DIGITS:
        return None
    part = found.groupdict(default="")
    top = part["over"] or part["over1"] or part["top"]
    power = int(part["power"] or part["e"] or 0)
    bottom = _fraction(part["under"] or part["under1"] or part["bottom"] or "1")
    if not bottom or abs(power) > MAX_DIGITS or (part["whole"] and top.startswith("-")):
        return None
    value = _fraction(part["whole"] or "0") + _fraction(top or part["number"]) / bottom
    unit, percent = part["unit"].strip(), False
    if unit:
        unit = _DEGREE.sub(" degree ", UPRIGHT.sub(r" \1", unit) if UPRIGHT.match(unit) else unit).strip()
        percent, scale = bool(_PERCENT.fullmatch(unit)), _SCALE.match(unit)
        if scale:
            power, unit = power + _SCALES[scale[0]], unit[scale.end() :].strip()
        if unit and not percent and not _is_unit(unit, apart=part["unit"][0] == "\\" or bool(part["space"])):
            return None
    scale_by = Fraction(10) ** power
    value *= -scale_by if "-" in part["sign"] + part["sign2"] else scale_by
    places = part["number"].partition(".")[2]
    last_place = scale_by / 10 ** len(places) if places else None
    return Literal(value, last_place, percent, "" if percent else _known_unit(unit or part["currency"].strip()))


def numbers(text: str) -> Numbers | None:
    """The list, set, tuple or interval of numbers that canonical `text` is, or None."""
    inside = text.replace(r"\{", "{").replace(r"\}", "}")
    is_bracketed = inside[:1] in ("(", "[", "{") and inside[-1:] in (")", "]", "}")
    brackets, inside = (inside[0] + inside[-1], inside[1:-1]) if is_bracketed else ("", inside)
    if "," not in inside:
        return None
    items = [literal(item.strip()) for item in re.split(r",|\s(?:and|or)\s", inside)]
    # Braces without backslashes only group in LaTeX.
    return Numbers("" if text[:1] == "{" else brackets, tuple(item for item in items if item)) if all(items) else None


def assignment(text: str) -> tuple[str, Literal] | None:
    """Name and value where canonical `text` gives one letter the value of a number ("x=5"), or None."""
    found = _ASSIGNMENT.fullmatch(text)
    value = literal(found[2]) if found else None
    return (found[1].lower(), value) if found and value else None


def without_unit(text: str) -> str:
    """Canonical `text` without the unit it ends in."""
    found = _LAST_UNIT.search(text)
    rest = text[: found.start()].strip() if found else ""
    if not found or not rest or rest.endswith((",", "=", "<", ">")):
        return text
    unit = UPRIGHT.sub(r"\1", found[0]).strip()
    return rest if _DEGREE.fullmatch(unit) or (_UNIT.fullmatch(unit) and not _NOT_IN_UNIT.search(unit)) else text


def choices(text: str) -> frozenset[str] | None:
    """The letters of multiple choice that canonical `text` names, or None."""
    text = _CHOICE_LEAD.sub("", UPRIGHT.sub(r"\1", text).strip()).strip("\u3010\u3011")
    choice = _CHOICE.fullmatch(text)
    if choice:
        at = choice.lastindex or 1
        if at > 1 and (_OTHER_CHOICE.search(text, choice.end(at) + 1) or _LISTED_CHOICE.match(text, choice.end(at))):
            return None
        return frozenset(choice[at].upper())
    return frozenset(re.findall("[A-H]", text)) if _CHOICES.fullmatch(text) else None


def words(text: str) -> str | None:
    """Canonical `text` in lower case and single spaces where it is words, or None."""
    text = " ".join(UPRIGHT.sub(r"\1", text).split()).rstrip(".")
    return text.casefold() if _WORDS.fullmatch(text) else None


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", digits))


def _is_unit(unit: str, *, apart: bool) -> bool:
    """Whether what follows a number is a unit and not algebra. `apart`: it is upright or a space precedes it."""
    if not _UNIT.fullmatch(unit) or _NOT_IN_UNIT.search(unit):
        return False
    is_known = bool(_known_unit(unit)) and (apart or len(unit) > 1)
    return is_known or bool(re.match(r"[A-Za-z]{3}|[\u4e00-\u9fff]", unit))


def _known_unit(unit: str) -> str:
    """One spelling for units that mean the same; "" for a unit that isn't in the table."""
    unit = re.sub(r"\b(?:square|sq\.?)\s*(\w+)|\u5e73\u65b9(\w+)", r"\1\2 2", unit)
    unit = re.sub(r"\bcubic\s*(\w+)|\u7acb\u65b9(\w+)", r"\1\2 3", unit)
    parts = _UNIT_PART.findall(re.sub(r"\bper\b|\u6bcf", "/", unit))
    known = [
        part if part in "/23" else _UNITS.get(part) or _UNITS.get(part.lower().removesuffix("s")) for part in parts
    ]
    return " ".join(map(str, known)) if all(known) else ""
