"""Needle in a haystack: find a number in a long text, by the text's length and the number's depth in it.

The test is Kamradt's (2023), with a key for the number as in RULER (Hsieh et al., arXiv:2404.06654, section 3).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerFast

from configs.evaluation import NeedleSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.rows import BadRowError
from pipeline.evaluation.generation import completion_record, rates
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, suite_result, with_progress
from pipeline.evaluation.texts import read_utf8
from rewards.types import Task, Verdict
from rollout.types import StoredGroup

SUITE = "needles"
_COLOURS = (
    "amber", "azure", "black", "bronze", "crimson", "golden", "green", "grey", "ivory", "purple", "silver", "white",
)  # fmt: skip
_ANIMALS = ("badger", "camel", "crane", "falcon", "heron", "lynx", "marten", "otter", "raven", "seal", "tiger", "wolf")
_QUALITIES = ("broad", "calm", "clear", "cold", "dry", "fine", "late", "low", "old", "plain", "quiet", "slow", "small")
_THINGS = (
    "bench", "bridge", "field", "garden", "gate", "hill", "lane", "mill", "path", "pond", "road", "shore", "wall",
)  # fmt: skip
_RELATIONS = ("ends at", "faces", "follows", "leads to", "lies behind", "meets", "runs past", "stands by")
"""The words of keys and of generated filler."""

END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
SEPARATOR_OF_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
SENTENCES_PER_DRAW = 256


@dataclass(frozen=True, slots=True)
class Needle:
    """One sentence to find, and the prompt that contains it."""

    length: int
    depth: float
    index: int
    sentence: str
    question: str
    number: str
    token_ids: list[int]

    @property
    def row(self) -> str:
        """The needle's id, the same for every checkpoint."""
        return f"{self.length}:{self.depth:g}:{self.index}"


def load_needles(suite: NeedleSuite, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Needle]:
    """Build the prompts by length, depth and index: as many whole sentences as fit, with the needle at `depth`.

    Key, number and part of the text are drawn from `seed` and the needle's own name. Raises ValueError for a length
    without room for the question, and for a text that isn't UTF-8, is too short or spells a special token.
    """
    chat, sentences = ChatFormat(tokenizer), _sentences(suite.path) if suite.path else None
    needles: list[Needle] = []
    for length, depth, index in product(suite.lengths, suite.depths, range(suite.samples)):
        rng = Random(f"{seed}:{length}:{depth:g}:{index}")
        key = f"{rng.choice(_COLOURS)} {rng.choice(_ANIMALS)}"
        number = str(rng.randrange(100_000, 1_000_000))
        sentence, question = f"The number of the {key} is {number}.", f"What is the number of the {key}?"

        def prompt_ids(
            filler: Sequence[str], sentence: str = sentence, question: str = question, depth: float = depth
        ) -> list[int]:
            before = round(depth * len(filler))
            text = " ".join([*filler[:before], sentence, *filler[before:]])
            content = f"{text}\n\n{question} Answer with the number alone."
            return chat.prompt_ids(chat.check([{"role": "user", "content": content}], last_role="user"))

        filler = _rotated(sentences, rng) if sentences else _generated(tokenizer, length, rng)
        try:
            token_ids = _longest(prompt_ids, filler, tokenizer, length)
        except BadRowError as error:
            raise ValueError(f"path='{suite.path}': {error}; take another text") from error
        needles.append(Needle(length, depth, index, sentence, question, number, token_ids))
    return needles


def run_needles(needles: Sequence[Needle], session: Session) -> SuiteResult:
    """Generate one greedy completion of every prompt. See `needles_result` for the figures."""
    prompts = [needle.token_ids for needle in needles]
    stream = session.rollout.generate(prompts, session.greedy, 1, session.seed)
    groups = {group.index: group for group in with_progress(stream, SUITE, len(prompts))}
    return needles_result(needles, [_record(index, needle, groups[index]) for index, needle in enumerate(needles)])


def needles_result(needles: Sequence[Needle], records: Sequence[CompletionRecord]) -> SuiteResult:
    """Return `accuracy`, the share of needles found, overall and by length and depth, with intervals.

    The names are `accuracy_<length>`, `accuracy_depth_<depth>` and `accuracy_<length>_depth_<depth>`.
    """
    items: dict[str, Items] = {}
    for needle, record in zip(needles, records, strict=True):
        length, depth = f"_{needle.length}", f"_depth_{needle.depth:g}"
        for part in ("", length, depth, length + depth):
            items.setdefault(f"accuracy{part}", {})[needle.row] = float(record.score or 0.0)
    order = sorted(items, key=lambda name: (name.count("_"), "depth" in name))  # the overall figure first
    return suite_result({name: items[name] for name in order}, items, rates(records), records)


def _record(index: int, needle: Needle, group: StoredGroup) -> CompletionRecord:
    """Record a completion without its haystack, which the seed reproduces."""
    numbers = set(re.findall(r"\d+", SEPARATOR_OF_THOUSANDS.sub("", group.completions[0].text)))
    right = numbers == {needle.number}
    outcome = "found" if right else "another number" if numbers else "no number"
    task = Task(needle.question, needle.number, SUITE, needle.row)
    verdict = Verdict(float(right), outcome=outcome, detail=needle.sentence)
    return completion_record(index, task, group, 0, "greedy", {SUITE: verdict})


def _longest(
    prompt_ids: Callable[[Sequence[str]], list[int]],
    filler: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
) -> list[int]:
    """Return the prompt with the most of `filler`, from its start, within `length` tokens."""
    empty = len(prompt_ids([]))
    if empty > length:
        raise ValueError(f"lengths: {length} tokens have no room for needle and question, which take {empty}; raise it")
    sizes = [len(ids) for ids in tokenizer([f" {text}" for text in filler], add_special_tokens=False)["input_ids"]]
    count = bisect_right(list(accumulate(sizes)), length - empty)  # an estimate: tokens may span two sentences
    token_ids = prompt_ids(filler[:count])
    while len(token_ids) > length:
        count -= 1
        token_ids = prompt_ids(filler[:count])
    while count < len(filler) and len(longer := prompt_ids(filler[: count + 1])) <= length:
        token_ids, count = longer, count + 1
    if count == len(filler) and len(token_ids) < length:
        raise ValueError(
            f"path: the whole text makes a prompt of {len(token_ids)} tokens, and lengths asks for {length}; give a "
            "longer text, or leave path out"
        )
    return token_ids


def _sentences(path: str) -> list[str]:
    text = read_utf8(Path(path)).strip()
    return [" ".join(sentence.split()) for sentence in END_OF_SENTENCE.split(text)]


def _rotated(sentences: Sequence[str], rng: Random) -> list[str]:
    """Start the text at a random sentence, and continue at its beginning after its end."""
    start = rng.randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def _generated(tokenizer: PreTrainedTokenizerFast, length: int, rng: Random) -> list[str]:
    """Generate sentences without a number, with more than `length` tokens."""
    sentences: list[str] = []
    tokens = 0
    while tokens <= length:
        draw: list[str] = []
        for _ in range(SENTENCES_PER_DRAW):
            qualities, things = rng.sample(_QUALITIES, 2), rng.sample(_THINGS, 2)
            draw.append(f"The {qualities[0]} {things[0]} {rng.choice(_RELATIONS)} the {qualities[1]} {things[1]}.")
        tokens += len(tokenizer(" ".join(draw), add_special_tokens=False)["input_ids"])
        sentences += draw
    return sentences
