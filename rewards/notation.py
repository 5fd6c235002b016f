r"""How an answer is written: Unicode and plain text become LaTeX, and simple forms are read without a parser.

What is read here, exactly and in microseconds, is most of what a data set of school mathematics asks for: integers,
decimals, fractions, mixed numbers, percentages and powers of ten, with or without a unit or a currency; times of day;
letters of multiple choice; words.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from rewards.wording import without_lead

MAX_DIGITS = 400
"""Longest number that is read, in digits, and the largest power of ten."""

_SYMBOLS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2044": "/", "\u3001": ",", "\u3002": ".", "\uffe5": "\u00a5"}
    | {"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ", "\u00b1": r"\pm "}
    | {"\u221a": r"\sqrt ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u211d": r"\mathbb{R}"}
    | {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx "}
    | {"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset "}
    | {"\u6216": " or ", "\u548c": " and ", "\u4e14": " and "}
)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_RAISED_RUN = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")

_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_UPRIGHT = r"\\(?:text[a-z]{0,6}|math(?:rm|bf|it|sf)|mbox|rm|operatorname)\s*\{\s*([^{}]*?)\s*\}"
_ALL_UPRIGHT = re.compile(_UPRIGHT)
_UPRIGHT_NAME = re.compile(r"\\(?:mathrm|mathbf|rm|operatorname)\s*\{\s*([A-Za-z]|[a-z]+)\s*\}")
_LIST_WORD = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(and|or)\s*,?\s*\}|(?<=[\d)}])(and|or)(?=[A-Z\d(\\-])")
_BOLD = (
    r"\\(?:text(?:bf|it|md|sl|sf|tt|sc|up|normal)|math(?:bf|it|sf|tt|normal)"
    r"|emph|underline|bm|boldsymbol|pmb|ensuremath)"
)
_FACE = re.compile(
    rf"(?:{_BOLD}(?![A-Za-z])|\\(?:text)?color\s*\{{[^{{}}]*\}})\s*(?P<opens>\{{)?"
    r"|\\(?:bf|it|rm|sf|tt|bfseries|boldmath)(?![A-Za-z])\s*|\\.|[{}]",
    re.DOTALL,
)
_UPRIGHT_NUMBER = re.compile(r"\\(?:text|mathrm|mbox|hbox)\s*\{\s*([-+]?\s*(?:\\?\$)?\s*\.?\d[^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|gather|split|equation|center)\*?\}")
_ROW_BREAK = r"(?:\\\\(?![A-Za-z])(?:\[[^\[\]]*\])?|\\newline(?![A-Za-z]))"
_OUTER_BREAKS = re.compile(rf"\A(?:\s|{_ROW_BREAK})+|(?:\s|{_ROW_BREAK})+\Z")
_BREAK_IN_PROSE = re.compile(rf"(?<=[}}:])\s*{_ROW_BREAK}\s*|\s*{_ROW_BREAK}\s*(?=\\text|\()")
_BREAK = re.compile(rf"\s*{_ROW_BREAK}\s*")
_STYLE = re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|(?<!\\)\\[,;:! ]\s*|~|\\q?quad(?![a-z])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,?\\!\s*,?|\\ )(?=\d{3}(?!\d))")
_NAMES = re.compile(
    r"(?<![\\A-Za-z])(a(?:rc)?(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|sqrt|log|ln|exp|pi)(?![a-z])"
)
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", re.IGNORECASE)
_PLAIN_MATRIX = re.compile(r"\[\s*\[([^\[\]]*(?:\]\s*,\s*\[[^\[\]]*)*)\]\s*\]")
_FACTORS = re.compile(r"(?<![\w^{}\\.)])(\d+|\(\s*-?[\d./]+\s*\))\s*(?=\(\s*-?[\d./]+\s*\))")
_CALCULATION = re.compile(
    r"(?:[-+*/().\d\s=,{}$]|\\(?:times|cdot|div|[dt]?frac|\$))*=(?=\s*(?:-|\d|\\[dt]?frac)[^A-Za-z]*(?:\Z|\\))"
)
_OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
_DOTTED = re.compile("(\\d)\u0307")
_ELLIPSIS = r"(?:\s*(?:\.{3,}|\\[lc]?dots(?![A-Za-z])))"
_PERIOD = r"\{{\s*(?P<{0}>\d+)\s*\}}|(?P<{0}1>\d)"
_REPEATING = re.compile(
    rf"""(?<![\d.,}}\\])(?P<whole>\d{{1,3}}(?:(?:,|\{{,\}}|,?\\[,!]){{1,2}}\d{{3}})+|\d*)(?:\.|\{{\.\}})(?P<digits>\d*)
    (?:\\(?:overline|bar|widebar)\s*(?:{_PERIOD.format("bar")}){_ELLIPSIS}?
     |\\dot\s*(?:{_PERIOD.format("dot")})(?:(?P<between>\d*)\\dot\s*(?:{_PERIOD.format("last")}))?{_ELLIPSIS}?
     |\((?P<bracket>\d+)\)(?!\s*[\w(^\\]){_ELLIPSIS}?
     |(?P<ellipsis>{_ELLIPSIS})|\s+\(?(?P<word>repeating|recurring)\)?)""",
    re.VERBOSE,
)
_MAX_PERIODS = 60
_THRICE = re.compile(r"(\d*?)(\d+?)\2\2+")
_TWICE = re.compile(r"()(\d+?)\2")
_DOLLAR = re.compile(r"(?<!\\)\$")
_OPEN_BOX = re.compile(r"\A\\+f?box(?:ed)?\s*\{")

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
    rf"(?:\s*{_UPRIGHT}(?:\s*\^\s*\{{?\d\}}?)?|{_DEGREE.pattern}|(?<=[\d)}}])\s+[a-z]{{3,}}[a-z ]*)\s*\.?$"
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


def canonical(text: str) -> str:
    """`text` as LaTeX without math delimiters, styles, invisible characters, row breaks and a full stop at the end.

    A calculation ("62+1=63") becomes its result, a repeating decimal a fraction, and prose that leads to a value goes.
    """
    if text.isdecimal() and text.isascii():
        return text
    text = _undressed(_REPEATING.sub(_as_fraction, _latex_symbols(text)))
    if text.count("{") > text.count("}"):
        text = _OPEN_BOX.sub("", text)
    if len(_DOLLAR.findall(text)) % 2 == 0:  # delimiters inside; a single one is money
        text = _DOLLAR.sub(" ", text)
    if "\\" in text:
        text = _one_row(_UPRIGHT_NUMBER.sub(r" \1", _plain_face(text)))
    text = _STYLE.sub(" ", _THOUSANDS.sub(",", text))
    text = _LIST_WORD.sub(lambda word: f" {word[1] or word[2]} ", text)
    text = _UPRIGHT_NAME.sub(r" \1", text)
    text = _INFINITY.sub(r"\\infty ", _NAMES.sub(r"\\\1 ", text))
    text = text.replace("**", "^").replace(r"\varnothing", r"\emptyset")
    text = without_lead(text)
    text = _PLAIN_MATRIX.sub(_matrix, _FACTORS.sub(r"\1 \\cdot ", _undressed(text)))
    for function in (r"\sqrt", "^"):
        text = _braced(text, function)
    return " ".join(_result(text).split())


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
    found = _TIME.fullmatch(_ALL_UPRIGHT.sub(r" \1", text).strip())
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
        unit = _DEGREE.sub(" degree ", _ALL_UPRIGHT.sub(r" \1", unit) if _ALL_UPRIGHT.match(unit) else unit).strip()
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
    unit = _ALL_UPRIGHT.sub(r"\1", found[0]).strip()
    return rest if _DEGREE.fullmatch(unit) or (_UNIT.fullmatch(unit) and not _NOT_IN_UNIT.search(unit)) else text


def choices(text: str) -> frozenset[str] | None:
    """The letters of multiple choice that canonical `text` names, or None."""
    text = _CHOICE_LEAD.sub("", _ALL_UPRIGHT.sub(r"\1", text).strip()).strip("\u3010\u3011")
    one = _CHOICE.fullmatch(text)
    if one:
        at = one.lastindex or 1
        if at > 1 and (_OTHER_CHOICE.search(text, one.end(at) + 1) or _LISTED_CHOICE.match(text, one.end(at))):
            return None
        return frozenset(one[at].upper())
    return frozenset(re.findall("[A-H]", text)) if _CHOICES.fullmatch(text) else None


def words(text: str) -> str | None:
    """Canonical `text` in lower case and single spaces where it is words, or None."""
    text = " ".join(_ALL_UPRIGHT.sub(r"\1", text).split()).rstrip(".")
    return text.casefold() if _WORDS.fullmatch(text) else None


def _result(text: str) -> str:
    """What a calculation comes to, such as "63" of "62+1=63"."""
    calculation = _CALCULATION.match(text)
    if not calculation or literal(calculation[0].partition("=")[0].strip()):
        return text
    return text[calculation.end() :]


def _as_fraction(found: re.Match[str]) -> str:
    """A repeating decimal as a fraction. "0.333..." repeats what is there three times, or twice and nothing else."""
    part = found.groupdict(default="")
    whole, digits = re.sub(r"\D", "", part["whole"]), part["digits"]
    period = part["bar"] or part["bar1"] or part["bracket"]
    if part["dot"] or part["dot1"]:
        period = "".join(part[name] for name in ("dot", "dot1", "between", "last", "last1"))
    if part["ellipsis"] or part["word"]:
        if part["word"] and len(digits) == 1:
            digits, period = "", digits
        elif len(digits) <= _MAX_PERIODS and (again := _THRICE.fullmatch(digits) or _TWICE.fullmatch(digits)):
            digits, period = again[1], again[2]
        elif part["ellipsis"] and digits:
            return f"{part['whole']}.{digits}"  # the first digits of an irrational number
    if not period or len(whole + digits + period) > MAX_DIGITS:
        return found[0]
    nines = 10 ** len(digits) * (10 ** len(period) - 1)
    value = Fraction(int(whole + digits + period) - int((whole + digits) or "0"), nines)
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _plain_face(text: str) -> str:
    r"""`text` without \textbf{}, \bm{}, \mathsf{} and their kin, but with what stands in them."""
    out, closers, at = list[str](), list[str](), 0
    for token in _FACE.finditer(text):
        out.append(text[at : token.start()])
        at = token.end()
        if token[0] == "}":
            out.append(closers.pop() if closers else "}")
        elif token[0] == "{":
            out.append("{")
            closers.append("}")
        elif len(token[0]) == 2 and not token["opens"]:
            out.append(token[0])  # an escaped character, or the start of another command
        else:
            out.append(" " if text[: token.start()][-1:].isalpha() else "")
            closers += [""] if token["opens"] else []
    return "".join(out) + text[at:]


def _one_row(text: str) -> str:
    """`text` without row breaks: they separate the items of a list, or prose from its value. Matrices keep theirs."""
    bare = _LAYOUT.sub(" ", text)
    if r"\begin" in bare:
        return text
    bare = _OUTER_BREAKS.sub("", bare if bare == text else bare.replace("&", " "))
    return _BREAK.sub(", ", _BREAK_IN_PROSE.sub(" ", bare))


def _latex_symbols(text: str) -> str:
    """`text` with LaTeX for Unicode's symbols, and without its invisible characters."""
    text = "".join(ch for ch in text if ch in "\n\t" or unicodedata.category(ch) not in ("Cf", "Cc"))
    text = _OVERLINED.sub(lambda run: rf"\overline{{{run[0][::2]}}}", _DOTTED.sub(r"\\dot{\1}", text))
    text = _RAISED_RUN.sub(lambda run: "^{" + run[0].translate(_RAISED) + "}", text)
    text = _VULGAR_FRACTION.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]), text)
    return unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)


def _undressed(text: str) -> str:
    """`text` without the math delimiters or the \\text{} around the whole of it, and without a full stop."""
    while True:
        before, text = text, text.strip().removesuffix(".").strip()
        for opening, closing in _DELIMITERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                text = text[len(opening) : -len(closing)].strip()
        upright = _ALL_UPRIGHT.fullmatch(text)
        text = upright[1] if upright else text
        if text == before:
            return text


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


def _matrix(found: re.Match[str]) -> str:
    rows = re.split(r"\]\s*,\s*\[", found[1])
    return r"\begin{pmatrix}" + r"\\".join(row.replace(",", "&") for row in rows) + r"\end{pmatrix}"


def _braced(text: str, function: str) -> str:
    """`text` with the parentheses right after each `function` as braces."""
    out, closers = [], [""]
    opening = re.compile(rf"{re.escape(function)}\s*\(|[()]")
    at = 0
    for token in opening.finditer(text):
        out.append(text[at : token.start()])
        at = token.end()
        if token[0] == ")":
            out.append(closers.pop() if len(closers) > 1 else ")")
        elif token[0] == "(":
            out.append("(")
            closers.append(")")
        else:
            out.append(function + "{")
            closers.append("}")
    return "".join(out) + text[at:]
