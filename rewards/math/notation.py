r"""Short answers, read from canonical text (`rewards/math/canonical.py`) without a parser.

They are read exactly and in microseconds, and make up most answers in data sets of school mathematics.

| kind | examples | function |
|---|---|---|
| number | 1,000; -3.5; \frac{1}{2}; 2 1/2; 3 \times 10^4; 50\%; \$5; 12 cm; 2 million | `literal` |
| several numbers | 3, 4; (1,2); [0,1); \{1,2\} | `numbers` |
| assignment | x=5 | `assignment` |
| time of day | 3:30 p.m.; noon; 15:30 | `time_of_day` |
| multiple choice | B; (B) 12 apples; A, C | `choices` |
| words | Monday | `words` |
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 400
"""Longest number that is read, in digits, and the largest power of ten."""
UPRIGHT = re.compile(r"\\(?:text[a-z]{0,6}|math(?:rm|bf|it|sf)|mbox|rm|operatorname)\s*\{\s*([^{}]*?)\s*\}")

# Units. A row holds the spellings of one unit, the first of which stands for all.
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
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "\u4e07": 4, "\u4ebf": 8}
_SCALE = re.compile("|".join(rf"{word}(?![A-Za-z])" for word in _SCALES))
_PERCENT = re.compile(r"\\?%|(?:percent|percentage|pct|per\ cent)\b")
_DEGREE = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree")
_UNIT = re.compile(
    r"[A-Za-z\u4e00-\u9fff€£¥$](?:[A-Za-z\u4e00-\u9fff/ .()-]|\^\s*\{?\s*-?\d\s*\}?|(?<=[A-Za-z])[23](?!\d))*"
)
_UNIT_PART = re.compile(r"[A-Za-z]+|[\u4e00-\u9fff]+|[€£¥$]|/|\d")
_NOT_IN_UNIT = re.compile(r"\b(?:and|or|to|mod|if|is|are|for|when|where|repeating|recurring)\b")
_LAST_UNIT = re.compile(
    rf"(?:\s*{UPRIGHT.pattern}(?:\s*\^\s*\{{?\d\}}?)?|{_DEGREE.pattern}|(?<=[\d)}}])\s+[a-z]{{3,}}[a-z ]*)\s*\.?$"
)

# Numbers.
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

# Times, choices, words.
_TIME = re.compile(
    r"""(?P<before>[\u4e0a\u4e0b]\u5348|\u665a\u4e0a|\u51cc\u6668)?\s*
    (?P<hour>\d{1,2})(?:\s*[:.\u70b9\u9ede]\s*(?P<minute>[0-5]\d)\s*\u5206?(?:\s*:\s*(?P<second>[0-5]\d))?
       |\s*\u70b9|\s*o'?clock)?
    \s*(?P<after>[ap]\s?\.?\s?m\b\.?|noon|midnight|in\ the\ (?:morning|afternoon|evening))?""",
    re.IGNORECASE | re.VERBOSE,
)
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
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.,-])*[^\W\d_]{2}|[\u4e00-\u9fff]+")


class Literal(NamedTuple):
    """A number as written.

    last_place: worth of one in the last place of a decimal, None for an exact number. unit: "" for none or an unknown
    one.
    """

    value: Fraction
    last_place: Fraction | None
    is_percent: bool
    unit: str


class Numbers(NamedTuple):
    """Several numbers as written. brackets: "()", "[)", ..., "{}" for a set, "" for a list."""

    brackets: str
    items: tuple[Literal, ...]


def literal(text: str) -> Literal | None:
    r"""Read a number of up to MAX_DIGITS digits, or return None.

    Example:
        literal(r"3.50 \text{ cm}")  # Literal(Fraction(7, 2), Fraction(1, 100), False, "cm")
    """
    match = _LITERAL.fullmatch(text)
    if not match or len(text) > MAX_DIGITS:
        return None
    part = match.groupdict(default="")
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
    r"""Read a list, set, tuple or interval of numbers, or return None.

    Example:
        numbers("[0, 1)").brackets  # "[)"
    """
    inside = text.replace(r"\{", "{").replace(r"\}", "}")
    is_bracketed = inside[:1] in ("(", "[", "{") and inside[-1:] in (")", "]", "}")
    brackets, inside = (inside[0] + inside[-1], inside[1:-1]) if is_bracketed else ("", inside)
    if "," not in inside:
        return None
    items = [literal(item.strip()) for item in re.split(r",|\s(?:and|or)\s", inside)]
    # Braces without backslashes only group in LaTeX.
    return Numbers("" if text[:1] == "{" else brackets, tuple(item for item in items if item)) if all(items) else None


def assignment(text: str) -> tuple[str, Literal] | None:
    """Return name and value where one letter is set to a number ("x=5"), or None."""
    match = _ASSIGNMENT.fullmatch(text)
    value = literal(match[2]) if match else None
    return (match[1].lower(), value) if match and value else None


def time_of_day(text: str) -> tuple[int, bool] | None:
    """Return seconds since midnight, and whether the half of the day is named; None for no time.

    Example:
        time_of_day("3:30 p.m.")  # (55800, True)
    """
    if text.casefold() in ("noon", "midnight"):
        text = f"12 {text}"
    elif not text[:1].isdigit() and "\u5348" not in text:
        return None
    match = _TIME.fullmatch(UPRIGHT.sub(r" \1", text).strip())
    if not match or not (match["minute"] or match["after"] or match["before"]):
        return None
    hour, half = int(match["hour"]), (match["before"] or match["after"] or "").lower()
    if not half and not re.search("[:\u70b9\u9ede]", text):
        return None  # 4.30 is a time with its half of the day only
    if hour > 23 or (half and not 1 <= hour <= 12):
        return None
    if half:
        is_late = half[0] in "pn\u4e0b\u665a" or half.endswith(("afternoon", "evening"))
        hour = hour % 12 + 12 * is_late
    return 3600 * hour + 60 * int(match["minute"] or 0) + int(match["second"] or 0), bool(half)


def choices(text: str) -> frozenset[str] | None:
    """Return the letters of multiple choice that `text` names, or None.

    Example:
        choices("(B) 12 apples")  # {"B"}
    """
    text = _CHOICE_LEAD.sub("", UPRIGHT.sub(r"\1", text).strip()).strip("\u3010\u3011")
    match = _CHOICE.fullmatch(text)
    if match:
        form = match.lastindex or 1
        end = match.end(form)
        if form > 1 and (_OTHER_CHOICE.search(text, end + 1) or _LISTED_CHOICE.match(text, end)):
            return None
        return frozenset(match[form].upper())
    return frozenset(re.findall("[A-H]", text)) if _CHOICES.fullmatch(text) else None


def words(text: str) -> str | None:
    """Return `text` in lower case and single spaces if it is words, or None."""
    text = " ".join(UPRIGHT.sub(r"\1", text).split()).rstrip(".")
    return text.casefold() if _WORDS.fullmatch(text) else None


def without_rounding(text: str) -> tuple[str, str]:
    r"""Split "\sqrt2 \approx 1.41" into the exact and the rounded value; "x \approx 5" becomes an equation."""
    exact, sign, rounded = text.partition(r"\approx")
    if not sign:
        return text, ""
    if exact.strip() and literal(rounded.strip()) and not _NAME.fullmatch(exact.strip()):
        return exact.strip(), rounded.strip()
    return (text.replace(r"\approx", "=") if exact.strip() else rounded).strip(), ""


def without_unit(text: str) -> str:
    """Return `text` without the unit it ends in."""
    match = _LAST_UNIT.search(text)
    rest = text[: match.start()].strip() if match else ""
    if not match or not rest or rest.endswith((",", "=", "<", ">")):
        return text
    unit = UPRIGHT.sub(r"\1", match[0]).strip()
    return rest if _DEGREE.fullmatch(unit) or (_UNIT.fullmatch(unit) and not _NOT_IN_UNIT.search(unit)) else text


def list_items(text: str) -> list[str]:
    """Split `text` at the commas outside of brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def both_signs(text: str) -> str:
    r"""Return a list with each "\pm 1" as "+1,-1"; math-verify reads \pm only outside of lists."""
    parts = list_items(text)
    if len(parts) == 1 or r"\pm" not in text:
        return text
    is_signed = [r"\pm" in part and part.strip()[0] not in "([\\" for part in parts]
    return ",".join(
        ",".join(part.replace(r"\pm", sign) for sign in "+-") if signed else part
        for part, signed in zip(parts, is_signed, strict=True)
    )


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", digits))


def _is_unit(unit: str, *, apart: bool) -> bool:
    """Tell a unit behind a number from algebra. apart: it is upright or follows a space."""
    if not _UNIT.fullmatch(unit) or _NOT_IN_UNIT.search(unit):
        return False
    is_known = bool(_known_unit(unit)) and (apart or len(unit) > 1)
    return is_known or bool(re.match(r"[A-Za-z]{3}|[\u4e00-\u9fff]", unit))


def _known_unit(unit: str) -> str:
    """Return one spelling for units that mean the same; "" for an unknown one."""
    unit = re.sub(r"\b(?:square|sq\.?)\s*(\w+)|\u5e73\u65b9(\w+)", r"\1\2 2", unit)
    unit = re.sub(r"\bcubic\s*(\w+)|\u7acb\u65b9(\w+)", r"\1\2 3", unit)
    parts = _UNIT_PART.findall(re.sub(r"\bper\b|\u6bcf", "/", unit))
    names = [
        part if part in "/23" else _UNITS.get(part) or _UNITS.get(part.lower().removesuffix("s")) for part in parts
    ]
    return " ".join(map(str, names)) if all(names) else ""
