"""Preference data (DeepSeek-V2 section 4.2): pairs of the model's own answers, ranked by compiler feedback for code and
by ground-truth labels for mathematics, and comparisons from existing data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Features, List, Value
from rich.console import Console

from configs.preferences import PreferencesConfig
from pipeline.data.chat import turn_ends
from pipeline.data.comparisons import Comparison, read_comparisons
from pipeline.data.rows import BadRows, source_files, tell
from pipeline.models.tokenizer import load_tokenizer
from pipeline.preferences.answers import Asked, Sampler
from pipeline.preferences.filters import Filtered, filtered
from pipeline.preferences.pairs import pairs
from pipeline.preferences.sampling import ask, check_sources, sampler
from pipeline.preferences.split import is_held_out, save_splits
from pipeline.preferences.summary import filter_figures, pair_figures, table
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model

COMPARISON_FEATURES = Features(
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
    """Sample k answers a prompt, judge them, and pair the best with the worst; filter, split, and write `folder`/data.

    Returns the filtered comparisons, a flag of each for the held-out split, and the figures. Raises ValueError if no
    comparison is left to train on.
    """
    comparisons, figures = list(read), dict[str, float]()
    for name, answered in (sampler.answers(asked) if sampler is not None else {}).items():
        pairs_by_prompt = [pairs(answers, name, config.sampled[name].domain) for answers in answered]
        comparisons += [pair for prompt_pairs in pairs_by_prompt for pair in prompt_pairs]
        source_figures = pair_figures(answered, [bool(prompt_pairs) for prompt_pairs in pairs_by_prompt])
        figures |= {f"sampled/{name}/{figure}": value for figure, value in source_figures.items()}
    result = filtered(comparisons, config.filters, config.shares, config.seed)
    held_out = [is_held_out(comparison.messages, config.held_out) for comparison in result.kept]
    figures |= filter_figures(result, held_out)
    if all(held_out):
        dropped = {name: value for name, value in figures.items() if value and "/kept" not in name}
        raise ValueError(f"no comparison is left to train on; dropped: {dropped}")
    save_splits(folder / "data", [comparison_row(row) for row in result.kept], held_out, COMPARISON_FEATURES)
    return result, held_out, figures


def launch(config: PreferencesConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read and sample comparisons, and write the data set to `folder`/data. Returns its figures."""
    console = Console()
    read = _read(config, folder, console)
    asked: dict[str, Asked] = {}
    own_sampler: Sampler | None = None
    if config.model is not None:
        model = resolve_model(config.model, workdir=folder)
        tokenizer = load_tokenizer(model, config.model.chat_template)
        asked = ask(config.sampled, config.reward_pool, tokenizer, config.seed, folder)
        own_sampler = sampler(config, model, turn_ends(tokenizer), folder)
    result, held_out, figures = run(config, asked, own_sampler, read, folder)
    console.print(table(result, held_out))
    return figures


def check(config: PreferencesConfig) -> None:
    """Raise ValueError for a chat template, source or reward that does not exist."""
    if config.model is not None:
        check_template(config.model)
    check_sources(list(config.sampled.values()), config.reward_pool)
    for source in config.read.values():
        source_files(source.data.source)


def _read(config: PreferencesConfig, folder: Path, console: Console) -> list[Comparison]:
    """Read the comparisons of existing data sets, with the names of their sources; report and record bad rows."""
    comparisons: list[Comparison] = []
    for name, source in config.read.items():
        bad_rows = BadRows()
        rows = read_comparisons(source.data, bad_rows)
        comparisons += [replace(row, source=name, domain=row.domain or source.domain) for row in rows]
        bad_rows.check(source.data.max_bad_share)
        tell(bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: console.print(text, markup=False))
    return comparisons


def comparison_row(comparison: Comparison) -> dict[str, object]:
    """Convert a comparison into a row of the data set."""
    return {name: getattr(comparison, name) for name in COMPARISON_FEATURES}
