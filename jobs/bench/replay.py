"""What engine and trainer disagree on, and what replaying the engine's routes mends of it and costs.

The cost is a difference of two long times: on a machine that does other things as well it is lost in their noise.
"""

import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.sampling import RolloutConfig, SamplingConfig
from jobs.bench.grpo import PROMPT_LENGTHS
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_rollout
from pipeline.data.trees import Branch, MicroBatch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.weights.fresh import create_model
from pipeline.weights.load import Dtype, load_model
from rollout.pool import RolloutPool
from rollout.types import Group

SIDES: tuple[tuple[Dtype, Dtype], ...] = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
"""Dtypes of engine and trainer."""
ROLLOUT = RolloutConfig(max_model_len=256, max_num_seqs=64)
GROUP_SIZE, TOKENS = 8, 64


def replay(repeats: int) -> dict[str, float]:
    """Mismatch with and without replay on a random mixture of 25 million parameters (see `study`), again with all its
    matrices doubled, where more depends on the route; and the share of sampling and training that replay costs, from
    medians of `repeats` runs of 8 prompts x 8 completions x 64 tokens each way."""
    with tempfile.TemporaryDirectory(prefix="alignyard-bench-") as made, cluster():
        fresh = create_model("moe_25m", 0, Path(made) / "moe_25m")
        doubled = _doubled(fresh, Path(made) / "doubled")
        figures = {f"fresh {name}": value for name, value in study(fresh).items()}
        figures |= {f"doubled {name}": value for name, value in study(doubled).items()}
        return figures | _cost(fresh, repeats)


def study(checkpoint: Path, max_tokens: int = TOKENS) -> dict[str, float]:
    """By dtype of engine and trainer, over sampled tokens: mean and largest |trainer - engine| log-probability and the
    k3 estimate of their divergence, each `own` (the trainer's gates choose) and `replayed`; and the share of known
    routes, of a token in a layer, that the trainer's gates would not have taken. Needs a running Ray."""
    figures: dict[str, float] = {}
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for engine_dtype in dtypes:
        row = _packed(_sample(checkpoint, engine_dtype, max_tokens))
        trainers: list[Dtype] = [trainer for engine, trainer in SIDES if engine == engine_dtype]
        for trainer_dtype in trainers:
            sides = f"{engine_dtype}/{trainer_dtype}"
            model = LogprobModel(load_model(checkpoint, trainer_dtype))
            for way in ("own", "replayed"):
                with torch.no_grad():
                    values_N = _forward(model, row, replayed=way == "replayed").double().numpy()
                gap_N = values_N - row.columns["rollout_logprobs"]
                figures[f"{sides} {way} abs_mean"] = float(np.abs(gap_N).mean())
                figures[f"{sides} {way} abs_max"] = float(np.abs(gap_N).max())
                figures[f"{sides} {way} k3_mean"] = float((np.expm1(gap_N) - gap_N).mean())
                if way == "own":
                    figures[f"{sides} rerouted_share"] = _rerouted(model, row)
    return figures


def _sample(checkpoint: Path, dtype: Dtype, max_tokens: int) -> list[Group]:
    with closing(start_rollout(checkpoint, ROLLOUT, dtype=dtype, seed=0, with_routes=True)) as rollout:
        return _generate(rollout, max_tokens)


def _generate(rollout: RolloutPool, max_tokens: int) -> list[Group]:
    prompts = [[3 + (7 * i + j) % 256 for j in range(length)] for i, length in enumerate(PROMPT_LENGTHS)]
    return list(rollout.generate(prompts, SamplingConfig(max_tokens=max_tokens), GROUP_SIZE, seed=0))


def _packed(groups: list[Group]) -> MicroBatch:
    return micro_batch(
        [
            Tree(
                group.prompt_ids,
                [Branch(c.token_ids, {"rollout_logprobs": c.logprobs}, c.routed_experts) for c in group.completions],
                root_experts=group.routed_experts,
            )
            for group in groups
        ]
    )


def _forward(model: nn.Module, row: MicroBatch, *, replayed: bool) -> Tensor:
    ids_T, source_N, target_N = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    assert row.experts_TLK is not None
    experts_TLK = torch.from_numpy(row.experts_TLK) if replayed else None
    return model(ids_T, Layout(row.lengths, row.parents), source_N, target_N, experts_TLK)


def _rerouted(model: LogprobModel, row: MicroBatch) -> float:
    """Share of known routes of which the model's last pass took another."""
    assert row.experts_TLK is not None
    own_TLK, theirs_TLK = (np.sort(x, axis=-1) for x in (model.routers.chosen_TLK.numpy(), row.experts_TLK))
    known_TL = (theirs_TLK >= 0).all(axis=-1)
    return float((own_TLK != theirs_TLK).any(axis=-1)[known_TL].mean())


def _doubled(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = load_model(checkpoint, "float32")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() >= 2):
            parameter.mul_(2)
    model.save_pretrained(folder)
    return folder


def _cost(checkpoint: Path, repeats: int) -> dict[str, float]:
    """Medians of paired runs, with and without, in turns, after one that warms up."""
    model = LogprobModel(load_model(checkpoint, "float32"))
    seconds: dict[str, list[float]] = {name: [] for name in ("sample", "sample_routes", "train", "train_replayed")}
    with (
        closing(start_rollout(checkpoint, ROLLOUT, dtype="float32", seed=0)) as plain,
        closing(start_rollout(checkpoint, ROLLOUT, dtype="float32", seed=0, with_routes=True)) as routed,
    ):
        row = _packed(_generate(routed, TOKENS))
        for _ in range(repeats + 1):
            started = [time.perf_counter()]
            for step in (
                lambda: _generate(plain, TOKENS),
                lambda: _generate(routed, TOKENS),
                lambda: _forward(model, row, replayed=False).sum().backward(),
                lambda: _forward(model, row, replayed=True).sum().backward(),
            ):
                step()
                started.append(time.perf_counter())
            for name, spent in zip(seconds, np.diff(started), strict=True):
                seconds[name].append(float(spent))
    medians = {f"{name}_seconds": statistics.median(values[1:]) for name, values in seconds.items()}
    plain_seconds = medians["sample_seconds"] + medians["train_seconds"]
    replayed_seconds = medians["sample_routes_seconds"] + medians["train_replayed_seconds"]
    return medians | {"share_of_sampling_and_training": replayed_seconds / plain_seconds - 1}
