"""The Ray actors that judge. Groups go in as they are finished and are judged while others are still being written.

Each crew has a queue and workers of its own: one for the rules, one for what runs programs, one for each reward that
asks a model. A worker takes the next group when it is free, so a slow one holds nothing up but what it judges.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from configs.rewards import RewardPoolConfig, RewardSpec
from rewards import registry
from rewards.breaker import CircuitBreaker
from rewards.guard import RULE_MEMORY_GIB, Guard, applicable, inspect, start_limit
from rewards.metrics import Passage, summarize, summarize_pool
from rewards.serve import Build
from rewards.types import Post, Status, Task, Verdict

WORKER_START_SECONDS = 120.0
"""Longest a new actor may take to be placed and to make its rewards; setting them up comes on top."""

BREAKER_WINDOW = 100
"""Newest verdicts of a reward that the failure rate is taken over."""

_HEARTBEAT_SECONDS = 10.0
"""How long a worker may judge before it is asked whether it lives, and again after as long."""
_ANSWER_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_ATTEMPTS = 2

Judged = list[dict[str, Verdict]]
"""Per completion the verdicts by reward."""


class RewardWorker:
    """Judges whole groups behind a guard. The pool runs it as a Ray actor with a second thread, to say that it lives.

    Every wait of a guard ends, so while the actor lives its groups get judged, however long their limits are.
    """

    def __init__(self, specs: list[RewardSpec], timeout_seconds: float, memory_gib: float | None, build: Build) -> None:
        self._guard = Guard(specs, timeout_seconds=timeout_seconds, memory_gib=memory_gib, build=build)

    def start(self) -> None:
        """Start the judging process. Raises ValueError for a wrong spec, RuntimeError where it can't be started."""
        self._guard.start()

    def judge(self, task: Task, completions: list[str], labels: list[str]) -> Judged:
        """Per completion the verdict of each reward in `labels`."""
        verdicts = [self._guard.judge(label, task, completions) for label in labels]
        return [dict(zip(labels, row, strict=True)) for row in zip(*verdicts, strict=True)]

    def alive(self) -> None:
        """Answers, which a process that was stopped does not."""

    def close(self) -> None:
        """End the judging process, and clear away the files it left."""
        self._guard.close()


@dataclass(frozen=True)
class _Job:
    """The part of one group that goes to one crew."""

    index: int
    task: Task
    completions: list[str]
    labels: list[str]
    submitted: float


@dataclass(frozen=True)
class _Done:
    """A job's verdicts, when it was judged, and how many workers it cost."""

    job: _Job
    judged: Judged
    passage: Passage
    replaced: int


