"""What a gate decides, in the words of its rules, and `decision.json`, which keeps it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from rich.table import Table
from rich.text import Text

from configs.gate import GateConfig, HoldRule, ImproveRule, Rule
from pipeline.disk.files import read_json, write_atomic
from pipeline.disk.recorded import DECISION
from pipeline.gates.rules import Outcome, Ruling, lower_is_better

Verdict = Literal["promote", "stop", "roll_back", "ask"]

COLORS: dict[Outcome, str] = {"holds": "green", "fails": "bold red", "undecided": "yellow"}


@dataclass(frozen=True, slots=True)
class Decision:
    """A gate's verdict and what it rests on.

    promoted: the checkpoint that what follows starts from, relative to the gate's folder; None where nothing goes on,
    and in a user's decision until the gate has run again. best: the rules on the best checkpoint that the candidate's
    stage kept, where one was asked for. hashes: of what was compared; a decision holds for these only.
    """

    verdict: Verdict
    rulings: list[Ruling]
    hashes: dict[str, str]
    decided_by: Literal["rules", "user"] = "rules"
    promoted: str | None = None
    best: list[Ruling] = field(default_factory=list[Ruling])


def outcome_of(rulings: Sequence[Ruling]) -> Outcome:
    """One failed rule fails; else one undecided rule leaves it undecided; else it holds."""
    outcomes = {ruling.outcome for ruling in rulings}
    return "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"


def verdict_of(rulings: Sequence[Ruling], config: GateConfig) -> Verdict:
    """What the gate's configuration makes of its rules' outcomes."""
    match outcome_of(rulings):
        case "holds":
            return "promote"
        case "fails":
            return config.on_failure
        case "undecided":
            return config.on_undecided


def write_decision(folder: Path, decision: Decision) -> None:
    """Writes `decision.json`."""
    written = {
        "verdict": decision.verdict,
        "promoted": decision.promoted,
        "decided_by": decision.decided_by,
        "rules": [_record(ruling) for ruling in decision.rulings],
        "best": [_record(ruling) for ruling in decision.best],
        "hashes": decision.hashes,
    }
    write_atomic(folder / DECISION, json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def read_decision(folder: Path) -> Decision | None:
    """The decision that `write_decision` wrote; None where the gate has not decided yet."""
    if not (folder / DECISION).is_file():
        return None
    read = read_json(folder / DECISION, "remove it, and the gate decides again")
    return Decision(
        verdict=read["verdict"],
        rulings=[_ruling(record) for record in read["rules"]],
        hashes=read["hashes"],
        decided_by=read["decided_by"],
        promoted=read["promoted"],
        best=[_ruling(record) for record in read["best"]],
    )


def rules_table(rulings: Sequence[Ruling]) -> Table:
    """A line a rule: what came of it, what it asks, both figures, and the difference with its interval."""
    table = Table("", "rule", "before", "now", "difference", "interval", "items", box=None, header_style="bold")
    for ruling in rulings:
        table.add_row(
            Text(came_of(ruling), style=COLORS[ruling.outcome]),
            asked(ruling.rule),
            "" if ruling.parent is None else f"{ruling.parent:.3g}",
            f"{ruling.candidate:.3g}",
            "" if ruling.difference is None else f"{ruling.difference:+.3g}",
            f"{ruling.low:.3g} to {ruling.high:.3g}" if ruling.samples else "",
            f"{ruling.samples or ''}",
        )
    return table


def asked(rule: Rule) -> str:
    """A rule in words."""
    if isinstance(rule, ImproveRule | HoldRule):
        up, down = ("lower", "higher") if lower_is_better(rule.figure) else ("higher", "lower")
        if isinstance(rule, ImproveRule):
            return f"{rule.figure} {up} by more than {rule.margin:g}" if rule.margin else f"{rule.figure} {up}"
        return f"{rule.figure} no {down} than {rule.tolerance:g} from before"
    if rule.at_least is not None:
        return f"{rule.figure} at least {rule.at_least:g}"
    return f"{rule.figure} at most {rule.at_most:g}"


def came_of(ruling: Ruling) -> str:
    """A rule's outcome in words, with what would decide it."""
    left_out = f"; {ruling.unpaired} items judged in one evaluation only" if ruling.unpaired else ""
    if ruling.outcome != "undecided":
        return ruling.outcome + left_out
    needed = ruling.samples_needed
    hint = "exactly at the bound" if needed is None else f"about {needed} items would tell"
    return f"undecided: {hint}{left_out}"


def _record(ruling: Ruling) -> dict[str, Any]:
    figures = {name: getattr(ruling, name) for name in Ruling.__slots__ if name != "rule"}
    return ruling.rule.model_dump() | figures


def _ruling(record: dict[str, Any]) -> Ruling:
    figures = {name: record.pop(name) for name in Ruling.__slots__ if name != "rule"}
    return Ruling(TypeAdapter[Rule](Rule).validate_python(record), **figures)
