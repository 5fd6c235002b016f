"""`alignyard lineage RUN [STAGE]`: the models and data that a run was made from, as a tree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from rich.tree import Tree
from typer import Argument

from jobs.command import OUT, RunName, RunsDir, run_folder, verb_app
from pipeline.disk.recorded import LINEAGE, changes, read_figures, read_lineage
from pipeline.reports.files import read_metrics

app = verb_app()
HASH_CHARACTERS = 8


@app.command()
def lineage(
    run: RunName,
    stage: Annotated[str | None, Argument(metavar="STAGE", help="Show the inputs of this stage alone.")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Draw the stages of a run as a tree: each below the stage that its model comes from.

    The tree shows the hashes of weights, data and rewards, and which of them have changed since. With STAGE it shows
    everything that went into that stage, up to the models and files that no stage made. The files are read to compare
    their hashes.

    \b
    Examples:
      alignyard lineage demo
      alignyard lineage runs/demo prefer
    """
    folder = run_folder(run, runs_dir)
    if (folder / LINEAGE).is_file():  # a stage that was run alone
        folder, name = folder.resolve().parent, folder.resolve().name
        OUT.print(_tree_of_stage(folder, {name: read_lineage(folder / name)}, name, set()))
        return 0
    stages = _read_stages(folder)
    if stage is None:
        OUT.print(_tree_of_run(folder, stages))
    elif stage in stages:
        OUT.print(_tree_of_stage(folder, stages, stage, set()))
    else:
        raise ValueError(f"'{folder}' has no stage '{stage}'; it has {', '.join(stages)}")
    return 0


def _read_stages(run: Path) -> dict[str, dict[str, Any]]:
    """The lineage of each stage, in the order in which they started."""
    stages = {file.parent.name: read_lineage(file.parent) for file in run.glob(f"*/{LINEAGE}")}
    if not stages:
        raise ValueError(f"'{run}' holds no stage of a run: give the name of a run below --runs-dir, or its folder")
    return dict(sorted(stages.items(), key=lambda item: item[1]["created"]))


def _tree_of_run(run: Path, stages: dict[str, dict[str, Any]]) -> Tree:
    """Every stage once, under the first of its parents that belongs to the run."""
    root = Tree(Text(run.resolve().name, style="bold"), guide_style="dim")
    branches: dict[str, Tree] = {}
    for name, record in stages.items():
        parents = [parent for parent in _parents(record) if parent in branches]
        branch = (branches[parents[0]] if parents else root).add(_title(run / name, record))
        branches[name] = branch
        for line in _input_lines(run / name, record, parents[1:]):
            branch.add(line)
    return root


def _tree_of_stage(run: Path, stages: dict[str, dict[str, Any]], name: str, shown: set[str]) -> Tree:
    """A stage above the stages it was made from, recursively. A stage in `shown` is only named."""
    record = stages[name]
    if name in shown:
        return Tree(_title(run / name, record).append(" (see above)"))
    shown.add(name)
    tree = Tree(_title(run / name, record), guide_style="dim")
    for line in _input_lines(run / name, record, []):
        tree.add(line)
    for parent in _parents(record):
        if parent in stages:
            tree.add(_tree_of_stage(run, stages, parent, shown))
    return tree


def _parents(record: dict[str, Any]) -> list[str]:
    """Names of the stages whose results the stage used, each once."""
    return list(dict.fromkeys(Path(parent["folder"]).name for parent in record["parents"]))


def _title(folder: Path, record: dict[str, Any]) -> Text:
    """`reason (grpo) done, reward 0.3 → 0.7`."""
    from pipeline.gates.decision import read_decision
    from pipeline.reports.curves import trend

    rows, decision = read_metrics(folder), read_decision(folder)
    facts = [
        "done" if read_figures(folder) is not None else f"{len(rows)} steps so far" if rows else "",
        trend(rows),
        decision.action.replace("_", " ") if decision else "",
    ]
    title = Text(folder.name, style="bold")
    title.append(f" ({record['type']})", style="not bold")
    return title.append(f" {', '.join(fact for fact in facts if fact)}", style="not bold dim")


def _input_lines(folder: Path, record: dict[str, Any], other_parents: list[str]) -> Iterator[Text]:
    """One line for each input of a stage, and one for each that has changed since."""
    from pipeline.reports.files import data_hashes, weights_hash

    stage_of_key = {parent["key"]: Path(parent["folder"]).name for parent in record["parents"]}
    for key, model in record["models"].items():
        stage = stage_of_key.get(f"{key}.path")
        origin = f"of {stage}" if stage else model["folder"]
        hashes = f"weights {weights_hash(model)[:HASH_CHARACTERS]}, tokenizer {model['tokenizer'][:HASH_CHARACTERS]}"
        yield Text(f"{key}: {model['head']} {origin}, {hashes}", style="dim")
    for key, file, sha256 in data_hashes(record):
        yield Text(f"{key}: {file} {sha256[:HASH_CHARACTERS]}", style="dim")
    for name, sha256 in record["rewards"].items():
        yield Text(f"reward {name} {sha256[:HASH_CHARACTERS]}", style="dim")
    if other_parents:
        yield Text(f"also from {', '.join(other_parents)}")
    for change in changes(folder, content=True):
        yield Text(f"changed since: {change}", style="yellow")
