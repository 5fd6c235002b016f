"""`alignyard explain RUN STEP`: a step's unusual figures, and its samples."""

import math
from pathlib import Path
from typing import Annotated

from rich.text import Text
from typer import Argument

from jobs.command import OUT, RunName, RunsDir, StageOption, plain_table, verb_app
from jobs.runs import find_run, stage_folders
from jobs.verbs.rollouts import print_card
from pipeline.disk.recorded import METRICS

app = verb_app()
_SHOWN = 12


@app.command("explain")
def explain_step(
    run: RunName,
    step: Annotated[int, Argument(metavar="STEP", help="The number of a step.")],
    stage: StageOption = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Show what changed most between a step and the 20 before it, with the step's best and worst samples.

    The score is a robust z-score: the distance from the median of the steps before, in standard deviations estimated
    from their median absolute deviation. From 3.5 on a figure counts as unusual.

    \b
    Examples:
      alignyard explain demo/reason 57
      alignyard explain demo 57 --stage reason
    """
    from pipeline.reports.files import read_json_lines, read_metrics
    from pipeline.reports.samples import extremes, rollout_files
    from pipeline.reports.unusual import UNUSUAL, WINDOW, figure_jumps

    folders = {
        name: folder
        for name, folder in stage_folders(find_run(run, runs_dir), stage).items()
        if (folder / METRICS).is_file()
    }
    if len(folders) != 1:
        raise ValueError(f"RUN={run}: stages with steps: {', '.join(folders) or '(none)'}; name one by --stage")
    [(name, folder)] = folders.items()
    jumps = figure_jumps(read_metrics(folder), step)
    unusual = sum(abs(jump.score) >= UNUSUAL for jump in jumps)
    verdict = f"{unusual} of {len(jumps)} figures are unusual" if unusual else "no figure is unusual"
    OUT.print(Text(f"{name}, step {step} against up to {WINDOW} steps before: {verdict}", style="bold"), soft_wrap=True)
    table = plain_table("figure", "median before", "now", "score")
    for column in table.columns[1:]:
        column.justify = "right"
    for jump in jumps[: max(min(unusual, _SHOWN), 5)]:
        score = "was constant" if math.isinf(jump.score) else f"{jump.score:+.1f}"
        style = "bold" if abs(jump.score) >= UNUSUAL else ""
        table.add_row(Text(jump.figure, overflow="fold"), f"{jump.before:.4g}", f"{jump.value:.4g}", score, style=style)
    OUT.print(table)
    if unusual > _SHOWN:
        OUT.print(f"({unusual - _SHOWN} more are unusual)", style="dim")
    file = rollout_files(folder).get(step)
    for title, cards in extremes(read_json_lines(file)).items() if file else ():
        if cards:
            OUT.print(Text(f"\n{title} of step {step}", style="bold"))
        for card in cards:
            print_card(card)
    return 0
