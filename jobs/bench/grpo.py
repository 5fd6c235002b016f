"""What a step costs on this machine, measured on the real thing: the stages' own code, engines, ranks and judges.

Absolute seconds move with the machine; the ratios are taken within one run.
"""

import json
import random
import statistics
import tempfile
from pathlib import Path

import ray

from configs.grpo import GRPOConfig
from configs.load import load_config
from pipeline.cluster.room import cluster
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.grpo.sync import BUCKET_MIB, probe_sequences, sync_weights
from pipeline.reports.report import read_metrics
from pipeline.run.stage import run_stage
from pipeline.train.spec import TrainSpec
from pipeline.weights.fresh import create_model
from rollout.pool import vllm_baseline_seconds

GRPO_STEP = Path(__file__).with_name("grpo_step.yaml")
PROMPT_LENGTHS = (32, 36, 40, 44, 52, 56, 60, 64)
"""Tokens of the prompts of a step, chat template included."""
TEMPLATE_TOKENS = 3
PHASES = ("generate", "reference", "train", "sync")


def grpo_step(steps: int) -> dict[str, float]:
    """A GRPO step of 8 prompts x 8 completions x 128 tokens on a 25M-parameter DeepSeek-V3 with a frozen reference,
    beside what vLLM alone takes to generate as many tokens, with its own attention and with ours (see
    rollout.pool.vllm_baseline_seconds). Medians over `steps` steps after one that warms up."""
    with tempfile.TemporaryDirectory(prefix="alignyard-bench-") as made:
        folder = Path(made)
        config = _grpo_config(folder, steps)
        run_stage(config, folder / "grpo")
        rows = read_metrics(folder / "grpo")[1:]
        with cluster():
            model = Path(config.model.path)
            prompts = [[3 + (7 * i + j) % 256 for j in range(length)] for i, length in enumerate(PROMPT_LENGTHS)]
            request = (model, config.rollout, prompts, config.sampling.of_policy(), config.group_size)
            alone, expanded = (
                statistics.median(vllm_baseline_seconds(*request, repeats=steps, latent=latent))
                for latent in (True, False)
            )
    figures = {f"{phase}_seconds": _median(rows, f"time/{phase}_seconds") for phase in PHASES}
    step = _median(rows, "time/step_seconds")
    figures["step_seconds"] = step
    figures["other_seconds"] = step - sum(figures[f"{phase}_seconds"] for phase in ("generate", "reference", "train"))
    figures["vllm_alone_seconds"], figures["vllm_alone_expanded_seconds"] = alone, expanded
    figures["step_over_vllm_alone"] = step / alone
    figures["generate_over_vllm_alone"] = figures["generate_seconds"] / alone
    figures["generate_over_vllm_alone_expanded"] = figures["generate_seconds"] / expanded
    figures["sync_share"] = figures["sync_seconds"] / step
    figures["other_share"] = figures["other_seconds"] / step
    return figures


def sync(steps: int) -> dict[str, float]:
    """Weights of the 25M-parameter model from one rank to one engine, proof included; medians of `steps` syncs."""
    with tempfile.TemporaryDirectory(prefix="alignyard-bench-") as made, cluster():
        config = _grpo_config(Path(made), steps)
        model = Path(config.model.path)
        spec = TrainSpec(model, "float32", config.trainer, config.optimizer, 1)
        probe = probe_sequences(264, max_model_len=config.rollout.max_model_len)
        with start_all(
            lambda: start_ranks(spec), lambda: start_rollout(model, config.rollout, dtype="float32", seed=0)
        ) as (policy, rollout):
            rows = [
                sync_weights(policy, rollout, config.sync, probe=probe, version=version) for version in range(steps + 1)
            ][1:]
            sent = sum(
                payload.nbytes
                for bucket in ray.get(policy.put_weights(BUCKET_MIB), timeout=60)
                for payload in bucket.payloads
            )
    figures = {name: _median(rows, f"sync/{name}") for name in ("transfer_seconds", "proof_seconds", "gap_max")}
    figures["mib"] = sent / 2**20
    figures["mib_per_second"] = figures["mib"] / figures["transfer_seconds"]
    return figures


def _grpo_config(folder: Path, steps: int) -> GRPOConfig:
    rng = random.Random(0)
    rows = [
        {"prompt": "".join(rng.choices("abcdefgh 0123456789", k=length - TEMPLATE_TOKENS)), "truth": "7"}
        for length in PROMPT_LENGTHS
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = create_model("moe_25m", 0, folder / "moe_25m")
    overrides = [f"model.path={model}", f"prompts.source.paths=[{prompts}]", f"steps={steps + 1}"]
    return load_config(str(GRPO_STEP), overrides, GRPOConfig).config


def _median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)
