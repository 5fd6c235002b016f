"""`alignyard run` and `alignyard submit`: start a run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from jobs.command import OUT, Address, Fresh, Output, Overrides, RecipeFile, StageFile, begin_anew, verb_app, write_json
from jobs.start import new_order, recipe_of, start_order

if TYPE_CHECKING:
    from configs.stages import Recipe
    from pipeline.run.preview_placement import PlacementPreview

app = verb_app()


@app.command()
def run(
    file: RecipeFile,
    overrides: Overrides,
    start: Annotated[str | None, Option("--from", metavar="STAGE", help="Run this stage and its dependents.")] = None,
    until: Annotated[str | None, Option(metavar="STAGE", help="Run this stage and its dependencies.")] = None,
    only: Annotated[str | None, Option(metavar="STAGE", help="Run this stage alone.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan of the run, and start nothing.")] = False,
    cluster: Annotated[
        str, Option(metavar="NxDEVICE", help="With --dry-run: place every stage on this cluster, such as 1x8xH100.")
    ] = "",
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write those placements to a file.")
    ] = None,
    detach: Annotated[bool, Option("--detach", help="Return as soon as the run has started.")] = False,
    fresh: Fresh = False,
    address: Address = "",
) -> int:
    """Run a recipe: every stage as a Ray job, as soon as its inputs are done, in parallel where resources allow.

    Finished stages are reused. An interrupted run continues when the same command is given again.

    Without an address the run starts its own Ray cluster on this machine, which ends with it. It goes on when the
    terminal closes; Ctrl-C stops it. With --address (or RAY_ADDRESS) everything runs on that cluster: its machines
    need alignyard installed and must share <runs_dir>. Plug-ins, templates and data that the recipe names by relative
    paths travel with the run, 100 MiB at most. status, logs and stop work from any shell.

    \b
    Examples:
      alignyard run demo
      alignyard run demo --dry-run
      alignyard run deepseek_v2_lite --dry-run --cluster 1x8xH100 --json placement.json
      alignyard run my.yaml stages.reason.steps=300 name=longer
      alignyard run my.yaml --from reason --fresh
      alignyard run my.yaml --from reason --address http://head:8265 --detach
    """
    from configs.graph import chosen, graph
    from configs.load import load_config
    from configs.stages import Recipe

    recipe = load_config(file, overrides, Recipe).config
    selection = {"start": start, "until": until, "only": only}
    names = chosen(graph(recipe), **selection)  # refuses a wrong stage name at once
    if fresh and dry_run:
        raise ValueError("--fresh moves results aside, and --dry-run changes nothing; give one of them")
    if (cluster and not dry_run) or (json_file and not cluster):
        raise ValueError("--cluster goes with --dry-run, and --json with --cluster")
    if dry_run:
        return _dry_run(recipe, selection, cluster, json_file)
    if fresh:
        folder = Path(recipe.runs_dir, recipe.name)
        if address and not folder.is_dir():
            raise ValueError(
                f"--fresh: there is no '{folder.absolute()}' on this machine; leave --fresh out where the run is new, "
                "or give the command on a machine that shares the folder"
            )
        begin_anew((folder / name for name in names), run=folder)
    return start_order(new_order(recipe, address, **selection), detach=detach)


@app.command()
def submit(
    stage: Annotated[str, Argument(metavar="STAGE", help="Its type; docs/recipes.md lists the types.")],
    file: StageFile,
    overrides: Overrides,
    output: Output = None,
    address: Address = "",
) -> int:
    """Run one stage as a Ray job, and return at once. Everything else is as with `alignyard run`.

    \b
    Examples:
      alignyard submit sft my_sft.yaml
      alignyard submit grpo my_grpo.yaml optimizer.learning_rate=1e-5 --output runs/slow --address http://head:8265
    """
    from configs.base import neighbour
    from configs.load import load_config
    from configs.stages import STAGES

    if stage not in STAGES:
        raise ValueError(f"submit {stage}: no such type of stage; {neighbour(stage, list(STAGES))}")
    config = load_config(file, overrides, STAGES[stage]).config
    folder = output or Path("runs") / Path(file).stem
    return start_order(new_order(recipe_of(config, folder), address), detach=True)


def _dry_run(recipe: "Recipe", selection: dict[str, str | None], cluster: str, json_file: Path | None) -> int:
    from pipeline.disk.run_record import refuse_other_recipe
    from pipeline.run.dry_run import (
        StageSelection,
        describe_layout,
        describe_model,
        describe_sources,
        dry_run,
        refuse_problems,
    )

    folder = Path(recipe.runs_dir, recipe.name)
    refuse_other_recipe(recipe, folder)
    previews = _placements(recipe, cluster) if cluster else {}
    stages = dry_run(recipe, folder, StageSelection(**selection))
    for stage in stages:
        OUT.print(f"\n[bold]{stage.name}[/] ({stage.config.type}): {stage.action}", highlight=False)
        table = Table.grid(padding=(0, 2, 0, 2))
        for title, text in (
            ("after", ", ".join(stage.waits_for)),
            ("model", describe_model(stage.config, recipe)),
            ("layout", "; ".join(describe_layout(stage.config, recipe))),
            ("data", "\n".join(describe_sources(stage.config))),
        ):
            if text:
                table.add_row(title, Text(text))
        if stage.missing_input:
            table.add_row("lacks", Text(stage.missing_input, style="yellow"))
        OUT.print(table)
        if stage.name in previews:
            _print_placement(previews[stage.name])
    OUT.print(f"\nrun folder: {folder}", highlight=False, soft_wrap=True)
    lacking = [stage.name for stage in stages if stage.missing_input]
    if lacking:
        OUT.print(f"missing before it can run here: the inputs of {', '.join(lacking)}", style="yellow", soft_wrap=True)
    write_json(
        {"cluster": cluster, "stages": {name: _values(preview) for name, preview in previews.items()}}, json_file
    )
    refused = [f"{name}: {preview.refused}" for name, preview in previews.items() if preview.refused]
    if refused:
        raise ValueError("\n".join(refused))
    refuse_problems([stage for stage in stages if stage.conflict])
    return 0


def _placements(recipe: "Recipe", cluster: str) -> "dict[str, PlacementPreview]":
    from pipeline.planner.devices import cluster_of
    from pipeline.run.preview_placement import preview_placement

    devices = cluster_of(cluster)
    return {name: preview_placement(config, recipe, devices) for name, config in recipe.stages.items()}


def _print_placement(preview: "PlacementPreview") -> None:
    """Print the actors of every device, and the GiB that it holds in each phase."""
    from pipeline.cluster.placement import held_bytes

    if preview.placement is None:
        OUT.print(f"  can't be placed: {preview.refused}", style="red", markup=False, highlight=False, soft_wrap=True)
        return
    phases = list(dict.fromkeys(phase for actor in preview.placement.actors for phase in actor.bytes))
    table = Table("device", "actors", *(f"{phase}, GiB" for phase in phases))
    for (node, number), actors in preview.placement.users().items():
        shares = [f"{actor} ({actor.share:g})" if actor.share < 1 else str(actor) for actor in actors]
        held = (f"{held_bytes(actors, phase) / 2**30:.1f}" for phase in phases)
        table.add_row(f"{node}:{number}", ", ".join(shares), *held)
    OUT.print(table, highlight=False)
    if preview.note:
        OUT.print(f"  {preview.note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _values(preview: "PlacementPreview") -> dict[str, Any]:
    actors = preview.placement.actors if preview.placement else []
    return {"actors": [asdict(actor) for actor in actors], "refused": preview.refused, "note": preview.note}
