"""`report.html` of a whole run: its stages, figures before and after, decisions of its gates, and
lineage."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.disk.ending import Ending
from pipeline.disk.files import read_json_or_none
from pipeline.disk.recorded import FIGURES, LINEAGE, changes, read_figures
from pipeline.disk.run_record import RunRecord, StageRecord, State
from pipeline.gates.cache import EVALUATION_FIGURES
from pipeline.gates.decision import Decision, read_decision
from pipeline.gates.rules import lower_is_better
from pipeline.reports.curves import STEP_SECONDS, trend
from pipeline.reports.files import read_metrics
from pipeline.reports.page import REPORT, write_page
from pipeline.reports.samples import compare
from pipeline.reports.stage_page import write_html


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """An evaluation of a checkpoint: the folder of its records, and its figures as `SUITE/FIGURE`."""

    name: str
    folder: Path
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FigureChange:
    """A figure in the first and in the last evaluation that has it, with the 95 % interval of the last.

    rules: the gates that watch it, each with its outcome.
    """

    figure: str
    first: float
    last: float
    low: float | None
    high: float | None
    rules: list[str]

    @property
    def direction(self) -> str:
        """`better` or `worse`; `same` where the first value lies within the interval of the last."""
        within = self.low is not None and self.high is not None and self.low <= self.first <= self.high
        if self.first == self.last or within:
            return "same"
        return "better" if (self.last < self.first) == lower_is_better(self.figure) else "worse"


def write_recipe_html(record: RunRecord) -> None:
    """Write `report.html` of a run, and of each of its gates, since a gate's stage may end without writing its own.
    While the run goes on, a browser reloads the page every now and then."""
    run, now = Path(record.folder), time.time()
    decisions = {name: decision for name in record.stages if (decision := read_decision(run / name))}
    for name in decisions:
        write_html(run / name)
    evaluations = [
        evaluation for name, stage in record.stages.items() for evaluation in _evaluations(run / name, stage)
    ]
    first, last = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else (None, None)
    lineages = {name: lineage for name in record.stages if (lineage := read_json_or_none(run / name / LINEAGE))}
    write_page(
        run / REPORT,
        "run.html",
        title=run.resolve().name,
        reload=record.state == State.RUNNING,
        record=record,
        done=sum(stage.state == Ending.DONE.word for stage in record.stages.values()),
        seconds={name: _seconds(run / name, stage, now) for name, stage in record.stages.items()},
        results={name: stage_result(run / name, stage) for name, stage in record.stages.items()},
        pages={name for name in record.stages if (run / name / REPORT).is_file()},
        total_seconds=(record.ended or now) - record.started,
        evaluations=evaluations,
        changed_figures=list(_changed_figures(evaluations, decisions)),
        decisions=decisions,
        comparisons=compare(first.folder, last.folder, (first.name, last.name)) if first and last else [],
        changes=[(name, text) for name in lineages for text in changes(run / name, content=False)],
        lineages=lineages,
    )


def _seconds(folder: Path, stage: StageRecord, now: float) -> float:
    """Time of a stage; of a reused one, whose start this record lacks, the time of its steps."""
    if stage.started:
        return (stage.ended or now) - stage.started
    return sum(row.get(STEP_SECONDS, 0.0) for row in read_metrics(folder))


def stage_result(folder: Path, stage: StageRecord) -> str:
    """One line on what came of a stage."""
    if decision := read_decision(folder):
        outcomes = ", ".join(f"{ruling.rule.figure} {ruling.outcome}" for ruling in decision.rulings)
        person = ", decided by a person" if decision.decided_by == "user" else ""
        return f"{decision.action.replace('_', ' ')}{person}: {outcomes}"
    if stage.type in ("preferences", "sample"):
        kept = (read_figures(folder) or {}).get("kept")
        return "" if kept is None else f"{kept:.0f} {'comparisons' if stage.type == 'preferences' else 'answers'} kept"
    if stage.type == "eval":
        figures = read_figures(folder) or {}
        return ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if f"{key}_low" in figures)
    return trend(read_metrics(folder))


def _evaluations(folder: Path, stage: StageRecord) -> Iterator[EvaluatedModel]:
    """Evaluations that a stage made; of a gate the parent's before the candidate's."""
    if stage.type == "eval" and (figures := read_json_or_none(folder / FIGURES)):
        yield EvaluatedModel(folder.name, folder, figures)
    for role in ("parent", "candidate"):
        if suites := read_json_or_none(folder / role / EVALUATION_FIGURES):
            figures = {f"{suite}/{key}": value for suite, of_suite in suites.items() for key, value in of_suite.items()}
            yield EvaluatedModel(f"{folder.name}, {role}", folder / role, figures)


def _changed_figures(
    evaluations: Sequence[EvaluatedModel], decisions: Mapping[str, Decision]
) -> Iterator[FigureChange]:
    """The change of every figure that several checkpoints have, from the first of them to the last."""
    series: defaultdict[str, list[Mapping[str, float]]] = defaultdict(list)
    for evaluation in evaluations:
        for figure in evaluation.figures:
            if not figure.endswith(("_low", "_high")):
                series[figure].append(evaluation.figures)
    for figure, values in series.items():
        if len(values) > 1:
            rules = [
                f"{gate}: {ruling.outcome}"
                for gate, decision in decisions.items()
                for ruling in decision.rulings
                if ruling.rule.figure == figure
            ]
            low, high = (values[-1].get(f"{figure}_{end}") for end in ("low", "high"))
            yield FigureChange(figure, values[0][figure], values[-1][figure], low, high, rules)
