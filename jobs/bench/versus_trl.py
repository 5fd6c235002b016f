"""Measures a GRPO step of ours beside one of TRL's: the same checkpoint, prompts and number of tokens, in turns.

TRL generates with `transformers`, since its vLLM mode does not run on a CPU, and computes all rows of a step in one
batch, the fastest of the batch sizes 8, 16, 32 and 64 that were tried on two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from jobs.bench.grpo import grpo_config
from jobs.bench.measure import bench_folder
from pipeline.reports.report import read_metrics
from pipeline.run.stage import run_stage

TRL = "trl==1.16.0"
TURNS = 2
TRL_STEP_SECONDS = 1800
"""Seconds after which a step of TRL counts as hanging."""


def versus_trl(steps: int) -> dict[str, float]:
    """Times `steps` GRPO steps of ours and of TRL's in each of two turns, after one step each that warms up.

    Both take 8 prompts x 8 completions x 128 tokens on a 25M-parameter DeepSeek-V3 in float32, with a frozen reference
    and one update. TRL is installed into a temporary folder, beside this environment's torch and transformers. Raises
    RuntimeError if it can't be installed or fails.
    """
    ours: list[float] = []
    theirs: list[float] = []
    with bench_folder() as name:
        folder = Path(name)
        config = grpo_config(folder, steps)
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder / 'trl'}", TRL])
        settings = {
            "num_generations": config.group_size,
            "max_completion_length": config.sampling.max_tokens,
            "generation_kwargs": {"min_new_tokens": config.sampling.max_tokens},
            "per_device_train_batch_size": config.prompts_per_step * config.group_size,
            "gradient_checkpointing": False,
            "beta": config.objective.kl_coef,
            "learning_rate": config.optimizer.learning_rate,
        }
        program = str(Path(__file__).with_name("trl_step.py"))
        command = [sys.executable, program, config.model.path, str(folder / "prompts.jsonl"), str(steps)]
        for turn in range(TURNS):
            run_stage(config, folder / f"grpo-{turn}")
            ours += [row["time/step_seconds"] for row in read_metrics(folder / f"grpo-{turn}")[1:]]
            output = _run(
                [*command, json.dumps(settings)], PYTHONPATH=str(folder / "trl"), seconds=TRL_STEP_SECONDS * (steps + 1)
            )
            theirs += json.loads(output.splitlines()[-1])
    return {
        "alignyard_step_seconds": median(ours),
        "trl_step_seconds": median(theirs),
        "alignyard_over_trl": median(ours) / median(theirs),
    }


def _run(command: list[str], seconds: float = 300, **environment: str) -> str:
    """Run a program and return its output. Raises RuntimeError with the end of its errors if it fails."""
    completed = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    if completed.returncode:
        raise RuntimeError(f"'{' '.join(command[:4])} ...' failed: {completed.stderr[-2000:]}")
    return completed.stdout
