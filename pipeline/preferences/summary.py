"""What a stage made of its sources, in figures and for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.data.comparisons import Comparison
from pipeline.preferences.answers import Answered
from pipeline.preferences.filters import Filtered, is_longer
from pipeline.preferences.pairs import unpaired, usable

SHOWN = 3
"""Pairs shown to people."""


def answer_figures(answered: Sequence[Answered]) -> dict[str, float]:
    """Of what was sampled for one source: `prompts` and `answers`, the mean `score` of those judged, and as shares of
    all `unjudged` and `cut_short`."""
    answers = [answer for one in answered for answer in one.answers]
    scores = [answer.score for answer in answers if answer.score is not None]
    figures = {"prompts": float(len(answered)), "answers": float(len(answers))}
    if scores:
        figures["score"] = fmean(scores)
    return figures | {
        "unjudged": 1 - len(scores) / max(len(answers), 1),
        "cut_short": sum(not answer.ended for answer in answers) / max(len(answers), 1),
    }


def pair_figures(answered: Sequence[Answered], paired: Sequence[bool]) -> dict[str, float]:
    """`answer_figures`, and of the prompts without a pair how many for which reason; `left_out` are answers that were
    not judged, are empty or say the same as another."""
    left_out = sum(len(one.answers) - len(usable(one.answers)) for one in answered)
    reasons = Counter(unpaired(one) for one, has_pair in zip(answered, paired, strict=True) if not has_pair)
    return (
        answer_figures(answered)
        | {"left_out": float(left_out), "without_pair": float(reasons.total())}
        | {f"without_pair/{_key(reason)}": float(count) for reason, count in reasons.items()}
    )


def filter_figures(result: Filtered, held_out: Sequence[bool]) -> dict[str, float]:
    """How many comparisons were `given`, `dropped` and `kept`, and of these `held_out`; dropped ones by reason; all by
    source and domain. Of the kept ones the mean `margin` where there are scores, and `better_longer`: the share where
    the better answer is the longer one, of those that differ in length."""
    every = result.kept + [one for _, one in result.dropped]
    figures = {
        "given": float(len(every)),
        "kept": float(len(result.kept)),
        "held_out": float(sum(held_out)),
        "dropped": float(len(result.dropped)),
    }
    for reason, count in Counter(reason for reason, _ in result.dropped).items():
        figures[f"dropped/{_key(reason)}"] = float(count)
    for part, name_of in (("source", lambda one: one.source), ("domain", lambda one: one.domain)):
        given, kept = Counter(map(name_of, every)), Counter(map(name_of, result.kept))
        for name in sorted(given):
            figures |= {f"{part}/{name}/given": float(given[name]), f"{part}/{name}/kept": float(kept[name])}
    margins = [one.margin for one in result.kept if one.margin is not None]
    if margins:
        figures["margin"] = fmean(margins)
    longer = [is_longer(one) == 1 for one in result.kept if is_longer(one)]
    if longer:
        figures["better_longer"] = fmean(longer)
    return figures


def table(result: Filtered, held_out: Sequence[bool]) -> Group:
    """The same for people: a line for each source and domain, then why comparisons were dropped, then some of them."""
    parts: dict[tuple[str, str], list[Comparison]] = {}
    given: Counter[tuple[str, str]] = Counter()
    for one in result.kept + [one for _, one in result.dropped]:
        given[one.source, one.domain] += 1
    for one in result.kept:
        parts.setdefault((one.source, one.domain), []).append(one)
    kept = Table("source", "domain", "given", "kept", "margin", "better longer", box=None, header_style="bold")
    for source, domain in sorted(given):
        of_part = parts.get((source, domain), [])
        figures = filter_figures(Filtered(of_part, []), [])
        cells = (f"{figures[name]:.3g}" if name in figures else "" for name in ("margin", "better_longer"))
        kept.add_row(source, domain, str(given[source, domain]), str(len(of_part)), *cells)
    reasons = Table("dropped", "", box=None, header_style="bold")
    for reason, count in Counter(reason for reason, _ in result.dropped).most_common():
        reasons.add_row(reason, str(count))
    total = Text(f"{len(result.kept) - sum(held_out)} comparisons to train on, {sum(held_out)} held out")
    return Group(kept, *([reasons] if result.dropped else []), total, samples_table(result.kept))


def samples_table(comparisons: Sequence[Comparison]) -> Table:
    """Some comparisons, of different sources first."""
    firsts = {one.source: one for one in reversed(comparisons)}
    others = [one for one in comparisons if one is not firsts[one.source]]
    shown = Table("prompt", "best", "worst", box=None, header_style="bold", style="dim", expand=True)
    for one in [*firsts.values(), *others][:SHOWN]:
        shown.add_row(*map(_shown, (one.messages[-1]["content"], one.answers[0], one.answers[-1])))
    return shown


def counts_table(head: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """A table of figures, a line for each name."""
    lines = Table(*head, box=None, header_style="bold")
    for name, values in rows.items():
        lines.add_row(name, *(f"{value:.4g}" for value in values))
    return lines


def _shown(text: str) -> Text:
    """On one line and harmless to a terminal: what is not printable is written as in a program."""
    return Text(repr(text)[1:-1], no_wrap=True, overflow="ellipsis")


def _key(reason: str) -> str:
    return reason.replace(" ", "_")
