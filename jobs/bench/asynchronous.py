"""Measures what sampling while the ranks train saves: the same GRPO stage with `rollout.max_lag` 0 and 1, in turns."""

from pathlib import Path
from statistics import mean, median

from configs.load import load_config
from configs.stages import Recipe
from jobs.bench.ablations import FIGURE
from jobs.bench.measure import print_table
from pipeline.reports.report import read_metrics
from pipeline.run.stage import run_stage

_RECIPE = Path(__file__).with_suffix(".yaml")
_FORMS = ("synchronous", "asynchronous")
_WARM_UP = 3
"""Steps that are not measured: the first of a form with a lag still samples in turns."""
_SECONDS = {
    "step": "time/step_seconds",
    "generate": "time/generate_seconds",
    "train": "time/train_seconds",
    "sync": "time/sync_seconds",
    "ranks idle": "idle/ranks_seconds",
    "engines idle": "idle/engines_seconds",
}


def asynchronous(steps: int) -> dict[str, float]:
    """Runs both forms of asynchronous.yaml at the seeds 0 to `steps` - 1, in changing order, and prints the medians of
    a step's seconds, the ratio within each seed, and the share of held-out sums that is right greedily.

    The stages lie in runs/asynchronous-seed-N; a seed that is there is continued, or read if it is done. Engine and
    rank have a thread each, so two cores without other load are needed.
    """
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    for seed in range(steps):
        recipe = load_config(str(_RECIPE), [f"seed={seed}"], Recipe).config
        folder = Path("runs") / f"asynchronous-seed-{seed}"
        for name in ("sft", *(_FORMS if seed % 2 == 0 else reversed(_FORMS))):
            run_stage(recipe.stages[name], folder / name, recipe)
        medians = {form: _medians(folder / form) for form in _FORMS}
        for form in _FORMS:
            right = read_metrics(folder / form)[-1][FIGURE]
            figures |= {f"seed {seed}/{form}/{name}": value for name, value in medians[form].items()}
            figures[f"seed {seed}/{form}/right"] = right
            cells = [f"{medians[form][name]:.2f}" for name in _SECONDS]
            rows.append([str(seed), form, *cells, f"{medians[form]['lag']:.2f}", f"{100 * right:.1f}"])
        figures[f"seed {seed}/ratio"] = medians["synchronous"]["step"] / medians["asynchronous"]["step"]
    print_table(["seed", "form", *_SECONDS, "lag", "held-out sums right, %"], rows)
    ratios = [figures[f"seed {seed}/ratio"] for seed in range(steps)]
    shares = {form: mean(figures[f"seed {seed}/{form}/right"] for seed in range(steps)) for form in _FORMS}
    return figures | {"step_ratio": median(ratios)} | {f"{form}_right": share for form, share in shares.items()}


def _medians(folder: Path) -> dict[str, float]:
    """Return the medians of a form's seconds, and of its lag, over the steps without warm-up and validation."""
    rows = [row for row in read_metrics(folder)[_WARM_UP:] if FIGURE not in row]
    medians = {name: median(row[key] for row in rows) for name, key in _SECONDS.items()}
    return medians | {"lag": median(row.get("rollout/lag_mean", 0.0) for row in rows)}
