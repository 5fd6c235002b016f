"""Measures the mismatch of engine and trainer, and what replaying the engine's routes repairs of it and costs.

The cost is a difference of two long times: on a machine with other load it is lost in the noise.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn

from configs.model import Dtype
from configs.sampling import RolloutConfig, SamplingConfig
from jobs.bench.measure import bench_folder, byte_prompts, medians, seconds_in_turns
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_rollout
from pipeline.data.trees import MicroBatch, micro_batch, stored_tree
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.weights.fresh import create_model
from pipeline.weights.load import load_model
from rollout.pool import RolloutPool
from rollout.types import StoredGroup

TRAINER_DTYPES: dict[Dtype, tuple[Dtype, ...]] = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32")}
"""Dtypes of the trainer by that of the engine."""
ROLLOUT = RolloutConfig(max_model_len=256, max_num_seqs=64)
SAMPLES_PER_PROMPT, MAX_TOKENS = 8, 64


def replay(repeats: int) -> dict[str, float]:
    """Measures mismatch and cost on a random mixture of experts with 25 million parameters.

    The mismatch is that of `study`: of the model as it is, and with all its matrices doubled, where more depends on
    the route. The cost is a share of sampling and training, from medians of `repeats` runs of 8 prompts x 8
    completions x 64 tokens each way.
    """
    with bench_folder() as name, cluster():
        fresh = create_model("moe_25m", 0, Path(name) / "moe_25m")
        doubled = _doubled(fresh, Path(name) / "doubled")
        figures = {f"fresh {name}": value for name, value in study(fresh).items()}
        figures |= {f"doubled {name}": value for name, value in study(doubled).items()}
        return figures | _cost(fresh, repeats)


def study(checkpoint: Path, max_tokens: int = MAX_TOKENS) -> dict[str, float]:
    """Compares the log-probabilities of engine and trainer on sampled tokens, by the dtypes of both. Needs Ray running.

    The figures are mean and largest |trainer - engine| and the k3 estimate of their divergence, with the trainer's
    `own` routes and with `replayed` ones; and the share of known routes, per token and layer, that the trainer's gates
    would not have taken.

    Example:
        study(Path("runs/demo/grpo_reasoning/hf"))["bfloat16/float32 replayed abs_max"]
    """
    figures: dict[str, float] = {}
    for engine_dtype, trainer_dtypes in TRAINER_DTYPES.items():
        with closing(start_rollout(checkpoint, ROLLOUT, dtype=engine_dtype, seed=0, with_routes=True)) as rollout:
            batch = _packed(_generate(rollout, max_tokens))
        for trainer_dtype in trainer_dtypes:
            model = LogprobModel(load_model(checkpoint, trainer_dtype))
            for routes in ("own", "replayed"):
                key = f"{engine_dtype}/{trainer_dtype}"
                with torch.no_grad():
                    values_N = _forward(model, batch, replayed=routes == "replayed").double().numpy()
                gap_N = values_N - batch.columns["rollout_logprobs"]
                figures[f"{key} {routes} abs_mean"] = float(np.abs(gap_N).mean())
                figures[f"{key} {routes} abs_max"] = float(np.abs(gap_N).max())
                figures[f"{key} {routes} k3_mean"] = float((np.expm1(gap_N) - gap_N).mean())
                if routes == "own":
                    figures[f"{key} rerouted_share"] = _rerouted_share(model, batch)
    return figures


def _generate(rollout: RolloutPool, max_tokens: int = MAX_TOKENS) -> list[StoredGroup]:
    return list(rollout.generate(byte_prompts(), SamplingConfig(max_tokens=max_tokens), SAMPLES_PER_PROMPT, seed=0))


def _packed(groups: list[StoredGroup]) -> MicroBatch:
    trees = [stored_tree(group, {index: {} for index in range(SAMPLES_PER_PROMPT)}) for group in groups]
    return micro_batch([tree.filled({ref: ray.get(ref) for ref in tree.references()}) for tree in trees])


def _forward(model: nn.Module, batch: MicroBatch, *, replayed: bool) -> Tensor:
    ids_T, source_N, target_N = (torch.from_numpy(x) for x in (batch.token_ids_T, batch.source_N, batch.target_N))
    assert batch.experts_TLK is not None
    experts_TLK = torch.from_numpy(batch.experts_TLK) if replayed else None
    return model(ids_T, Layout(batch.lengths, batch.parents), source_N, target_N, experts_TLK)


def _rerouted_share(model: LogprobModel, batch: MicroBatch) -> float:
    """Share of known routes for which the model's last pass chose other experts."""
    assert batch.experts_TLK is not None
    own_TLK, engine_TLK = (np.sort(x, axis=-1) for x in (model.routers.chosen_TLK.numpy(), batch.experts_TLK))
    known_TL = (engine_TLK >= 0).all(axis=-1)
    return float((own_TLK != engine_TLK).any(axis=-1)[known_TL].mean())


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
    model = LogprobModel(load_model(checkpoint, "float32"))
    with (
        closing(start_rollout(checkpoint, ROLLOUT, dtype="float32", seed=0)) as plain,
        closing(start_rollout(checkpoint, ROLLOUT, dtype="float32", seed=0, with_routes=True)) as routed,
    ):
        batch = _packed(_generate(routed))
        sample, sample_routes, train, train_replayed = medians(
            seconds_in_turns(
                repeats,
                lambda: _generate(plain),
                lambda: _generate(routed),
                lambda: _forward(model, batch, replayed=False).sum().backward(),
                lambda: _forward(model, batch, replayed=True).sum().backward(),
            )
        )
    return {
        "sample_seconds": sample,
        "sample_routes_seconds": sample_routes,
        "train_seconds": train,
        "train_replayed_seconds": train_replayed,
        "share_of_sampling_and_training": (sample_routes + train_replayed) / (sample + train) - 1,
    }
