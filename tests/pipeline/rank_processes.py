"""Ranks of a test as processes of their own, one process group each time."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from rollout.process import free_port

# Ranks are forked from a process that has imported everything, which takes longer than what they do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.pipeline.dropping_ranks",
        "tests.pipeline.train_ranks",
        "tests.pipeline.distill_ranks",
        "tests.pipeline.fp8_ranks",
        "tests.pipeline.layout_ranks",
        "tests.pipeline.load_ranks",
        "tests.pipeline.memory_ranks",
        "tests.pipeline.moments_ranks",
        "tests.pipeline.mtp_ranks",
        "tests.pipeline.replay_ranks",
        "tests.pipeline.reward_ranks",
        "tests.pipeline.sums_ranks",
        "tests.pipeline.sleep_ranks",
    ]
)


def run_ranks(main: Callable[..., None], ranks: int, folder: Path, *arguments: object) -> None:
    """`main(*arguments)`, as text, in `ranks` processes with the group in the environment; what they say is written to
    `folder`."""
    group = {"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    texts = tuple(str(argument) for argument in arguments)
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        FORKS.Process(target=be_rank, args=(main, group | {"RANK": str(rank)}, log, texts))
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=240)
        assert [process.exitcode for process in processes] == [0] * ranks, [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()


def be_rank(main: Callable[..., None], environment: dict[str, str], log: Path, arguments: tuple[str, ...]) -> None:
    """In a process of its own: one rank, whatever it says written to `log`."""
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        main(*arguments)
