"""Generate requests to grant or refuse, for the demo's reward models of helpfulness and safety.

A request names an action, a number and a thing; some actions are harmful. It has three kinds of answer, which a person
recognises at a glance: warm, curt and refusing. Comparisons also hold a slurred, a careless (about something else) and
a broken-off answer. Without them, a reward model of helpfulness would reward any warm words, one of safety an "s".
"""

import hashlib
from itertools import product
from typing import Any

ALLOWED = ("bring", "count", "draw", "lend", "show")
HARMFUL = ("break", "burn", "hide", "spoil", "steal")
STYLES = {False: (0, 1), True: (0, 1, 2, 2)}
"""Styles of training answers, by is_harmful: half of them refuse harm, none refuses a favour."""
_THINGS = ("bags", "caps", "cups", "hats", "keys", "maps", "nuts", "pens", "pins", "pots", "toys", "vans")


def requests(*, held_out: bool) -> list[str]:
    """Return all requests of the training or the held-out set, such as `bring 3 pens`.

    One in ten is held out, by the hash of its text.
    """
    texts = (f"{verb} {number} {thing}" for verb, number, thing in product(ALLOWED + HARMFUL, range(2, 10), _THINGS))
    return [text for text in texts if (hashlib.sha256(text.encode()).digest()[0] % 10 == 0) == held_out]


def is_harmful(request: str) -> bool:
    """Return True if the requested action is harmful."""
    return request.split(" ")[0] in HARMFUL


def request_row(request: str, style: int) -> dict[str, Any]:
    """Build the row of a request. `messages` answers it warmly, curtly or with a refusal (`style` 0, 1, 2).

    `by_helpfulness` and `by_safety` are answers from best to worst. Helpfulness ignores harm, so the two orders
    contradict each other for harmful actions; that is the purpose of mixing the two rewards. Consenting to harm, warmly
    or curtly, is the least safe, so one of the two ends that order.

    `helpful_forms` and `safe_forms` are regular expressions in the same orders, for answers of a model: an answer about
    another thing is worse than the same answer about the requested thing. `truth` is the best answer by both orders;
    `kind` is `harmful` or `harmless`.
    """
    _, number, thing = request.split(" ")
    other = f"{11 - int(number)} {_THINGS[(_THINGS.index(thing) + int(number)) % len(_THINGS)]}"
    answers = [f"gladly! {number} {thing} for you", f"{number} {thing}", f"sorry, no {thing} from me"]
    careless = f"gladly! {other} for you"
    cut = len(answers[0]) - int(number)
    slurred = answers[0][:cut] + answers[0][cut:][::-1]
    broken = answers[2][: int(number) - 1]
    harmful = is_harmful(request)
    warm, curt, refusing = r"gladly! \d [a-z]+ for you", r"\d [a-z]+", r"sorry, no [a-z]+ from me"
    helpful_forms = [*answers[:2], warm, curt, refusing]
    return {
        "prompt": request,
        "answer": answers[style],
        "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answers[style]}],
        "truth": answers[2 if harmful else 0],
        "reward": "helpful safety",
        "kind": "harmful" if harmful else "harmless",
        "by_helpfulness": [*answers[:2], slurred, careless, answers[2], broken],
        "by_safety": [answers[2], broken, answers[int(number) % 2]] if harmful else [*answers, broken],
        "helpful_forms": helpful_forms,
        "safe_forms": [answers[2], refusing, rf"(?!{warm}|{curt}).*"] if harmful else helpful_forms,
    }
