"""`report.html` of a stage: one file that needs nothing else, rewritten while the stage runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from configs.stages import STAGES
from pipeline.disk.files import read_json_or_none
from pipeline.disk.recorded import CONFIG, DECISION, LINEAGE, read_figures
from pipeline.gates.decision import read_decision
from pipeline.reports.alarms import Alarms
from pipeline.reports.charts import Interval
from pipeline.reports.curves import STEP_SECONDS, headline, line_charts, seconds_by_phase
from pipeline.reports.files import EXPERT_LOAD, MetricsRow, data_hashes, read_metrics
from pipeline.reports.page import REPORT, write_page
from pipeline.reports.results import by_suite, calibration, data_cards, kept_and_dropped
from pipeline.reports.samples import before_and_after, compare, extremes, failures, outcomes, read_rollouts


def write_html(folder: Path) -> None:
    """Write `report.html` from the files that a stage's folder holds by now, without the parts whose files are missing.
    A browser loads it again every now and then until the stage is done."""
    stage, run = folder.resolve().name, folder.resolve().parent.name
    rows, figures, steps = read_metrics(folder), read_figures(folder), read_rollouts(folder)
    lineage, expert_load = (read_json_or_none(folder / name) or {} for name in (LINEAGE, EXPERT_LOAD))
    stage_type, undecided = lineage.get("type", ""), not (folder / DECISION).is_file()
    suites = _suites(stage_type, figures or {})
    documents = (folder / CONFIG, folder / LINEAGE)
    samples = [record for records in steps.values() for record in records]
    write_page(
        folder / REPORT,
        "stage.html",
        title=f"{stage} of {run}",
        reload=figures is None and undecided,
        stage=stage,
        run=run,
        type=stage_type,
        rows=rows,
        seconds=sum(row.get(STEP_SECONDS, 0.0) for row in rows),
        figures=figures,
        alarms=_alarms(folder, rows, stage_type) if stage_type in ("grpo", "distill") and rows else [],
        headline=headline(rows),
        suites=suites,
        calibrations={suite: calibration(folder / "evaluation" / f"{suite}.reliability.jsonl") for suite in suites},
        decision=read_decision(folder),
        comparisons=compare(folder / "parent", folder / "candidate", ("the parent", "the candidate")),
        kept_and_dropped=kept_and_dropped(figures or {}) if stage_type in ("preferences", "sample") else {},
        data_cards=data_cards(folder / "data"),
        phases=seconds_by_phase(rows),
        charts=line_charts(rows),
        expert_load=expert_load,
        expert_intervals=[_expert_interval(*gate) for gate in expert_load.get("gates", {}).items()],
        last_step=max(steps, default=0),
        samples=samples,
        before_and_after=before_and_after(steps) if steps else None,
        extremes=extremes(steps[max(steps)]) if steps else {},
        outcomes=outcomes(samples),
        failures=failures(samples),
        lineage=lineage,
        data_hashes=list(data_hashes(lineage)) if lineage else [],
        documents=[(file.name, file.read_text(encoding="utf-8")) for file in documents if file.is_file()],
    )


def _alarms(folder: Path, rows: Sequence[MetricsRow], stage_type: str) -> list[str]:
    """The warnings that the run's alarms gave, each with its step."""
    config: Any = STAGES[stage_type].model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    warnings: list[str] = []
    step = 0
    alarms = Alarms(
        config.model_copy(update={"stop_on": []}),
        lambda text: warnings.append(f"Step {step}: {text.strip().removeprefix('alarm: ')}"),
    )
    for row in rows:
        step = int(row["step"])
        alarms.check(step, row)
    return warnings


def _suites(stage_type: str, figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Figures of an evaluation by suite, or of a stage on comparisons by held-out set."""
    prefix = {"eval": "", "rm": "eval/", "dpo": "eval/"}.get(stage_type)
    if prefix is None:
        return {}
    return by_suite({key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)})


def _expert_interval(router: str, counts: Sequence[int]) -> Interval:
    """The least, median and largest load of a layer's experts in means of the layer."""
    name = f"layer {number[1]}" if (number := re.search(r"\.(\d+)\.", router)) else router
    mean, idle = sum(counts) / len(counts) or 1, counts.count(0)
    note = f"{max(counts) / mean:.3g} at most" + (f", {idle} of {len(counts)} without a token" if idle else "")
    shares = (median(counts) / mean, min(counts) / mean, max(counts) / mean)
    return Interval(name, *shares, "bad" if idle else "busy", note, bound=1.0)
