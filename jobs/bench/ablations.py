"""Runs GRPO in forms that differ in one setting each, at several seeds: the table of ablations in docs/results.md."""

from pathlib import Path
from statistics import mean

from jobs.bench.measure import print_table, run_at_seed, stage_figures

FIGURE = "validation/sums/pass@1_greedy"
QUESTIONS: dict[str, tuple[str, ...]] = {
    "advantage": ("plain", "std"),
    "ratio, 4 updates a batch": ("token_ratio", "sequence_ratio", "completion_ratio"),
    "divergence k3": ("plain", "k3_1e-2", "k3_1e-1", "k3_1"),
    "divergence, unbiased": ("plain", "unbiased_1e-2", "unbiased_1e-1", "unbiased_1"),
    "off-policy mask, 2 updates": ("two_updates", "two_updates_mask"),
    "off-policy mask, 4 updates": ("token_ratio", "four_updates_mask"),
    "off-policy mask, 8 updates": ("eight_updates", "eight_updates_mask"),
    "reward model": ("plain", "reward_model_alone", "reward_model_added", "reward_model_gated"),
}
"""Stages of ablations.yaml that answer each question."""


def ablations(steps: int) -> dict[str, float]:
    """Runs jobs/bench/ablations.yaml at the seeds 0 to `steps` - 1 and prints, for each question, the share of held-out
    sums that the policy of each form gets right greedily: the mean over seeds, the lowest and the highest.

    Returns the shares by seed and stage. A seed whose run is in runs/ is continued, or read if it is done. Raises
    ValueError if a run ends before its last stage.
    """
    recipe = str(Path(__file__).with_suffix(".yaml"))
    stages = list(dict.fromkeys(stage for form in QUESTIONS.values() for stage in form))
    shares: dict[str, list[float]] = {stage: [] for stage in stages}
    for seed in range(steps):
        folder = run_at_seed(recipe, "ablations", seed)
        for stage in stages:
            shares[stage].append(stage_figures(folder / stage)[FIGURE])
    rows = [
        [question if first else "", stage, _summary(shares[stage])]
        for question, form in QUESTIONS.items()
        for first, stage in ((place == 0, stage) for place, stage in enumerate(form))
    ]
    print_table(["question", "form", "held-out sums right, %"], rows)
    return {f"seed {seed}/{stage}": share for stage in stages for seed, share in enumerate(shares[stage])}


def _summary(shares: list[float]) -> str:
    """Write shares as percentages: their mean, and their range."""
    return f"{100 * mean(shares):.1f} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"
