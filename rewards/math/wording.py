r"""Find the words around an answer, in English and Chinese.

| function | answer | result |
|---|---|---|
| `without_lead` | The total is 12 apples | 12 apples |
| `without_qualifier` | x + c \text{ for any real } c | x + c, and the domain R |
| `before_reason` | 12 (since 3 * 4 = 12) | 12 |
| `chosen_options` | so I choose (B). | B |
"""

import re
from collections.abc import Iterator

LATIN_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
_UPRIGHT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")

# Prose that leads to an answer.
_LEAD = re.compile(
    r"(?P<name>[A-Za-z][A-Za-z' -]{1,100}:|[A-Za-z' -]{0,100}[a-z]{3}[A-Za-z' -]{0,100}[:=])(?!=)"
    r"|(?:[A-Za-z][A-Za-z'-]*,?\ +){1,20}?(?:is|are|equals|equal\ to)\b:?"
    r"|(?:so|thus|hence|then|therefore|finally|we\ (?:get|have|find|obtain))\b,?"
    r"|[\u4e00-\u9fff]{1,20}?(?:[是为為:]|等[于於]|[一总總]?共有?)",
    re.IGNORECASE | re.VERBOSE,
)
_ANSWER_LEAD = re.compile(r"\b(?:answer|result|solution)\s*(?:is|are|:|=)|(?:答案|结果|結果)\S", re.IGNORECASE)
_NO_LEAD = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|if|unless|either|or|except|than)\b|n't\b|[不非错錯若]",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[-+]?\s*[$(\[{]*(?:[\d.]|\\(?!text))|[A-Za-z](?:\([a-z]\))?\s*(?:\Z|[=<>^+*/.-])|\(?[A-J]\)")

# Qualifiers, which give the domain of an answer's letters.
_LETTER = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?"
_LETTERS = rf"(?P<letters>{_LETTER}(?:\s*(?:,|and|,\s*and)\s*{_LETTER})*)"
_KIND = (
    r"(?:an?\s+|the\s+|any\s+|some\s+|arbitrary\s+|fixed\s+|given\s+)*"
    r"(?P<kind>(?:(?:non-?)?(?:positive|negative|zero)\s+|(?:real|complex|rational|natural|whole|prime|even|odd)\s*\b)*"
    r"(?:-?\s*(?:valued\s+)?(?:numbers?|constants?|integers?|reals?|naturals?|values?|scalars?|parameters?)\b)?)(?:\s+of\s+integration)?"
)
_SET = r"\\in\s*\\math(?:bb|bf|rm)\s*\{?\s*(?P<set>[CNQRZ]\s*\}?\s*(?:[_^]\s*\{?\s*[+*>0]*\s*\}?)?)"
_IS_A = rf"(?:(?:is|are|being|denotes?)\s+)?{_KIND}"
_QUALIFIERS = [
    re.compile(rf"[\s,;(]*\b(?:{form})[\s).]*\Z")
    for form in (
        rf"for\s+(?:any|all|every|each|some|an?)\b\s*{_KIND}\s*(?:of\s+)?(?:{_LETTERS}\s*(?:{_SET})?)?",
        rf"(?:for|where|with)\s+(?:any\s+|all\s+)?{_LETTERS}\s*{_SET}",
        rf"(?:where|with)\s+{_LETTERS}\s+{_IS_A}",
    )
] + [
    re.compile(rf"\s*(?:{form})[\s).]*\Z")
    for form in (
        rf"[,;(]?\s*\\forall\s*{_LETTERS}\s*(?:{_SET})?",
        rf"[,;(]\s*{_LETTERS}\s*{_SET}",
        rf"[,;(]\s*{_LETTERS}\s+(?:is|are)\s+{_KIND}",
        rf"[,;(]\s*{_LETTERS}\s+(?=[a-z]{{4}}){_KIND}",
        rf"[,;(]\s*{_KIND}\s+{_LETTERS}",
    )
]
_QUALIFIER_CHARS = 120
_MAY_QUALIFY = re.compile(r"\bfor\b|\bwhere\b|\bwith\b|\\forall|\\in(?![a-z])|constant|integer|real|number")
_DOMAINS = {"real": "R", "complex": "C", "rational": "Q", "integer": "Z", "natural": "N", "whole": "N"}

