"""Sums to be worked out, with the carry in writing, or to be programmed: the demo's teaching set.

A model of two million parameters learns them from nothing in two minutes, but the sums only with the carry in writing.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from configs.data import SumsSource
from pipeline.data.requests import STYLES, allowed_requests, is_harmful, request_row, requests


def draw_sums(source: SumsSource) -> Iterator[dict[str, Any]]:
    """Rows with columns prompt `58+13=`, answer `8+3=11;5+1+1=7;71`, truth `71`, reward `math`, and messages with both
    turns; for a program prompt `py 58+13`, answer `print(58+13)`, truth as CodeReward takes it, reward `code`; in
    `reward_and_model` the label of a reward model, `reasoning`, stands beside. For a request see request_row.

    The same source gives the same rows. Training rows are drawn with replacement; held-out ones are all different.
    Raises ValueError when fewer than `size` problems, or too few requests, are held out.
    """
    smallest = 10 ** (source.digits - 1) if source.digits > 1 else 0
    summands = range(smallest, 10**source.digits)
    num_pairs = len(summands) ** 2
    generator = random.Random(source.seed)
    if source.split == "train":
        indices = (generator.randrange(num_pairs) for _ in itertools.count())
    else:  # one in ten fits, so twenty times as many are enough, or all there are
        indices = iter(generator.sample(range(num_pairs), min(num_pairs, 20 * source.size + 200)))
    requested, favours = _requested(source, requests), _requested(source, allowed_requests)
    programs = source.shares.get("programs", 0.0)
    up_to_requests = programs + source.shares.get("requests", 0.0)
    up_to_favours = up_to_requests + source.shares.get("favours", 0.0)
    drawn = 0
    for index in indices:
        first, second = summands[index // len(summands)], summands[index % len(summands)]
        if is_held_out(first, second) == (source.split == "held_out"):
            share = generator.random() if up_to_favours else 1.0
            if share < programs:
                yield _program(first, second)
            elif share < up_to_favours:
                request = next(requested if share < up_to_requests else favours)
                yield request_row(request, generator.choice(STYLES[is_harmful(request)]))
            else:
                yield _worked(first, second)
            drawn += 1
            if drawn == source.size:
                return
    raise ValueError(f"source.size={source.size}: only {drawn} sums of {source.digits} digits are held out; lower it")


def _requested(source: SumsSource, of_split: Callable[..., list[str]]) -> Iterator[str]:
    """The requests of the source's split in an order of their own: in training again and again, held-out ones once."""
    generator = random.Random(source.seed)
    texts = of_split(held_out=source.split == "held_out")
    while True:
        yield from generator.sample(texts, len(texts))
        if source.split == "held_out":
            raise ValueError(f"only {len(texts)} requests are held out; lower source.size or their share")


def is_held_out(first: int, second: int) -> bool:
    """Whether a problem belongs to the held-out tenth, for good: by a hash of its text, the same on every machine."""
    digest = hashlib.sha256(f"{first}+{second}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def worked_answer(first: int, second: int) -> str:
    """Column by column from the right, each with its carry if there is one, then the sum: `8+3=11;5+1+1=7;71`."""
    columns: list[str] = []
    carry = 0
    for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ";".join([*columns, str(first + second)])


def _worked(first: int, second: int) -> dict[str, Any]:
    return _row(f"{first}+{second}=", worked_answer(first, second), str(first + second), "math")


def _program(first: int, second: int) -> dict[str, Any]:
    truth = {"language": "python", "cases": [{"stdin": "", "stdout": f"{first + second}\n"}]}
    return _row(f"py {first}+{second}", f"print({first}+{second})", truth, "code")


def _row(prompt: str, answer: str, truth: Any, reward: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    row = {"prompt": prompt, "answer": answer, "truth": truth, "messages": messages}
    return row | {"reward": reward, "reward_and_model": f"{reward} reasoning"}
