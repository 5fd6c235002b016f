"""Measures the way of sampled tokens from engines to ranks: seconds, bytes and memory of the process that drives both.

The queue, the pools, advantages, packing and rows are the stages' own; tokens, routes and verdicts are made up.
"""

import gc
import pickle
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from configs.grpo import GRPOConfig
from pipeline.cluster.room import cluster
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.trees import Floats, MicroBatch, Tree
from pipeline.grpo.batches import training_batches
from pipeline.grpo.collect import collect
from pipeline.grpo.fleet import Fleet
from pipeline.train.spec import BatchSums, TrainSpec
from pipeline.train.worker import RankBatch, TrainActor, TrainingRanks
from rewards.types import Task, Verdict
from rollout.actors import EngineActor
from rollout.pool import RolloutPool
from rollout.queue import CompletionRequest, Progress
from rollout.types import Completion, StoredGroup

STEP_TOKENS, COMPLETION_TOKENS, GROUP_SIZE = 1_024_000, 2000, 16
PROMPT_IDS = list(range(128))
LAYERS, EXPERTS, TOP_K = 26, 64, 6
"""DeepSeek-V2-Lite's mixture layers, the experts of each, and those of a token."""
SEQUENCES = 8
"""Completions that an engine finishes between two reports."""


def data_plane(steps: int) -> dict[str, float]:
    """Passes a step of a million sampled tokens with routes from two engines to two ranks, `steps` times after one
    whose bytes are counted.

    The figures are of the driver: microseconds of its processors and bytes of what it receives and sends, for each
    token, and MiB by which it grew from the first step that was measured to the last.
    """
    with cluster():
        return pass_tokens(steps, STEP_TOKENS, COMPLETION_TOKENS)


