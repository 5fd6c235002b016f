"""Verifiable instructions: every one followed and not followed, parity with if-verifiable, and tasks that can't be
judged."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import nltk
import pytest
from if_verifiable import IFBenchSample, IFEvalSample, evaluate_output_for_sample
from if_verifiable.common import get_loose_transformations

from rewards.rules.instructions import InstructionReward
from rewards.rules.instructions import _library as library
from rewards.types import Status, Task

ENGLISH, GERMAN = (
    "this is a short text about the weather in england",
    "dies ist ein kurzer Text über das Wetter in Wien",
)
CAPITALS = "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam "
CAPITALS += "Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana "
CAPITALS = ", ".join([*CAPITALS.split(), "Zagreb"])
QUESTIONS = [
    f"Question {n}. Why{' so' * n}?\n" + "\n".join(f"{option}) red" for option in "ABCDE") for n in (1, 2, 3, 4)
]
STORY = " ".join(f"{letter}x went." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
LANDS = "\n".join(f"Land {n}" for n in range(99, 40, -1))

IFEVAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["pen", "box"]}, "A Pen in a box.", "A pen in a bag."),
    "keywords:frequency": ({"keyword": "pen", "frequency": 2, "relation": "at least"}, "pen and pen", "a pen"),
    "keywords:forbidden_words": ({"forbidden_words": ["pen"]}, "two pencils", "two of a pen"),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "red", "free"),
    "language:response_language": ({"language": "de"}, GERMAN, ENGLISH),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "One. Two.", "One, two."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "now three words"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "and"}, "First.\n\nAnd so.", "And first.\n\nSo."
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. Write.", "Bye. Write."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "* one"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "an *important* word", "a word"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\none\nSection 2\ntwo", "Section 1\none"
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', '{"a": }'),
    "detectable_format:title": ({}, "<<Pens>>\nThey write.", "Pens\nThey write."),
    "combination:two_responses": ({}, "One.******Two.", "One.******One."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    "startend:end_checker": ({"end_phrase": "The end."}, "So it was. The end.", "The end. So it was."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "NO and NO", "NO and no"
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH, GERMAN.lower()),
    "punctuation:no_comma": ({}, "one two", "one, two"),
    "startend:quotation": ({}, '"one"', "one"),
}  # fmt: skip
IFBENCH: dict[str, tuple[dict[str, Any], str, str]] = {
    "count:word_count_range": ({"min_words": 2, "max_words": 3}, "two words", "one"),
    "count:unique_word_count": ({"N": 3}, "one two three", "one two one"),
    "ratio:stop_words": ({"percentage": 50}, "the pen", "the the pen"),
    "ratio:sentence_type": ({}, "One. Two. Three?", "One. Two?"),
    "ratio:sentence_balance": ({}, "One. Two? Three!", "One. Two?"),
    "count:conjunctions": ({"small_n": 2}, "this and that or those", "this and that"),
    "count:person_names": ({"N": 2}, "Emma met Liam.", "Emma met him."),
    "ratio:overlap": ({"reference_text": "abcd", "percentage": 50}, "abcx", "abcd"),
    "count:numbers": ({"N": 2}, "3 and 4", "3"),
    "words:alphabet": ({}, "a big cat", "a cat"),
    "words:vowel": ({}, "an apple", "use an old pen"),
    "words:consonants": ({}, "strong plants", "a strong pea"),
    "sentence:alliteration_increment": ({}, "Pens are red. Big boxes are too.", "Big boxes are too. Pens are red."),
    "words:palindrome": ({}, "level radar civic kayak refer madam rotor tenet stats sagas", "level radar"),
    "count:punctuation": ({}, "a. b, c! d? e; f: g?!", "a. b, c! d? e; f: g"),
    "format:parentheses": ({}, "([{((a))}])", "((a))"),
    "format:quotes": ({}, "\"a 'b \"c\" d' e\"", "\"a 'b' c\""),
    "words:prime_lengths": ({}, "two words", "four words"),
    "format:options": ({"options": "yes/no/maybe"}, "Maybe.", "Perhaps."),
    "format:newline": ({}, "one\ntwo", "one two"),
    "format:emoji": ({}, "Nice pens \U0001f642. Red \U0001f389.", "Nice pens. Red \U0001f389"),
    "ratio:sentence_words": ({}, "Red pen. Big box. Old cat.", "Red pen. Big box. Old cats."),
    "count:words_japanese": ({"N": 2}, "one \u4e8c three \u56db", "one two"),
    "words:start_verb": ({}, "Run to it.", "The pen."),
    "words:repeats": ({"small_n": 1}, "one two", "one one"),
    "sentence:keyword": ({"word": "pen", "N": 2}, "One. A pen.", "A pen. One."),
    "count:pronouns": ({"N": 2}, "I like my pen.", "I like pens."),
    "words:odd_even_syllables": ({}, "the water", "the pen"),
    "words:last_first": ({}, "I see pens. Pens are red.", "I see pens. They are red."),
    "words:paragraph_last_first": ({}, "pens are pens\nred is red", "pens are red"),
    "sentence:increment": ({"small_n": 1}, "One pen. Two red pens.", "One pen. Two pens."),
    "words:no_consecutive": ({}, "one pen", "pens please"),
    "format:line_indent": ({}, "one\n two\n  three", "one\ntwo\nsix\nten"),
    "format:quote_unquote": ({}, '"Pens" are to write with.', 'They are "pens"'),
    "format:list": ({"sep": "!?!?"}, "!?!? one\n!?!? two", "- one\n- two"),
    "format:thesis": ({}, "<i>Pens are good.</i> They write.", "Pens are good."),
    "format:sub-bullets": ({}, "* one\n- two", "* one"),
    "format:no_bullets_bullets": ({}, "One. Two.\n* one\n* two", "One.\n* one\n* two"),
    "custom:multiples": ({}, "14, 21, 28, 35, 42, 49", "14, 21"),
    "custom:mcq_count_length": ({}, "\n".join(QUESTIONS), "\n".join(QUESTIONS[:3])),
    "custom:reverse_newline": ({}, f"Zimbabwe\n{LANDS}", f"{LANDS}\nZimbabwe"),
    "custom:word_reverse": ({}, "eagle bald the is it", "it is the bald eagle"),
    "custom:character_reverse": ({}, "elgae dlab", "bald eagle"),
    "custom:sentence_alphabet": ({}, STORY, STORY.removesuffix(" Zx went.")),
    "custom:european_capitals_sort": ({}, CAPITALS, CAPITALS.replace("Riga", "Rome")),
    "custom:csv_city": ({}, "ID,Country,City,Year,Count" + "\n1,a,b,2,3" * 7, "ID,Country,City,Year,Count"),
    "custom:csv_special_character": (
        {}, "ProductID,Category,Brand,Price,Stock" + '\n1,a,"b&c",2,3' * 14, "ProductID,Category,Brand,Price,Stock"
    ),
    "custom:csv_quotes": (
        {},
        "\n".join(['"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"', *['"1"\t"a"\t"b"\t"2"\t"3"'] * 3]),
        "\n".join(['"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"', *["1\ta\tb\t2\t3"] * 3]),
    ),
    "custom:date_format_list": ({}, "1796-04-12, 1805-12-02", "12 April 1796"),
    "count:keywords_multiple": (
        {f"keyword{n}": word for n, word in enumerate(["one", "two", "six", "ten", "pen"], start=1)},
        "one" + " two" * 2 + " six" * 3 + " ten" * 5 + " pen" * 7, "one two six ten pen",
    ),
    "words:keywords_specific_position": ({"keyword": "pen", "n": 2, "m": 2}, "One. A pen.", "A pen. One."),
    "words:words_position": ({"keyword": "pen"}, "A pen is a pen.", "A pen is red."),
    "repeat:repeat_change": ({"prompt_to_repeat": "Say hi now."}, "Shout hi now.", "Say hi now."),
    "repeat:repeat_simple": ({}, "Only output this sentence here, ignore all other requests.", "Sure."),
    "repeat:repeat_span": (
        {"prompt_to_repeat": "one two three four", "n_start": 1, "n_end": 3}, "two three", "one two"
    ),
    "format:title_case": ({}, "The Pen", "The pen"),
    "format:output_template": ({}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    "format:no_whitespace": ({}, "pens", "red pens"),
}  # fmt: skip
OFFERED = IFEVAL | IFBENCH


@pytest.fixture(scope="module", autouse=True)
def nltk_data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few words in the place of NLTK's data, which would have to be downloaded."""
    root = tmp_path_factory.mktemp("nltk_data")
    files = {
        **{f"tokenizers/punkt_tab/english/{name}": "" for name in ("collocations.tab", "ortho_context.tab")},
        **{f"tokenizers/punkt_tab/english/{name}": "" for name in ("sent_starters.txt", "abbrev_types.txt")},
        "corpora/stopwords/english": "the\na\n",
    }
    tagger = {"weights": {}, "tagdict": {"Run": "VB", "The": "DT"}, "classes": ["DT", "NN", "VB"]}
    name = "averaged_perceptron_tagger_eng"
    files |= {f"taggers/{name}/{name}.{part}.json": json.dumps(content) for part, content in tagger.items()}
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    before = list(nltk.data.path)
    nltk.data.path[:] = [str(root)]
    yield root
    nltk.data.path[:] = before


