"""What in a step's figures a person should know of without having looked for it."""

from collections.abc import Mapping

COLLAPSED_RATE = 0.2
"""Share of unlike pairs with the same total from which on the mix of rewards hides what it is made of."""

LEFT_OUT_RATE = 0.2
"""Share of completions without a reward from which on a step learns from too little of what it sampled."""


def alarms(metrics: Mapping[str, float]) -> dict[str, str]:
    """By name of the alarm what to say; empty for a step that raises none."""
    raised: dict[str, str] = {}
    collapsed = metrics.get("reward/total/collapsed_rate", 0.0)
    if collapsed > COLLAPSED_RATE:
        raised["collapsed rewards"] = (
            f"of the pairs of completions in a group that the rewards tell apart, {collapsed:.0%} got the same total "
            "and so the same advantage (reward/total/collapsed_rate); choose other weights, or mixing=group"
        )
    left_out = metrics.get("reward/total/left_out_rate", 0.0)
    if left_out > LEFT_OUT_RATE:
        rates = {name: rate for name, rate in metrics.items() if name.endswith(("/abstain_rate", "/failure_rate"))}
        worst = max(rates, key=lambda name: rates[name], default="reward/total/left_out_rate")
        raised["completions left out"] = (
            f"{left_out:.0%} of the completions got no reward and teach nothing (most of all {worst}); a row that not "
            "every reward can judge names its own by prompts.reward: column:NAME"
        )
    return raised