# Reasons that follow an answer.
_OPENING = r"[\s,;:(\[{\uff0c\uff1b\uff1a\uff08\u3010\u2013\u2014-]"
_BECAUSE = (
    rf"{_OPENING}(?:because|since|due\s+to|given\s+that|owing\s+to|as\s+(?=[\d$\\(]))\b"
    r"|[,;(\[\u2013\u2014-]\s*as(?!\s+(?:well|follows|much|many)\b)\b|因[为為]|由[于於]"
)
_CALCULATION = r"[,;:\uff0c\uff1b]\s*(?=[\d$(\\][^,;=A-Za-z]{1,60}=)"
_REASON = re.compile(rf"{_BECAUSE}|[,;(\[\u2013\u2014-]\s*which\b|{_CALCULATION}", re.IGNORECASE)
_LAST_REASON = re.compile(rf"(?<!\band)(?<!\bbut)(?:{_BECAUSE})(?=[^,\uff0c]*\Z)", re.IGNORECASE)
_RESULT = re.compile(
    r"\b(?:so|thus|hence|therefore|then|means?|making|leaving|total)\b|所以|因此|一共|[总總]共", re.IGNORECASE
)
_ASIDE = re.compile(r"(?:\s|(?<=\S)(?=[\uff08\u3010]))[(\[\uff08\u3010]([^()\[\]\uff08\uff09\u3010\u3011]*)")
_ASIDE_IS_REASON = re.compile(r"=|[a-z]{2,} [a-z]{2,}|[\u4e00-\u9fff]{4}")
_ASIDE_IS_ANSWER = re.compile(r"\A\s*(?:or|and|possibly|maybe|perhaps)\b|\b(?:mod|modulo|base)\b|或", re.IGNORECASE)
_TRAILING = re.compile(r"(?:[\s,;:(\[{\uff0c\uff1b\uff08\u3010\u2013\u2014]|\\text[a-z]{0,6})+\Z")
_HAS_ANSWER = re.compile(r"\d|\\|\A\W*[A-J]\W*\Z")

# Letters of multiple choice. An atomic group, or "choose A, B and C on the circle" would choose A.
_CHOICE_LETTER = r"[A-J](?![a-zK-Z'])"
_MORE_LETTERS = rf"(?:\s?[,\u3001\uff0c]?\s?(?:and|or|&|[和或])?\s?\(?{_CHOICE_LETTER}\)?){{0,9}}"
_OPTION = rf"[(\[\uff08\u3010*\s]{{0,4}}(?>{_CHOICE_LETTER}{_MORE_LETTERS})[)\]\uff09\u3011*]{{0,4}}"
_PHRASE_END = r"(?=\s{0,3}(?:[.,;:!\u3002\uff0c\n]|\Z|because|since|as\b))"
_CHOICE_NOUN = r"(?:the\s)?(?:(?:correct|right|best)\s)?(?:option|choice|answer|letter)?\s?:?\s?"
_NOT_CHOSEN = (
    r"(?<!not\ )(?<!n't\ )(?<!never\ )(?<!\bto\ )(?<!can\ )(?<!could\ )"
    r"(?<![Ii]f\ we\ )(?<![Ii]f\ you\ )(?<![Ii]f\ I\ )(?<![Ii]f\ they\ )"
)
_OPTIONS = re.compile(
    rf"""
    {_NOT_CHOSEN}\b(?:choos(?:e|ing)|chose|pick(?:ing)?|select(?:ing)?|go(?:ing)?\ with)\s{_CHOICE_NOUN}
        (?P<verb>{_OPTION}){_PHRASE_END}
    |\b(?i:option|choice|selection)\s?(?i:is|would\ be|must\ be|should\ be|:)\s?(?:(?i:option|choice)\s?)?
        (?P<noun>{_OPTION}){_PHRASE_END}
    |\b(?i:options?|choices?|answers?)\s?(?P<subject>{_OPTION})\s(?:is|are|must\ be|would\ be)\s
        (?:the\s)?(?:only\s)?(?:correct|right|best|true|answer)(?:\s(?:answer|option|choice|one)s?)?{_PHRASE_END}
    |(?<![\w\\])(?P<named>{_OPTION})\s(?:is|are)\s(?:the\s)?(?:only\s)?
        (?:(?:correct|right|best)\s)?(?:answer|option|choice)s?{_PHRASE_END}
    |(?<![不非若如未])(?<!不[能应應可会會要該该得])(?<!如果)(?<!假如)(?<!假设)(?<!排除)
        [选選][择擇]?(?:[项項]?\s?(?:应该?|應該?)?[是为為:\uff1a]|答案)?\s?
        (?P<chosen>{_OPTION})(?![A-Za-z])(?!\s?(?:[项項]|[选選][项項])?\s?(?:[不错錯]|吗|嗎|是[不错錯]))
    |(?<![A-Za-z])(?P<right>{_OPTION})\s?[选選]?[项項]?\s?(?:才是|[是为為])?\s?
        (?:正[确確]|[对對]的|符合[题題]意)(?!\s?(?:吗|嗎|与否|[?\uff1f]))
    """,
    re.VERBOSE,
)
_MAY_CHOOSE = re.compile(r"choos|chose|pick|select|go(?:ing)? with|option|choice|answer|[选選]|正[确確]", re.IGNORECASE)


