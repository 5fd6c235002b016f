"""Preference data, put together: prompts, engines, judges, files, table."""

from pathlib import Path

from rich.console import Console

from configs.preferences import PreferencesConfig
from configs.stages import Recipe
from pipeline.data.chat import turn_ends
from pipeline.data.comparisons import Comparison, read_comparisons
from pipeline.data.rows import BadRows, report_bad_rows, source_files
from pipeline.launch.sample import ask, check_sources, sampler
from pipeline.models.tokenizer import load_tokenizer
from pipeline.preferences.answers import Asked, Sampler
from pipeline.preferences.summary import table
from pipeline.stages import preferences
from pipeline.weights.resolve import check_template, resolve_model


def check(config: PreferencesConfig) -> None:
    """Raise ValueError for a template, source or reward that isn't there."""
    if config.model is not None:
        check_template(config.model)
    check_sources(list(config.sampled.values()), config.reward_pool)
    for source in config.read.values():
        source_files(source.data.source)


def launch(config: PreferencesConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Build the data set into `folder`/data; its figures."""
    console = Console()
    read = _read(config, folder, console)
    asked: dict[str, Asked] = {}
    speaks: Sampler | None = None
    if config.model is not None:
        model = resolve_model(config.model, workdir=folder)
        tokenizer = load_tokenizer(model, config.model.chat_template)
        asked = ask(config.sampled, config.reward_pool, tokenizer, config.seed, folder)
        speaks = sampler(config, model, turn_ends(tokenizer), folder)
    result, held_out, figures = preferences.run(config, asked, speaks, read, folder)
    console.print(table(result, held_out))
    return figures


def _read(config: PreferencesConfig, folder: Path, console: Console) -> list[Comparison]:
    """What others have compared, under the names of its sources; bad rows are told and kept."""
    read: list[Comparison] = []
    for name, source in config.read.items():
        bad_rows = BadRows()
        rows = read_comparisons(source.data, bad_rows)
        read += [preferences.named(one, name, source.domain) for one in rows]
        bad_rows.check(source.data.max_bad_share)
        report_bad_rows(bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: console.print(text, markup=False))
    return read
