"""A reward for following verifiable instructions about the form of a completion.

The checkers are if-verifiable's: those of IFEval (Zhou et al., arXiv:2311.07911) and IFBench (Pyatkin et al.,
arXiv:2507.02833), under the ids of these data sets.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import langdetect
import nltk

from configs.base import Settings, neighbour
from rewards.rules.stricter import Condition, rules
from rewards.thinking import after_thinking
from rewards.types import Status, Task, Verdict

langdetect.DetectorFactory.seed = 0  # without a seed, the language of a text may change between runs

_NEEDS_NLTK_DATA = {
    "length_constraints:number_sentences": ["tokenizers/punkt_tab"],
    "change_case:capital_word_frequency": ["tokenizers/punkt_tab"],
    "words:keywords_specific_position": ["tokenizers/punkt_tab"],
    "words:words_position": ["tokenizers/punkt_tab"],
    "format:title_case": ["tokenizers/punkt_tab"],
    "words:start_verb": ["tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng"],
    "ratio:stop_words": ["corpora/stopwords"],
}
_DETECTS_LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
_HAS_TEXT = re.compile(r"[^\W_]|[\U0001f000-\U0001faff\u2600-\u27bf]")
_PROBE = 'A "probe" of one sentence, with 2 numbers.\n\n* 3 items (no more)!'


class InstructionReward(Settings):
    """The instructions of a prompt that a completion follows: all of them, or their share.

    `task.truth` is a row's `{"instruction_id_list": [...], "kwargs": [{...}, ...]}`, or its JSON; null arguments are
    ignored. Text before `</think>` is not judged. The verdict's detail names the instructions that are not followed.

    Departs from if-verifiable where its checkers accept an empty effort or reject a right one
    (`rewards.rules.stricter`; listed in docs/rewards.md): text without a letter, digit or emoji follows no instruction,
    and text of undetectable language follows none about language. A completion that makes a checker raise is `abstain`.
    """

    mode: Literal["strict", "loose"] = "strict"
    """`strict` judges the completion as it is. `loose` also judges it without asterisks, without its first line and
    without its last line, which may be a greeting, and takes the best."""
    score_as: Literal["all", "fraction"] = "all"
    """`all`: 1.0 if every instruction is followed, else 0.0. `fraction`: the share of followed ones."""

    def setup(self) -> None:
        """Load the checkers and langdetect's language profiles, which takes half a second."""
        _library()
        _has_language("any text")

    def check(self, task: Task) -> None:
        """Raises ValueError for an unknown instruction, unfit arguments, and missing NLTK data."""
        for instruction, arguments in _read(task.truth):
            checker = _checker(instruction, arguments)
            try:
                checker.check_following(_PROBE)
            except Exception as error:
                raise ValueError(f"{instruction} can't be judged with {arguments}: {error}") from error

    def score(self, task: Task, completion: str) -> Verdict:
        """The verdict; see the class. Raises ValueError where `check` does."""
        checkers = [_checker(instruction, arguments) for instruction, arguments in _read(task.truth)]
        text = after_thinking(completion).strip()
        texts = [text] if self.mode == "strict" else _library().loose_variants(text)
        unfollowed: list[str] = []
        for checker in checkers:
            try:
                if not any(_follows(checker, text) for text in texts):
                    unfollowed.append(checker.id)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  eighty checkers may raise anything
                detail = f"{checker.id} can't read the completion: {type(error).__name__}: {error}"
                return Verdict(None, Status.ABSTAIN, detail[:500])
        followed = 1 - len(unfollowed) / len(checkers)
        return Verdict(
            followed if self.score_as == "fraction" else float(not unfollowed),
            detail=f"not followed: {', '.join(unfollowed)}" if unfollowed else "",
            outcome="all followed" if not unfollowed else "none followed" if followed == 0 else "some followed",
        )