def without_lead(text: str) -> str:
    """Return `text` without the prose that leads to a value: "The area is 12", "Area = 12", "面积是12"."""
    upright = _UPRIGHT.match(text)
    plain = (f"{upright[1]} {text[upright.end() :]}" if upright else text).lstrip()
    lead = _LEAD.match(plain)
    if not lead or _NO_LEAD.search(lead[0]):
        return text
    rest = plain[lead.end() :].strip()
    return rest if _VALUE.match(rest) or (rest and _ANSWER_LEAD.search(lead[0])) else text


def without_qualifier(text: str) -> tuple[str, str]:
    """Split off a qualifier such as "for any real c", and return the rest and the domain: R, Z, N, ... or ""."""
    if not _MAY_QUALIFY.search(text):
        return text, ""
    plain = _UPRIGHT.sub(r" \1 ", text)
    for qualifier in _QUALIFIERS:
        match = qualifier.search(plain, max(0, len(plain) - _QUALIFIER_CHARS))
        if match and plain[: match.start()].strip():
            groups = match.groupdict(default="")
            return plain[: match.start()].strip(), _domain(groups.get("kind", ""), groups.get("set", ""))
    return text, ""


def _domain(kind: str, symbol: str) -> str:
    """Return one name for domains that mean the same: "R", "Z", "N", "Z positive", ...; "" for any constant."""
    if symbol:
        name = re.sub(r"[\s{}_^]", "", symbol)
        return {"N+": "N", "N*": "N", "Z+": "N", "Z>0": "N"}.get(name, name)
    words = kind.replace("non-", "non").split()
    singular = {word.removesuffix("s") for word in words} - {"number", "constant", "value", "scalar", "parameter"}
    names = {_DOMAINS.get(word, word) for word in singular}
    return "N" if names == {"Z", "positive"} else " ".join(sorted(names))


def before_reason(text: str, *, is_marked: bool = True) -> str:
    """Return an answer without the reason that follows it, after a comma or in parentheses.

    is_marked: `text` is a marked answer. Other prose keeps calculations and clauses that go on ("since it takes 3, he
    pays 12").
    """
    for reason in (_REASON if is_marked else _LAST_REASON).finditer(text):
        head = _TRAILING.sub("", text[: reason.start()])
        has_answer = re.search(r"\w", head) if is_marked else _HAS_ANSWER.search(head)
        if has_answer and not _RESULT.search(text, reason.end()):
            text = head
            break
    for aside in _ASIDE.finditer(text):
        head = text[: aside.start()].strip()
        if not is_marked and text[aside.end() + 1 :].strip(" .\n"):
            continue
        if _HAS_ANSWER.search(head) and _ASIDE_IS_REASON.search(aside[1]) and not _ASIDE_IS_ANSWER.search(aside[1]):
            return head
    return text


def chosen_options(text: str) -> Iterator[tuple[int, str]]:
    """Yield end and letters of each phrase that chooses letters of multiple choice ("I choose B", "选项C正确")."""
    for phrase in _OPTIONS.finditer(text) if _MAY_CHOOSE.search(text) else ():
        yield phrase.end(), phrase[phrase.lastgroup or 0].strip(" ()[]*\uff08\uff09\u3010\u3011\n")
