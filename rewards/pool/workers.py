"""Pools of Ray actors that judge each group of completions as soon as it is sampled.

An actor holds a `rewards.pool.guard.Guard`; the reward itself runs in the guard's child process
(`rewards/pool/serve.py`). There is one group of workers for rules, one for programs, and one for each reward that runs
a model. Every group of workers has its own queue, so a slow reward delays no other.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Lock
from typing import Any

import ray
from ray._common.utils import get_system_memory
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.rewards import PoolName, RewardPoolConfig, RewardSpec
from rewards.plugins.build import build_reward
from rewards.pool.breaker import CircuitBreaker
from rewards.pool.guard import Guard, applicable, inspect
from rewards.pool.limits import memory_limits, start_limit
from rewards.pool.metrics import JobTimes, summarize, summarize_workers
from rewards.pool.serve import Build
from rewards.types import Placement, Status, Task, Verdict

WORKER_START_SECONDS = 120.0
"""Longest a new actor may take to be placed and to build its rewards; their set-up comes on top."""

BREAKER_WINDOW = 100
"""Newest verdicts of a reward that the failure rate is taken over."""

_HEARTBEAT_SECONDS = 10.0
"""Time after which a busy worker must show that it is alive, and again after as long."""
_ALIVE_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_ATTEMPTS = 2
_PENDING = Verdict(None, Status.INFRA_ERROR, "not judged yet")

GroupVerdicts = list[dict[str, Verdict]]
"""The verdicts of a group: for each completion by reward label."""


class RewardWorker:
    """Judges groups behind a guard, as a Ray actor with a second thread for `alive`.

    Every wait of a guard ends, so a living actor finishes its jobs.
    """

    def __init__(self, specs: list[RewardSpec], pool: PoolName, config: RewardPoolConfig, build: Build) -> None:
        memory_gib, resident_gib = memory_limits(pool, specs[0].label, config, machine_gib=get_system_memory() / 2**30)
        self._guard = Guard(
            specs,
            timeout_seconds=config.timeout_seconds,
            memory_gib=memory_gib,
            resident_gib=resident_gib,
            build=build,
        )
        self._place = _node_in_words()

    def start(self) -> None:
        """Start the judging process. Raises ValueError for a wrong spec or a node without what a reward needs,
        RuntimeError where it can't be started."""
        try:
            self._guard.start()
        except (ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"{error}{self._place}") from error

    def judge(self, task: Task, completions: list[str], labels: list[str]) -> GroupVerdicts:
        """The verdicts of the rewards in `labels`; those without a score name this worker's node."""
        verdicts = [
            [
                replace(verdict, detail=f"{verdict.detail}{self._place}") if verdict.failed else verdict
                for verdict in self._guard.judge(label, task, completions)
            ]
            for label in labels
        ]
        return [dict(zip(labels, row, strict=True)) for row in zip(*verdicts, strict=True)]

    def alive(self) -> None:
        """Return at once; a stopped process never does."""

    def close(self) -> None:
        """End the judging process and remove its files."""
        self._guard.close()


def _node_in_words() -> str:
    """Name this node, empty on a cluster of one: a toolchain that it lacks may be on the others."""
    several = ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1
    return f" (on node {os.uname().nodename})" if several else ""


@dataclass(frozen=True)
class _Job:
    """One group for one worker group."""

    index: int
    task: Task
    completions: list[str]
    labels: list[str]
    submitted: float


@dataclass(frozen=True)
class _JudgedJob:
    """A job with its verdicts, its times and the number of workers it cost."""

    job: _Job
    verdicts: GroupVerdicts
    times: JobTimes
    replaced: int


