"""Runs online against offline alignment at several seeds: the figures of both, as the table of docs/results.md."""

from pathlib import Path

from jobs.bench.measure import print_table, run_at_seed, stage_figures

_ROWS: dict[str, tuple[str, str, float]] = {
    "requests answered best, % of samples": ("eval_{}", "requests/pass@1_sampled", 100),
    "the same, greedily": ("eval_{}", "requests/pass@1_greedy", 100),
    "score of the rule, mean": ("eval_{}", "requests/score_mean", 1),
    "harm refused, %": ("eval_{}", "manners/refusal_rate", 100),
    "favours refused, %": ("eval_{}", "manners/over_refusal_rate", 100),
    "sums right, % of 300": ("eval_{}", "sums/pass@1_greedy", 100),
}
"""Stage, figure and factor of each row of the table."""
_MODELS = ("sft", "offline", "online")


def online_offline(steps: int) -> dict[str, float]:
    """Runs GRPO on a reward model and DPO on its preferences at the seeds 0 to `steps` - 1, and prints each figure of
    the SFT model, of DPO and of GRPO.

    Returns the figures by seed, row and model. A seed whose run is in runs/ is continued, or read if it is done. Raises
    ValueError if a run ends before its evaluations.
    """
    figures: dict[str, float] = {}
    table = {row: [row] for row in _ROWS}
    for seed in range(steps):
        folder = run_at_seed(str(Path(__file__).with_suffix(".yaml")), "online-offline", seed)
        for row, (stage, figure, factor) in _ROWS.items():
            values = [stage_figures(folder / stage.format(model))[figure] * factor for model in _MODELS]
            figures |= {f"seed {seed}/{row}/{model}": value for model, value in zip(_MODELS, values, strict=True)}
            table[row].append(" / ".join(f"{value:.{0 if factor > 1 else 2}f}" for value in values))
    print_table([" / ".join(_MODELS), *(f"seed {seed}" for seed in range(steps))], table.values())
    return figures
