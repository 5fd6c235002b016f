"""Steps of GRPO on many devices, in turns and asynchronously, as a simulation of events.

Where `cost` gives the seconds of phases that all devices go through together, here each engine has its own work and
speed. Engines pull completions from one queue in the order of the steps, as rollout.queue lets them; a step is trained
when its last completion has come, and steps begin `max_lag` steps early at most, as in pipeline.grpo.draws.

An engine decodes a token of each completion that it holds in `seconds_per_token`. So its place can be told in tokens of
one completion, its position, and only its own completions change its pace.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf

WARM_UP = 3
"""Steps that are not counted: the first one samples without anything to train."""


@dataclass(frozen=True)
class Workload:
    """Work of a step, and the seconds that its parts take.

    lengths: tokens of completions; each completion has one of them, at random. completions: of a step.
    room: completions that an engine decodes at once. seconds_per_token: of a decoding step with so many of them.
    train_seconds: of a token on one device. fixed_seconds: of a step on the ranks, whatever its tokens.
    sync_seconds: in which engines and ranks stand still. prefill_seconds: of a begun token that is computed again.
    """

    lengths: Sequence[int]
    completions: int
    room: int
    seconds_per_token: Callable[[int], float]
    train_seconds: float
    fixed_seconds: float = 0.0
    sync_seconds: float = 0.0
    prefill_seconds: float = 0.0


@dataclass(frozen=True)
class SimulatedFleet:
    """Engines and ranks; where they share devices, max_lag is 0.

    engine_size, rank_devices: devices of one engine, and of all ranks. slow_share: share of engines that decode at
    `slow_speed` of the others'. failure_seconds: mean time between failures of a device. restart_seconds: until a
    process that failed works again.
    """

    engines: int
    rank_devices: int
    engine_size: int = 1
    max_lag: int = 0
    slow_share: float = 0.0
    slow_speed: float = 1.0
    failure_seconds: float = inf
    restart_seconds: float = 0.0


@dataclass(frozen=True)
class SimulatedSteps:
    """Seconds of a step, shares of time in which ranks and engines did nothing, and lag of a token in versions, all in
    the mean; failures in all."""

    step_seconds: float
    ranks_idle: float
    engines_idle: float
    lag: float
    failures: int


@dataclass(order=True)
class _Completion:
    """end: position of its engine at which it ends. counted: tokens of it that the lag has been counted for."""

    end: float
    number: int
    step: int
    length: int
    counted: float = 0.0


class _Engine:
    """Completions under way, the first to end on top."""

    def __init__(self, speed: float) -> None:
        self.speed, self.time, self.position, self.busy = speed, 0.0, 0.0, 0.0
        self.held: list[_Completion] = []

    def pace(self, work: Workload) -> float:
        return work.seconds_per_token(len(self.held)) / self.speed

    def end(self, work: Workload) -> float:
        """Return when the next completion ends."""
        return self.time + (self.held[0].end - self.position) * self.pace(work) if self.held else inf

    def advance(self, time: float, work: Workload) -> None:
        """Decode until `time`."""
        if time > self.time:
            if self.held:
                self.position += (time - self.time) / self.pace(work)
                self.busy += time - self.time
            self.time = time


class _Rollout:
    """Engines and their queue."""

    def __init__(self, work: Workload, fleet: SimulatedFleet, rng: random.Random) -> None:
        slow = round(fleet.slow_share * fleet.engines)
        self.work, self.rng, self.version = work, rng, 0
        self.engines = [_Engine(fleet.slow_speed if i < slow else 1.0) for i in range(fleet.engines)]
        self.waiting: deque[_Completion] = deque()
        self.missing: dict[int, int] = {}  # completions that have not come, by step
        self.tokens: dict[int, int] = {}
        self.lags: dict[int, float] = {}  # sum over the tokens of a step

    def begin(self, step: int, now: float) -> None:
        """Queue the completions of a step, and give them to the engines with the least work."""
        lengths = self.rng.choices(self.work.lengths, k=self.work.completions)
        self.missing[step], self.tokens[step], self.lags[step] = len(lengths), sum(lengths), 0.0
        self.waiting.extend(_Completion(0.0, number, step, length) for number, length in enumerate(lengths))
        free = [(len(engine.held), i) for i, engine in enumerate(self.engines) if len(engine.held) < self.work.room]
        heapq.heapify(free)
        while free and self.waiting:
            count, i = free[0]
            self.engines[i].advance(now, self.work)
            self._take(self.engines[i])
            heapq.heapreplace(free, (count + 1, i)) if count + 1 < self.work.room else heapq.heappop(free)

    def run(self, now: float, until: float = inf, step: int | None = None) -> float:
        """Work until a time, or until `step` has all its completions; return when that was."""
        ends = [(engine.end(self.work), i) for i, engine in enumerate(self.engines)]
        heapq.heapify(ends)
        while step is None or self.missing[step]:
            end, i = ends[0]
            if end >= until:
                return until
            engine, now = self.engines[i], max(now, end)
            engine.advance(end, self.work)
            done = heapq.heappop(engine.held)
            self.missing[done.step] -= 1
            self._count(done, done.length)
            if self.waiting:
                self._take(engine)
            heapq.heapreplace(ends, (engine.end(self.work), i))
        return now

    def update(self, now: float, version: int) -> None:
        """Stand still while the weights of `version` arrive, then compute what was begun again."""
        for engine in self.engines:
            engine.advance(now, self.work)
            begun = [each.length - (each.end - engine.position) for each in engine.held]
            for completion, tokens in zip(engine.held, begun, strict=True):
                self._count(completion, tokens)
            engine.time += self.work.sync_seconds + sum(begun) * self.work.prefill_seconds / engine.speed
        self.version = version

    def clear(self, now: float) -> None:
        """Forget what is under way and begin anew at `now`."""
        for engine in self.engines:
            engine.held, engine.time = [], max(engine.time, now)
        self.waiting.clear()
        self.missing.clear()

    def _take(self, engine: _Engine) -> None:
        completion = self.waiting.popleft()
        completion.end = engine.position + completion.length
        heapq.heappush(engine.held, completion)

    def _count(self, completion: _Completion, tokens: float) -> None:
        self.lags[completion.step] += (tokens - completion.counted) * (completion.step - 1 - self.version)
        completion.counted = tokens


def simulate(work: Workload, fleet: SimulatedFleet, steps: int, seed: int = 0) -> SimulatedSteps:
    """Simulate WARM_UP and `steps` further steps.

    A failed engine's completions are continued by it when it works again; after a failure of a rank the step is done
    anew, from the checkpoint before it, with whatever was sampled ahead.

    Example:
        simulate(work, SimulatedFleet(engines=32, rank_devices=32, max_lag=1), steps=20).step_seconds
    """
    rng = random.Random(seed)
    rollout = _Rollout(work, fleet, rng)
    now = since = busy_ranks = busy_engines = lag = tokens = 0.0
    failures, step = 0, 1
    while step <= WARM_UP + steps:
        for later in range(step, step + fleet.max_lag + 1):
            if later not in rollout.missing:
                rollout.begin(later, now)
        ready = rollout.run(now, step=step)
        trained = ready + work.fixed_seconds + rollout.tokens[step] * work.train_seconds / fleet.rank_devices
        rollout.run(ready, until=trained)
        if rng.random() < 1 - exp(-(trained - now) * fleet.rank_devices / fleet.failure_seconds):
            failures += 1
            now = trained + fleet.restart_seconds
            rollout.clear(now)
            continue
        rollout.update(trained, version=step)
        for engine in rollout.engines:
            if rng.random() < 1 - exp(-(trained - now) * fleet.engine_size / fleet.failure_seconds):
                failures += 1
                engine.time += fleet.restart_seconds
        now = trained + work.sync_seconds
        if step > WARM_UP:
            busy_ranks += trained - ready
            lag, tokens = lag + rollout.lags[step], tokens + rollout.tokens[step]
        if step == WARM_UP:
            since, busy_engines = now, sum(engine.busy for engine in rollout.engines)
        step += 1
    seconds = now - since
    busy_engines = sum(engine.busy for engine in rollout.engines) - busy_engines
    return SimulatedSteps(
        seconds / steps, 1 - busy_ranks / seconds, 1 - busy_engines / seconds / fleet.engines, lag / tokens, failures
    )