class _Crew:
    """The workers that share a queue, and a thread for each, which takes jobs from it.

    A worker that dies or hangs is replaced and its job done again; a job that loses its worker twice gets `infra_error`
    verdicts.
    """

    def __init__(
        self, name: str, specs: list[RewardSpec], posts: list[Post], config: RewardPoolConfig, build: Build
    ) -> None:
        self.size = config.workers.get(name, 1)
        self.start_seconds = WORKER_START_SECONDS + start_limit(posts)
        self._arguments = (specs, config.timeout_seconds, RULE_MEMORY_GIB if name == "rule" else None, build)
        self._gpus = sum(gpus_of(post) for post in posts)
        self._closing = Lock()
        self._closed = False
        self._workers: list[Any] = []
        self._idle: SimpleQueue[Any] = SimpleQueue()  # None in the place of a worker that was lost
        for _ in range(self.size):
            self._idle.put(self._new_worker())
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix=f"rewards-{name}")

    def start(self) -> list["ray.ObjectRef[None]"]:
        """Have the workers start their processes; ready when they did."""
        return [worker.start.remote() for worker in self._workers]

    def submit(self, job: _Job) -> "Future[_Done]":
        """Queue the job and return at once."""
        return self._threads.submit(self._run, job)

    def close(self) -> None:
        """End the workers, and with them the jobs."""
        with self._closing:
            self._closed = True
        workers = list(self._workers)
        closing = [worker.close.remote() for worker in workers]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for worker in workers:
            ray.kill(worker)
        self._threads.shutdown(cancel_futures=True)

    def _new_worker(self) -> Any:
        # No core of its own: it must fit beside engines and ranks that claim them all, and only waits for its process.
        options = {"num_cpus": 0, "num_gpus": self._gpus, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(RewardWorker).options(**options)
        with self._closing:
            if self._closed:
                raise RuntimeError("the reward pool was closed")
            self._workers.append(actor.remote(*self._arguments))
            return self._workers[-1]

    def _dismiss(self, worker: Any) -> None:
        ray.kill(worker)
        self._workers.remove(worker)

    def _run(self, job: _Job) -> _Done:
        started, reason = time.monotonic(), ""
        worker = self._idle.get_nowait()
        for replaced in range(_ATTEMPTS):
            try:
                if worker is None:
                    worker = self._new_worker()
                    ray.get(worker.start.remote(), timeout=self.start_seconds)
                judged = _ask(worker, job)
            except RayError as error:
                reason = str(error)
                self._dismiss(worker)
                worker = None  # the second try gets a new one: the next idle one may have died in the same accident
            else:
                self._idle.put(worker)
                return _Done(job, judged, Passage(job.submitted, started, time.monotonic()), replaced)
        self._idle.put(None)
        lost = Verdict(None, Status.INFRA_ERROR, f"lost {_ATTEMPTS} reward workers, the last because {reason}"[:500])
        judged = [dict.fromkeys(job.labels, lost) for _ in job.completions]
        return _Done(job, judged, Passage(job.submitted, started, time.monotonic()), _ATTEMPTS)


def gpus_of(post: Post) -> float:
    """GPUs that a worker at `post` asks Ray for: as it says, or one where the cluster has any."""
    if post.gpus is None:
        return float(ray.cluster_resources().get("GPU", 0) > 0)
    return post.gpus


def _refuse_too_many_gpus(posts: Iterable[Post], config: RewardPoolConfig) -> None:
    """Raises ValueError for what Ray would wait for without a word."""
    there = int(ray.cluster_resources().get("GPU", 0))
    asked = {post.label: gpus_of(post) * config.workers.get(post.crew, 1) for post in posts if gpus_of(post)}
    if sum(asked.values()) > there:
        wanted = ", ".join(f"{gpus:g} for reward '{label}'" for label, gpus in asked.items())
        raise ValueError(
            f"GPUs asked for: {wanted}; the cluster has {there}: "
            "lower reward_pool.workers, or set args.gpus, to 0 for a judge on the CPU"
        )


def _ask(worker: Any, job: _Job) -> Judged:
    """The worker's verdicts. Raises RayError when it dies or no longer says that it lives."""
    ref = worker.judge.remote(job.task, job.completions, job.labels)
    while True:
        try:
            return ray.get(ref, timeout=_HEARTBEAT_SECONDS)
        except GetTimeoutError:
            ray.get(worker.alive.remote(), timeout=_ANSWER_SECONDS)


class RewardPool:
    """Judges groups with every reward that applies to their task, each reward in its own kind of worker.

    Needs a running Ray. A worker that dies or hangs is replaced and its group judged again; a group that loses its
    worker twice gets `infra_error` verdicts. Raises ValueError at the start for wrong specs, as `rewards.guard.inspect`
    does, and for more GPUs than the cluster has, and RuntimeError where the workers don't start. It belongs to one
    thread.
    """

    def __init__(self, specs: list[RewardSpec], config: RewardPoolConfig, build: Build = registry.build) -> None:
        posts = inspect(specs, config, build=build)
        _refuse_too_many_gpus(posts.values(), config)
        self._crew_of = {label: post.crew for label, post in posts.items()}
        self._breaker = CircuitBreaker(max_failure_rate=config.max_failure_rate, window=BREAKER_WINDOW)
        self._groups: dict[int, int] = {}
        self._jobs: list[Future[_Done]] = []
        self._verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
        self._done: defaultdict[str, list[_Done]] = defaultdict(list)
        self._waited = 0.0
        self._crews: dict[str, _Crew] = {}
        for name in dict.fromkeys(self._crew_of.values()):
            mine = [spec for spec in specs if self._crew_of[spec.label] == name]
            self._crews[name] = _Crew(name, mine, [posts[spec.label] for spec in mine], config, build)
        limit = max((crew.start_seconds for crew in self._crews.values()), default=0.0)
        try:
            ray.get([ref for crew in self._crews.values() for ref in crew.start()], timeout=limit)
        except RayError as error:
            self.close()
            if isinstance(error, RayTaskError):
                raise error.cause from None
            raise RuntimeError(f"the reward workers did not start in {limit:g} s: {error}") from error

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        """Queue one group and return at once.

        index: the group's place, its key in what `gather` returns. Raises ValueError when no reward applies to
        `task.kind`, and when `index` was submitted since the last `gather`.
        """
        labels = applicable(task, list(self._crew_of))
        if index in self._groups:
            raise ValueError(f"group {index} was submitted twice")
        self._groups[index] = len(completions)
        for name, crew in self._crews.items():
            mine = [label for label in labels if self._crew_of[label] == name]
            if mine:
                self._jobs.append(crew.submit(_Job(index, task, completions, mine, time.monotonic())))

    def gather(self) -> dict[int, Judged]:
        """Wait for everything submitted since the last call: per group and completion its verdicts by reward.

        Raises RewardsUnavailable when the circuit breaker trips.
        """
        began = time.monotonic()
        jobs, self._jobs = self._jobs, []
        groups, self._groups = self._groups, {}
        parts: dict[int, Judged] = {index: [{} for _ in range(size)] for index, size in groups.items()}
        for job in as_completed(jobs):  # ends because every job does
            self._collect(job.result(), parts)
        self._waited += time.monotonic() - began
        # In the order of submission and of the rewards, so that sums don't depend on who was judged first.
        judged = {
            index: [{label: verdicts[label] for label in self._crew_of if label in verdicts} for verdicts in part]
            for index, part in parts.items()
        }
        for part in judged.values():
            for verdicts in part:
                for label, verdict in verdicts.items():
                    self._verdicts[label].append(verdict)
        return judged

    def metrics(self) -> dict[str, float]:
        """Of everything gathered since the last call, `reward/<label>/<stat>` (rewards.metrics.summarize) and
        `reward_pool/<crew>/<stat>` (summarize_pool), and `reward_pool/wait_seconds`, what `gather` took: the time that
        judging adds to a step."""
        metrics = summarize(self._verdicts)
        if metrics:
            metrics["reward_pool/wait_seconds"] = self._waited
        self._waited = 0.0
        for name, done in self._done.items():
            passages = [one.passage for one in done]
            replaced = sum(one.replaced for one in done)
            metrics |= summarize_pool(name, passages, workers=self._crews[name].size, replaced=replaced)
        self._verdicts.clear()
        self._done.clear()
        return metrics

    def close(self) -> None:
        """End the workers, and with them whatever is not judged yet."""
        for crew in self._crews.values():
            crew.close()

    def _collect(self, done: _Done, parts: dict[int, Judged]) -> None:
        job = done.job
        self._done[self._crew_of[job.labels[0]]].append(done)
        name = job.task.row or repr(job.task.prompt[:60])
        for verdicts, given in zip(parts[job.index], done.judged, strict=True):
            verdicts |= given
            for label, verdict in given.items():
                self._breaker.observe(label, verdict, name)
