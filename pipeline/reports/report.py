"""What a person watches of a stage, and what stays of it: `metrics.jsonl`, TensorBoard events, samples, console lines.

`metrics.jsonl` holds one object a step with every digit, so that a resumed run can be compared with one never killed to
the bit: all keys but those that end in `_seconds` or `_per_second`, or contain `/seconds_`, which hold wall-clock time,
and `memory/...`.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self, TextIO

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pipeline.disk.files import write_atomic, write_json_lines
from pipeline.disk.recorded import METRICS
from pipeline.reports.files import EXPERT_LOAD, ROLLOUTS, Row, duration, read_metrics
from pipeline.reports.stage_page import write_html
from rewards.types import Verdict

GROUPS_KEPT = 4
"""Groups of a step whose samples are kept."""
SAMPLES_SHOWN = 10
"""Samples shown on the console over a whole stage."""
HEADING_EVERY = 20
ETA_STEPS = 20
WIDTH = 100

PAGE_SECONDS = 15.0
"""The page is written anew no more often than this, and no sooner than a hundred times what it took the last time: it
never costs a run more than a hundredth."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion for people to read; a reward of NaN means it was left out, not judged."""

    prompt: str
    completion: str
    finish_reason: str
    reward: float
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True, slots=True)
class Column:
    """A figure on the console's line: its key (a pattern), heading ("" takes the key's noun), format and width."""

    key: str
    heading: str
    form: str
    width: int


COLUMNS = (
    Column("loss/nll_mean", "loss", ".4f", 7),
    Column("eval/nll_mean", "held-out", ".4f", 8),
    Column("reward/total/mean", "reward", ".3f", 6),
    Column("reward/*/pass_rate", "", ".0%", 4),
    Column("rollout/length/mean", "length", ".0f", 6),
    Column("reward_model/accuracy", "accuracy", ".0%", 8),
    Column("reward_model/margin_mean", "margin", ".2f", 6),
    Column("eval/*/accuracy", "", ".1%", 6),
    Column("rollout/entropy_mean", "entropy", ".3f", 7),
    Column("loss/kl_mean", "kl", ".1e", 7),
    Column("mismatch/abs_max", "mismatch", ".1e", 8),
    Column("train/grad_norm", "grad", ".2f", 5),
    Column("train/learning_rate", "lr", ".1e", 7),
    Column("time/generate_seconds", "gen", ".1f", 5),
    Column("time/reference_seconds", "ref", ".1f", 5),
    Column("time/train_seconds", "train", ".1f", 5),
    Column("time/sync_seconds", "sync", ".1f", 5),
    Column("time/eval_seconds", "eval", ".1f", 5),
    Column("time/step_seconds", "s/step", ".1f", 6),
    Column("*/tokens_per_second", "tok/s", ".0f", 5),
)