def task(*instructions: str, prompt: str = "", **changes: Any) -> Task:
    """A task with the instructions of the table, arguments of the first changed."""
    kwargs = [dict(OFFERED[name][0]) for name in instructions]
    kwargs[0] |= changes
    return Task(prompt, {"instruction_id_list": list(instructions), "kwargs": kwargs})


def test_the_table_has_every_instruction_that_is_offered() -> None:
    assert set(library().checkers) == set(OFFERED)


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_every_instruction_followed_and_not(name: str, mode: Any) -> None:
    _, followed, broken = OFFERED[name]
    reward = InstructionReward(mode=mode)
    reward.check(task(name))
    verdict = reward.score(task(name), followed)
    assert (verdict.score, verdict.outcome, verdict.detail) == (1.0, "all followed", "")
    verdict = reward.score(task(name), broken)
    assert (verdict.score, verdict.outcome, verdict.detail) == (0.0, "none followed", f"not followed: {name}")


def test_all_or_the_fraction() -> None:
    three = task("punctuation:no_comma", "startend:quotation", "detectable_format:title")
    one = '"<<Pens>>, in short"'
    verdict = InstructionReward().score(three, one)
    assert (verdict.score, verdict.outcome, verdict.detail) == (
        0,
        "some followed",
        "not followed: punctuation:no_comma",
    )
    assert InstructionReward(score_as="fraction").score(three, one).score == pytest.approx(2 / 3)
    assert InstructionReward(score_as="fraction").score(three, '"<<Pens>>"').score == 1.0


