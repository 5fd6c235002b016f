"""What in a step's figures a person should know of without having looked for it."""

from collections.abc import Mapping

COLLAPSED_RATE = 0.2
"""Share of unlike pairs with the same total from which on the mix of rewards hides what it is made of."""


def alarms(metrics: Mapping[str, float]) -> dict[str, str]:
    """By name of the alarm what to say; empty for a step that raises none."""
    raised: dict[str, str] = {}
    collapsed = metrics.get("reward/total/collapsed_rate", 0.0)
    if collapsed > COLLAPSED_RATE:
        raised["collapsed rewards"] = (
            f"of the pairs of completions in a group that the rewards tell apart, {collapsed:.0%} got the same total "
            "and so the same advantage (reward/total/collapsed_rate); choose other weights, or mixing=group"
        )
    return raised
