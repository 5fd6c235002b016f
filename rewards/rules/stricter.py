"""Conditions for instructions whose if-verifiable checker accepts empty work, or refuses a completion that obeys.

A guard must hold in addition to the checker; a replacement takes its place. Both are called with the checker, which
holds the arguments, and the text. docs/rewards.md lists every difference. All scans take time linear in the text.
"""

import re
import string
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

Condition = Callable[[Any, str], bool]
Split = Callable[[str], Sequence[str]]

_NAMES = """
Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin Harper Leo
Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla
Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan
"""
"""The names that IFBench asks for."""
_CONJUNCTIONS = {"and", "but", "for", "nor", "or", "so", "yet"}
_BULLET = re.compile(r"^[ \t]*(?:\*(?!\*)|-(?!-)).*\w.*$", re.MULTILINE)
_SPACED = re.compile(r"[0-9A-Za-z\u00c0-\u024f\u0370-\u052f]")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_PLACEHOLDER = re.compile(r"\[([^\[\]]*)\]")
_WORD_CHARACTER = re.compile(r"\w")
_THESIS = re.compile(r"<(i|em)>(?P<thesis>[^<]*)</\1>(?P<rest>.*)", re.DOTALL)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without the punctuation around them."""
    stripped = (
        word.strip(string.punctuation + "\u201c\u201d\u2018\u2019\u2026\u2014") for word in text.lower().split()
    )
    return [word for word in stripped if word]


def _at_least(count: int, split: Split) -> Condition:
    """Require `count` parts or more, since every statement holds for all of no parts."""
    return lambda _, text: len(split(text)) >= count


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _occurrences(keyword: str, text: str) -> int:
    """Count a keyword in a text as a whole word, in any case and with the ending of a plural or a verb.

    In scripts without spaces, such as Chinese, it also counts inside of words.
    """
    word = keyword.strip()
    before = r"(?<!\w)" if _SPACED.match(word[:1]) else ""
    after = r"(?:['\u2019]?s|es|e?d|ing)?(?!\w)" if _SPACED.match(word[-1:]) else ""
    return len(re.findall(f"{before}{re.escape(word)}{after}", text, re.IGNORECASE))


def _keywords_multiple(checker: Any, text: str) -> bool:
    arguments = checker.get_instruction_args()
    counts = zip((f"keyword{number}" for number in range(1, 6)), (1, 2, 3, 5, 7), strict=True)
    return all(_occurrences(arguments[name], text) == count for name, count in counts)


def _keyword_frequency(checker: Any, text: str) -> bool:
    arguments = checker.get_instruction_args()
    count, frequency = _occurrences(arguments["keyword"], text), arguments["frequency"]
    return count < frequency if arguments["relation"] == "less than" else count >= frequency


def _person_names(checker: Any, text: str) -> bool:
    names = set(re.findall(rf"(?<!\w)(?:{'|'.join(_NAMES.split())})(?!\w)", text))
    return len(names) >= checker.get_instruction_args()["N"]


def _sub_bullets(_: Any, text: str) -> bool:
    kinds = "".join(line.lstrip()[0] for line in _BULLET.findall(text))
    return kinds.startswith("*") and kinds.endswith("-") and "**" not in kinds


def _title_case(_: Any, text: str) -> bool:
    words = re.findall(r"[^\W\d_][\w'\u2019]*", text)
    return bool(words) and not any(word[0].islower() and len(word) > 1 for word in words)


def _thesis(_: Any, text: str) -> bool:
    match = _THESIS.search(text)
    return match is not None and bool(match["thesis"].strip()) and bool(match["rest"].strip())


def _dates(_: Any, text: str) -> bool:
    parts = [part.strip() for part in text.strip().split(",")]
    try:
        return all(_DATE.fullmatch(part) and 1769 <= date.fromisoformat(part).year <= 1821 for part in parts)
    except ValueError:
        return False


def rules(sentences: Split) -> tuple[dict[str, Condition], dict[str, Condition]]:
    """Return guards and replacements by instruction. sentences: if-verifiable's function that splits a text."""

    def ends(*marks: str) -> Condition:
        return lambda _, text: all(any(sentence.endswith(mark) for sentence in sentences(text)) for mark in marks)

    def keyword_in_sentence(checker: Any, text: str) -> bool:
        arguments, parts = checker.get_instruction_args(), sentences(text)
        position: int = arguments["N"]
        return len(parts) >= position and _occurrences(arguments["word"], parts[position - 1]) > 0

    guards: dict[str, Condition] = {
        "ratio:sentence_words": lambda _, text: len(set(words_of(text))) == len(words_of(text)),
        "ratio:sentence_type": ends(".", "?"),
        "ratio:sentence_balance": ends(".", "?", "!"),
        "words:alphabet": _at_least(2, words_of),
        "words:no_consecutive": _at_least(2, words_of),
        "words:odd_even_syllables": _at_least(2, words_of),
        "words:last_first": _at_least(2, sentences),
        "sentence:increment": _at_least(2, sentences),
        "sentence:alliteration_increment": _at_least(2, sentences),
        "words:paragraph_last_first": lambda _, text: any(len(words_of(line)) > 1 for line in text.split("\n")),
        "format:line_indent": _at_least(2, _lines),
        "count:words_japanese": lambda checker, text: len(text.split()) >= checker.get_instruction_args()["N"],
        "detectable_content:number_placeholders": lambda checker, text: (
            sum(bool(_WORD_CHARACTER.search(inside)) for inside in _PLACEHOLDER.findall(text))
            >= checker.get_instruction_args()["num_placeholders"]
        ),
        "keywords:existence": lambda checker, text: all(
            _occurrences(keyword, text) for keyword in checker.get_instruction_args()["keywords"]
        ),
        "count:conjunctions": lambda checker, text: (
            len(_CONJUNCTIONS & set(words_of(text))) >= checker.get_instruction_args()["small_n"]
        ),
        "count:unique_word_count": lambda checker, text: (
            len(set(words_of(text))) >= checker.get_instruction_args()["N"]
        ),
    }
    replaced: dict[str, Condition] = {
        "count:person_names": _person_names,
        "count:keywords_multiple": _keywords_multiple,
        "keywords:frequency": _keyword_frequency,
        "sentence:keyword": keyword_in_sentence,
        "length_constraints:nth_paragraph_first_word": lambda checker, text: checker.check_following(
            "\n\n".join(part for part in re.split(r"\n[ \t]*(?=\n)", text) if part.strip())
        ),
        "detectable_format:number_bullet_lists": lambda checker, text: (
            len(_BULLET.findall(text)) == checker.get_instruction_args()["num_bullets"]
        ),
        "format:sub-bullets": _sub_bullets,
        "format:no_bullets_bullets": lambda checker, text: checker.check_following("\n".join(_lines(text))),
        "format:title_case": _title_case,
        "format:thesis": _thesis,
        "custom:date_format_list": _dates,
    }
    return guards, replaced
