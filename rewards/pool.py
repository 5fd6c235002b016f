"""The Ray actors that judge. Groups go in as they are finished and are judged while others are still being written."""

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from configs.rewards import RewardPoolConfig, RewardSpec
from rewards import registry
from rewards.breaker import CircuitBreaker
from rewards.guard import START_SECONDS, Build, Guard
from rewards.metrics import summarize
from rewards.types import Status, Task, Verdict

WORKER_START_SECONDS = 120.0
"""Longest a new actor may take to be placed and to run."""

_ATTEMPTS = 2
_MARGIN_SECONDS = 5.0

Judged = list[dict[str, Verdict]]


class RewardWorker:
    """Judges whole groups behind a guard. The pool runs it as a Ray actor."""

    def __init__(self, specs: list[RewardSpec], timeout_seconds: float, build: Build) -> None:
        self._guard = Guard(specs, timeout_seconds=timeout_seconds, build=build)

    def start(self) -> None:
        """Start the judging process. Raises ValueError for a wrong spec, RuntimeError where it can't be started."""
        self._guard.start()

    def judge(self, task: Task, completions: list[str], names: list[str]) -> Judged:
        """Per completion the verdict of each reward in `names`."""
        return [{name: self._guard.judge(name, task, text) for name in names} for text in completions]


@dataclass
class _Job:
    """One group on its way through a worker."""

    index: int
    task: Task
    completions: list[str]
    names: list[str]
    attempts: int = 0
    ref: Any = None


@dataclass
class _Lane:
    """A worker and its groups, judged in this order; `since` is when the first one's clock began."""

    worker: Any
    jobs: deque[_Job]
    since: float


class RewardPool:
    """Judges groups with every reward that applies to their task.

    Needs a running Ray. A worker that dies or hangs is replaced and its groups are judged again; a group that loses its
    worker twice gets `infra_error` verdicts. Raises ValueError at the start for wrong specs.
    """

    def __init__(self, specs: list[RewardSpec], config: RewardPoolConfig, build: Build = registry.build) -> None:
        self._names = [spec.name for spec in specs]
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"rewards: every name may appear once, got {', '.join(self._names)}")
        self._specs, self._config, self._build = specs, config, build
        self._breaker = CircuitBreaker(max_failure_rate=config.max_failure_rate, window=config.breaker_window)
        self._judged: dict[int, Judged] = {}
        self._verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
        self._lanes = [_Lane(self._start_worker(), deque(), 0.0) for _ in range(config.num_workers)]
        try:
            ray.get([lane.worker.start.remote() for lane in self._lanes], timeout=WORKER_START_SECONDS)
        except RayError as error:
            self.close()
            raise (error.cause if isinstance(error, RayTaskError) else error) from None

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        """Hand one group to the least busy worker and return at once.

        index: the group's place, its key in what `gather` returns. Raises ValueError when no reward applies to
        `task.kind`, and when `index` was submitted since the last `gather`.
        """
        names = [name for name in self._names if task.kind in ("", name)]
        if not names:
            raise ValueError(f"task {task.row!r} is for reward '{task.kind}'; configured: {', '.join(self._names)}")
        if index in self._judged or any(job.index == index for lane in self._lanes for job in lane.jobs):
            raise ValueError(f"group {index} was submitted twice")
        lane = min(self._lanes, key=lambda lane: len(lane.jobs))
        if not lane.jobs:
            lane.since = time.monotonic()
        lane.jobs.append(_Job(index, task, completions, names))
        self._send(lane, lane.jobs[-1])

    def gather(self) -> dict[int, Judged]:
        """Wait for everything submitted since the last call: per group and completion its verdicts by reward.

        Raises RewardsUnavailable when the circuit breaker trips.
        """
        while busy := [lane for lane in self._lanes if lane.jobs]:
            patience = max(0.0, min(self._deadline(lane) for lane in busy) - time.monotonic())
            ray.wait([lane.jobs[0].ref for lane in busy], timeout=patience)
            for lane in busy:
                if ray.wait([lane.jobs[0].ref], timeout=0)[0]:
                    self._collect(lane)
                elif time.monotonic() > self._deadline(lane):
                    self._replace(lane, "it did not answer in time")
        judged, self._judged = self._judged, {}
        return judged

    def metrics(self) -> dict[str, float]:
        """`reward/<name>/<stat>` of everything gathered since the last call; see `summarize`."""
        metrics = summarize(self._verdicts)
        self._verdicts.clear()
        return metrics

    def close(self) -> None:
        """End the workers. Their judging processes end when the channel to them closes."""
        for lane in self._lanes:
            ray.kill(lane.worker)

    def _start_worker(self) -> Any:
        # No core of its own: it must fit beside engines and ranks that claim them all, and only waits for its process.
        actor = ray.remote(num_cpus=0, max_restarts=0)(RewardWorker)
        return actor.remote(self._specs, self._config.timeout_seconds, self._build)

    def _send(self, lane: _Lane, job: _Job) -> None:
        job.ref = lane.worker.judge.remote(job.task, job.completions, job.names)

    def _deadline(self, lane: _Lane) -> float:
        """When the lane's first group must be judged: by then a guard that only kills and restarts is done."""
        job = lane.jobs[0]
        verdicts = len(job.completions) * len(job.names)
        return lane.since + _MARGIN_SECONDS + verdicts * 2 * (self._config.timeout_seconds + START_SECONDS)

    def _collect(self, lane: _Lane) -> None:
        try:
            judged = ray.get(lane.jobs[0].ref, timeout=_MARGIN_SECONDS)
        except RayError as error:
            self._replace(lane, str(error))
            return
        lane.since = time.monotonic()
        self._finish(lane.jobs.popleft(), judged)

    def _replace(self, lane: _Lane, reason: str) -> None:
        """Give the lane a new worker and send it the groups; the first, in whose time it happened, only once more."""
        ray.kill(lane.worker)
        lane.worker = self._start_worker()
        lane.since = time.monotonic() + WORKER_START_SECONDS
        lane.jobs[0].attempts += 1
        if lane.jobs[0].attempts == _ATTEMPTS:
            job = lane.jobs.popleft()
            lost = Verdict(
                None, Status.INFRA_ERROR, f"lost {_ATTEMPTS} reward workers, the last because {reason}"[:500]
            )
            self._finish(job, [dict.fromkeys(job.names, lost) for _ in job.completions])
        for job in lane.jobs:
            self._send(lane, job)

    def _finish(self, job: _Job, judged: Judged) -> None:
        assert len(judged) == len(job.completions)
        self._judged[job.index] = judged
        for verdicts in judged:
            for name, verdict in verdicts.items():
                self._verdicts[name].append(verdict)
                self._breaker.observe(name, verdict, job.task.row or repr(job.task.prompt[:60]))
