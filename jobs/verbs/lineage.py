"""`alignyard lineage RUN [STAGE]`: what a run's results were made from, as a tree."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from jobs.command import OUT, Verbs, add_verb

LINEAGE = """\
Draws what a run's stages were made from: each under the stage whose model it took, with the hashes of its weights and
data, and what has changed since. Of one stage, everything that went into it, up to the models and files that no stage
made. A recorded hash is compared with the file as it is now, which is read for it.

examples:
  alignyard lineage demo
  alignyard lineage runs/demo prefer
"""
HASH_SHOWN = 8


def add_lineage(verbs: Verbs) -> None:
    """Adds `lineage` to the command's verbs."""
    parser = add_verb(verbs, "lineage", _lineage, "what a run's results were made from", LINEAGE)
    parser.add_argument("run", metavar="RUN", help="name or folder of the run")
    parser.add_argument("stage", metavar="STAGE", nargs="?", help="show what this stage was made from (default: all)")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )


def _lineage(args: argparse.Namespace) -> int:
    run = args.runs_dir / args.run if (args.runs_dir / args.run).is_dir() else Path(args.run)
    stages = _recorded(run)
    if args.stage is None:
        OUT.print(_descendants(run, stages))
    elif args.stage in stages:
        OUT.print(_ancestors(run, stages, args.stage, set()))
    else:
        raise ValueError(f"'{run}' has no stage '{args.stage}'; it has {', '.join(stages)}")
    return 0


def _recorded(run: Path) -> dict[str, dict[str, Any]]:
    """The lineage of each stage, in the order they were begun in."""
    from pipeline.disk.recorded import LINEAGE as FILE
    from pipeline.disk.recorded import read_lineage

    found = {file.parent.name: read_lineage(file.parent) for file in run.glob(f"*/{FILE}")}
    if not found:
        raise ValueError(f"'{run}' holds no stage of a run: give the name of a run below --runs-dir, or its folder")
    return dict(sorted(found.items(), key=lambda item: item[1]["created"]))


def _descendants(run: Path, stages: dict[str, dict[str, Any]]) -> Tree:
    """Every stage once, under the first of its parents that belongs to the run."""
    root = Tree(Text(run.resolve().name, style="bold"), guide_style="dim")
    branches: dict[str, Tree] = {}
    for name, lineage in stages.items():
        parents = [parent for parent in _parents(lineage) if parent in branches]
        branch = (branches[parents[0]] if parents else root).add(_title(run / name, lineage))
        branches[name] = branch
        for line in _lines(run / name, lineage, parents[1:]):
            branch.add(line)
    return root


def _ancestors(run: Path, stages: dict[str, dict[str, Any]], name: str, drawn: set[str]) -> Tree:
    """A stage, and below it what it was made from, and so on; what is `drawn` already is only named."""
    lineage = stages[name]
    if name in drawn:
        return Tree(_title(run / name, lineage).append(" (see above)"))
    drawn.add(name)
    tree = Tree(_title(run / name, lineage), guide_style="dim")
    for line in _lines(run / name, lineage, []):
        tree.add(line)
    for parent in _parents(lineage):
        if parent in stages:
            tree.add(_ancestors(run, stages, parent, drawn))
    return tree


def _parents(lineage: dict[str, Any]) -> list[str]:
    """Names of the stages it took something from, each once."""
    return list(dict.fromkeys(Path(parent["folder"]).name for parent in lineage["parents"]))


def _title(folder: Path, lineage: dict[str, Any]) -> Text:
    """`reason (grpo) done, reward 0.3 → 0.7`."""
    from pipeline.disk.recorded import read_figures
    from pipeline.gates.decision import read_decision
    from pipeline.reports.curves import small_curve
    from pipeline.reports.files import read_metrics

    rows, decision = read_metrics(folder), read_decision(folder)
    facts = [
        "done" if read_figures(folder) is not None else f"{len(rows)} steps so far" if rows else "",
        small_curve(rows)[1],
        decision.action.replace("_", " ") if decision else "",
    ]
    title = Text(folder.name, style="bold")
    title.append(f" ({lineage['type']})", style="not bold")
    return title.append(f" {', '.join(fact for fact in facts if fact)}", style="not bold dim")


def _lines(folder: Path, lineage: dict[str, Any], other_parents: list[str]) -> Iterator[Text]:
    """What a stage took, a line each, and what of it has changed since."""
    from pipeline.disk.recorded import changes
    from pipeline.reports.stage_page import data_hashes, weights_hash

    made_by = {parent["key"]: Path(parent["folder"]).name for parent in lineage["parents"]}
    for key, model in lineage["models"].items():
        maker = made_by.get(f"{key}.path")
        origin = f"of {maker}" if maker else model["folder"]
        hashes = f"weights {weights_hash(model)[:HASH_SHOWN]}, tokenizer {model['tokenizer'][:HASH_SHOWN]}"
        yield Text(f"{key}: {model['head']} {origin}, {hashes}", style="dim")
    for key, file, sha256 in data_hashes(lineage):
        yield Text(f"{key}: {file} {sha256[:HASH_SHOWN]}", style="dim")
    for name, sha256 in lineage["rewards"].items():
        yield Text(f"reward {name} {sha256[:HASH_SHOWN]}", style="dim")
    if other_parents:
        yield Text(f"also from {', '.join(other_parents)}")
    for change in changes(folder, content=True):
        yield Text(f"changed since: {change}", style="yellow")
