"""Training conversations from a model's verified answers: rejection sampling, or distillation from another model
(DeepSeek-V3 section 5.1)."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Features, List, Value
from rich.console import Console

from configs.sample import SampleConfig
from pipeline.data.chat import turn_ends
from pipeline.data.prompts import Prompt
from pipeline.models.tokenizer import load_tokenizer
from pipeline.preferences.answers import Answer, AnswerSampler, PromptSet
from pipeline.preferences.sampling import answer_sampler, check_sources, load_prompt_sets
from pipeline.preferences.selection import select_answers
from pipeline.preferences.split import is_held_out_prompt, save_splits
from pipeline.preferences.summary import answer_figures, counts_table
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model

CONVERSATION_FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "source": Value("string"),
        "domain": Value("string"),
        "score": Value("float64"),
    }
)


def run(
    config: SampleConfig, prompt_sets: Mapping[str, PromptSet], sampler: AnswerSampler, folder: Path
) -> dict[str, float]:
    """Sample k answers a prompt, judge them, keep the best of those that ended and passed; split, write `folder`/data.

    Returns the figures by domain: those of `answer_figures`, the share of prompts `solved` by an answer that may be
    kept, answers `kept` and `dropped` by reason, and the kept ones' mean `tokens`. Raises ValueError if no conversation
    is left to train on.
    """
    figures: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    held_out: list[bool] = []
    for name, answered in sampler.answers(prompt_sets).items():
        selected = select_answers(answered, config.domains[name], config.seed)
        rows += [_row(prompt, answer, name) for prompt, answer in selected.kept]
        held_out += [is_held_out_prompt(prompt.task.conversation, config.held_out) for prompt, _ in selected.kept]
        figures |= {f"{name}/{figure}": value for figure, value in answer_figures(answered).items()}
        figures |= {f"{name}/{figure}": value for figure, value in selected.figures().items()}
    figures |= {"kept": float(len(rows)), "held_out": float(sum(held_out))}
    if len(rows) == sum(held_out):
        raise ValueError(f"no conversation is left to train on; figures of the answers: {figures}")
    save_splits(folder / "data", rows, held_out, CONVERSATION_FEATURES)
    return figures


def launch(config: SampleConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the prompts, start engines and judges, and sample into `folder`. Returns the figures by domain."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    prompt_sets = load_prompt_sets(config.domains, config.reward_pool, tokenizer, config.seed, folder)
    figures = run(config, prompt_sets, answer_sampler(config, model, turn_ends(tokenizer), folder), folder)
    columns = ("prompts", "score", "solved", "kept", "tokens", "cut_short", "unjudged")
    rows = {name: [figures.get(f"{name}/{column}", float("nan")) for column in columns] for name in prompt_sets}
    Console().print(counts_table(("domain", *columns), rows))
    return figures


def check(config: SampleConfig) -> None:
    """Raise ValueError for a chat template, source or reward that does not exist."""
    check_template(config.model)
    check_sources(config.domains.values(), config.reward_pool)


def _row(prompt: Prompt, answer: Answer, domain: str) -> dict[str, object]:
    messages = [*prompt.task.conversation, {"role": "assistant", "content": answer.text}]
    return {"messages": messages, "source": prompt.task.row, "domain": domain, "score": answer.score}
