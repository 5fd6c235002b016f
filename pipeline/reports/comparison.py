"""Runs side by side: settings that differ, curves of each stage, and tests of the differences over seeds."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.load import leaves
from configs.stages import STAGES, Recipe
from pipeline.disk.files import read_json, read_json_or_none
from pipeline.disk.recorded import ABSENT, CONFIG, LINEAGE, differences, read_figures, read_lineage
from pipeline.disk.run_record import RECIPE, RUN, RunRecord, State
from pipeline.evaluation.statistics import welch_test
from pipeline.reports.charts import LineChart, Points
from pipeline.reports.curves import headline, headline_series, line_charts
from pipeline.reports.files import MetricsRow, read_metrics
from pipeline.reports.page import REPORT, write_page
from pipeline.reports.recipe_page import stage_result

LABEL_WIDTH = 16
"""Longest label; runs with longer names, or with the same one, are called by letters."""
NO_CORRECTION = "p is not corrected for the number of figures."


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A run under a short label. settings: dotted keys of its recipe, or of a stage that was run alone, and below
    `lineage` the hashes and versions of what it was made of."""

    label: str
    record: RunRecord
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting and its values, each with the labels of the runs that have it. others: keys of the same name that
    differ in the same way."""

    key: str
    values: Mapping[str, Sequence[str]]
    others: int


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """A figure of a stage. series: by label its points; none for an evaluation. ends: its start and end, means over the
    first and last twentieth of the steps that all runs have. findings: sentences on its spread over seeds and on the
    differences between groups."""

    name: str
    series: Mapping[str, Points]
    ends: Mapping[str, tuple[float | None, float]]
    findings: Sequence[str]


@dataclass(frozen=True, slots=True)
class ComparedStage:
    """A stage that the runs have in common. results: by label one line on what came of it. last_step: the last that all
    runs with steps have reached, 0 for none. charts: by section, with a curve for each run."""

    name: str
    type: str
    results: Mapping[str, str]
    last_step: int
    figures: Sequence[ComparedFigure]
    charts: Mapping[str, Sequence[LineChart]]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Runs, the groups whose members differ only in seeds, as labels, the settings that differ, and the stages."""

    runs: Sequence[ComparedRun]
    groups: Sequence[Sequence[str]]
    differences: Sequence[SettingDifference]
    stages: Sequence[ComparedStage]

    @property
    def is_running(self) -> bool:
        """True while one of the runs goes on."""
        return any(run.record.state == State.RUNNING for run in self.runs)


def compare_records(records: Sequence[RunRecord], only: str | None = None) -> RunComparison:
    """Compare runs of recipes, stage by stage, or stages that stand alone, whatever their names. Runs may go on.

    only: the stage to compare; None for all. Raises ValueError for recipes beside single stages, the same run twice,
    and runs without a stage in common.
    """
    alone = [not (Path(record.folder) / RUN).is_file() for record in records]
    if any(alone) and not all(alone):
        raise ValueError("RUN: a recipe can't be compared with a stage; give the recipe's stage as RUN/STAGE")
    folders = [Path(record.folder).resolve() for record in records]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"RUN: '{next(f for f in folders if folders.count(f) > 1)}' is given twice; give each run once"
        )
    runs = [
        ComparedRun(label, record, settings)
        for label, record, settings in zip(_labels(folders), records, _settings(folders), strict=True)
    ]
    if all(alone):
        names = {folders[0].name: {run.label: Path(run.record.folder) for run in runs}}
    else:
        names = {
            name: {run.label: Path(run.record.folder) / name for run in runs if name in run.record.stages}
            for name in dict.fromkeys(name for record in records for name in record.stages)
        }
    known = [name for name, having in names.items() if len(having) > 1]
    if not known or (only is not None and only not in known):
        raise ValueError(f"--stage {only}: " * (only is not None) + f"stages in common: {', '.join(known) or '(none)'}")
    groups = list(_groups(runs))
    stages = [
        _compared_stage(name, names[name], {run.label: run for run in runs}, groups)
        for name in known
        if only in (None, name)
    ]
    return RunComparison(runs, groups, list(_differences(runs)), stages)


def write_comparison_html(comparison: RunComparison, file: Path) -> None:
    """Write the comparison as a page, with links to the reports of the runs."""
    links = {
        run.label: os.path.relpath(report, file.parent.resolve())
        for run in comparison.runs
        if (report := Path(run.record.folder).resolve() / REPORT).is_file()
    }
    page = {"title": "Comparison", "reload": comparison.is_running, "note": NO_CORRECTION}
    write_page(file, "comparison.html", **page, comparison=comparison, links=links)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders; with their parents' where names are equal, and letters where that is too long."""
    for labels in ([folder.name for folder in folders], ["/".join(folder.parts[-2:]) for folder in folders]):
        if len(set(labels)) == len(labels) and max(map(len, labels)) <= LABEL_WIDTH:
            return labels
    return [chr(ord("A") + number) if number < 26 else f"run {number + 1}" for number in range(len(folders))]


