"""Measures judging: math through the pool beside math-verify alone, hostile answers, and the pool's own overhead.

Answers are made up with a fixed seed. All rates are taken in one run, in turns, since they depend on the machine.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import gcd
from statistics import median

import math_verify

from configs.rewards import RewardPoolConfig, RewardSpec
from pipeline.cluster.room import cluster
from rewards.plugins.build import build_reward
from rewards.pool.workers import GroupVerdicts, RewardPool
from rewards.types import Reward, Task

NUM_GROUPS, COMPLETIONS_PER_GROUP = 100, 8
HOSTILE_ANSWERS = (
    "9^{9^{9^9}}",
    "10^{10^{10}}!",
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    "{" * 100_000,
    "(" * 400 + "1" + ")" * 400,
    r"\sqrt{" * 200 + "2" + "}" * 200,
)
"""Answers on which a checker without limits spends minutes, gigabytes or its stack; one in a hundred."""


@dataclass(frozen=True)
class MathGroup:
    """A gold answer, and completions that each end in an answer."""

    gold: str
    completions: list[str]


class Length:
    """A reward that takes no time, so that the rate is that of the pool itself."""

    def score(self, task: Task, completion: str) -> float:
        """Characters of the completion."""
        return float(len(completion))


def build_length(spec: RewardSpec) -> Reward:
    """Builds the reward, as the pool's `build` argument."""
    return Length()


