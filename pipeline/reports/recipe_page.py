"""`report.html` of a whole run: its stages and what they were made from, what improved, what the gates decided."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk.recorded import FIGURES, LINEAGE, METRICS, changes, read_figures
from pipeline.gates.cache import EVALUATION_FIGURES
from pipeline.gates.decision import DECISION, read_decision
from pipeline.reports.curves import small_curve
from pipeline.reports.files import duration, read_json, read_metrics
from pipeline.reports.page import Inside, Markup, pill, section, table, tag, write_page
from pipeline.reports.results import beside, decision_plots, verdict
from pipeline.reports.stage_page import REPORT, short, weights_hash, write_html

RUN = "run.json"
KINDS = {"done": "good", "running": "busy", "waiting for a decision": "busy", "failed": "bad"} | dict.fromkeys(
    ("stopped itself", "interrupted", "killed"), "bad"
)
"""What to think of a stage's state; of the others nothing."""

ROW, BULGE, EDGE = 72, 13, 14
WIDEST = 70

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage as the page shows it."""

    name: str
    folder: Path
    type: str
    state: str
    reason: str
    seconds: float | None
    parents: list[str]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A checkpoint's evaluation: what it is called, the folder with its records, its figures as `SUITE/FIGURE`."""

    name: str
    folder: Path
    figures: Figures


def write_recipe_html(run_folder: Path) -> None:
    """Writes `report.html` of what a run's folder holds by now, and that of its gates, which may end without one.
    While the run goes on a browser that shows the page looks again every now and then."""
    run = read_json(run_folder / RUN)
    stages = list(_stages(run_folder, run))
    for stage in stages:
        if (stage.folder / DECISION).is_file():
            write_html(stage.folder)
    evaluated = [each for stage in stages for each in _evaluated(stage)]
    state = run.get("state") or ("done" if all(stage.state == "done" for stage in stages) else "")
    parts = [
        _heading(run_folder.resolve().name, run, state, stages),
        section("Stages", _rails(stages)),
        section("What improved", *_improved(evaluated)),
        section("Gates", *_gates(stages)),
        *_samples(evaluated),
        section("Lineage", *_lineage(stages)),
    ]
    write_page(run_folder / REPORT, run_folder.resolve().name, *parts, reload=state == "running")


def _stages(run_folder: Path, run: Mapping[str, Any]) -> Iterator[Stage]:
    """The stages in the recipe's order; of a run that nobody has recorded, in the order they were begun in."""
    lineages = {file.parent.name: read_json(file) for file in run_folder.glob(f"*/{LINEAGE}")}
    begun = sorted(lineages, key=lambda name: lineages[name].get("created", ""))
    records: Mapping[str, Any] = run.get("stages") or {name: {} for name in begun}
    for name, record in records.items():
        folder, lineage = run_folder / name, lineages.get(name, {})
        made_by = dict.fromkeys(Path(parent["folder"]).name for parent in lineage.get("parents", ()))
        yield Stage(
            name,
            folder,
            record.get("type") or lineage.get("type", ""),
            record.get("state") or _state(folder),
            record.get("reason", ""),
            _seconds(record, folder),
            [parent for parent in record.get("waits_for") or made_by if parent in records],
        )


def _state(folder: Path) -> str:
    if read_figures(folder) is not None:
        return "done"
    return "begun" if (folder / LINEAGE).is_file() else "waiting"


def _seconds(record: Mapping[str, Any], folder: Path) -> float | None:
    """From its start to its end or to now; where nobody took the time, that of its steps."""
    if record.get("started"):
        return (record.get("ended") or time.time()) - record["started"]
    seconds = sum(row.get("time/step_seconds", 0.0) for row in read_metrics(folder))
    return seconds or None


def _evaluated(stage: Stage) -> Iterator[Evaluated]:
    """What was evaluated in a stage, the parent of a gate before its candidate."""
    if stage.type == "eval":
        if figures := read_json(stage.folder / FIGURES):
            yield Evaluated(stage.name, stage.folder, figures)
        return
    for name in ("parent", "candidate"):
        suites = read_json(stage.folder / name / EVALUATION_FIGURES)
        if suites:
            figures = {f"{suite}/{figure}": value for suite, of in suites.items() for figure, value in of.items()}
            yield Evaluated(f"{stage.name}, {name}", stage.folder / name, figures)


def _heading(name: str, run: Mapping[str, Any], state: str, stages: Sequence[Stage]) -> Markup:
    done = sum(stage.state == "done" for stage in stages)
    facts = [f"{done} of {len(stages)} stages done"]
    if run.get("started"):
        facts.append(duration((run.get("ended") or time.time()) - run["started"]))
    reason = tag("p", run["reason"], class_="notice") if run.get("reason") else ""
    title = tag("h1", name, " ", pill(state, KINDS.get(state, "idle")) if state else "")
    return tag("header", title, tag("p", " · ".join(facts), class_="sub"), reason)