class _WorkerGroup:
    """Workers with a common queue. A thread for each worker takes jobs from it.

    A worker that dies or hangs is replaced and its job judged again; a job that loses two workers gets `infra_error`
    verdicts.
    """

    def __init__(
        self,
        name: str,
        specs: list[RewardSpec],
        placements: list[Placement],
        config: RewardPoolConfig,
        build: Build,
        slots: Sequence[Mapping[str, Any]],
    ) -> None:
        self.size = config.workers.get(name, 1)
        self.start_seconds = WORKER_START_SECONDS + start_limit(placements)
        self._arguments = (specs, placements[0].pool, config, build)
        # A worker in the place of a lost one takes over its devices.
        self._slots = list(slots[: self.size])
        self._slot_of: dict[Any, Mapping[str, Any]] = {}
        self._closing = Lock()
        self._closed = False
        self._workers: list[Any] = []
        self._idle: SimpleQueue[Any] = SimpleQueue()  # None in the place of a lost worker
        for _ in range(self.size):
            self._idle.put(self._new_worker())
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix=f"rewards-{name}")

    def start(self) -> list["ray.ObjectRef[None]"]:
        """Start the workers' processes; the references are ready when these are."""
        return [worker.start.remote() for worker in self._workers]

    def submit(self, job: _Job) -> "Future[_JudgedJob]":
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
        # Ranks and engines may claim all cores, and the actor only waits for its process, so it claims none.
        with self._closing:
            if self._closed:
                raise RuntimeError("the reward pool was closed")
            slot = self._slots.pop()
            actor: Any = ray.remote(RewardWorker).options(num_cpus=0, max_concurrency=2, **slot)
            self._workers.append(actor.remote(*self._arguments))
            self._slot_of[self._workers[-1]] = slot
            return self._workers[-1]

    def _dismiss(self, worker: Any) -> None:
        ray.kill(worker)
        self._workers.remove(worker)
        self._slots.append(self._slot_of.pop(worker))

    def _run(self, job: _Job) -> _JudgedJob:
        started, reason = time.monotonic(), ""
        worker = self._idle.get_nowait()
        for replaced in range(_ATTEMPTS):
            try:
                if worker is None:
                    worker = self._new_worker()
                    ray.get(worker.start.remote(), timeout=self.start_seconds)
                verdicts = _judge(worker, job)
            except RayError as error:
                reason = str(error)
                self._dismiss(worker)
                worker = None  # a new one for the second try, since the other idle ones may have died of the same cause
            else:
                self._idle.put(worker)
                return _JudgedJob(job, verdicts, JobTimes(job.submitted, started, time.monotonic()), replaced)
        self._idle.put(None)
        loss = Verdict(None, Status.INFRA_ERROR, f"lost {_ATTEMPTS} reward workers, the last because {reason}"[:500])
        verdicts = [dict.fromkeys(job.labels, loss) for _ in job.completions]
        return _JudgedJob(job, verdicts, JobTimes(job.submitted, started, time.monotonic()), _ATTEMPTS)