def _follows(checker: Any, text: str) -> bool:
    if not _HAS_TEXT.search(text) or (checker.id in _DETECTS_LANGUAGE and not _has_language(text)):
        return False
    guards, replaced = _library().rules
    if checker.id in replaced:
        return replaced[checker.id](checker, text)
    return bool(checker.check_following(text)) and (checker.id not in guards or guards[checker.id](checker, text))


def _has_language(text: str) -> bool:
    try:
        langdetect.detect(text)
    except langdetect.LangDetectException:
        return False
    return True


def _read(truth: Any) -> list[tuple[str, dict[str, Any]]]:
    """The id and the arguments of each instruction, without null arguments."""
    try:
        row = json.loads(truth) if isinstance(truth, str) else truth
        instructions, kwargs = row["instruction_id_list"], row["kwargs"]
        pairs = list(zip(instructions, kwargs, strict=True))
        if not pairs or not all(isinstance(name, str) for name, _ in pairs):
            raise ValueError("instruction_id_list must hold at least one id, and nothing but ids")
        return [(name, {key: _whole(v) for key, v in args.items() if v is not None}) for name, args in pairs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            'truth must be {"instruction_id_list": [ids], "kwargs": [one {argument: value} an id]}, '
            f"got {str(truth)[:200]!r}: {error!r}"
        ) from error


def _whole(value: Any) -> Any:
    """3 for 3.0, since tables with empty cells turn integers into floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _checker(instruction: str, arguments: dict[str, Any]) -> Any:
    """if-verifiable's checker with its arguments set. Raises ValueError where `InstructionReward.check` does."""
    checkers = _library().checkers
    if instruction not in checkers:
        raise ValueError(f"unknown instruction '{instruction}': {neighbour(instruction, list(checkers))}")
    _find_data(instruction)
    checker = checkers[instruction](instruction)
    keys = checker.get_instruction_args_keys()
    for key in arguments:
        if key not in keys:
            raise ValueError(f"{instruction} takes no '{key}': {neighbour(key, keys)}")
    if missing := [key for key in keys if key not in arguments]:
        raise ValueError(f"{instruction} lacks {', '.join(missing)}")
    state = random.getstate()
    try:
        checker.build_description(**arguments)
        # A checker draws a random value in the place of one that it can't use, and would judge by it.
        if random.getstate() != state:
            raise ValueError("it would choose another value at random")
        for key, value in (checker.get_instruction_args() or {}).items():
            if type(value) is not type(arguments[key]):
                raise ValueError(f"{key} must be a {type(value).__name__}")
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        reason = f"unknown value {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"{instruction} can't be judged with {arguments}: {reason}") from error
    finally:
        random.setstate(state)
    return checker


def _find_data(instruction: str) -> None:
    for path in _NEEDS_NLTK_DATA.get(instruction, []):
        try:
            nltk.data.find(path)
        except LookupError:
            name = path.rpartition("/")[2]
            raise ValueError(
                f"{instruction} needs NLTK's data '{name}': python -m nltk.downloader {name} (NLTK_DATA says where to)"
            ) from None


class _Library(NamedTuple):
    """The parts of if-verifiable in use; `checkers` are classes by instruction id."""

    checkers: dict[str, Any]
    loose_variants: Callable[[str], list[str]]
    rules: tuple[dict[str, Condition], dict[str, Condition]]


@cache
def _library() -> _Library:
    # The package's __init__ would import `datasets`, whose pyarrow reserves more than 1 of the 2 GiB that a judging
    # process may address, so an empty module takes its place. IFBench's module would download NLTK's data.
    name = "if_verifiable"
    spec = find_spec(name)
    assert spec is not None
    with patch.object(nltk, "download"):
        sys.modules[name] = module_from_spec(spec)
        try:
            from if_verifiable.common import get_loose_transformations
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
            from if_verifiable.ifbench.instructions_util import split_into_sentences
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL
        finally:
            del sys.modules[name]
    return _Library(IFEVAL | IFBENCH, get_loose_transformations, rules(split_into_sentences))
