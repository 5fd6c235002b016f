"""Figures and tables of a stage that samples or reads preference data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.data.comparisons import Comparison
from pipeline.preferences.answers import AnsweredPrompt
from pipeline.preferences.filters import FilterResult, longer_answer
from pipeline.preferences.pairs import ranked_answers, unpaired_reason

SHOWN_PAIRS = 3
"""Pairs in the table on the console."""


def answer_figures(answered_prompts: Sequence[AnsweredPrompt]) -> dict[str, float]:
    """Return figures of one source: `prompts`, `answers`, the mean `score`, and the shares `unjudged`, `cut_short`."""
    answers = [answer for answered in answered_prompts for answer in answered.answers]
    scores = [answer.score for answer in answers if answer.score is not None]
    figures = {"prompts": float(len(answered_prompts)), "answers": float(len(answers))}
    if scores:
        figures["score"] = fmean(scores)
    return figures | {
        "unjudged": 1 - len(scores) / max(len(answers), 1),
        "cut_short": sum(not answer.ended for answer in answers) / max(len(answers), 1),
    }


def pair_figures(answered_prompts: Sequence[AnsweredPrompt], paired: Sequence[bool]) -> dict[str, float]:
    """Return `answer_figures`, `left_out` answers, and prompts `without_pair` by reason.

    An answer is left out if it is empty, unjudged or equal to another. paired: whether each prompt has a pair.
    """
    left_out = sum(len(answered.answers) - len(ranked_answers(answered.answers)) for answered in answered_prompts)
    reasons = Counter(
        unpaired_reason(answered) for answered, pair in zip(answered_prompts, paired, strict=True) if not pair
    )
    return (
        answer_figures(answered_prompts)
        | {"left_out": float(left_out), "without_pair": float(reasons.total())}
        | {f"without_pair/{_key(reason)}": float(count) for reason, count in reasons.items()}
    )


def filter_figures(result: FilterResult, held_out: Sequence[bool]) -> dict[str, float]:
    """Return the counts `held_out`, `given` and `kept` (also by source and by domain) and `dropped` (also by reason).

    Of the kept comparisons also the mean `margin`, and `better_longer`: the share, among those of unequal length, whose
    better answer is the longer one.
    """
    comparisons = result.kept + [comparison for _, comparison in result.dropped]
    figures = {
        "given": float(len(comparisons)),
        "kept": float(len(result.kept)),
        "held_out": float(sum(held_out)),
        "dropped": float(len(result.dropped)),
    }
    for reason, count in Counter(reason for reason, _ in result.dropped).items():
        figures[f"dropped/{_key(reason)}"] = float(count)
    for part in ("source", "domain"):
        kept_counts = Counter(getattr(comparison, part) for comparison in result.kept)
        for name, count in sorted(Counter(getattr(comparison, part) for comparison in comparisons).items()):
            figures |= {f"{part}/{name}/given": float(count), f"{part}/{name}/kept": float(kept_counts[name])}
    margins = [comparison.margin for comparison in result.kept if comparison.margin is not None]
    if margins:
        figures["margin"] = fmean(margins)
    longer = [longer_answer(comparison) == 1 for comparison in result.kept if longer_answer(comparison)]
    if longer:
        figures["better_longer"] = fmean(longer)
    return figures


def comparisons_table(result: FilterResult, held_out: Sequence[bool]) -> Group:
    """Tabulate comparisons by source and domain, dropped ones by reason, and a few that were kept."""
    given_counts = Counter((row.source, row.domain) for row in result.kept + [row for _, row in result.dropped])
    counts = Table("source", "domain", "given", "kept", "margin", "better longer", box=None, header_style="bold")
    for (source, domain), count in sorted(given_counts.items()):
        kept_rows = [row for row in result.kept if (row.source, row.domain) == (source, domain)]
        figures = filter_figures(FilterResult(kept_rows, []), [])
        cells = (f"{figures[name]:.3g}" if name in figures else "" for name in ("margin", "better_longer"))
        counts.add_row(source, domain, str(count), str(len(kept_rows)), *cells)
    reasons = Table("dropped", "", box=None, header_style="bold")
    for reason, count in Counter(reason for reason, _ in result.dropped).most_common():
        reasons.add_row(reason, str(count))
    total = Text(f"{len(result.kept) - sum(held_out)} comparisons to train on, {sum(held_out)} held out")
    return Group(counts, *([reasons] if result.dropped else []), total, _pairs_table(result.kept))


def counts_table(head: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """Tabulate figures, a row for each name."""
    lines = Table(*head, box=None, header_style="bold")
    for name, values in rows.items():
        lines.add_row(name, *(f"{value:.4g}" for value in values))
    return lines


def _pairs_table(comparisons: Sequence[Comparison]) -> Table:
    """Tabulate the first comparison of each source, then others."""
    firsts = {comparison.source: comparison for comparison in reversed(comparisons)}
    rest = [comparison for comparison in comparisons if comparison is not firsts[comparison.source]]
    pairs = Table("prompt", "best", "worst", box=None, header_style="bold", style="dim", expand=True)
    for comparison in [*firsts.values(), *rest][:SHOWN_PAIRS]:
        texts = (comparison.messages[-1]["content"], comparison.answers[0], comparison.answers[-1])
        # repr() escapes control characters, which could act on the terminal.
        pairs.add_row(*(Text(repr(text)[1:-1], no_wrap=True, overflow="ellipsis") for text in texts))
    return pairs


def _key(reason: str) -> str:
    return reason.replace(" ", "_")