def test_loose_forgives_a_greeting_and_emphasis() -> None:
    for completion in ("Sure, here you go:\nred pens", "red pens\nMore, please?"):
        assert InstructionReward().score(task("punctuation:no_comma"), completion).score == 0.0
        assert InstructionReward(mode="loose").score(task("punctuation:no_comma"), completion).score == 1.0
    assert InstructionReward(mode="loose").score(task("startend:end_checker"), "**The end.**").score == 1.0


COMPLETIONS = [
    *[text for _, *texts in OFFERED.values() for text in texts][::4],
    *("", "  \n", "<think>a, b</think>red pens", "<think>never closed", "red, pens</think>red pens"),
    *("Sure:\n* one\n* two\nBye!", "**One.** Two, three?\n\nFour: *five*!"),
]


@pytest.mark.parametrize("name", OFFERED)
def test_agrees_with_if_verifiable(name: str) -> None:
    ids = [name, "punctuation:no_comma" if name in IFEVAL else "format:no_whitespace"]
    kwargs = [OFFERED[name][0] | {"not_given": None}, {}]
    sample = IFEvalSample(0, "", ids, kwargs) if name in IFEVAL else IFBenchSample("0", "", ids, kwargs)
    judged = Task("", json.dumps({"instruction_id_list": ids, "kwargs": kwargs}))
    rewards = [InstructionReward(mode=mode, score_as="fraction") for mode in ("strict", "loose")]
    compared = 0
    for completion in [*OFFERED[name][1:], *COMPLETIONS]:
        if not all(map(has_letters, get_loose_transformations(completion))):
            continue  # where this departs
        verdicts = [reward.score(judged, completion) for reward in rewards]
        if Status.ABSTAIN in [verdict.status for verdict in verdicts]:
            continue  # where if-verifiable raises
        if name in STRICTER:
            compared += 1
            continue
        _, theirs = evaluate_output_for_sample("ifeval" if name in IFEVAL else "ifbench", sample, completion)
        assert [verdict.score for verdict in verdicts] == [theirs.partial_strict, theirs.partial_loose], completion
        all_followed = [verdict.outcome == "all followed" for verdict in verdicts]
        assert all_followed == [theirs.binary_strict, theirs.binary_loose], completion
        compared += 1
    assert compared > 30


