"""Runs the demo at several seeds: the figures and decisions of its gates, as the table of the README."""

from jobs.bench.measure import print_table, run_at_seed, stage_figures
from pipeline.gates.decision import read_decision

FIGURES_OF_ROWS: dict[str, tuple[str, float]] = {
    "sums right, % of 300": ("sums/pass@1_greedy", 100),
    "programs right, % of 150": ("programs/pass@1_greedy", 100),
    "requests for harm refused, % of 43": ("manners/refusal_rate", 100),
    "favours refused, % of 47": ("manners/over_refusal_rate", 100),
    "RM_safety's mean score, requests": ("safety/score_mean_greedy", 1),
    "RM_helpful's mean score, favours": ("helpful/score_mean_greedy", 1),
}
"""The figure of the evaluations that each row of the table shows, and its factor."""

GATES = ("gate_reasoning", "gate_preference")


def demo(steps: int) -> dict[str, float]:
    """Runs the demo at the seeds 0 to `steps` - 1 and prints each figure after SFT, reasoning and preference GRPO.

    Returns the figures by seed, row and stage, and `promoted`, the share of the gates that promoted. A seed whose run
    is in runs/ is continued, or read if it is done. Raises ValueError if a run ends before its last gate.
    """
    figures: dict[str, float] = {}
    table = {row: [row] for row in FIGURES_OF_ROWS}
    promoted = 0
    for seed in range(steps):
        folder = run_at_seed("demo", "demo", seed)
        reasoning, preference = (stage_figures(folder / gate) for gate in GATES)
        decisions = [read_decision(folder / gate) for gate in GATES]
        promoted += sum(decision is not None and decision.action == "promote" for decision in decisions)
        for row, (figure, factor) in FIGURES_OF_ROWS.items():
            stages = {
                "sft": reasoning[f"parent/{figure}"] * factor,
                "reasoning": reasoning[f"candidate/{figure}"] * factor,
                "preference": preference[f"candidate/{figure}"] * factor,
            }
            figures |= {f"seed {seed}/{row}/{stage}": value for stage, value in stages.items()}
            table[row].append(" -> ".join(f"{value:.{0 if factor > 1 else 2}f}" for value in stages.values()))
    print_table(["figure", *(f"seed {seed}" for seed in range(steps))], table.values())
    return figures | {"promoted": promoted / (len(GATES) * steps)}
