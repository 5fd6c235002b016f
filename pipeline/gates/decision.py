"""A gate's decision: made from its rulings, kept in `decision.json`, printed as a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from rich.table import Column, Table
from rich.text import Text

from configs.gate import GateConfig, HoldRule, ImproveRule, Rule
from pipeline.disk.files import read_json, write_atomic
from pipeline.disk.recorded import DECISION
from pipeline.gates.rules import RuleOutcome, Ruling, lower_is_better

Action = Literal["promote", "stop", "roll_back", "ask"]
OUTCOME_STYLES: dict[RuleOutcome, str] = {"holds": "green", "fails": "bold red", "undecided": "yellow"}


@dataclass(frozen=True, slots=True)
class Decision:
    """The action of a gate and the rulings behind it."""

    action: Action
    rulings: list[Ruling]
    hashes: dict[str, str]
    """Hashes of the checkpoints and suites compared; the decision holds for these alone."""
    decided_by: Literal["rules", "user"] = "rules"
    promoted: str | None = None
    """The checkpoint that later stages start from, relative to the gate's folder.

    None where the run stops, and in a user's decision until the gate has run again.
    """
    best: list[Ruling] = field(default_factory=list[Ruling])
    """Rulings on the best checkpoint of the candidate's stage, where rolling back considered one."""
    note: str = ""
    """The reason that a user gave for a decision."""


def overall_outcome(rulings: Sequence[Ruling]) -> RuleOutcome:
    """Combine rulings: one that fails fails the gate; else one undecided leaves it undecided; else it holds."""
    outcomes = {ruling.outcome for ruling in rulings}
    return "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"


def action_for(rulings: Sequence[Ruling], config: GateConfig) -> Action:
    """Choose the action that the gate's configuration sets for its rulings."""
    match overall_outcome(rulings):
        case "holds":
            return "promote"
        case "fails":
            return config.on_failure
        case "undecided":
            return config.on_undecided


def write_decision(folder: Path, decision: Decision) -> None:
    """Write `decision.json`, which calls the action `verdict` and the rulings `rules`."""
    record = {
        "verdict": decision.action,
        "promoted": decision.promoted,
        "decided_by": decision.decided_by,
        "note": decision.note,
        "rules": [_record(ruling) for ruling in decision.rulings],
        "best": [_record(ruling) for ruling in decision.best],
        "hashes": decision.hashes,
    }
    write_atomic(folder / DECISION, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_decision(folder: Path) -> Decision | None:
    """Read the decision that `write_decision` wrote; None where the gate has not decided yet."""
    if not (folder / DECISION).is_file():
        return None
    record = read_json(folder / DECISION, "remove it, and the gate decides again")
    return Decision(
        action=record["verdict"],
        rulings=[_ruling(rule) for rule in record["rules"]],
        hashes=record["hashes"],
        decided_by=record["decided_by"],
        promoted=record["promoted"],
        best=[_ruling(rule) for rule in record["best"]],
        note=record.get("note", ""),
    )


def rules_table(rulings: Sequence[Ruling]) -> Table:
    """Tabulate rulings: outcome, rule, both figures, and the difference with its interval."""
    rule = Column("rule", overflow="fold")
    table = Table("", rule, "before", "now", "difference", "interval", "items", box=None, header_style="bold")
    for ruling in rulings:
        table.add_row(
            Text(describe_ruling(ruling), style=OUTCOME_STYLES[ruling.outcome]),
            describe_rule(ruling.rule),
            "" if ruling.parent is None else f"{ruling.parent:.3g}",
            f"{ruling.candidate:.3g}",
            "" if ruling.difference is None else f"{ruling.difference:+.3g}",
            f"{ruling.low:.3g} to {ruling.high:.3g}" if ruling.samples else "",
            f"{ruling.samples or ''}",
        )
    return table


def describe_rule(rule: Rule) -> str:
    """Describe a rule, as in `sums/accuracy no lower than 0.02 from before`."""
    if isinstance(rule, ImproveRule | HoldRule):
        better, worse = ("lower", "higher") if lower_is_better(rule.figure) else ("higher", "lower")
        if isinstance(rule, ImproveRule):
            return f"{rule.figure} {better} by more than {rule.margin:g}" if rule.margin else f"{rule.figure} {better}"
        return f"{rule.figure} no {worse} than {rule.tolerance:g} from before"
    if rule.at_least is not None:
        return f"{rule.figure} at least {rule.at_least:g}"
    return f"{rule.figure} at most {rule.at_most:g}"


def describe_ruling(ruling: Ruling) -> str:
    """Describe an outcome, with the number of items that would decide it and those judged once only."""
    left_out = f"; {ruling.unpaired} items judged in one evaluation only" if ruling.unpaired else ""
    if ruling.outcome != "undecided":
        return ruling.outcome + left_out
    needed = ruling.samples_needed
    remedy = "exactly at the bound" if needed is None else f"about {needed} items would tell"
    return f"undecided: {remedy}{left_out}"


_FIGURES = [name for name in Ruling.__slots__ if name != "rule"]


def _record(ruling: Ruling) -> dict[str, Any]:
    return ruling.rule.model_dump() | {name: getattr(ruling, name) for name in _FIGURES}


def _ruling(record: dict[str, Any]) -> Ruling:
    figures = {name: record.pop(name) for name in _FIGURES}
    return Ruling(TypeAdapter[Rule](Rule).validate_python(record), **figures)
