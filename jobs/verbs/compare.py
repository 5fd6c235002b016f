"""`alignyard compare RUN RUN ...`: runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Argument, Option

from jobs.command import OUT, PageFile, RunsDir, one_line, spark_levels, verb_app
from jobs.runs import find_run

if TYPE_CHECKING:
    from pipeline.reports.comparison import ComparedFigure, ComparedStage, RunComparison

app = verb_app()
_SPARK_WIDTH = 48


@app.command("compare")
def compare_runs(
    runs: Annotated[
        list[str], Argument(metavar="RUN RUN ...", help="Names or folders of runs; RUN/STAGE is one stage of a run.")
    ],
    stage: Annotated[str | None, Option(metavar="STAGE", help="Compare this stage alone, with more figures.")] = None,
    page: PageFile = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Compare runs: the settings that differ, the curves of each stage, and what the differences are worth.

    Runs that differ in nothing but their seeds are a group. Figures are compared at the last step that all runs have.
    Between groups of two runs and more, Welch's t-test says whether a difference is more than chance. The page has all
    charts of the reports, with a curve for each run.

    \b
    Examples:
      alignyard compare demo demo_low_rate
      alignyard compare demo/reason other/reason --page compared.html
    """
    from pipeline.reports.comparison import NO_CORRECTION, compare_records, write_comparison_html

    if len(runs) < 2:
        raise ValueError(f"RUN: '{runs[0]}' alone is nothing to compare; give two runs or more")
    comparison = compare_records([find_run(run, runs_dir) for run in runs], stage)
    _print_runs(comparison)
    for compared in comparison.stages:
        _print_stage(compared, most=None if len(comparison.stages) == 1 else 1)
    if any("p = " in finding for s in comparison.stages for figure in s.figures for finding in figure.findings):
        OUT.print(NO_CORRECTION, style="dim")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_comparison_html(comparison, page)
        OUT.print(f"wrote {page}", soft_wrap=True)
    return 0


def _print_runs(comparison: "RunComparison") -> None:
    for run in comparison.runs:
        number = next(number for number, group in enumerate(comparison.groups, start=1) if run.label in group)
        text = Text(run.label, style="bold").append(f"  {run.record.state}, group {number}", style="not bold")
        OUT.print(text.append(f"  {run.record.folder}", style="not bold dim"), soft_wrap=True)
    if all(len(group) == 1 for group in comparison.groups):
        OUT.print("one run a group: a difference may be chance; runs with other seeds would tell", style="dim")
    OUT.print(Text("\nsettings that differ" if comparison.differences else "\nno setting differs", style="bold"))
    for difference in comparison.differences:
        others = f" and {difference.others} more of that name" if difference.others else ""
        OUT.print(Text(f"  {difference.key}{others}"), soft_wrap=True)
        for value, labels in difference.values.items():
            OUT.print(Text(f"    {', '.join(labels)}: {one_line(value, 200)}"))


def _print_stage(stage: "ComparedStage", most: int | None) -> None:
    """Prints the results of a stage, its figures without steps, and the first `most` curves."""
    OUT.print(Text(f"\n{stage.name}", style="bold").append(f" ({stage.type})", style="not bold"))
    for label, result in stage.results.items():
        OUT.print(Text(f"  {label}: {result}"))
    if stage.last_step:
        OUT.print(f"  figures up to step {stage.last_step}, which all runs have", style="dim")
    curves = [figure for figure in stage.figures if figure.series]
    for figure in [figure for figure in stage.figures if not figure.series] + curves[:most]:
        _print_figure(figure)


def _print_figure(figure: "ComparedFigure") -> None:
    from pipeline.reports.charts import LineChart, sparkline

    OUT.print(Text(f"  {figure.name}"))
    width = max(map(len, figure.ends))
    chart = LineChart(figure.name, "", figure.series, {}) if figure.series else None
    for label, (first, last) in figure.ends.items():
        ends = f"{last:.4g}" if first is None else f"{first:.4g} -> {last:.4g}"
        spark = min(OUT.width - width - 30, _SPARK_WIDTH)
        curve = (
            f"{sparkline(figure.series[label], chart, spark_levels(), spark):{spark}} " if chart and spark > 4 else ""
        )
        OUT.print(Text(f"    {label:{width}} {curve}{ends}"))
    for finding in figure.findings:
        OUT.print(Text(f"    {finding}", style="italic"))