def rewards(repeats: int) -> dict[str, float]:
    """Judges NUM_GROUPS groups of math answers, as many with one hostile answer in a hundred, and 10,000 trivial ones.

    One process judges on each core. Rates are medians over `repeats` turns. math-verify's rate is that of one process
    with its own defaults, in its main thread, on the same answers; it parses a gold answer once a group.
    """
    workers, size = len(os.sched_getaffinity(0)), COMPLETIONS_PER_GROUP
    trivial = [MathGroup("", [f"{index} {n}" for n in range(size)]) for index in range(10_000 // size)]
    warm_up = math_groups(10 * workers, seed=2 * repeats)
    alone, pooled, attacked, samples, busy = ([] for _ in range(5))
    equal: list[bool] = []
    config = RewardPoolConfig(workers={"rule": workers}, max_failure_rate=1.0)
    with (
        cluster(),
        closing(RewardPool([RewardSpec(name="math")], config, build_reward)) as math,
        closing(RewardPool([RewardSpec(name="length")], config, build_length)) as length,
    ):
        _judge_alone(warm_up)
        _judge(math, warm_up)
        for turn in range(repeats):  # new answers in each turn, which no cache has seen
            clean = math_groups(NUM_GROUPS, seed=turn)
            hostile = math_groups(NUM_GROUPS, seed=repeats + turn, hostile=True)
            rate, expected = _timed(clean, _judge_alone)
            alone.append(rate)
            rate, verdicts = _timed(clean, lambda groups: _judge(math, groups))
            pooled.append(rate)
            equal += [a == b for a, b in zip(verdicts, expected, strict=True)]
            attacked.append(_timed(hostile, lambda groups: _judge(math, groups))[0])
            start = time.process_time()
            samples.append(_timed(trivial, lambda groups: _judge(length, groups))[0])
            busy.append((time.process_time() - start) / len(trivial))
    return {
        "workers": float(workers),
        "math_verify_answers_per_second": median(alone),
        "pool_answers_per_second": median(pooled),
        "pool_answers_per_second_hostile": median(attacked),
        "trivial_samples_per_second": median(samples),
        "driver_cpu_ms_per_group": 1000 * median(busy),
        "verdicts_like_math_verify": sum(equal) / len(equal),
        "math_over_workers_x_math_verify": median(a / (workers * b) for a, b in zip(pooled, alone, strict=True)),
        "hostile_loss": 1 - median(a / b for a, b in zip(attacked, pooled, strict=True)),
    }


def math_groups(count: int, *, seed: int, hostile: bool = False) -> list[MathGroup]:
    """Makes `count` groups, of every kind of answer in turn; about half of the completions are right.

    With `hostile`, one completion in a hundred answers with one of HOSTILE_ANSWERS.
    """
    rng = random.Random(seed)
    groups: list[MathGroup] = []
    for index in range(count):
        gold, right, wrong = _KINDS[index % len(_KINDS)](rng)
        completions: list[str] = []
        for number in range(index * COMPLETIONS_PER_GROUP, (index + 1) * COMPLETIONS_PER_GROUP):
            answer = rng.choice(rng.choice((right, wrong)))
            if hostile and number % 100 == 0:
                answer = HOSTILE_ANSWERS[number // 100 % len(HOSTILE_ANSWERS)]
            steps = " ".join(
                f"Step {step}: we get {rng.randrange(1000)} from it." for step in range(rng.randrange(4, 40))
            )
            completions.append(f"{steps}\nThe final answer is $\\boxed{{{answer}}}$.")
        groups.append(MathGroup(gold, completions))
    return groups


def _timed(groups: Sequence[MathGroup], judge: Callable[[Sequence[MathGroup]], list[bool]]) -> tuple[float, list[bool]]:
    """Completions a second, and the verdict on each."""
    start = time.perf_counter()
    right = judge(groups)
    return len(right) / (time.perf_counter() - start), right


def _judge_alone(groups: Sequence[MathGroup]) -> list[bool]:
    """math-verify's verdicts, called as in its documentation."""
    right: list[bool] = []
    for group in groups:
        gold = math_verify.parse(f"${group.gold}$")
        right += [math_verify.verify(gold, math_verify.parse(completion)) for completion in group.completions]
    return right


def _judge(pool: RewardPool, groups: Sequence[MathGroup]) -> list[bool]:
    for index, group in enumerate(groups):
        pool.submit(index, Task("", group.gold), group.completions)
    verdicts: dict[int, GroupVerdicts] = pool.gather()
    pool.metrics()
    return [verdict.score == 1 for index in sorted(verdicts) for row in verdicts[index] for verdict in row.values()]


AnswerKind = Callable[[random.Random], tuple[str, list[str], list[str]]]
"""Makes a gold answer, right answers and wrong answers."""


def _integer(rng: random.Random) -> tuple[str, list[str], list[str]]:
    n = rng.randrange(-10_000, 10_000)
    return str(n), [str(n), f"{n}.0", f"x = {n}"], [str(n + 1), str(-n - 1), f"\\frac{{{n}}}{{7}}"]


def _fraction(rng: random.Random) -> tuple[str, list[str], list[str]]:
    b = rng.choice((3, 7, 11, 13, 16))
    a = rng.choice([a for a in range(1, 50) if gcd(a, b) == 1])
    fraction = "\\frac{{{}}}{{{}}}".format
    return fraction(a, b), [fraction(a, b), fraction(3 * a, 3 * b), f"{a}/{b}"], [fraction(b, a + 1), f"{a}.{b}"]


def _surd(rng: random.Random) -> tuple[str, list[str], list[str]]:
    k, m = rng.randrange(2, 30), rng.choice((2, 3, 5, 6, 7))
    wrong = [f"{k + 1}\\sqrt{{{m}}}", f"\\sqrt{{{k * m}}}"]
    return f"{k}\\sqrt{{{m}}}", [f"{k}\\sqrt{{{m}}}", f"\\sqrt{{{k * k * m}}}"], wrong


def _polynomial(rng: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(1, 20), rng.randrange(1, 20)
    right = [f"x^2+{a + b}x+{a * b}", f"{a * b}+{a + b}x+x^2", f"(x+{b})(x+{a})"]
    return f"(x+{a})(x+{b})", right, [f"x^2+{a + b}x+{a * b + 1}", f"x^2-{a + b}x+{a * b}"]


def _angle(rng: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(1, 12), rng.choice((5, 7, 9))
    right = [f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}\\pi/{b}"]
    return right[0], right, [f"\\frac{{{b}\\pi}}{{{a + 1}}}", f"\\frac{{{a}}}{{{b}}}"]


def _interval(rng: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(-20, 0), rng.randrange(1, 20)
    wrong = [f"[{a}, {b}]", f"({a}, {b + 1}]", f"({a}, \\infty)"]
    return f"({a}, {b}]", [f"({a}, {b}]", f"({a},{b}]"], wrong


def _set(rng: random.Random) -> tuple[str, list[str], list[str]]:
    a, b, c = rng.sample(range(-50, 50), 3)
    return f"\\{{{a},{b},{c}\\}}", [f"\\{{{c}, {a}, {b}\\}}"], [f"\\{{{a},{b}\\}}", f"\\{{{a},{b},{c + 100}\\}}"]


def _matrix(rng: random.Random) -> tuple[str, list[str], list[str]]:
    matrix = "\\begin{{pmatrix}}{} & {}\\\\{} & {}\\end{{pmatrix}}".format
    a, b, c, d = rng.sample(range(-9, 10), 4)
    return matrix(a, b, c, d), [matrix(a, b, c, d)], [matrix(b, a, c, d), matrix(a, b, c, d + 1)]


_KINDS: tuple[AnswerKind, ...] = (_integer, _fraction, _surd, _polynomial, _angle, _interval, _set, _matrix)