def _slots(count: int, placements: Iterable[Placement], begun: int) -> list[dict[str, Any]]:
    """Ray options of `count` workers: on all nodes in turn, after `begun` of other groups, or where their GPUs are."""
    if gpus := sum(map(_gpus, placements)):
        return [{"num_gpus": gpus, "scheduling_strategy": "SPREAD"}] * count
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    # They claim nothing, so by SPREAD Ray may put all on one node. Soft: after the loss of a node its workers start
    # elsewhere.
    places = (nodes[number % len(nodes)] for number in range(begun, begun + count))
    return [{"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} for node in places]


def _gpus(placement: Placement) -> float:
    """GPUs that a worker claims."""
    if placement.gpus is None:
        return float(ray.cluster_resources().get("GPU", 0) > 0)
    return placement.gpus


def _refuse_missing_gpus(placements: Iterable[Placement], config: RewardPoolConfig) -> None:
    """Raises ValueError for more GPUs than the cluster has: Ray would wait for them without a message."""
    available = int(ray.cluster_resources().get("GPU", 0))
    claims = {
        placement.label: _gpus(placement) * config.workers.get(placement.worker_group, 1) for placement in placements
    }
    if sum(claims.values()) > available:
        listed = ", ".join(f"{gpus:g} for reward '{label}'" for label, gpus in claims.items() if gpus)
        raise ValueError(
            f"the rewards claim GPUs: {listed}; the cluster has {available}: "
            "lower reward_pool.workers, or set args.gpus, to 0 for a judge on the CPU"
        )


def _judge(worker: Any, job: _Job) -> GroupVerdicts:
    """The worker's verdicts. Raises RayError when it dies or no longer shows that it is alive."""
    ref = worker.judge.remote(job.task, job.completions, job.labels)
    while True:
        try:
            return ray.get(ref, timeout=_HEARTBEAT_SECONDS)
        except GetTimeoutError:
            ray.get(worker.alive.remote(), timeout=_ALIVE_SECONDS)


class RewardPool:
    """Judges groups with every reward that applies to their task, on a running Ray.

    placements: those of the rewards, where `rewards.pool.guard.Judges` has built them already; else they are built here
    once more. resources: Ray options of every worker that queries a model, by its label; the others go anywhere. A
    worker that dies or hangs is replaced and its group judged again; a group that loses two workers gets `infra_error`
    verdicts. A pool belongs to one thread.

    Raises ValueError for wrong specs and for more GPUs than the cluster has, RuntimeError where workers don't start.

    Example:
        pool = RewardPool([RewardSpec(name="math")], RewardPoolConfig(workers={"rule": 4}))
        pool.submit(0, Task("7 * 9?", "63"), ["It is 63.", "It is 62."])
        [right, wrong] = pool.gather()[0]
    """

    def __init__(
        self,
        specs: list[RewardSpec],
        config: RewardPoolConfig,
        build: Build = build_reward,
        placements: Mapping[str, Placement] | None = None,
        resources: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        if placements is None:
            placements = inspect(specs, config, build)
        _refuse_missing_gpus(placements.values(), config)
        self._group_of = {label: placement.worker_group for label, placement in placements.items()}
        self._breaker = CircuitBreaker(max_failure_rate=config.max_failure_rate, window=BREAKER_WINDOW)
        self._groups: dict[int, GroupVerdicts] = {}
        self._jobs: dict[int, list[Future[_JudgedJob]]] = {}
        self._verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
        self._judged: defaultdict[str, list[_JudgedJob]] = defaultdict(list)
        self._waited = 0.0
        self._worker_groups: dict[str, _WorkerGroup] = {}
        begun = 0
        for name in dict.fromkeys(self._group_of.values()):
            members = [spec for spec in specs if self._group_of[spec.label] == name]
            of_members = [placements[spec.label] for spec in members]
            slots = (resources or {}).get(name) or _slots(config.workers.get(name, 1), of_members, begun)
            begun += len(slots)
            self._worker_groups[name] = _WorkerGroup(name, members, of_members, config, build, slots)
        limit = max((workers.start_seconds for workers in self._worker_groups.values()), default=0.0)
        try:
            ray.get([ref for workers in self._worker_groups.values() for ref in workers.start()], timeout=limit)
        except RayError as error:
            self.close()
            if isinstance(error, RayTaskError):
                raise error.cause from None
            raise RuntimeError(f"the reward workers did not start in {limit:g} s: {error}") from error

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        """Queue one group and return at once.

        index: the group's key in the result of `gather`. Raises ValueError where the task names an unknown reward, and
        for an index that was submitted and not gathered yet.
        """
        labels = applicable(task, list(self._group_of))
        if index in self._groups:
            raise ValueError(f"group {index} was submitted twice")
        # In the order of the rewards, whatever the order of judging, so that sums are the same in every run.
        self._groups[index] = [dict.fromkeys(labels, _PENDING) for _ in completions]
        for name, workers in self._worker_groups.items():
            members = [label for label in labels if self._group_of[label] == name]
            if members:
                job = _Job(index, task, completions, members, time.monotonic())
                self._jobs.setdefault(index, []).append(workers.submit(job))

    def gather(
        self, indices: Collection[int] | None = None, meanwhile: Callable[[], None] | None = None
    ) -> dict[int, GroupVerdicts]:
        """Wait for the groups of `indices`, or for all that were submitted, and return their verdicts by index.

        meanwhile: called again and again while the caller waits. Raises RewardsUnavailable when the circuit breaker
        trips.
        """
        began = time.monotonic()
        wanted = [index for index in self._groups if indices is None or index in indices]
        groups = {index: self._groups.pop(index) for index in wanted}
        jobs = [job for index in wanted for job in self._jobs.pop(index, [])]
        while meanwhile is not None and not all(job.done() for job in jobs):
            meanwhile()
        for future in as_completed(jobs):  # ends, since every job does
            self._collect(future.result(), groups)
        self._waited += time.monotonic() - began
        for group in groups.values():
            for verdicts in group:
                for label, verdict in verdicts.items():
                    self._verdicts[label].append(verdict)
        return groups

    def metrics(self) -> dict[str, float]:
        """Metrics of everything gathered since the last call: `reward/<label>/<stat>` (rewards.pool.metrics.summarize),
        `reward_pool/<worker group>/<stat>` (summarize_workers), and `reward_pool/wait_seconds`, the time that `gather`
        took and judging adds to a step."""
        metrics = summarize(self._verdicts)
        if metrics:
            metrics["reward_pool/wait_seconds"] = self._waited
        self._waited = 0.0
        for name, jobs in self._judged.items():
            replaced = sum(job.replaced for job in jobs)
            size = self._worker_groups[name].size
            metrics |= summarize_workers(name, [job.times for job in jobs], workers=size, replaced=replaced)
        self._verdicts.clear()
        self._judged.clear()
        return metrics

    def close(self) -> None:
        """End the workers, and with them the jobs that are not judged yet."""
        for workers in self._worker_groups.values():
            workers.close()

    def _collect(self, judged_job: _JudgedJob, groups: dict[int, GroupVerdicts]) -> None:
        job = judged_job.job
        self._judged[self._group_of[job.labels[0]]].append(judged_job)
        name = job.task.row or repr(job.task.prompt[:60])
        for verdicts, new in zip(groups[job.index], judged_job.verdicts, strict=True):
            verdicts |= new
            for label, verdict in new.items():
                self._breaker.observe(label, verdict, name)
