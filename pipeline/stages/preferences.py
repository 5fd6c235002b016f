"""Preference data (DeepSeek-V2 section 4.2): pairs of the model's own answers, of code by compiler feedback and of
mathematics by ground-truth labels, and comparisons that others have made."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Features, List, Value

from configs.preferences import PreferencesConfig
from pipeline.data.comparisons import Comparison
from pipeline.preferences.answers import Asked, Sampler
from pipeline.preferences.filters import Filtered, filtered
from pipeline.preferences.pairs import pairs
from pipeline.preferences.split import is_held_out, save_splits
from pipeline.preferences.summary import filter_figures, pair_figures

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "answers": List(Value("string")),
        "scores": List(Value("float64")),
        "source": Value("string"),
        "domain": Value("string"),
        "row": Value("string"),
    }
)


def run(
    config: PreferencesConfig,
    asked: Mapping[str, Asked],
    sampler: Sampler | None,
    read: Sequence[Comparison],
    folder: Path,
) -> tuple[Filtered, list[bool], dict[str, float]]:
    """Sample k answers a prompt, judge them, set the best against the worst; filter, split, and write `folder`/data.

    Returns what was kept and dropped, which of the kept ones are held out, and the figures. Raises ValueError where
    nothing is left to train on.
    """
    comparisons, figures = list(read), dict[str, float]()
    for name, answered in (sampler.answers(asked) if sampler is not None else {}).items():
        made = [pairs(one, name, config.sampled[name].domain) for one in answered]
        comparisons += [pair for of_prompt in made for pair in of_prompt]
        of_source = pair_figures(answered, [bool(of_prompt) for of_prompt in made])
        figures |= {f"sampled/{name}/{figure}": value for figure, value in of_source.items()}
    result = filtered(comparisons, config.filters, config.shares, config.seed)
    held_out = [is_held_out(one.messages, config.held_out) for one in result.kept]
    figures |= filter_figures(result, held_out)
    if not len(held_out) > sum(held_out):
        told = {name: value for name, value in figures.items() if value and "/kept" not in name}
        raise ValueError(f"no comparison is left to train on; what became of them: {told}")
    save_splits(folder / "data", [_row(one) for one in result.kept], held_out, FEATURES)
    return result, held_out, figures


def named(comparison: Comparison, source: str, domain: str) -> Comparison:
    """A comparison that was read, under the names its source has here; a domain of its own stays."""
    return replace(comparison, source=source, domain=comparison.domain or domain)


def _row(one: Comparison) -> dict[str, object]:
    return {name: getattr(one, name) for name in FEATURES}
