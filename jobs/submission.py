"""Ray jobs: the cluster they run on, and its job server."""

import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from jobs.command import QUIET_ENVIRONMENT
from pipeline.cluster.room import quoted_interpreter, ray_cluster
from pipeline.disk.home import restrict_token
from pipeline.errors import RunStopped

UNREACHABLE_SECONDS = 60.0
"""A job server that has not answered for this long counts as gone."""
REQUEST_SECONDS = 20.0
"""Longest wait for an answer of the job server, and for each part of a file that it takes. Without its head, Ray ends
this process after 60 s, and a request that still waits would keep the conductor from saying so."""
GRACE_SECONDS = 20
"""Time that a job has to stop before Ray kills it."""
RUN_KEY, FOLDER_KEY, STAGE_KEY = "alignyard_run", "alignyard_folder", "alignyard_stage"
"""Metadata of our jobs."""
RAY_LOG_LINE = re.compile(r"Running entrypoint for job |[-0-9]+ [:,0-9]+\tINFO job_manager")
"""Lines that Ray itself writes into a job's log."""


@contextmanager
def cluster_with_jobs() -> Iterator[str]:
    """Connects to the cluster whose job this process is, or starts one here; yields the address of its job server.

    A new cluster ends with the block, or with this process.
    """
    with ray_cluster(include_dashboard=True) as context:
        yield f"http://{context.dashboard_url}"


def job_id(run: str, stage: str) -> str:
    """A unique name for a job."""
    return "-".join(part for part in (run, stage, uuid4().hex[:6]) if part)


def module_command(module: str, *arguments: str) -> str:
    """The shell command that runs one of our modules, with this Python if it exists on the job's machine.

    `-P` keeps Python from importing modules out of the working directory.
    """
    python = shlex.quote(sys.executable)
    options = f"-P -m {module} {' '.join(map(shlex.quote, arguments))}"
    return f"if [ -x {python} ]; then exec {python} {options}; else exec python {options}; fi"


def stage_command(run: Path, stage: str, working_directory: Path) -> str:
    """The shell command that runs a stage on this process's cluster.

    It sets RAY_ADDRESS, since Ray would give the job the cluster that was started last on the machine.
    """
    address, folder = ray.get_runtime_context().gcs_address, shlex.quote(str(working_directory))
    return f"cd {folder} && export RAY_ADDRESS={address} && {module_command('jobs.stage_job', str(run), stage)}"


@dataclass(frozen=True, slots=True)
class RunJob:
    """A Ray job of a run: of one of its stages, or of its conductor if `stage` is empty."""

    id: str
    run: str
    folder: str
    stage: str
    state: str
    is_over: bool
    started: float
    """Seconds since the epoch, as `ended`."""
    ended: float | None


class _Client(JobSubmissionClient):
    """A client whose requests end: Ray 2.60's wait for an answer without limit."""

    def _do_request(self, *args: Any, **options: Any) -> Any:
        return super()._do_request(*args, timeout=REQUEST_SECONDS, **options)


class Jobs:
    """The job server of a cluster.

    Example:
        server = Jobs("http://head:8265")
        server.stop(server.running(Path("/shared/runs/demo"), stages=True))
    """

    def __init__(self, address: str) -> None:
        """Raises ValueError if no job server answers at `address`, such as http://head:8265."""
        self.address = address
        restrict_token()
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
        os.environ.pop("RAY_ADDRESS", None)  # the client would prefer it to `address`
        try:
            self._client = _Client(address)
        except AuthenticationError as error:
            raise ValueError(
                f"--address {address}: the cluster wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where it "
                "is not in ~/.ray/auth_token"
            ) from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--address {address}: no Ray job server answers there ({error})") from error
        self._silent_since: float | None = None

    def submit(
        self,
        command: str,
        *,
        job: str,
        run: str,
        folder: Path,
        stage: str = "",
        environment: Mapping[str, str],
        package: Path | None = None,
    ) -> None:
        """Starts `command` as the Ray job `job` of a run: of a stage, or of the conductor if `stage` is empty.

        package: a folder here, in a copy of which the job starts. Raises RunStopped when the cluster has accepted no
        job for a minute.
        """
        quiet = {name: os.environ.get(name, value) for name, value in QUIET_ENVIRONMENT.items()}
        stopping = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_SECONDS)}
        runtime_env: dict[str, Any] = {"env_vars": {**quiet, **environment, **stopping}, **quoted_interpreter()}
        runtime_env |= {"working_dir": str(package)} if package else {}
        metadata = {RUN_KEY: run, FOLDER_KEY: str(folder), STAGE_KEY: stage}
        deadline = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            try:
                self._client.submit_job(
                    entrypoint=command, submission_id=job, runtime_env=runtime_env, metadata=metadata
                )
                return
            except (OSError, RuntimeError) as error:  # a cluster that has just started does not accept jobs yet
                if time.monotonic() > deadline:
                    raise RunStopped(f"the Ray cluster ({self.address}) takes no jobs: {error}") from error
                time.sleep(0.5)

    def ended(self, job: str) -> JobDetails | None:
        """The details of a job that has ended, or None while it runs or the server does not answer.

        Raises RunStopped when the server has not answered for a minute.
        """
        try:
            details = self._client.get_job_info(job)
        except (OSError, RuntimeError) as error:
            self._silent_since = self._silent_since or time.monotonic()
            if time.monotonic() - self._silent_since > UNREACHABLE_SECONDS:
                raise RunStopped(f"the job server of the Ray cluster ({self.address}) is gone: {error}") from error
            return None
        self._silent_since = None
        return details if details.status.is_terminal() else None

    def stop(self, jobs: Sequence[str]) -> list[str]:
        """Ends jobs, and kills those that take too long. Returns the jobs that still run."""
        for job in jobs:
            with suppress(OSError, RuntimeError):  # it has ended, or the server is gone: the loop below finds out
                self._client.stop_job(job)
        deadline = time.monotonic() + GRACE_SECONDS + 30
        alive = list(jobs)
        while alive and time.monotonic() < deadline:
            time.sleep(0.2)
            alive = [job for job in alive if self.ended(job) is None]
        return alive

    def of_runs(self) -> list[RunJob]:
        """All jobs of runs on the cluster, oldest first."""
        jobs = [
            RunJob(
                id=str(job.submission_id),
                run=labels[RUN_KEY],
                folder=labels[FOLDER_KEY],
                stage=labels[STAGE_KEY],
                state=job.status.lower(),
                is_over=job.status.is_terminal(),
                started=(job.start_time or 0) / 1000,
                ended=job.end_time / 1000 if job.end_time else None,
            )
            for job in self._client.list_jobs()
            if RUN_KEY in (labels := job.metadata or {})
        ]
        return sorted(jobs, key=lambda job: job.started)

    def running(self, folder: Path, *, stages: bool) -> list[str]:
        """The unfinished jobs of the run in `folder`: those of its stages, or its conductor's."""
        jobs = [job for job in self.of_runs() if job.folder == str(folder) and bool(job.stage) == stages]
        return [job.id for job in jobs if not job.is_over]

    def logs(self, job: str) -> str:
        """A job's output so far."""
        return _without_ray_lines(self._client.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> None:
        """Passes a job's output to `write`, until the job ends."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                write(_without_ray_lines(text))

        try:
            asyncio.run(tail())
        except (OSError, RuntimeError) as error:
            write(f"alignyard: the rest of the output of {job} is lost here: {error}\n")


def _without_ray_lines(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not RAY_LOG_LINE.match(line))