class Report:
    """The record of one stage in its folder. A context manager: what was reported is on disk however the block ends.

    Every step is readable as soon as `step` returns.
    """

    def __init__(self, folder: Path, *, total_steps: int, label: str) -> None:
        """`label` names the stage beside the progress bar, which is drawn only where standard output is a terminal."""
        self.last_metrics: Row = {}
        self._folder = folder
        self._total_steps = total_steps
        self._console = rich.get_console()
        self._lines = StepLines(total_steps)
        self._bar = Progress(
            TextColumn(label),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total_steps)
        self._metrics_file: TextIO | None = None
        self._events: EventFileWriter | None = None
        self._page_due = 0.0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._close_files()

    def resume(self, step: int) -> None:
        """Go on after `step`, 0 for the beginning: what an earlier, killed run reported of later steps is dropped."""
        kept = [row for row in read_metrics(self._folder) if row["step"] <= step]
        self._close_files()
        write_json_lines(self._folder / METRICS, map(_finite, kept))
        (self._folder / EXPERT_LOAD).unlink(missing_ok=True)
        (self._folder / ROLLOUTS).mkdir(exist_ok=True)
        for file in (self._folder / ROLLOUTS).glob("step-*.jsonl"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        self._metrics_file = (self._folder / METRICS).open("a", encoding="utf-8")
        self._events = EventFileWriter(str(self._folder / "tensorboard"))
        self._add_event(step + 1, session_log=SessionLog(status=SessionLog.START))  # drops what was told of it before
        self.last_metrics = {key: value for key, value in kept[-1].items() if key != "step"} if kept else {}
        self._bar.update(self._task, completed=step)
        self._lines.start()

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Sequence[Sample] | None = None,
        expert_load: Callable[[], Mapping[str, Sequence[int]]] = dict,
    ) -> None:
        """Record a step, which counts from 1. `samples` come group by group; those of the first groups are kept.
        `expert_load` is asked when the page is written, for the tokens sent to each expert in this step.

        Without a `resume` before the first step, whatever the folder holds of it and later ones is dropped.
        """
        if self._metrics_file is None or self._events is None:
            self.resume(step - 1)
        assert self._metrics_file is not None and self._events is not None
        self.last_metrics = {key: float(value) for key, value in metrics.items()}
        if samples:
            write_json_lines(self._folder / ROLLOUTS / f"step-{step:06d}.jsonl", map(_sample_record, _first(samples)))
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in self.last_metrics.items()]
        self._add_event(step, summary=Summary(value=scalars))
        self._events.flush()
        self._metrics_file.write(json.dumps(_finite({"step": step} | self.last_metrics)) + "\n")
        self._metrics_file.flush()
        os.fsync(self._metrics_file.fileno())  # so that a power cut loses no row before a training state
        for line in self._lines.of(step, self.last_metrics):
            self._console.print(line, soft_wrap=True)
        shown_every = max(self._total_steps // SAMPLES_SHOWN, 1)
        if samples and (step % shown_every == 0 or step == 1):
            for line in sample_lines(samples[0]):
                self._console.print(line, soft_wrap=True)
        self._bar.update(self._task, completed=step)
        self._write_page(step, expert_load)

    def note(self, text: str) -> None:
        """Print `text` as it is, above the bar."""
        text = "\n".join(map(_printable, text.splitlines()))
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _write_page(self, step: int, expert_load: Callable[[], Mapping[str, Sequence[int]]]) -> None:
        """Brings `report.html` up to date, where that is due."""
        started = time.monotonic()
        if started >= self._page_due or step == self._total_steps:
            if load := expert_load():
                write_atomic(self._folder / EXPERT_LOAD, json.dumps({"step": step, "gates": load}))
            write_html(self._folder)
            ended = time.monotonic()
            self._page_due = ended + max(PAGE_SECONDS, 100 * (ended - started))

    def _add_event(self, step: int, **content: Any) -> None:
        assert self._events is not None
        self._events.add_event(Event(step=step, wall_time=time.time(), **content))

    def _close_files(self) -> None:
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._events is not None:
            self._events.close()
        self._metrics_file = self._events = None


class StepLines:
    """A stage's steps as the lines of a table whose columns are the figures that have come up so far."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._keys: dict[str, None] = {}
        self._heading = ""
        self._under_heading = 0
        self.start()

    def start(self) -> None:
        """The clock that the time left is estimated by begins now."""
        self._ends = deque([time.monotonic()], maxlen=ETA_STEPS + 1)

    def of(self, step: int, metrics: Mapping[str, float]) -> list[Text]:
        """The step's line, after a heading where one is due: every 20 lines and when there is a new column."""
        self._ends.append(time.monotonic())
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        self._keys |= dict.fromkeys(metrics)
        columns = [
            (column, key, column.heading or key.split("/")[1][:9])
            for column in COLUMNS
            for key in self._keys
            if fnmatchcase(key, column.key)
        ]
        count_width = max(2 * len(str(self._total_steps)) + 1, len("step"))
        headings, cells = [f"{'step':>{count_width}}"], [f"{f'{step}/{self._total_steps}':>{count_width}}"]
        for column, key, heading in columns:
            width = max(column.width, len(heading))
            headings.append(f"{heading:>{width}}")
            cells.append(f"{metrics[key]:>{width}{column.form}}" if key in metrics else " " * width)
        headings.append(f"{'left':>6}")
        cells.append(f"{duration(pace * (self._total_steps - step)):>6}")
        heading, line = " ".join(headings), Text(" ".join(cells))
        if heading == self._heading and self._under_heading < HEADING_EVERY:
            self._under_heading += 1
            return [line]
        self._heading, self._under_heading = heading, 1
        return [Text(heading, style="bold"), line]


def sample_lines(sample: Sample) -> list[Text]:
    """A sample in two lines of the console's width: what was asked and said, and what came of it."""
    asked = f"  {_elide(sample.prompt, 36)}  ->  "
    said = asked + _elide(sample.completion, WIDTH - len(asked))
    judged = ", ".join(
        " ".join(
            [f"{name} {verdict.status}", *([] if verdict.score is None else [f"{verdict.score:g}"]), verdict.outcome]
        ).rstrip()
        for name, verdict in sample.verdicts.items()
    )
    reward = "left out" if math.isnan(sample.reward) else f"reward {sample.reward:g}"
    outcome = f"  {reward} ({judged}), finish_reason {sample.finish_reason}"
    lines = [Text(said, style="dim"), Text(outcome, style="dim")]
    for line in lines:
        line.truncate(WIDTH, overflow="ellipsis")
    return lines


def _first(samples: Sequence[Sample]) -> Iterator[Sample]:
    """The samples of the first groups, a group being neighbours with one prompt."""
    for _, group in islice(groupby(samples, key=lambda sample: sample.prompt), GROUPS_KEPT):
        yield from group


def _sample_record(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "finish_reason": sample.finish_reason,
        "reward": None if math.isnan(sample.reward) else sample.reward,
        "verdicts": {
            name: {
                "score": verdict.score,
                "status": verdict.status,
                "outcome": verdict.outcome,
                "detail": verdict.detail,
            }
            for name, verdict in sample.verdicts.items()
        },
    }


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no number for what is not finite: null."""
    return {key: value if math.isfinite(value) else None for key, value in sorted(row.items())}


def _elide(text: str, width: int) -> str:
    """`text` on one line, its middle left out where it is too long."""
    shown = _printable(text)
    if len(shown) <= width:
        return shown
    head = (width - 5) // 2
    return f"{shown[:head]} ... {shown[head + 5 - width :]}"


def _printable(text: str) -> str:
    """`text` with what would steer a terminal, or turn the direction of writing, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