def pass_tokens(steps: int, num_tokens: int, length: int) -> dict[str, float]:
    """Do as `data_plane` with completions of `length` tokens, on a running Ray."""
    config = _config(num_tokens // (length * GROUP_SIZE), length)
    pool, ranks = _CountingPool(config), _CountingRanks(config)
    handles: dict[str, Any] = {"policy": ranks, "rollout": pool, "rewards": _Judges()}
    handles["checkpoints"] = SimpleNamespace(step=0)
    fleet = Fleet(**handles, config=config, folder=Path(), probe=[])
    seconds, resident = list[float](), list[int]()
    for step in range(steps + 1):
        started = time.process_time()
        experience = collect(config, cast(Prompts, _SyntheticPrompts()), fleet, step + 1)
        for batch in training_batches(experience, config, step + 1):
            fleet.update(fleet.prepare(batch))
        seconds.append(time.process_time() - started)
        pool.counts = ranks.counts = False
        del experience
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    pool.close()
    ranks.close()
    sampled = config.prompts_per_step * GROUP_SIZE * length
    return {
        "tokens": float(sampled),
        "driver_us_per_token": 1e6 * median(seconds[1:]) / sampled,
        "driver_bytes_per_token": (pool.num_bytes + ranks.num_bytes) / sampled,
        "driver_growth_mib": (resident[-1] - resident[1]) / 2**20,
    }


def _config(num_prompts: int, length: int) -> GRPOConfig:
    return GRPOConfig.model_validate(
        {
            "type": "grpo",
            "model": {"path": "made-up"},
            "prompts": {"source": {"type": "sums", "size": num_prompts}, "max_prompt_length": len(PROMPT_IDS)},
            "rewards": [{"name": "math"}],
            "steps": 1,
            "prompts_per_step": num_prompts,
            "group_size": GROUP_SIZE,
            "sampling": {"max_tokens": length},
            "optimizer": {"learning_rate": 1e-3},
            "routing_replay": "rollout",
            "rollout": {"max_model_len": length + len(PROMPT_IDS), "num_engines": 2, "max_num_seqs": SEQUENCES},
            "trainer": {"num_ranks": 2},
        }
    )


class _SyntheticPrompts:
    def take(self, step: int, num_prompts: int) -> list[Prompt]:
        return [Prompt(PROMPT_IDS, Task("2 + 2 =", "4"))] * num_prompts


class _Judges:
    """Every other completion of a group is right."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def submit(self, index: int, task: Task, completions: Sequence[str]) -> None:
        self._sizes[index] = len(completions)

    def gather(self, indices: Collection[int], meanwhile: None) -> dict[int, list[dict[str, Verdict]]]:
        return {index: [{"math": Verdict(float(g % 2))} for g in range(self._sizes[index])] for index in indices}

    def metrics(self) -> dict[str, float]:
        return {}


class _SyntheticEngine:
    """Finishes what it is asked for at once."""

    def advance(self, requests: list[CompletionRequest], *_: float) -> Progress[Completion]:
        finished = [(r.key, _completion(r), None if r.key.sample else _routes(len(r.prompt_ids))) for r in requests]
        return Progress(finished, {}, SEQUENCES)


def _completion(request: CompletionRequest) -> Completion:
    rng, length = np.random.default_rng(request.seed), request.sampling.max_tokens
    ids, logprobs = rng.integers(0, 100_000, length).tolist(), (-rng.random(length, np.float32)).tolist()
    return Completion(ids, logprobs, "four" * length, "stop", 0, routed_experts=_routes(length))


def _routes(length: int) -> Any:
    return np.random.default_rng(length).integers(0, EXPERTS, (length, LAYERS, TOP_K), np.int16)


class _SyntheticEngineActor(EngineActor):
    def start(self, *_: Any, **__: Any) -> list[str]:
        self._engine: Any = _SyntheticEngine()
        return ["cpu"]


class _CountingPool(RolloutPool):
    """Engines whose groups are counted in bytes, as they reach the driver."""

    actor = _SyntheticEngineActor

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(Path(), config.rollout, "float32", 0)
        self.counts, self.num_bytes = True, 0

    def groups(self, ticket: int) -> Iterator[StoredGroup]:
        for group in super().groups(ticket):
            if self.counts:
                named = [replace(done, columns=done.columns.binary()) for done in group.completions]
                self.num_bytes += len(pickle.dumps(replace(group, completions=named, routed_experts=None)))
            yield group


class _SyntheticRank:
    """Reads every column of its rows."""

    def reference_logprobs(self, batch: list[MicroBatch]) -> list[Floats]:
        return [row.columns["rollout_logprobs"] for row in batch]

    def forward_backward(self, batch: list[MicroBatch], denominator: float) -> BatchSums:
        loss = sum(float(values_N.sum()) for row in batch for values_N in row.columns.values()) / denominator
        sums = {"mismatch/abs_mean": 0.0, "mismatch/sequence_max": 0.0}
        return BatchSums(sum(len(row.target_N) for row in batch), loss, sums, {})

    def optim_step(self) -> dict[str, float]:
        return {"train/grad_norm": 1.0}


class _SyntheticTrainActor(TrainActor):
    def build(self, spec: TrainSpec, environment: dict[str, str], sharers: int) -> str:
        self.engine: Any = _SyntheticRank()
        self.batches = {}
        return "cpu"


class _CountingRanks(TrainingRanks):
    """Ranks whose batches are counted in bytes, as the driver sends them."""

    actor = _SyntheticTrainActor

    def __init__(self, config: GRPOConfig) -> None:
        spec = TrainSpec(Path(), "float32", config.trainer, config.optimizer, config.steps)
        super().__init__(spec, resources=[{"num_cpus": 0.1}] * config.trainer.num_ranks)
        self.counts, self.num_bytes = True, 0

    def shard(self, trees: list[Tree]) -> RankBatch:
        if self.counts:
            for tree in trees:
                named = [replace(branch, stored=branch.stored.binary()) for branch in tree.branches]
                self.num_bytes += len(pickle.dumps(replace(tree, branches=named, root_stored=None)))
        return super().shard(trees)
