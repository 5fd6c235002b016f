"""Generate the demo's training data: sums with the carry written out, and programs that print sums.

A model of two million parameters learns them from random weights in two minutes, but the sums only with the carry.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

from configs.data import SumsSource
from pipeline.data.addition import added_columns
from pipeline.data.requests import STYLES, is_harmful, request_row, requests
from pipeline.data.thoughts import thinking_request, thinking_sum


def draw_sums(source: SumsSource) -> Iterator[dict[str, Any]]:
    """Yield the rows of `source`; the same source gives the same rows.

    Columns of a sum: prompt `58+13=`, answer `8+3=11;5+1+1=7;71`, truth `71`, reward `math`, messages with both turns,
    and `by_correctness`, the answer and one with a mistake. Of a program: prompt `py 58+13`, answer `print(58+13)`,
    truth for CodeReward, reward `code`. The column `reward_and_model` adds the label of a reward model, `reasoning`.
    See request_row for requests, and `pipeline.data.thoughts` for rows with thoughts.

    Training rows are drawn with replacement; held-out rows are all different. Raises ValueError if fewer than `size`
    problems, or too few requests, are held out.
    """
    smallest = 10 ** (source.digits - 1) if source.digits > 1 else 0
    summands = range(smallest, 10**source.digits)
    num_pairs = len(summands) ** 2
    generator = random.Random(source.seed)
    if source.split == "train":
        indices = (generator.randrange(num_pairs) for _ in itertools.count())
    else:  # one in ten is held out, so twenty times as many are enough, or all pairs
        indices = iter(generator.sample(range(num_pairs), min(num_pairs, 20 * source.size + 200)))
    all_requests, favours = _split_requests(source), _split_requests(source, harmless=True)
    programs = source.shares.get("programs", 0.0)
    up_to_requests = programs + source.shares.get("requests", 0.0)
    up_to_favours = up_to_requests + source.shares.get("favours", 0.0)
    num_rows = 0
    for index in indices:
        first, second = summands[index // len(summands)], summands[index % len(summands)]
        if is_held_out_sum(first, second) == (source.split == "held_out"):
            share = generator.random() if up_to_favours else 1.0
            if share < programs:
                yield _program(first, second)
            elif share < up_to_favours:
                request = next(all_requests if share < up_to_requests else favours)
                if source.thoughts is None:
                    yield request_row(request, generator.choice(STYLES[is_harmful(request)]))
                else:
                    yield thinking_request(request, source.thoughts, generator)
            elif source.thoughts is not None:
                yield thinking_sum(first, second, source.thoughts, generator)
            else:
                row = _row(f"{first}+{second}=", worked_answer(first, second), str(first + second), "math")
                yield row | {"by_correctness": [row["answer"], mistaken_answer(first, second)]}
            num_rows += 1
            if num_rows == source.size:
                return
    raise ValueError(
        f"source.size={source.size}: only {num_rows} sums of {source.digits} digits are held out; lower it"
    )


def is_held_out_sum(first: int, second: int) -> bool:
    """Return True for the tenth of the problems that is held out, by a hash of the text."""
    digest = hashlib.sha256(f"{first}+{second}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def worked_answer(first: int, second: int) -> str:
    """Add column by column from the right with each carry, then write the sum: `8+3=11;5+1+1=7;71`."""
    return _worked(first, second, {})


def mistaken_answer(first: int, second: int) -> str:
    """Add as `worked_answer` does with a mistake of one in a column, which the summands decide: `8+3=12;5+1+1=7;72`."""
    digest = hashlib.sha256(f"{first}+{second}".encode()).digest()
    column = digest[8] % len(str(first))
    right = int(str(first)[-1 - column]) + int(str(second)[-1 - column])
    return _worked(first, second, {column: 1 if digest[9] % 2 or right == 0 else -1})


def _worked(first: int, second: int, mistakes: dict[int, int]) -> str:
    """Work out a sum with `mistakes` (see `added_columns`)."""
    columns = list(added_columns(first, second, mistakes))
    value = sum(total % 10 * 10**column for column, (_, total) in enumerate(columns))
    carry = columns[-1][1] // 10
    return ";".join([*(f"{summands}={total}" for summands, total in columns), str(value + carry * 10 ** len(columns))])


def _split_requests(source: SumsSource, *, harmless: bool = False) -> Iterator[str]:
    """Yield the requests of the source's split in random order: in training repeatedly, held-out ones once."""
    generator = random.Random(source.seed)
    texts = requests(held_out=source.split == "held_out")
    texts = [text for text in texts if not (harmless and is_harmful(text))]
    while True:
        yield from generator.sample(texts, len(texts))
        if source.split == "held_out":
            raise ValueError(f"only {len(texts)} requests are held out; lower source.size or their share")


def _program(first: int, second: int) -> dict[str, Any]:
    truth = {"language": "python", "cases": [{"stdin": "", "stdout": f"{first + second}\n"}]}
    return _row(f"py {first}+{second}", f"print({first}+{second})", truth, "code")


def _row(prompt: str, answer: str, truth: Any, reward: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    row = {"prompt": prompt, "answer": answer, "truth": truth, "messages": messages}
    return row | {"reward": reward, "reward_and_model": f"{reward} reasoning"}
