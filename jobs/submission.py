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
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import ray
from ray._private import parameter
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from jobs.command import QUIET
from pipeline.errors import RunStopped

UNREACHABLE_SECONDS = 60.0
"""How long the job server may not answer before it counts as gone."""
STOP_SECONDS = 20
"""What a job that is told to stop has for it, before it is killed."""
RUN_KEY, FOLDER_KEY, STAGE_KEY = "alignyard_run", "alignyard_folder", "alignyard_stage"
"""Metadata of our jobs. The conductor's has no stage."""
RAYS_OWN_LINES = re.compile(r"Running entrypoint for job |[-0-9]+ [:,0-9]+\tINFO job_manager")


@contextmanager
def cluster_with_jobs() -> Iterator[str]:
    """Connects to the cluster this process is a job of, or starts one of this machine that ends with the block or with
    this process. Yields the address of its job server."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" in os.environ:
        context = ray.init(**quiet)
    else:
        # Ray's processes end with the thread that started them: this must be the main one.
        with _agent_on_a_free_port():
            context = ray.init(address="local", include_dashboard=True, dashboard_port=0, **quiet)
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


@contextmanager
def _agent_on_a_free_port() -> Iterator[None]:
    """While the block runs, `ray.init` takes any free port for the agent that starts jobs. It has no argument for it:
    of two clusters on one machine the second would take no jobs, the port being taken."""
    params: Any = parameter.RayParams
    parameter.RayParams = partial(params, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = params


def job_id(run: str, stage: str) -> str:
    """A name for a job that no other has."""
    return "-".join(part for part in (run, stage, uuid4().hex[:6]) if part)


def module_command(module: str, *arguments: str) -> str:
    """The shell's line that runs one of our modules, with this Python where it is there. Nothing that lies in the
    working directory is imported in the place of an installed package."""
    python = shlex.quote(sys.executable)
    run = f"-P -m {module} {' '.join(map(shlex.quote, arguments))}"
    return f"if [ -x {python} ]; then exec {python} {run}; else exec python {run}; fi"


def stage_command(run: Path, stage: str, working_directory: Path) -> str:
    """The shell's line that runs a stage, on the cluster of this process. Ray itself would hand the job the address of
    the cluster that was started last on the machine."""
    address, folder = ray.get_runtime_context().gcs_address, shlex.quote(str(working_directory))
    return (
        f"{{ [ ! -d {folder} ] || cd {folder}; }} && export RAY_ADDRESS={address} && "
        f"{module_command('jobs.stage_job', str(run), stage)}"
    )


class Jobs:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Raises ValueError when nothing answers at `address`, such as http://head:8265."""
        self.address = address
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
        os.environ.pop("RAY_ADDRESS", None)  # it would be taken in the place of the address given
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise ValueError(
                f"--address {address}: the cluster wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where it "
                "is not in ~/.ray/auth_token"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"--address {address}: no Ray job server answers there ({error})") from error
        self._silent_since: float | None = None

    def submit(
        self, command: str, *, job: str, run: str, folder: Path, stage: str = "", environment: Mapping[str, str]
    ) -> None:
        """Starts `command` as the Ray job `job`: a stage of the run, or where `stage` is empty its conductor.

        Raises RunStopped when the cluster has taken no jobs for a minute.
        """
        quiet = {name: os.environ.get(name, value) for name, value in QUIET.items()}
        stopping = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        environment = {**quiet, **environment, **stopping}
        metadata = {RUN_KEY: run, FOLDER_KEY: str(folder), STAGE_KEY: stage}
        deadline = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            try:
                self._client.submit_job(
                    entrypoint=command, submission_id=job, runtime_env={"env_vars": environment}, metadata=metadata
                )
                return
            except (OSError, RuntimeError) as error:  # a cluster that has just started takes jobs a little later
                if time.monotonic() > deadline:
                    raise RunStopped(f"the Ray cluster ({self.address}) takes no jobs: {error}") from error
                time.sleep(0.5)

    def ended(self, job: str) -> JobDetails | None:
        """What is known of a job that has ended; None while it has not.

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
        """Ends jobs, by force where they take too long; returns those that live on all the same."""
        for job in jobs:
            with suppress(OSError, RuntimeError):  # already over, or nobody there: what is left is told below
                self._client.stop_job(job)
        deadline = time.monotonic() + STOP_SECONDS + 30
        left = list(jobs)
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = [job for job in left if self.ended(job) is None]
        return left

    def of_runs(self) -> list[JobDetails]:
        """Our jobs on the cluster, oldest first."""
        ours = [job for job in self._client.list_jobs() if RUN_KEY in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def running(self, folder: Path, *, stages: bool) -> list[str]:
        """The jobs of the run in `folder` that have not ended: those of its stages, or its conductor's."""
        return [
            str(job.submission_id)
            for job in self.of_runs()
            for metadata in [job.metadata or {}]
            if metadata[FOLDER_KEY] == str(folder)
            and bool(metadata[STAGE_KEY]) == stages
            and not job.status.is_terminal()
        ]

    def logs(self, job: str) -> str:
        """What a job has said so far."""
        return _ours(self._client.get_job_logs(job))

    def follow(self, job: str, say: Callable[[str], None]) -> None:
        """Hands on what a job says, until it ends."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                say(_ours(text))

        try:
            asyncio.run(tail())
        except (OSError, RuntimeError) as error:
            say(f"alignyard: the rest of what {job} says is lost here: {error}\n")

    def follow_aside(self, job: str, say: Callable[[str], None]) -> Thread:
        """As `follow`, in a thread."""
        thread = Thread(target=self.follow, args=(job, say), daemon=True)
        thread.start()
        return thread


def _ours(text: str) -> str:
    """Without the lines that Ray puts above."""
    return "".join(line for line in text.splitlines(keepends=True) if not RAYS_OWN_LINES.match(line))
