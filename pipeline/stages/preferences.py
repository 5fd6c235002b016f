"""Preference data (DeepSeek-V2 section 4.2): pairs of the model's own answers, ranked by compiler feedback for code and
by ground-truth labels for mathematics, and comparisons from existing data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, List, Value
from rich.console import Console

from configs.judging import RubricConfig
from configs.preferences import PreferencesConfig
from pipeline.data.chat import turn_ends
from pipeline.data.comparisons import Comparison, read_comparisons
from pipeline.data.judging import judging_rows
from pipeline.data.rows import BadRowError, BadRows, check_files, report_bad_rows
from pipeline.models.tokenizer import load_tokenizer
from pipeline.preferences.answers import AnswerSampler, PromptSet
from pipeline.preferences.filters import FilterResult, filter_comparisons
from pipeline.preferences.pairs import pair_answers
from pipeline.preferences.sampling import answer_sampler, check_sources, load_prompt_sets
from pipeline.preferences.split import is_held_out_prompt, save_splits
from pipeline.preferences.summary import comparisons_table, filter_figures, pair_figures
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model
from rewards.judging.rubric import Rubric

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
COMPARISON_FEATURES = Features(
    {
        "messages": _MESSAGES,
        "answers": List(Value("string")),
        "scores": List(Value("float64")),
        "source": Value("string"),
        "domain": Value("string"),
        "row": Value("string"),
    }
)


JUDGING_FEATURES = Features(
    {
        "prompt": _MESSAGES,
        "truth": {
            "best": Value("int64"),
            "label": Value("float64"),
            "answers": Value("int64"),
            "form": {"form": Value("string"), "lowest": Value("float64"), "highest": Value("float64")},
        },
        "messages": _MESSAGES,
        "source": Value("string"),
        "domain": Value("string"),
        "row": Value("string"),
    }
)


def run(
    config: PreferencesConfig,
    prompt_sets: Mapping[str, PromptSet],
    sampler: AnswerSampler | None,
    read: Sequence[Comparison],
    folder: Path,
) -> tuple[FilterResult, list[bool], dict[str, float]]:
    """Sample k answers a prompt, judge them, set the best against the worst; filter, split, and write `folder`/data.

    Returns the filtered comparisons, a flag of each for the held-out split, and the figures. Raises ValueError if no
    comparison is left to train on.
    """
    comparisons, figures = list(read), dict[str, float]()
    for name, answered_prompts in (sampler.answers(prompt_sets) if sampler is not None else {}).items():
        pairs = [pair_answers(answered, name, config.sampled[name].domain) for answered in answered_prompts]
        comparisons += [pair for of_prompt in pairs for pair in of_prompt]
        of_source = pair_figures(answered_prompts, [bool(of_prompt) for of_prompt in pairs])
        figures |= {f"sampled/{name}/{figure}": value for figure, value in of_source.items()}
    result = filter_comparisons(comparisons, config.filters, config.shares, config.seed)
    held_out = [is_held_out_prompt(comparison.messages, config.held_out) for comparison in result.kept]
    figures |= filter_figures(result, held_out)
    if all(held_out):
        dropped = {name: value for name, value in figures.items() if value and "/kept" not in name}
        raise ValueError(f"no comparison is left to train on; dropped: {dropped}")
    if config.judge is None:
        save_splits(folder / "data", [comparison_row(row) for row in result.kept], held_out, COMPARISON_FEATURES)
    else:
        prompts, sides, of_prompts = judging_prompts(result.kept, held_out, config.judge, config.seed)
        save_splits(folder / "data", prompts, sides, JUDGING_FEATURES)
        figures |= of_prompts
    return result, held_out, figures


def launch(config: PreferencesConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read and sample comparisons, and write the data set to `folder`/data. Returns its figures."""
    console = Console()
    read = _read(config, folder, console)
    prompt_sets: dict[str, PromptSet] = {}
    sampler: AnswerSampler | None = None
    if config.model is not None:
        model = resolve_model(config.model, workdir=folder)
        tokenizer = load_tokenizer(model, config.model.chat_template)
        prompt_sets = load_prompt_sets(config.sampled, config.reward_pool, tokenizer, config.seed, folder)
        sampler = answer_sampler(config, model, turn_ends(tokenizer), folder)
    result, held_out, figures = run(config, prompt_sets, sampler, read, folder)
    console.print(comparisons_table(result, held_out))
    return figures


def check(config: PreferencesConfig) -> None:
    """Raise ValueError for a chat template, source or reward that does not exist."""
    if config.model is not None:
        check_template(config.model)
    check_sources(config.sampled.values(), config.reward_pool)
    for source in config.read.values():
        check_files(source.data.source)


def _read(config: PreferencesConfig, folder: Path, console: Console) -> list[Comparison]:
    """Read the comparisons of existing data sets, with the names of their sources; report and record bad rows."""
    comparisons: list[Comparison] = []
    for name, source in config.read.items():
        bad_rows = BadRows()
        rows = read_comparisons(source.data, bad_rows)
        comparisons += [replace(row, source=name, domain=row.domain or source.domain) for row in rows]
        bad_rows.check(source.data.max_bad_share)
        report_bad_rows(bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: console.print(text, markup=False))
    return comparisons


def judging_prompts(
    comparisons: Sequence[Comparison], held_out: Sequence[bool], judge: RubricConfig, seed: int
) -> tuple[list[dict[str, Any]], list[bool], dict[str, float]]:
    """Return prompts that ask for verdicts on the comparisons, a flag of each for the held-out split, and figures.

    Raises ValueError if no prompt is left to train on, naming the first reason.
    """
    rubric = Rubric.model_validate(judge.model_dump())
    prompts, sides, bad_rows = list[dict[str, Any]](), list[bool](), BadRows()
    for comparison, side in zip(comparisons, held_out, strict=True):
        try:
            rows = judging_rows(comparison, rubric, seed)
        except BadRowError as error:
            bad_rows.add(comparison.row, error)
        else:
            prompts += rows
            sides += [side] * len(rows)
    if all(sides):
        raise ValueError(f"judge: no prompt is left to train on; {bad_rows.summary()}")
    dropped = {f"judge/dropped/{reason.replace(' ', '_')}": float(n) for reason, n in bad_rows.counts.items()}
    return prompts, sides, {"judge/prompts": float(len(prompts))} | dropped


def comparison_row(comparison: Comparison) -> dict[str, object]:
    """Convert a comparison into a row of the data set."""
    return {name: getattr(comparison, name) for name in COMPARISON_FEATURES}
