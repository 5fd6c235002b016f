"""Measures the growth of a GRPO step with its size: its seconds and its ranks' memory, as powers of what is doubled."""

import json
import math
from pathlib import Path
from statistics import linear_regression, median

from jobs.bench.grpo import MODEL, grpo_config
from jobs.bench.measure import bench_folder, print_table
from pipeline.reports.report import read_metrics
from pipeline.run.stage import run_stage
from pipeline.train.spec import PEAK
from pipeline.weights.architecture import architecture_file

FACTORS = (1, 2, 4)
BASE = {"prompts_per_step": 2, "group_size": 8, "sampling.max_tokens": 64}
"""Settings of the smallest step. `grpo_step.yaml` has the others."""
ARCHITECTURE = {"num_hidden_layers": 6, "n_routed_experts": 16}
"""The dimensions of the model that grow. A token has 4 experts, however many there are."""
ENGINES = "rollout.num_engines"
PARTS = {
    "step": "time/step_seconds",
    "generate": "time/generate_seconds",
    "reference": "time/reference_seconds",
    "train": "time/train_seconds",
    "sync": "time/sync_seconds",
    "peak of a rank": PEAK,
}
"""Metrics that are fitted. Peaks are those of the process above its imports, in GiB."""


def growth(steps: int) -> dict[str, float]:
    """Times GRPO steps with 1, 2 and 4 times the prompts, completions of a prompt, tokens, layers and experts, and with
    one and two engines, each of one thread; prints the exponent of each part of a step.

    An exponent of 1 is twice the time for twice the size, 0 the same time. Medians over `steps` steps after one that
    warms up.
    """
    figures: dict[str, float] = {}
    table: list[list[str]] = []
    base = _measured({}, steps)
    for dimension in (*BASE, *ARCHITECTURE, ENGINES):
        factors = FACTORS[:2] if dimension == ENGINES else FACTORS
        series = [base, *(_measured({dimension: factor}, steps) for factor in factors[1:])]
        exponents = {part: _exponent(factors, [row[part] for row in series]) for part in PARTS}
        figures |= {f"{dimension}/{part}": exponent for part, exponent in exponents.items()}
        table.append([dimension, *(f"{exponent:.2f}" for exponent in exponents.values())])
    print_table(["twice the", *PARTS], table)
    print_table(["smallest step", *PARTS], [["seconds, GiB", *(f"{base[part]:.3g}" for part in PARTS)]])
    return figures


def _measured(factors: dict[str, int], steps: int) -> dict[str, float]:
    """Return the median of each part of a step, with every dimension of `factors` so many times as large."""
    settings = {name: value * factors.get(name, 1) for name, value in BASE.items()}
    with bench_folder() as name:
        folder = Path(name)
        shape = json.loads(architecture_file(MODEL).read_text(encoding="utf-8"))
        shape |= {name: value * factors.get(name, 1) for name, value in ARCHITECTURE.items()}
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        overrides = [f"{name}={value}" for name, value in settings.items()]
        overrides += ["rollout.max_model_len=384", "rollout.threads=1", f"{ENGINES}={factors.get(ENGINES, 1)}"]
        config = grpo_config(folder, steps, overrides, model=str(folder / "config.json"))
        run_stage(config, folder / "grpo")
        rows = read_metrics(folder / "grpo")[1:]
    return {part: median(row[metric] for row in rows) for part, metric in PARTS.items()}


def _exponent(factors: tuple[int, ...], values: list[float]) -> float:
    """The slope of the logarithms."""
    return linear_regression([math.log(factor) for factor in factors], [math.log(value) for value in values]).slope
