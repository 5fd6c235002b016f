"""The record of a stage: `metrics.jsonl`, TensorBoard events, samples, console lines and the page.

`metrics.jsonl` holds one object a step with every digit. A resumed run and one that was never killed agree to the bit
in all keys but `memory/*` and the wall-clock times `*_seconds`, `*_per_second` and `*/seconds_*`.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from configs.sinks import SinkName
from configs.visible import visible
from pipeline.disk.files import write_atomic, write_json_lines
from pipeline.disk.recorded import METRICS
from pipeline.reports.files import EXPERT_LOAD, ROLLOUTS, duration, read_metrics
from pipeline.reports.sinks import SinkThread
from pipeline.reports.stage_page import write_html
from rewards.types import Verdict

_GROUPS_KEPT = 4
"""Groups of a step whose samples are kept."""
_SAMPLES_PRINTED = 10
"""Samples printed over a whole stage."""
_LINES_PER_HEADING = 20
_PACE_STEPS = 20
"""Steps that the time left is estimated by."""
_LINE_WIDTH = 100
_PAGE_SECONDS = 15.0
"""Least time between two writings of the page. It is also at least a hundred times what writing took, so that the page
costs a run no more than a hundredth."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion for people to read. A reward of NaN means that it was left out, since it could not be judged.
    Where nothing judges, there are no verdicts."""

    prompt: str
    completion: str
    finish_reason: str
    reward: float
    verdicts: Mapping[str, Verdict]


COLUMNS = (
    ("loss/nll_mean", "loss", ".4f", 7),
    ("eval/nll_mean", "held-out", ".4f", 8),
    ("reward/total/mean", "reward", ".3f", 6),
    ("reward/*/mean", "", ".2f", 5),
    ("rollout/length/mean", "length", ".0f", 6),
    ("reward_model/accuracy", "accuracy", ".0%", 8),
    ("reward_model/margin_mean", "margin", ".2f", 6),
    ("dpo/accuracy", "accuracy", ".0%", 8),
    ("dpo/margin_mean", "margin", ".2f", 6),
    ("eval/*/accuracy", "", ".1%", 6),
    ("rollout/entropy_mean", "entropy", ".3f", 7),
    ("loss/kl_mean", "kl", ".1e", 7),
    ("loss/reverse_kl_mean", "reverse kl", ".4f", 10),
    ("rollout/lag_mean", "lag", ".2f", 4),
    ("mismatch/abs_max", "mismatch", ".1e", 8),
    ("train/grad_norm", "grad", ".2f", 5),
    ("train/learning_rate", "lr", ".1e", 7),
    ("time/generate_seconds", "gen", ".1f", 5),
    ("time/reference_seconds", "ref", ".1f", 5),
    ("time/teachers_seconds", "teach", ".1f", 5),
    ("time/train_seconds", "train", ".1f", 5),
    ("time/sync_seconds", "sync", ".1f", 5),
    ("time/eval_seconds", "eval", ".1f", 5),
    ("idle/ranks_seconds", "ranks idle", ".1f", 10),
    ("idle/engines_seconds", "engines idle", ".1f", 12),
    ("time/step_seconds", "s/step", ".1f", 6),
    ("*/tokens_per_second", "tok/s", ".0f", 5),
)
"""Figures on a line of the console: key (a pattern, the first that fits), heading ("" takes the second part of the key:
a reward's column is its mean score), format, width."""
_LESS_NEEDED = (
    *("lr", "grad", "mismatch", "ref", "gen", "train", "sync", "teach", "eval", "tok/s", "entropy", "kl"),
    *("engines idle", "ranks idle", "lag"),
)
"""Headings of the columns that a narrow terminal leaves out, the first first."""
_HEADING_WIDTH = 16


class Report:
    """The record of one stage in its folder. A step is on disk as soon as `step` returns.

    Example:
        with Report(folder, total_steps=100, label="sft") as report:
            report.resume(checkpoints.restore())
            report.step(1, {"loss/nll_mean": 2.3})
    """

    def __init__(self, folder: Path, *, total_steps: int, label: str, report_to: Sequence[SinkName] = ()) -> None:
        """label: name of the stage beside the progress bar, which appears only where standard output is a terminal.
        report_to: services that get figures and samples."""
        self.last_metrics: dict[str, float] = {}
        self._folder = folder
        self._total_steps = total_steps
        self._console = rich.get_console()
        has_width = self._console.is_terminal or "COLUMNS" in os.environ
        self._lines = StepLines(total_steps, self._console.width if has_width else None)
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
        self._events: EventFileWriter | None = None
        self._page_due_at = 0.0
        self._report_to, self._sinks = report_to, list[SinkThread]()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._events is not None:
            self._events.close()
        self._close_sinks()

    def resume(self, step: int) -> None:
        """Continue after `step`, 0 for the beginning, and drop what an earlier, killed run reported of later steps."""
        rows = [row for row in read_metrics(self._folder) if row["step"] <= step]
        if self._events is not None:
            self._events.close()
        self._close_sinks()
        write_json_lines(self._folder / METRICS, map(_finite, rows))
        (self._folder / EXPERT_LOAD).unlink(missing_ok=True)
        (self._folder / ROLLOUTS).mkdir(exist_ok=True)
        for file in (self._folder / ROLLOUTS).glob("step-*.jsonl"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        self._events = EventFileWriter(str(self._folder / "tensorboard"))
        # A start at the next step makes TensorBoard drop the later events of the earlier run.
        self._events.add_event(_event(step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.last_metrics = {key: value for key, value in rows[-1].items() if key != "step"} if rows else {}
        self._bar.update(self._task, completed=step)
        self._lines.start_clock()
        self._sinks = [SinkThread(name, self._folder, total_steps=self._total_steps) for name in self._report_to]
        for sink in self._sinks:
            sink.start()

    def _close_sinks(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._print_sinks()
        self._sinks = []

    def _print_sinks(self) -> None:
        for sink in self._sinks:
            while sink.messages:
                self.note(sink.messages.pop(0))

    def page_due(self, step: int) -> bool:
        """Return whether reporting `step` now would write the page anew."""
        return time.monotonic() >= self._page_due_at or step == self._total_steps

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Sequence[Sample] = (),
        expert_load: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Record a step, which counts from 1.

        samples: group by group; those of the first groups are kept. expert_load: tokens sent to each expert by router,
        needed where `page_due(step)`. Without a `resume` before the first step, rows of the folder from that step on
        are dropped.
        """
        if self._events is None:
            self.resume(step - 1)
        assert self._events is not None
        self.last_metrics = {key: float(value) for key, value in metrics.items()}
        if samples:
            write_json_lines(self._folder / ROLLOUTS / f"step-{step:06d}.jsonl", _sample_records(samples))
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in self.last_metrics.items()]
        self._events.add_event(_event(step, summary=Summary(value=scalars)))
        self._events.flush()
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"step": step} | self.last_metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # so that a power cut loses no row before a training state
        for sink in self._sinks:
            sink.step_is_written()
        self._print_sinks()
        self._print(step, samples)
        if expert_load:
            write_atomic(self._folder / EXPERT_LOAD, json.dumps({"step": step, "gates": expert_load}))
        if self.page_due(step):
            started = time.monotonic()
            write_html(self._folder)
            ended = time.monotonic()
            self._page_due_at = ended + max(_PAGE_SECONDS, 100 * (ended - started))

    def note(self, text: str) -> None:
        """Print `text` as it is, above the bar."""
        self._console.print(visible(text), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _print(self, step: int, samples: Sequence[Sample]) -> None:
        lines = self._lines.lines(step, self.last_metrics)
        if samples and (step == 1 or step % max(self._total_steps // _SAMPLES_PRINTED, 1) == 0):
            lines += sample_lines(samples[0])
        for line in lines:
            self._console.print(line, soft_wrap=True)
        self._bar.update(self._task, completed=step)


class StepLines:
    """The steps of a stage as lines of a table, whose columns are the figures that have occurred so far."""

    def __init__(self, total_steps: int, width: int | None = None) -> None:
        """width: of the terminal, whose lines then leave out what is needed least."""
        self._total_steps, self._width = total_steps, width
        self._keys: dict[str, None] = {}
        self._heading = ""
        self._under_heading = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Estimate the time left from now on."""
        self._ends = deque([time.monotonic()], maxlen=_PACE_STEPS + 1)

    def lines(self, step: int, metrics: Mapping[str, float]) -> list[Text]:
        """The step's line, after a heading every 20 lines and with a new column."""
        self._ends.append(time.monotonic())
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        self._keys |= dict.fromkeys(metrics)
        count_width = max(2 * len(str(self._total_steps)) + 1, len("step"))
        columns = [("step", f"{'step':>{count_width}}", f"{f'{step}/{self._total_steps}':>{count_width}}")]
        shown: set[str] = set()
        for pattern, name, form, least_width in COLUMNS:
            for key in self._keys:
                if key not in shown and fnmatchcase(key, pattern):
                    shown.add(key)
                    title = name or key.split("/")[1][:_HEADING_WIDTH]
                    width = max(least_width, len(title))
                    cell = f"{metrics[key]:>{width}{form}}" if key in metrics else " " * width
                    columns.append((title, f"{title:>{width}}", cell))
        columns.append(("left", f"{'left':>6}", f"{duration(pace * (self._total_steps - step)):>6}"))
        left_out = self._fit(columns)
        heading = " ".join(column[1] for column in columns)
        line = Text(" ".join(column[2] for column in columns))
        if heading == self._heading and self._under_heading < _LINES_PER_HEADING:
            self._under_heading += 1
            return [line]
        note = [Text(f"(left out here: {', '.join(left_out)}; metrics.jsonl has all)", style="dim")] if left_out else []
        note = note if heading != self._heading else []
        self._heading, self._under_heading = heading, 1
        return [*note, Text(heading, style="bold"), line]

    def _fit(self, columns: list[tuple[str, str, str]]) -> list[str]:
        """Remove the columns that are needed least until a line fits the terminal, and return their headings."""
        left_out: list[str] = []
        for name in _LESS_NEEDED:
            if self._width is None or sum(len(column[1]) + 1 for column in columns) - 1 <= self._width:
                break
            left_out += [column[0] for column in columns if column[0] == name]
            columns[:] = [column for column in columns if column[0] != name]
        return left_out


def sample_lines(sample: Sample) -> list[Text]:
    """A sample in two lines of the console's width: prompt and completion, then reward and verdicts."""
    prompt = f"  {_elide(sample.prompt, 36)}  ->  "
    verdicts = ", ".join(
        " ".join(
            [f"{name} {verdict.status}", *([] if verdict.score is None else [f"{verdict.score:g}"]), verdict.outcome]
        ).rstrip()
        for name, verdict in sample.verdicts.items()
    )
    reward = "left out" if math.isnan(sample.reward) else f"reward {sample.reward:g}"
    judged = f"{reward} ({verdicts}), " if sample.verdicts else ""
    lines = [
        Text(prompt + _elide(sample.completion, _LINE_WIDTH - len(prompt)), style="dim"),
        Text(f"  {judged}finish_reason {sample.finish_reason}", style="dim"),
    ]
    for line in lines:
        line.truncate(_LINE_WIDTH, overflow="ellipsis")
    return lines


def _sample_records(samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Records of the first groups, a group being neighbours with one prompt."""
    for _, group in islice(groupby(samples, key=lambda sample: sample.prompt), _GROUPS_KEPT):
        for sample in group:
            record = asdict(sample)
            record["reward"] = None if math.isnan(sample.reward) else sample.reward
            for verdict in record["verdicts"].values():
                del verdict["seconds"]
            yield record


def _event(step: int, **content: Any) -> Event:
    return Event(step=step, wall_time=time.time(), **content)


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """The row with null for NaN and infinity, which JSON has no number for."""
    return {key: value if math.isfinite(value) else None for key, value in sorted(row.items())}


def _elide(text: str, width: int) -> str:
    """`text` on one line, without its middle where it is too long."""
    line = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) <= width:
        return line
    head = (width - 5) // 2
    return f"{line[:head]} ... {line[head + 5 - width :]}"
