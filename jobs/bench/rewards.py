"""What judging costs: math through the pool beside math-verify alone, hostile answers, and the pool's own overhead.

Answers are made up with a fixed seed. All rates are taken in one run, in turns, since they move with the machine.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import math_verify

from configs.rewards import RewardPoolConfig, RewardSpec
from pipeline.cluster.room import cluster
from rewards import registry
from rewards.pool import GroupVerdicts, RewardPool
from rewards.serve import Build
from rewards.types import Reward, Task

GROUPS, GROUP_SIZE = 100, 8
HOSTILE = (
    "9^{9^{9^9}}",
    "10^{10^{10}}!",
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    "{" * 100_000,
    "(" * 400 + "1" + ")" * 400,
    r"\sqrt{" * 200 + "2" + "}" * 200,
)
"""Answers that cost a checker without limits minutes, gigabytes or its stack; one in a hundred."""


@dataclass(frozen=True)
class MathGroup:
    """A gold answer and completions that end in an answer, each worded differently."""

    gold: str
    completions: list[str]


class Length:
    """A reward that takes no time: what is left is the way to it and back."""

    def score(self, task: Task, completion: str) -> float:
        """Characters of the completion."""
        return float(len(completion))


def build_length(spec: RewardSpec) -> Reward:
    """For the pool's `build`."""
    return Length()


def rewards(repeats: int) -> dict[str, float]:
    """Judge GROUPS groups of math answers, as many with one hostile answer in a hundred, and 10,000 trivial samples.

    A process judges on each core. Rates are medians over `repeats` turns. math-verify's rate is of one process with its
    own defaults, in its main thread, on the same answers as the pool's; it parses a gold answer once a group.
    """
    workers = len(os.sched_getaffinity(0))
    trivial = [MathGroup("", [f"{index} {n}" for n in range(GROUP_SIZE)]) for index in range(10_000 // GROUP_SIZE)]
    warm = math_groups(10 * workers, seed=2 * repeats)
    alone, pooled, attacked, samples, busy = ([] for _ in range(5))
    alike: list[bool] = []
    with cluster():
        config = RewardPoolConfig(workers={"rule": workers}, max_failure_rate=1.0)
        pools = [_pool("math", config, registry.build), _pool("length", config, build_length)]
        try:
            _alone(warm)
            _judge(pools[0], warm)
            for turn in range(repeats):  # new answers in each, which nobody's caches know
                clean, hostile = math_groups(GROUPS, seed=turn), math_groups(GROUPS, seed=repeats + turn, hostile=True)
                rate, theirs = _timed(clean, _alone)
                alone.append(rate)
                rate, ours = _timed(clean, lambda given: _judge(pools[0], given))
                pooled.append(rate)
                alike += [a == b for a, b in zip(ours, theirs, strict=True)]
                attacked.append(_timed(hostile, lambda given: _judge(pools[0], given))[0])
                began = time.process_time()
                samples.append(_timed(trivial, lambda given: _judge(pools[1], given))[0])
                busy.append((time.process_time() - began) / len(trivial))
        finally:
            for pool in pools:
                pool.close()
    figures = {
        "workers": float(workers),
        "math_verify_answers_per_second": statistics.median(alone),
        "pool_answers_per_second": statistics.median(pooled),
        "pool_answers_per_second_hostile": statistics.median(attacked),
        "trivial_samples_per_second": statistics.median(samples),
        "driver_cpu_ms_per_group": 1000 * statistics.median(busy),
        "verdicts_like_math_verify": sum(alike) / len(alike),
    }
    figures["math_over_workers_x_math_verify"] = statistics.median(
        one / (workers * other) for one, other in zip(pooled, alone, strict=True)
    )
    figures["hostile_loss"] = 1 - statistics.median(a / b for a, b in zip(attacked, pooled, strict=True))
    return figures


def math_groups(count: int, *, seed: int, hostile: bool = False) -> list[MathGroup]:
    """`count` groups, of every kind of answer in turn; about half of the completions are right.

    With `hostile`, one completion in a hundred answers with one of HOSTILE.
    """
    rng = random.Random(seed)
    made: list[MathGroup] = []
    for index in range(count):
        gold, right, wrong = _KINDS[index % len(_KINDS)](rng)
        completions: list[str] = []
        for number in range(index * GROUP_SIZE, (index + 1) * GROUP_SIZE):
            answer = rng.choice(rng.choice((right, wrong)))
            if hostile and number % 100 == 0:
                answer = HOSTILE[number // 100 % len(HOSTILE)]
            steps = " ".join(
                f"Step {step}: we get {rng.randrange(1000)} from it." for step in range(rng.randrange(4, 40))
            )
            completions.append(f"{steps}\nThe final answer is $\\boxed{{{answer}}}$.")
        made.append(MathGroup(gold, completions))
    return made


def _pool(name: str, config: RewardPoolConfig, build: Build) -> RewardPool:
    return RewardPool([RewardSpec(name=name)], config, build)


def _timed(groups: Sequence[MathGroup], judge: Callable[[Sequence[MathGroup]], list[bool]]) -> tuple[float, list[bool]]:
    """Completions a second, and whether each is right."""
    began = time.perf_counter()
    right = judge(groups)
    return len(right) / (time.perf_counter() - began), right


def _alone(groups: Sequence[MathGroup]) -> list[bool]:
    """math-verify's answers, as its documentation asks it."""
    right: list[bool] = []
    for group in groups:
        gold = math_verify.parse(f"${group.gold}$")
        right += [math_verify.verify(gold, math_verify.parse(completion)) for completion in group.completions]
    return right


def _judge(pool: RewardPool, groups: Sequence[MathGroup]) -> list[bool]:
    for index, group in enumerate(groups):
        pool.submit(index, Task("", group.gold), group.completions)
    judged: dict[int, GroupVerdicts] = pool.gather()
    pool.metrics()
    return [verdict.score == 1 for index in sorted(judged) for row in judged[index] for verdict in row.values()]


Kind = Callable[[random.Random], tuple[str, list[str], list[str]]]
"""Makes a gold answer, other ways to write it, and wrong answers."""


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


_KINDS: tuple[Kind, ...] = (_integer, _fraction, _surd, _polynomial, _angle, _interval, _set, _matrix)
