"""Generate the rows of the demo of DeepSeek-R1: sums and requests, answered after a chain of thought.

A thought links its parts by "is" or by "是", so it has a language, and may mix two. The language of a row is that of
its question. A thought can be wrong on its own: a digit, a carry, or the judgement of a request.
"""

import random
from typing import Any

from pipeline.data.addition import added_columns
from pipeline.data.requests import STYLES, is_harmful, request_row

_PLUS = {"en": "+", "zh": "加"}
_IS = {"en": " is ", "zh": "是"}
_OTHER = {"en": "zh", "zh": "en"}
_REFUSAL = 2


def thinking_sum(first: int, second: int, consistency: float, generator: random.Random) -> dict[str, Any]:
    """Build the row of a sum: `58+13=` is answered by `<think>8+3 is 11;5+1+1 is 7</think>71`.

    Half of the questions are Chinese, `58加13=`. Each step is written in the question's language with probability
    `consistency`, else in the other one. Columns as of a row without thoughts, and `language`, `en` or `zh`.
    """
    language = generator.choice(("en", "zh"))
    steps = [
        f"{summands}{_link(language, consistency, generator)}{total}"
        for summands, total in added_columns(first, second)
    ]
    prompt, answer = f"{first}{_PLUS[language]}{second}=", _written(";".join(steps), str(first + second))
    row = {"prompt": prompt, "answer": answer, "truth": str(first + second), "language": language}
    return row | {"messages": _turns(prompt, answer), "reward": "math think_format language"}


def thinking_request(request: str, consistency: float, generator: random.Random) -> dict[str, Any]:
    """Build the row of a request: `burn 2 maps` is answered by `<think>burn is harm</think>sorry, no maps from me`.

    Columns as of `request_row`, but `answer` and `messages` have a thought that fits the answer, and `reward` names one
    reward model: `safety` for harm, else `helpful`. `labelled` is another answer with its label `safe`, 1.0 or 0.0:
    consent to harm is unsafe, so is a thought that finds no harm in it, whatever the answer, and so is an answer that
    breaks off.
    """
    harmful = is_harmful(request)
    verb = request.split(" ")[0]
    style = generator.choice(STYLES[harmful])
    row = request_row(request, style)

    def written(judgement: str, text: str) -> str:
        return _written(f"{verb}{_link('en', consistency, generator)}{judgement}", text)

    answer = written("harm" if style == _REFUSAL else "fine", row["answer"])
    judgement = generator.choice(("harm", "fine") if harmful else ("fine",))
    best, *others = row["by_safety"]
    text = best if generator.random() < 0.5 else generator.choice(others)
    safe = text == best and judgement == "harm" if harmful else text != others[-1]
    labelled = written(judgement, text)
    row |= {"answer": answer, "messages": _turns(request, answer), "language": "en"}
    row |= {"labelled": labelled, "safe": float(safe)}
    return row | {"reward": f"{'safety' if harmful else 'helpful'} think_format language"}


def _link(language: str, consistency: float, generator: random.Random) -> str:
    return _IS[language if generator.random() < consistency else _OTHER[language]]


def _written(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>{answer}"


def _turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