def _settings(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Settings of each run: of the whole recipe, also for the same stage of several recipes; else of the stage."""
    recipes = [folder / RECIPE if (folder / RUN).is_file() else folder.parent / RECIPE for folder in folders]
    is_one_stage = len({folder.name for folder in folders}) == 1 and all(recipe.is_file() for recipe in recipes)
    if (folders[0] / RUN).is_file() or is_one_stage:
        settings = [dict(leaves(_validated(recipe, Recipe))) for recipe in recipes]
        lineages = [{file.parent.name: file for file in recipe.parent.glob(f"*/{LINEAGE}")} for recipe in recipes]
        parts = ("rewards", "versions")  # models and data follow from seeds
    else:
        types = [str(read_lineage(folder)["type"]) for folder in folders]
        settings = [
            dict(leaves(_validated(folder / CONFIG, STAGES[kind]))) for folder, kind in zip(folders, types, strict=True)
        ]
        lineages = [{"": folder / LINEAGE} for folder in folders]
        parts = ("rewards", "versions", "models", "data")
    for mine, files in zip(settings, lineages, strict=True):
        mine.pop("name", None)
        mine.pop("runs_dir", None)
        for name in sorted(set.intersection(*map(set, lineages))):
            record = read_json_or_none(files[name]) or {}
            inputs = {part: record.get(part) for part in parts}
            for model in (inputs.get("models") or {}).values():
                model.pop("folder", None)
            mine |= dict(leaves(inputs, f"lineage.{name}." if name else "lineage."))
    return settings


def _validated(file: Path, model: type[BaseModel]) -> dict[str, Any]:
    """A settings file with the defaults of keys that an earlier version did not know; as it is where it isn't valid.
    Raises ValueError for a damaged file."""
    values = read_json(file, "restore it from a copy")
    try:
        return model.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] in ("seed", "init_seed")


def _groups(runs: Sequence[ComparedRun]) -> Iterator[list[str]]:
    """Labels of the runs that are alike but for their seeds."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for run in runs:
        groups[repr(sorted((key, repr(v)) for key, v in run.settings.items() if not _is_seed(key)))].append(run.label)
    yield from groups.values()


def _differences(runs: Sequence[ComparedRun]) -> Iterator[SettingDifference]:
    keys = sorted({key for one in runs for other in runs for key in differences(one.settings, other.settings)})
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in keys:
        name = key.rpartition(".")[2]
        alike[(name, *(str(run.settings.get(key, ABSENT)) for run in runs))].append(key)
    for (_, *texts), same in alike.items():
        values: defaultdict[str, list[str]] = defaultdict(list)
        for run, text in zip(runs, texts, strict=True):
            values[text].append(run.label)
        yield SettingDifference(same[0], values, len(same) - 1)


def _compared_stage(
    name: str, folders: Mapping[str, Path], runs: Mapping[str, ComparedRun], groups: Sequence[Sequence[str]]
) -> ComparedStage:
    rows = {label: read_metrics(folder) for label, folder in folders.items()}
    rows = {label: of_run for label, of_run in rows.items() if of_run}
    stages = {label: runs[label].record.stages.get(name) for label in folders}
    stages = {label: stage or next(iter(runs[label].record.stages.values())) for label, stage in stages.items()}
    last_step = min((int(of_run[-1]["step"]) for of_run in rows.values()), default=0)
    ends: dict[str, dict[str, tuple[float | None, float]]] = {}
    for label, folder in folders.items():
        if label in rows:
            common = [row for row in rows[label] if row["step"] <= last_step]
            ends[label] = {figure: (first, last) for figure, first, last in headline(common)}
        elif stages[label].type == "eval":
            figures = read_figures(folder) or {}
            ends[label] = {key: (None, value) for key, value in figures.items() if f"{key}_low" in figures}
    return ComparedStage(
        name,
        stages[next(iter(folders))].type,
        {
            label: ", ".join(filter(None, (stages[label].state, stage_result(folders[label], stages[label]))))
            for label in folders
        },
        last_step,
        list(_figures(ends, {label: headline_series(of_run) for label, of_run in rows.items()}, groups)),
        _charts(rows),
    )


def _figures(
    ends: Mapping[str, Mapping[str, tuple[float | None, float]]],
    series: Mapping[str, Mapping[str, Points]],
    groups: Sequence[Sequence[str]],
) -> Iterator[ComparedFigure]:
    for name in dict.fromkeys(name for of_run in ends.values() for name in of_run):
        having = {label: of_run[name] for label, of_run in ends.items() if name in of_run}
        if len(having) > 1:
            last = {label: end for label, (_, end) in having.items()}
            curves = {label: series[label][name] for label in having if label in series}
            yield ComparedFigure(name, curves, having, list(_findings(last, groups)))


def _findings(last: Mapping[str, float], groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """Sentences on the spread of a figure within each group of seeds, and on how later groups differ from the first."""
    values = [[last[label] for label in group if label in last] for group in groups]
    for number, of_group in enumerate(values, start=1):
        if len(of_group) > 1:
            name = f"group {number}: " if len(groups) > 1 else ""
            yield f"{name}mean {fmean(of_group):.4g}, SD {stdev(of_group):.2g} over {len(of_group)} seeds"
    for number, of_group in enumerate(values[1:], start=2):
        if min(len(of_group), len(values[0])) < 2:
            continue
        test = welch_test(of_group, values[0])
        pair = f"group {number} less group 1: {test.difference:+.3g}"
        if test.p is None:
            yield f"{pair}; no spread over seeds, so no test"
        else:
            yield (
                f"{pair}, 95 % interval {test.low:.3g} to {test.high:.3g}, p = {test.p:.2g} "
                f"(Welch's t-test, {len(of_group)} and {len(values[0])} seeds)"
            )


def _charts(rows: Mapping[str, Sequence[MetricsRow]]) -> dict[str, list[LineChart]]:
    """The report's charts with one figure each, and a curve for each run."""
    series: dict[tuple[str, str, str, str], dict[str, Points]] = {}
    looks = {label: number for number, label in enumerate(rows)}
    for label, of_run in rows.items():
        for section, charts in line_charts(of_run).items():
            for chart in charts:
                for name, points in chart.series.items():
                    series.setdefault((section, chart.title, name, chart.unit), {})[label] = points
    sections: defaultdict[str, list[LineChart]] = defaultdict(list)
    for (section, title, name, unit), curves in series.items():
        sections[section].append(LineChart(f"{title}: {name}", unit, curves, looks))
    return sections
