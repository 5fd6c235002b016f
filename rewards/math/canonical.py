r"""Rewrite an answer as canonical LaTeX, without typefaces, row breaks and prose that carry no meaning.

| step | answer | result |
|---|---|---|
| Unicode | √2 + x² ≤ ½ | \sqrt 2 + x^{2} \le 1/2 |
| repeating decimals | 0.1\overline{6}; 0.333... | \frac{1}{6}; \frac{1}{3} |
| typefaces | \textbf{7} | 7 |
| row breaks | a \\ b | a, b |
| thousands | 1{,}000 | 1,000 |
| names | infinity; x**2 | \infty; x^2 |
| leading prose | The area is 12. | 12 |
| matrices, products | [[1,2],[3,4]]; 2(3) | \begin{pmatrix}1&2\\3&4\end{pmatrix}; 2 \cdot (3) |
| arguments | \sqrt(2) | \sqrt{2} |
| calculations | 62+1=63 | 63 |
"""

import re
import unicodedata
from fractions import Fraction

from rewards.math.notation import MAX_DIGITS, UPRIGHT, literal
from rewards.math.wording import without_lead

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
_MAX_ELLIPSIS_DIGITS = 60
"""Most digits before "..." that are searched for a period, in quadratic time."""
_THRICE = re.compile(r"(\d*?)(\d+?)\2\2+")
_TWICE = re.compile(r"()(\d+?)\2")
_DOLLAR = re.compile(r"(?<!\\)\$")
_OPEN_BOX = re.compile(r"\A\\+f?box(?:ed)?\s*\{")


def canonical(text: str) -> str:
    r"""Return `text` as LaTeX without math delimiters, styles, invisible characters, row breaks and a final full stop.

    Example:
        canonical(r"The area is $\dfrac{1}{2}$.")  # r"\dfrac{1}{2}"
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


def _result(text: str) -> str:
    """Return the result of a calculation, "63" of "62+1=63"; any other text unchanged."""
    calculation = _CALCULATION.match(text)
    if not calculation or literal(calculation[0].partition("=")[0].strip()):
        return text
    return text[calculation.end() :]


def _as_fraction(decimal: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction. Before "..." a period occurs three times, or twice and nothing else."""
    part = decimal.groupdict(default="")
    whole, digits = re.sub(r"\D", "", part["whole"]), part["digits"]
    period = part["bar"] or part["bar1"] or part["bracket"]
    if part["dot"] or part["dot1"]:
        period = "".join(part[name] for name in ("dot", "dot1", "between", "last", "last1"))
    if part["ellipsis"] or part["word"]:
        if part["word"] and len(digits) == 1:
            digits, period = "", digits
        elif len(digits) <= _MAX_ELLIPSIS_DIGITS and (repeat := _THRICE.fullmatch(digits) or _TWICE.fullmatch(digits)):
            digits, period = repeat[1], repeat[2]
        elif part["ellipsis"] and digits:
            return f"{part['whole']}.{digits}"  # the first digits of an irrational number
    if not period or len(whole + digits + period) > MAX_DIGITS:
        return decimal[0]
    nines = 10 ** len(digits) * (10 ** len(period) - 1)
    value = Fraction(int(whole + digits + period) - int((whole + digits) or "0"), nines)
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _plain_face(text: str) -> str:
    r"""Return `text` without \textbf{}, \bm{}, \mathsf{} and similar commands; their arguments stay."""
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
    """Return `text` with row breaks as commas between items and as spaces beside prose. Matrices keep theirs."""
    bare = _LAYOUT.sub(" ", text)
    if r"\begin" in bare:
        return text
    bare = _OUTER_BREAKS.sub("", bare if bare == text else bare.replace("&", " "))
    return _BREAK.sub(", ", _BREAK_IN_PROSE.sub(" ", bare))


def _latex_symbols(text: str) -> str:
    """Return `text` with Unicode's symbols as LaTeX, and without invisible characters."""
    text = "".join(ch for ch in text if ch in "\n\t" or unicodedata.category(ch) not in ("Cf", "Cc"))
    text = _OVERLINED.sub(lambda run: rf"\overline{{{run[0][::2]}}}", _DOTTED.sub(r"\\dot{\1}", text))
    text = _RAISED_RUN.sub(lambda run: "^{" + run[0].translate(_RAISED) + "}", text)
    text = _VULGAR_FRACTION.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]), text)
    return unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)


def _undressed(text: str) -> str:
    r"""Return `text` without the math delimiters or the \text{} around all of it, and without a full stop."""
    while True:
        before, text = text, text.strip().removesuffix(".").strip()
        for opening, closing in _DELIMITERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                text = text[len(opening) : -len(closing)].strip()
        upright = UPRIGHT.fullmatch(text)
        text = upright[1] if upright else text
        if text == before:
            return text


def _matrix(plain: re.Match[str]) -> str:
    rows = re.split(r"\]\s*,\s*\[", plain[1])
    return r"\begin{pmatrix}" + r"\\".join(row.replace(",", "&") for row in rows) + r"\end{pmatrix}"


def _braced(text: str, function: str) -> str:
    """Return `text` with the parentheses right after each `function` as braces."""
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
