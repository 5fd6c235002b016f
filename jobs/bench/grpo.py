"""Measures a GRPO step and a weight sync: the stages' own code with real engines, ranks and judges.

Absolute seconds depend on the machine; the ratios are taken within one run.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from configs.grpo import GRPOConfig
from configs.load import load_config
from jobs.bench.measure import PROMPT_LENGTHS, bench_folder, byte_prompts, seconds
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.grpo.sync import probe_sequences, sync_weights
from pipeline.planner.architecture import read_architecture
from pipeline.reports.report import read_metrics
from pipeline.run.stage import run_stage
from pipeline.train.spec import TrainSpec
from pipeline.weights.architecture import architecture_file
from pipeline.weights.fresh import create_model
from rollout.checkpoint import checkpoint_shapes
from rollout.pool import vllm_baseline_seconds

GRPO_STEP = Path(__file__).with_name("grpo_step.yaml")
TEMPLATE_TOKENS = 3
PHASES = ("generate", "reference", "train", "sync")
PRODUCT_SIDE = 2048
"""Rows and columns of the product that measures this machine's rate."""
MODEL = "moe_25m"
PASSES = 4
"""Forward passes that a step's training and reference cost: a backward pass costs two."""


def grpo_step(steps: int) -> dict[str, float]:
    """Times a GRPO step of 8 prompts x 8 completions x 128 tokens on a 25M-parameter DeepSeek-V3 with a reference.

    Beside it, vLLM alone generates as many tokens, with its own attention and with ours (see
    rollout.pool.vllm_baseline_seconds). Medians over `steps` steps after one that warms up.
    """
    with bench_folder() as name:
        folder = Path(name)
        config = grpo_config(folder, steps)
        run_stage(config, folder / "grpo")
        rows = read_metrics(folder / "grpo")[1:]
        with cluster():
            request = (Path(config.model.path), config.rollout, byte_prompts(), config.sampling)
            alone, expanded = (
                median(vllm_baseline_seconds(*request, config.group_size, repeats=steps, latent=latent))
                for latent in (True, False)
            )
    figures = {f"{phase}_seconds": _median(rows, f"time/{phase}_seconds") for phase in PHASES}
    step = _median(rows, "time/step_seconds")
    bound = _bound_seconds(config)
    other = step - sum(figures[f"{phase}_seconds"] for phase in ("generate", "reference", "train"))
    return figures | {
        "step_seconds": step,
        "other_seconds": other,
        "vllm_baseline_seconds": alone,
        "vllm_alone_expanded_seconds": expanded,
        "step_over_vllm_alone": step / alone,
        "generate_over_vllm_alone": figures["generate_seconds"] / alone,
        "generate_over_vllm_alone_expanded": figures["generate_seconds"] / expanded,
        "bound_seconds": bound,
        "train_and_reference_over_bound": (figures["train_seconds"] + figures["reference_seconds"]) / bound,
        "sync_share": figures["sync_seconds"] / step,
        "other_share": other / step,
    }


def sync_step(steps: int) -> dict[str, float]:
    """Times a sync of the 25M-parameter model from one rank to one engine, with its proof; medians of `steps` syncs."""
    with bench_folder() as folder, cluster():
        config = grpo_config(Path(folder), steps)
        model = Path(config.model.path)
        spec = TrainSpec(model, "float32", config.trainer, config.optimizer, 1)
        mib = sum(4 * math.prod(shape) for shape in checkpoint_shapes(model).values()) / 2**20
        probe = probe_sequences(264, max_model_len=config.rollout.max_model_len)
        with start_all(
            lambda: start_ranks(spec), lambda: start_rollout(model, config.rollout, dtype="float32", seed=0)
        ) as (ranks, rollout):
            rows = [
                sync_weights(ranks, rollout, config.sync, probe=probe, version=version) for version in range(steps + 1)
            ]
    names = ("transfer_seconds", "proof_seconds", "gap_max", "rank_held_mib", "worker_held_mib")
    figures = {name: _median(rows[1:], f"sync/{name}") for name in names}
    return figures | {"mib": mib, "mib_per_second": mib / figures["transfer_seconds"]}


def grpo_config(folder: Path, steps: int, overrides: Sequence[str] = (), model: str = MODEL) -> GRPOConfig:
    """Write the model and the prompts of the benchmark into `folder`; return the configuration of `steps` + 1 steps."""
    rng = random.Random(0)
    rows = [
        {"prompt": "".join(rng.choices("abcdefgh 0123456789", k=length - TEMPLATE_TOKENS)), "truth": "7"}
        for length in PROMPT_LENGTHS
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = create_model(model, 0, folder / MODEL)
    own = [f"model.path={path}", f"prompts.source.paths=[{prompts}]", f"steps={steps + 1}"]
    return load_config(str(GRPO_STEP), [*own, *overrides], GRPOConfig).config


def _bound_seconds(config: GRPOConfig) -> float:
    """Return the seconds of the floating-point operations of training and reference at the rate of a large product,
    with each prompt computed once for its group."""
    model = read_architecture(architecture_file(MODEL))
    completions = config.prompts_per_step * config.group_size * config.sampling.max_tokens
    context = sum(PROMPT_LENGTHS) / len(PROMPT_LENGTHS) + config.sampling.max_tokens / 2
    flops = PASSES * (sum(PROMPT_LENGTHS) + completions) * (2 * model.active + context * model.attention_flops)
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE)
    product_seconds = median(seconds(lambda: a @ a) for _ in range(9))
    return flops / (2 * PRODUCT_SIDE**3 / product_seconds)


def _median(rows: list[dict[str, float]], name: str) -> float:
    return median(row[name] for row in rows)
