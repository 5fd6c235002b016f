"""Instructions that if-verifiable takes for followed where nothing was done, or for broken where it was."""
# ruff: noqa: E501  a line an instruction

from typing import Any

import pytest

from rewards.rules.instructions import InstructionReward
from tests.rewards.rules.test_instructions import STRICTER, task
from tests.rewards.rules.test_instructions import nltk_data as nltk_data

DECIDED: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # instruction, changed arguments, what follows it, what does not
    ("ratio:sentence_words", {}, ["Tom ran. Ann hid! Who won?"], ["Dog. Dog. Dog.", "The a. The b. The c.", "... ..."]),
    ("ratio:sentence_type", {}, ["Yes. No. Why?"], ["Yes! No!", "Hello there", "One. Two."]),
    ("ratio:sentence_balance", {}, ["It is. Is it? It is!"], ["no sentence at all", "Is it? It is!"]),
    ("count:person_names", {"N": 2}, ["Leo's friend Ava.", "(Grace), Owen"], ["Leonard and Avalon.", "Leo, Leo", "leo ava"]),
    ("count:conjunctions", {"small_n": 2}, ["This and that, but no."], ["And and, and. (and)", "Band butter."]),
    ("count:unique_word_count", {"N": 3}, ["Red, blue; green."], ["red Red. red!", "red blue - --"]),
    ("count:words_japanese", {"N": 2}, ["one 二"], ["one"]),
    ("words:alphabet", {}, ["Zebras are big"], ["Zebras", "zebras big"]),
    ("words:no_consecutive", {}, ["red blue"], ["red", "red rose"]),
    ("words:odd_even_syllables", {}, ["the water"], ["water"]),
    ("words:last_first", {}, ["We see it. It sees us."], ["We see it.", "We see. It sees."]),
    ("words:paragraph_last_first", {}, ["all or all\n\nme and me"], ["all", "all or\nme"]),
    ("sentence:increment", {"small_n": 1}, ["We go. We go home."], ["We go.", "We go. We go."]),
    ("sentence:alliteration_increment", {}, ["See him. Big bears eat."], ["See him.", "Big bears eat. See him."]),
    ("sentence:keyword", {"word": "art", "N": 2}, ["No. Art helps."], ["No. We start.", "Art. No."]),
    ("format:line_indent", {}, ["a\n b\n  c"], ["a", "a\nb"]),
    ("format:sub-bullets", {}, ["* a\n  - b\n* c\n  - d\n  - e"], ["* a\n* b\n  - c", "* well-known", "- a", "a"]),
    ("format:no_bullets_bullets", {}, ["One. Two.\n\n* a\n\n* b\n"], ["One.\n* a\n* b", "One. Two.\n* a"]),
    ("format:title_case", {}, ["The Red Pen", "A Plan B"], ["The pen", "The pEn", "123 456"]),
    ("format:thesis", {}, ["<em>We agree.</em> So."], ["<em></em> text", "<i> </i> text", "<i>We.</i>", "<i>We</em> so"]),
    ("custom:date_format_list", {}, ["1800-02-28"], ["1800-00-10", "1800-10-00", "1801-02-29", "1700-01-01"]),
    (
        "count:keywords_multiple",
        {"keyword1": "art", "keyword2": "b", "keyword3": "c", "keyword4": "d", "keyword5": "e"},
        ["Art b b. c c c d d d d d e e e e e e e"],
        ["start b b c c c d d d d d e e e e e e e", "art b c d e"],
    ),
    ("keywords:existence", {"keywords": ["art", "New York"]}, ["Arts in new york"], ["We start in New York", "art, New"]),
    ("keywords:existence", {"keywords": ["方法"]}, ["这个方法很好"], ["这个办法很好"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2}, ["A cat, two cats"], ["concatenate cat", "category cat"]),
    ("length_constraints:nth_paragraph_first_word", {}, ["One.\n\n \n\n\nAnd two.\n\n"], ["And.\n\n\n\nOne.", "One.\n\nAn."]),
    ("detectable_content:number_placeholders", {}, ["[a] and [b c]"], ["[] and [ ]", "[a] and []"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n- b\n---"], ["*\n*\n", "-\n-", "* a"]),
    ("startend:quotation", {}, ['"a"'], ['""', '"..."']),
    ("words:prime_lengths", {}, ["to him"], ["!!!", "four"]),
    ("punctuation:no_comma", {}, ["a b"], ["!", "..."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "followed", "broken"), DECIDED)
def test_nothing_done_is_not_followed(
    name: str, changes: dict[str, Any], followed: list[str], broken: list[str]
) -> None:
    judged = task(name, **changes)
    InstructionReward().check(judged)
    scores = {text: InstructionReward().score(judged, text).score for text in [*followed, *broken]}
    assert scores == dict.fromkeys(followed, 1.0) | dict.fromkeys(broken, 0.0)


def test_every_stricter_rule_is_tried() -> None:
    assert {name for name, *_ in DECIDED} >= STRICTER


@pytest.mark.parametrize("language", ["zh-cn", "pt-BR", "xx", "EN", ""])
def test_an_unknown_language_is_a_bad_row(language: str) -> None:
    with pytest.raises(ValueError, match=r"unknown value|at random"):
        InstructionReward().check(task("language:response_language", language=language))