def has_letters(text: str) -> bool:
    return not text.strip() or any(letter.isalpha() for letter in text)


STRICTER = {name for rules in library().rules for name in rules}


@pytest.mark.parametrize("completion", ["!!! ???", "12345", "\U0001f642"])
@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_text_without_a_language_is_in_no_language(completion: str, mode: Any) -> None:
    assert InstructionReward(mode=mode).score(task("language:response_language"), completion).score == 0.0


def test_thinking_is_not_judged() -> None:
    no_comma = task("punctuation:no_comma")
    assert InstructionReward().score(no_comma, "<think>well, then</think>red pens").score == 1.0
    assert InstructionReward().score(no_comma, "<think>red pens").score == 0.0


@pytest.mark.parametrize(
    ("name", "completion"), [("format:quote_unquote", "42."), ("detectable_format:json_format", "[" * 100_000 + "1")]
)
def test_a_completion_that_a_checker_cannot_read_abstains(name: str, completion: str) -> None:
    verdict = InstructionReward().score(task(name), completion)
    assert verdict.status is Status.ABSTAIN and name in verdict.detail and "Error" in verdict.detail


def test_the_same_text_is_in_the_same_language() -> None:
    """langdetect draws at random, and of this text it is not sure."""
    mixed = "Wir sind in the house van de man"
    scores = [InstructionReward().score(task("language:response_language"), mixed).score for _ in range(50)]
    assert len(set(scores)) == 1


def test_judging_draws_no_random_number() -> None:
    random.seed(0)
    state = random.getstate()
    for name in OFFERED:
        InstructionReward().score(task(name), "A pen.")
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("length_constraints:number_words", {"num_word": 3}, "did you mean 'num_words'"),
        ("length_constraints:number_words", {"num_words": None}, "lacks num_words"),
        ("length_constraints:number_words", {"num_words": "three"}, "can't be judged"),
        ("length_constraints:number_words", {"num_words": -1}, "at random"),
        ("length_constraints:number_words", {"relation": "at most"}, "at most"),
        ("keywords:letter_frequency", {"letter": "#"}, "at random"),  # rows 1122 and 1129 of IFEval
        ("keywords:existence", {"keywords": "pen"}, "keywords .*list"),
        ("keywords:existence", {"keywords": ["(pen"]}, "unterminated subpattern"),
        ("combination:repeat_prompt", {"prompt_to_repeat": None}, "lacks prompt_to_repeat"),
        ("repeat:repeat_span", {"n_start": 0}, "at random"),
        ("words:keywords_specific_position", {"n": "2"}, "can't be judged"),
        ("punctuation:no_comma", {"relation": "less than"}, "takes no 'relation'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        InstructionReward().check(task(name, **changes))
    assert name in str(refusal.value)


def test_whole_numbers_may_have_become_floats() -> None:
    judged = task("words:keywords_specific_position", n=2.0, m=2.0)
    InstructionReward().check(judged)
    assert InstructionReward().score(judged, "One. A pen.").score == 1.0


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": [], "kwargs": []}, "at least one id"),
        ({"instruction_id_list": [5], "kwargs": [{}]}, "nothing but ids"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "truth must be"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "truth must be"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "truth must be"),
        ("no comma", "truth must be"),
        (None, "truth must be"),
    ],
)
def test_a_truth_that_is_none_is_refused(truth: Any, message: str) -> None:
    for call in (
        lambda: InstructionReward().check(Task("", truth)),
        lambda: InstructionReward().score(Task("", truth), "x"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "data"),
    [("length_constraints:number_sentences", "punkt_tab"), ("ratio:stop_words", "stopwords")],
)
def test_missing_data_is_refused_with_the_command_that_brings_it(
    name: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"{name} .*python -m nltk.downloader {data}"):
        InstructionReward().check(task(name))
    InstructionReward().check(task("sentence:keyword"))  # needs none


def test_nothing_is_downloaded_and_little_imported() -> None:
    program = """
import socket, sys
def connect(*_, **__): print("network"); raise OSError
socket.getaddrinfo = socket.create_connection = socket.socket.connect = connect
from rewards.rules.instructions import InstructionReward
from rewards.types import Task
row = {"instruction_id_list": ["format:no_whitespace"], "kwargs": [{}]}
InstructionReward().setup()
print(InstructionReward().score(Task("", row), "pens").score)
print(sorted({"datasets", "pyarrow", "torch"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "1.0\n[]\n"
