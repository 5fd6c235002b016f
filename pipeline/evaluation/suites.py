"""Suites run against handles: tasks judged by a reward, and texts scored by their likelihood.

What could not be judged is no failure: it leaves every denominator and is counted as `unjudged_rate`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import rich
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from configs.sampling import SamplingConfig
from configs.stages import TaskSuite, TextSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.statistics import bits_per_byte, pass_at_k, wilson_interval
from pipeline.folder import write_json_lines
from rewards.types import Status, Task, Verdict
from rollout.types import Group

WINDOWS_PER_BATCH = 64

Mode = Literal["greedy", "sampled"]
T = TypeVar("T")


class Rollout(Protocol):
    """What speaks and scores: the part of `rollout.pool.RolloutPool` that an evaluation needs."""

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Groups as they finish; `index` is the prompt's place."""
        ...

    def prompt_logprobs(self, prompts: list[list[int]]) -> Sequence[Sequence[Sequence[float]]]:
        """Per engine and prompt the log-probability of each token after the first."""
        ...


class Judge(Protocol):
    """What judges: the part of `rewards.pool.RewardPool` that an evaluation needs."""

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        """Hand over one group."""
        ...

    def gather(self) -> Mapping[int, Sequence[Mapping[str, Verdict]]]:
        """Per group and completion its verdicts by reward."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One judged completion; `index` is its prompt's place in the suite, `row` the task's in its source."""

    index: int
    row: str
    prompt: str
    truth: Any
    completion: str
    mode: Mode
    score: float | None
    status: Status
    outcome: str
    detail: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Figures by name, and for a task suite every completion behind them: the greedy ones, then the sampled ones,
    each in the order of the prompts."""

    figures: dict[str, float]
    records: list[Record] = field(default_factory=list[Record])


def run_task_suite(
    suite: TaskSuite,
    prompts: Prompts,
    rollout: Rollout,
    rewards: Judge,
    sampling: SamplingConfig,
    seed: int,
    path: Path,
) -> SuiteResult:
    """One greedy and `suite.samples` sampled completions of every prompt, judged, and written to `path` as JSON lines.

    The greedy pass takes only max_tokens from `sampling`. For the figures see `task_figures`. Raises whatever the
    handles raise (RewardsUnavailable when judging breaks down).
    """
    greedy = SamplingConfig(temperature=0.0, max_tokens=sampling.max_tokens)
    records = _speak(suite, prompts, rollout, rewards, greedy, 1, seed, "greedy")
    records += _speak(suite, prompts, rollout, rewards, sampling, suite.samples, seed, "sampled")
    write_json_lines(path, [asdict(record) for record in records])
    return SuiteResult(task_figures(records, suite.pass_score, suite.k), records)


def task_figures(records: Sequence[Record], pass_score: float, ks: Sequence[int]) -> dict[str, float]:
    """Figures of a task suite; a pass is a score of at least `pass_score`, and only judged completions count.

    `pass@1_greedy` with `_low` and `_high`, the ends of its 95 % Wilson interval; `pass@1_sampled`, the mean over
    prompts of their share of passes; `pass@<k>`, the mean over prompts with at least k judged samples. A figure is
    absent where nothing was judged. Over all completions: `mean_length` in tokens, `truncated_rate`, `unjudged_rate`.
    """
    figures: dict[str, float] = {}
    greedy = [record.score >= pass_score for record in records if record.mode == "greedy" and record.score is not None]
    if greedy:
        low, high = wilson_interval(sum(greedy), len(greedy))
        figures |= {
            "pass@1_greedy": sum(greedy) / len(greedy),
            "pass@1_greedy_low": low,
            "pass@1_greedy_high": high,
        }
    counts: list[tuple[int, int]] = []  # judged samples and passes of each prompt
    sampled = [record for record in records if record.mode == "sampled"]
    for _, of_prompt in groupby(sampled, key=lambda record: record.index):
        passes = [record.score >= pass_score for record in of_prompt if record.score is not None]
        counts.append((len(passes), sum(passes)))
    for name, k in [("pass@1_sampled", 1), *((f"pass@{k}", k) for k in ks)]:
        estimates = [pass_at_k(judged, passed, k) for judged, passed in counts if judged >= k]
        if estimates:
            figures[name] = sum(estimates) / len(estimates)
    if records:
        figures |= {
            "mean_length": sum(record.num_tokens for record in records) / len(records),
            "truncated_rate": sum(record.truncated for record in records) / len(records),
            "unjudged_rate": sum(record.score is None for record in records) / len(records),
        }
    return figures


def run_text_suite(suite: TextSuite, tokenizer: PreTrainedTokenizerFast, rollout: Rollout) -> SuiteResult:
    """`bits_per_byte` of a UTF-8 file, and `nll_mean` in nats a token.

    Every token is scored once, from the tokens before it in its window, whose first is the last of the window before.
    The very first is predicted from the beginning-of-sequence token; where the tokenizer has none it is not scored, and
    its bytes don't count. Raises ValueError when the file is missing, empty, not UTF-8, a single token, or changed by
    the tokenizer, which would then be scored on another text.
    """
    path = Path(suite.path)
    if not path.is_file():
        raise ValueError(f"path='{path}': no such file; give a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path='{path}' is not UTF-8: {error}; convert the file") from error
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids = cast(list[int], encoding["input_ids"])
    _check_unchanged(path, text, tokenizer, token_ids)
    if tokenizer.bos_token_id is None:
        text = text[encoding["offset_mapping"][0][1] :]
    else:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    if len(token_ids) < 2:
        raise ValueError(f"path='{path}' is a single token, and nothing comes before it to predict it from")
    nll = 0.0
    windows = [
        token_ids[start : start + suite.window_tokens]
        for start in range(0, len(token_ids) - 1, suite.window_tokens - 1)
    ]
    batches = range(0, len(windows), WINDOWS_PER_BATCH)
    for first in _watched(batches, path.name, len(batches)):
        # Every engine scores the batch and all hold the same weights: the first speaks for them.
        for logprobs in rollout.prompt_logprobs(windows[first : first + WINDOWS_PER_BATCH])[0]:
            nll -= sum(logprobs)
    return SuiteResult(
        {
            "bits_per_byte": bits_per_byte(nll, len(text.encode())),
            "nll_mean": nll / (len(token_ids) - 1),
        }
    )


def results_table(results: Mapping[str, SuiteResult]) -> Table:
    """The figures of all suites, a line each; ends of intervals stand beside what they are of."""
    table = Table("suite", "figure", "value", "95 % interval", box=None, header_style="bold")
    for suite, result in results.items():
        figures = result.figures
        for name, value in figures.items():
            if name.endswith(("_low", "_high")):
                continue
            interval = (
                f"{figures[f'{name}_low']:.4g} - {figures[f'{name}_high']:.4g}" if f"{name}_low" in figures else ""
            )
            table.add_row(suite, name, f"{value:.4g}", interval)
    return table


def _speak(
    suite: TaskSuite,
    prompts: Prompts,
    rollout: Rollout,
    rewards: Judge,
    sampling: SamplingConfig,
    num_completions: int,
    seed: int,
    mode: Mode,
) -> list[Record]:
    """Completions of every prompt, in the prompts' order; a group is judged while others are still being written."""
    groups: dict[int, Group] = {}
    label = suite.reward.label
    asked = [prompts[i] for i in range(len(prompts))]
    stream = rollout.generate([prompt.token_ids for prompt in asked], sampling, num_completions, seed)
    for group in _watched(stream, f"{label}, {mode}", len(asked)):
        groups[group.index] = group
        task = replace(asked[group.index].task, kind=label)  # the suite says who judges, not the row
        rewards.submit(group.index, task, [completion.text for completion in group.completions])
    judged = rewards.gather()
    return [
        Record(
            index=i,
            row=prompt.task.row,
            prompt=prompt.task.prompt,
            truth=prompt.task.truth,
            completion=completion.text,
            mode=mode,
            score=verdicts[label].score,
            status=verdicts[label].status,
            outcome=verdicts[label].outcome,
            detail=verdicts[label].detail,
            num_tokens=len(completion.token_ids),
            truncated=completion.finish_reason == "length",
        )
        for i, prompt in enumerate(asked)
        for completion, verdicts in zip(groups[i].completions, judged[i], strict=True)
    ]


def _check_unchanged(path: Path, text: str, tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> None:
    if not text:
        raise ValueError(f"path='{path}' is empty")
    came_back = str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if came_back != text:
        same = (pair[0] == pair[1] for pair in zip(text, came_back, strict=False))
        differs = next((place for place, equal in enumerate(same) if not equal), min(len(text), len(came_back)))
        raise ValueError(
            f"path='{path}': the tokenizer changes the text at character {differs}, {text[differs : differs + 20]!r} "
            f"into {came_back[differs : differs + 20]!r}; its bits per byte would be those of another text. "
            "Normalise the file (often Unicode's form C), or take another"
        )


def _watched(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The items, with a progress bar where a person sees one."""
    console = rich.get_console()
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)
