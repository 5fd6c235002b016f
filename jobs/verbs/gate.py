"""Gates on the command line: `alignyard gate show | decide`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from jobs.command import OUT, Verbs, add_verb

if TYPE_CHECKING:
    from pipeline.gates.decision import Decision

GATE = """\
Shows what a run's gates decided and on what evidence, and takes the decisions that they leave to you.

examples:
  alignyard gate show runs/demo
  alignyard gate show runs/demo reasoning_gate
  alignyard gate decide runs/demo reasoning_gate promote
"""
SHOW = """\
Every rule with both figures, their difference, its interval and what came of it. Of one gate also the items that got
worse, the worst first, with what the parent and the candidate said.

examples:
  alignyard gate show runs/demo
  alignyard gate show runs/demo reasoning_gate --items 20
"""
DECIDE = """\
Decides in the place of a gate that asks, or that stopped the run: `promote` lets the candidate go on, `roll_back` goes
on from the best checkpoint that its stage kept if that one passes, else from the parent, `stop` ends the run here. The
decision holds for the checkpoints and suites that the gate saw; it is carried out when the recipe is run again.

example:
  alignyard gate decide runs/demo reasoning_gate promote
"""


def add_gate(verbs: Verbs) -> None:
    """Adds `gate` and its own verbs to the command's."""
    gate = add_verb(verbs, "gate", _show, "what gates decided, and deciding for them", GATE)
    below = gate.add_subparsers(metavar="VERB", required=True)
    show = add_verb(below, "show", _show, "decisions and their evidence", SHOW)
    decide = add_verb(below, "decide", _decide, "decide for a gate", DECIDE)
    for parser in (show, decide):
        parser.add_argument("run", metavar="RUN", help="name or folder of the run")
        parser.add_argument(
            "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
        )
    show.add_argument("gate", metavar="GATE", nargs="?", help="the gate's name in the recipe (default: all)")
    show.add_argument("--items", metavar="N", type=int, default=5, help="worst items shown (default: %(default)s)")
    decide.add_argument("gate", metavar="GATE", help="the gate's name in the recipe")
    decide.add_argument("verdict", choices=["promote", "stop", "roll_back"], help="what happens to the candidate")


def _show(args: argparse.Namespace) -> int:
    run = _run(args)
    for name in [args.gate] if args.gate else _gates(run):
        OUT.rule(f"[bold]{name}")
        _show_decision(_decision(run, name))
        if args.gate:
            _show_regressions(run / name, _decision(run, name), args.items)
    return 0


def _show_decision(decision: "Decision") -> None:
    from pipeline.gates.decision import rules_table

    OUT.print(rules_table(decision.rulings))
    if decision.best:
        OUT.print("the best checkpoint that the candidate's stage kept:")
        OUT.print(rules_table(decision.best))
    verdict = Text(decision.action.replace("_", " "), style="bold")
    by = "decided by you" if decision.decided_by == "user" else "by the rules"
    verdict.append(f" ({by})", style="dim")
    if decision.promoted:
        verdict.append(f"; what follows starts from {decision.promoted}", style="not bold")
    elif decision.decided_by == "user" and decision.action != "stop":
        verdict.append("; carried out when the recipe is run again", style="not bold")
    OUT.print(verdict)


def _show_regressions(folder: Path, decision: "Decision", most: int) -> None:
    from pipeline.gates.evidence import regressions

    for figure in dict.fromkeys(ruling.rule.figure for ruling in decision.rulings):
        worst, total = regressions(folder, figure, most)
        if not total:
            continue
        OUT.print(f"\n[bold]{figure}[/]: worse on {total} items" + (f", the worst {most}:" if total > most else ":"))
        for item in worst:
            OUT.print(Text(f"  {item.item}: {item.parent:.4g} before, {item.candidate:.4g} now"))
            for label, record in (("before", item.before), ("now", item.now)):
                if record is not None and "completion" in record:
                    if label == "before":
                        OUT.print(Text(f"    asked   {_line(record.get('prompt', ''))}", style="dim"))
                    OUT.print(Text(f"    {label:<7} {_line(record['completion'])}", style="dim"))


def _decide(args: argparse.Namespace) -> int:
    from pipeline.disk.lock import locked
    from pipeline.disk.recorded import read_figures
    from pipeline.gates.decision import write_decision

    run = _run(args)
    folder, decision = run / args.gate, _decision(run, args.gate)
    if read_figures(folder) is not None:
        raise ValueError(
            f"gate '{args.gate}' is done ({decision.action.replace('_', ' ')}), and what follows may have started "
            f"from '{decision.promoted}'; to decide otherwise, run the recipe under another name"
        )
    with locked(folder):
        write_decision(folder, replace(decision, action=args.verdict, decided_by="user", promoted=None))
    OUT.print(f"{args.gate}: {args.verdict.replace('_', ' ')}. Run the recipe again to go on", highlight=False)
    return 0


def _run(args: argparse.Namespace) -> Path:
    for folder in (args.runs_dir / args.run, Path(args.run)):
        if folder.is_dir():
            return folder
    raise ValueError(f"RUN='{args.run}' is no folder, nor one below '{args.runs_dir}'; `alignyard list` shows the runs")


def _gates(run: Path) -> list[str]:
    """The gates of a run that have decided, in the order of their decisions."""
    from pipeline.gates.decision import DECISION

    found = sorted(run.glob(f"*/{DECISION}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ValueError(f"no gate of '{run}' has decided yet")
    return [file.parent.name for file in found]


def _decision(run: Path, name: str) -> "Decision":
    from pipeline.gates.decision import read_decision

    decision = read_decision(run / name)
    if decision is None:
        raise ValueError(f"'{run / name}': no gate has decided here; those that have: {', '.join(_gates(run))}")
    return decision


def _line(text: Any) -> str:
    """What a model said, on one line and harmless to a terminal."""
    line = " ".join(str(text)[:400].split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= 90 else f"{line[:60]} ... {line[-25:]}"
