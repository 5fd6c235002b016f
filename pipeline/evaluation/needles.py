"""A needle in a haystack: a number said once in a long text and then asked for, by the text's length and the number's
place in it (Kamradt, 2023; under a key, as in RULER, Hsieh et al., arXiv:2404.06654, section 3)."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerFast

from configs.evaluation import NeedleSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.rows import BadRowError
from pipeline.evaluation.speaking import rates, record
from pipeline.evaluation.suites import Items, Record, Session, SuiteResult, result, watched
from rewards.types import Task, Verdict
from rollout.types import Group

SUITE = "needles"
COLOURS = (
    "amber",
    "azure",
    "black",
    "bronze",
    "crimson",
    "golden",
    "green",
    "grey",
    "ivory",
    "purple",
    "silver",
    "white",
)
ANIMALS = ("badger", "camel", "crane", "falcon", "heron", "lynx", "marten", "otter", "raven", "seal", "tiger", "wolf")
QUALITIES = ("broad", "calm", "clear", "cold", "dry", "fine", "late", "low", "old", "plain", "quiet", "slow", "small")
THINGS = ("bench", "bridge", "field", "garden", "gate", "hill", "lane", "mill", "path", "pond", "road", "shore", "wall")
RELATIONS = ("ends at", "faces", "follows", "leads to", "lies behind", "meets", "runs past", "stands by")
"""What keys and filler are made of."""

END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
SEPARATOR_OF_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
DRAWN_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Needle:
    """One sentence to be found, and the prompt that hides it."""

    length: int
    depth: float
    place: int
    sentence: str
    question: str
    number: str
    token_ids: list[int]

    @property
    def row(self) -> str:
        """The same for every checkpoint."""
        return f"{self.length}:{self.depth:g}:{self.place}"


def load_needles(suite: NeedleSuite, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Needle]:
    """The prompts, by length, depth and place: each as many whole sentences as fit, in `depth` of which stands the
    needle. Key, number and stretch of text are drawn from `seed` and the needle's own name.

    Raises ValueError where a length has no room for the question, and for a text that isn't UTF-8, is too short or
    spells a special token.
    """
    chat, sentences = ChatFormat(tokenizer), _read(suite.path) if suite.path else None
    needles: list[Needle] = []
    for length, depth, place in product(suite.lengths, suite.depths, range(suite.samples)):
        rng = Random(f"{seed}:{length}:{depth:g}:{place}")
        key = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
        number = str(rng.randrange(100_000, 1_000_000))
        sentence, question = f"The number of the {key} is {number}.", f"What is the number of the {key}?"

        def prompt_ids(
            filler: Sequence[str], needle: str = sentence, asked: str = question, at: float = depth
        ) -> list[int]:
            before = round(at * len(filler))
            text = " ".join([*filler[:before], needle, *filler[before:]])
            content = f"{text}\n\n{asked} Answer with the number alone."
            return chat.prompt_ids(chat.check([{"role": "user", "content": content}], last_role="user"))

        filler = _turned(sentences, rng) if sentences else _drawn(tokenizer, length, rng)
        try:
            token_ids = _longest(prompt_ids, filler, tokenizer, length)
        except BadRowError as error:
            raise ValueError(f"path='{suite.path}': {error}; take another text") from error
        needles.append(Needle(length, depth, place, sentence, question, number, token_ids))
    return needles


def run_needles(needles: Sequence[Needle], session: Session) -> SuiteResult:
    """One greedy completion of every prompt. For the figures see `needles_result`."""
    asked = [needle.token_ids for needle in needles]
    stream = session.rollout.generate(asked, session.greedy, 1, session.seed)
    groups = {group.index: group for group in watched(stream, SUITE, len(asked))}
    return needles_result(needles, [_record(index, needle, groups[index]) for index, needle in enumerate(needles)])


def needles_result(needles: Sequence[Needle], records: Sequence[Record]) -> SuiteResult:
    """`accuracy`, the share of needles found; `accuracy_<length>`, of those in prompts of a length;
    `accuracy_depth_<depth>`, of those at a depth; `accuracy_<length>_depth_<depth>`; all with intervals."""
    items: dict[str, Items] = {}
    for needle, said in zip(needles, records, strict=True):
        length, depth = f"_{needle.length}", f"_depth_{needle.depth:g}"
        for part in ("", length, depth, length + depth):
            items.setdefault(f"accuracy{part}", {})[needle.row] = float(said.score or 0.0)
    order = sorted(items, key=lambda name: (name.count("_"), "depth" in name))  # the overall figure first
    return result({name: items[name] for name in order}, items, rates(records), records)


def _record(index: int, needle: Needle, group: Group) -> Record:
    """What was said; the haystack is left out, being made again from the seed."""
    completion = group.completions[0]
    said = set(re.findall(r"\d+", SEPARATOR_OF_THOUSANDS.sub("", completion.text)))
    right = said == {needle.number}
    outcome = "found" if right else "another number" if said else "no number"
    task = Task(needle.question, needle.number, SUITE, needle.row)
    verdict = Verdict(float(right), outcome=outcome, detail=needle.sentence)
    return record(index, task, group, 0, "greedy", {SUITE: verdict})


def _longest(
    prompt_ids: Callable[[Sequence[str]], list[int]],
    filler: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
) -> list[int]:
    """The prompt with the most of `filler`, from its start, that has at most `length` tokens."""
    bare = len(prompt_ids([]))
    if bare > length:
        raise ValueError(f"lengths: {length} tokens have no room for needle and question, which take {bare}; raise it")
    sizes = [len(ids) for ids in tokenizer([f" {text}" for text in filler], add_special_tokens=False)["input_ids"]]
    count = bisect_right(list(accumulate(sizes)), length - bare)  # nearly: tokens may join across sentences
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


def _read(path: str) -> list[str]:
    """The sentences of a text."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path='{path}' is not UTF-8: {error}; convert the file") from error
    return [" ".join(sentence.split()) for sentence in END_OF_SENTENCE.split(text.strip())]


def _turned(sentences: Sequence[str], rng: Random) -> list[str]:
    """The text from somewhere on; at its end it begins again."""
    start = rng.randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def _drawn(tokenizer: PreTrainedTokenizerFast, length: int, rng: Random) -> list[str]:
    """Sentences without a number, of more than `length` tokens."""

    def draw() -> Iterator[str]:
        for _ in range(DRAWN_AT_ONCE):
            qualities, things = rng.sample(QUALITIES, 2), rng.sample(THINGS, 2)
            yield f"The {qualities[0]} {things[0]} {rng.choice(RELATIONS)} the {qualities[1]} {things[1]}."

    sentences: list[str] = []
    tokens = 0
    while tokens <= length:
        more = list(draw())
        tokens += len(tokenizer(" ".join(more), add_special_tokens=False)["input_ids"])
        sentences += more
    return sentences