def _rails(stages: Sequence[Stage]) -> Markup:
    """The stages under each other, each joined to those it was made from by an arc at the left."""
    place = {stage.name: number for number, stage in enumerate(stages)}
    edges = [(place[parent], place[stage.name]) for stage in stages for parent in stage.parents]
    depth = [min(BULGE * (child - parent), WIDEST * 4 / 3) if child - parent > 1 else 0 for parent, child in edges]
    x = EDGE + 0.75 * max(depth, default=0.0)

    def y(number: int) -> float:
        return ROW * number + ROW / 2

    arcs = [
        tag("path", class_="rail", d=f"M{x:g} {y(a):g} C{x - bulge:g} {y(a):g} {x - bulge:g} {y(b):g} {x:g} {y(b):g}")
        for (a, b), bulge in zip(edges, depth, strict=True)
    ]
    dots = [
        tag(
            "circle",
            tag("title", f"{stage.name}: {stage.state}"),
            class_=f"stop-dot k{KINDS.get(stage.state, 'idle')}",
            cx=x,
            cy=y(number),
            r=6,
        )
        for number, stage in enumerate(stages)
    ]
    width, height = x + EDGE - 4, ROW * len(stages)
    size = f"width:{width:g}px;height:{height}px"
    drawn = tag("svg", arcs, dots, viewBox=f"0 0 {width:g} {height}", style=size, role="img", aria_label="stages")
    return tag("div", drawn, tag("div", map(_stop, stages)), class_="rails")


def _stop(stage: Stage) -> Markup:
    curve, said = small_curve(read_metrics(stage.folder)) if (stage.folder / METRICS).is_file() else (Markup(), "")
    if decision := read_decision(stage.folder):
        said = ", ".join(f"{ruling.rule.figure} {ruling.outcome}" for ruling in decision.rulings)
        said = f"{decision.action.replace('_', ' ')}: {said}"
    elif stage.type == "eval":
        figures = read_json(stage.folder / FIGURES)
        said = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if f"{key}_low" in figures)
    facts = [stage.type, duration(stage.seconds) if stage.seconds else "", stage.reason]
    named = tag("a", stage.name, href=f"{stage.name}/{REPORT}") if (stage.folder / REPORT).is_file() else stage.name
    return tag(
        "div",
        tag(
            "div",
            tag("div", named, " ", pill(stage.state, KINDS.get(stage.state, "idle")), class_="sub name"),
            tag("div", " · ".join(part for part in facts if part), class_="sub"),
            tag("div", said, class_="sub", title=said) if said else "",
        ),
        curve,
        class_="stop",
    )


def _improved(evaluated: Sequence[Evaluated]) -> Iterator[Markup]:
    """Every figure that was taken of more than one checkpoint: the first and the last."""
    series: defaultdict[str, list[tuple[str, float, str]]] = defaultdict(list)
    for each in evaluated:
        for figure, value in each.figures.items():
            if not figure.endswith(("_low", "_high")):
                low, high = each.figures.get(f"{figure}_low"), each.figures.get(f"{figure}_high")
                interval = "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
                series[figure].append((each.name, value, interval))
    rows = [
        (figure, f"{taken[0][1]:.4g}", f"{taken[-1][1]:.4g}", f"{taken[-1][1] - taken[0][1]:+.3g}", taken[-1][2])
        for figure, taken in series.items()
        if len(taken) > 1
    ]
    if rows:
        first, last = evaluated[0].name, evaluated[-1].name
        yield tag("p", f"Evaluations from the first ({first}) to the last ({last}).", class_="about")
        yield table(("figure", "first", "last", "change", "95 % interval of the last"), rows, numbers=[1, 2, 3])


def _gates(stages: Sequence[Stage]) -> Iterator[Markup]:
    for stage in stages:
        if decision := read_decision(stage.folder):
            name = tag("a", stage.name, href=f"{stage.name}/{REPORT}")
            yield tag("h3", name, " ", verdict(decision))
            yield tag("div", decision_plots(decision), class_="charts")


def _samples(evaluated: Sequence[Evaluated]) -> Iterator[Markup]:
    """Answers to the same prompts in the first and in the last evaluation that asked them."""
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        yield from beside(first.folder, last.folder, (first.name, last.name))


def _lineage(stages: Sequence[Stage]) -> Iterator[Markup]:
    rows: list[list[Inside]] = []
    changed: list[Markup] = []
    for stage in stages:
        lineage = read_json(stage.folder / LINEAGE)
        if lineage:
            hashes = [(short(weights_hash(model)), " ") for model in lineage["models"].values()]
            made_from = ", ".join(stage.parents) or "nothing of this run"
            rows.append([stage.name, made_from, hashes, short(lineage["config"])])
            changed += [
                tag("p", f"{stage.name}: {said}", class_="notice") for said in changes(stage.folder, content=False)
            ]
    if rows:
        yield from changed
        yield table(("stage", "made from", "weights", "settings"), rows)
