"""`alignyard gate show | decide`: the decisions of a run's gates."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.text import Text
from typer import Argument, Option

from jobs.command import OUT, RunName, RunsDir, one_line, run_folder, verb_app

if TYPE_CHECKING:
    from pipeline.gates.decision import Decision

app = verb_app()


@app.callback()
def _gate() -> None:
    """Show what a run's gates decided and on what evidence, or decide in their place.

    \b
    Examples:
      alignyard gate show runs/demo
      alignyard gate show runs/demo reasoning_gate
      alignyard gate decide runs/demo reasoning_gate promote
    """


@app.command()
def show(
    run: RunName,
    gate: Annotated[str | None, Argument(metavar="GATE", help="The gate's name in the recipe. [default: all]")] = None,
    items: Annotated[int, Option(metavar="N", help="Number of worst items to show.")] = 5,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Show the decisions and their evidence.

    For every rule: both figures, their difference, its interval and the outcome. With GATE, also the items that got
    worse, the worst first, with the answers of parent and candidate.

    \b
    Examples:
      alignyard gate show runs/demo
      alignyard gate show runs/demo reasoning_gate --items 20
    """
    folder = _existing_folder(run, runs_dir)
    for name in [gate] if gate else _decided_gates(folder):
        decision = _decision(folder, name)
        OUT.rule(f"[bold]{name}")
        _print_decision(decision)
        if gate:
            _print_regressions(folder / name, decision, items)
    return 0


def _print_decision(decision: "Decision") -> None:
    from pipeline.gates.decision import rules_table

    OUT.print(rules_table(decision.rulings))
    if decision.best:
        OUT.print("the best checkpoint that the candidate's stage kept:")
        OUT.print(rules_table(decision.best))
    verdict = Text(decision.action.replace("_", " "), style="bold")
    verdict.append(f" ({'decided by a person' if decision.decided_by == 'user' else 'by the rules'})", style="dim")
    if decision.promoted:
        verdict.append(f"; the next stage starts from {decision.promoted}", style="not bold")
    elif decision.decided_by == "user" and decision.action != "stop":
        verdict.append("; carried out when the recipe is run again", style="not bold")
    OUT.print(verdict, soft_wrap=True)
    if decision.note:
        OUT.print(Text(f"note: {one_line(decision.note, 400)}"), soft_wrap=True)


def _print_regressions(folder: Path, decision: "Decision", count: int) -> None:
    from pipeline.gates.evidence import regressions

    for figure in dict.fromkeys(ruling.rule.figure for ruling in decision.rulings):
        worst, total = regressions(folder, figure, count)
        if not total:
            continue
        OUT.print(f"\n[bold]{figure}[/]: worse on {total} items" + (f", the worst {count}:" if total > count else ":"))
        for item in worst:
            OUT.print(Text(f"  {item.item}: {item.parent:.4g} before, {item.candidate:.4g} now"))
            for label, record in (("before", item.before), ("now", item.now)):
                if record is not None and "completion" in record:
                    if label == "before":
                        OUT.print(Text(f"    prompt  {_excerpt(record.get('prompt', ''))}", style="dim"))
                    OUT.print(Text(f"    {label:<7} {_excerpt(record['completion'])}", style="dim"))


def _excerpt(text: object) -> str:
    return one_line(str(text), 90, tail=25)


@app.command()
def decide(
    run: RunName,
    gate: Annotated[str, Argument(metavar="GATE", help="The gate's name in the recipe.")],
    verdict: Annotated[
        Literal["promote", "stop", "roll_back"],
        Argument(metavar="promote|stop|roll_back", help="The fate of the candidate."),
    ],
    note: Annotated[str, Option(metavar="TEXT", help="The reason, kept with the decision.")] = "",
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Decide for a gate that asks, or that stopped the run.

    `promote` accepts the candidate. `roll_back` continues from the best checkpoint that its stage kept, if that one
    passes, or else from the parent. `stop` ends the run here. The decision holds for the checkpoints and suites that
    the gate saw, and is carried out when the recipe is run again.

    \b
    Example:
      alignyard gate decide runs/demo reasoning_gate promote --note "programs fell by chance: 3 of 20"
    """
    from pipeline.disk.lock import locked
    from pipeline.disk.recorded import read_figures
    from pipeline.gates.decision import write_decision

    run_path = _existing_folder(run, runs_dir)
    folder, decision = run_path / gate, _decision(run_path, gate)
    if read_figures(folder) is not None:
        raise ValueError(
            f"gate '{gate}' is done ({decision.action.replace('_', ' ')}), and the next stage may have started from "
            f"'{decision.promoted}'; to decide otherwise, run the recipe under another name"
        )
    with locked(folder):
        write_decision(folder, replace(decision, action=verdict, decided_by="user", promoted=None, note=note))
    OUT.print(f"{gate}: {verdict.replace('_', ' ')}. Run the recipe again to continue", highlight=False)
    return 0


def _existing_folder(run: str, runs_dir: Path) -> Path:
    folder = run_folder(run, runs_dir)
    if not folder.is_dir():
        raise ValueError(f"RUN='{run}' is no folder, nor one below '{runs_dir}'; `alignyard list` shows the runs")
    return folder


def _decided_gates(run: Path) -> list[str]:
    """The gates of a run that have decided, in the order of their decisions."""
    from pipeline.gates.decision import DECISION

    files = sorted(run.glob(f"*/{DECISION}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"no gate of '{run}' has decided yet")
    return [file.parent.name for file in files]


def _decision(run: Path, gate: str) -> "Decision":
    from pipeline.gates.decision import read_decision

    decision = read_decision(run / gate)
    if decision is None:
        raise ValueError(f"'{run / gate}': no gate has decided here; those that have: {', '.join(_decided_gates(run))}")
    return decision
