"""`alignyard plan RECIPE --cluster 96xH20`: predicts memory, layout and time on a cluster, without that cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from jobs.command import OUT, JsonFile, Overrides, RecipeFile, verb_app, write_json
from pipeline.reports.files import duration

if TYPE_CHECKING:
    from pipeline.planner.devices import Device
    from pipeline.planner.layout import Plan
    from pipeline.planner.stage import PlannedStage

app = verb_app()
SWEEP_ROWS = 20
"""Layouts of a sweep in the table; --json has all of them."""
BYTES_PER_GIB = 2**30


@app.command("plan")
def plan_recipe(
    file: RecipeFile,
    overrides: Overrides,
    cluster: Annotated[str, Option(metavar="NxDEVICE", help="Number and kind of the devices, such as 96xH20.")],
    stage: Annotated[str | None, Option(metavar="STAGE", help="Plan this stage alone.")] = None,
    sweep: Annotated[bool, Option("--sweep", help="Show every layout that was tried, the fastest first.")] = False,
    mean_share: Annotated[float, Option(metavar="SHARE", help="Mean length of texts, relative to the longest.")] = 0.5,
    model_config: Annotated[str | None, Option(metavar="FILE", help="A config.json instead of the recipe's.")] = None,
    measured: Annotated[
        Path | None, Option(metavar="RUN", help="Compare with the memory that a run measured.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Predict parameters, memory of each device and the time of a step, for every stage that trains.

    Prints whether the recipe's own layout fits the cluster, and the fastest layout that fits, or the reason why none
    does. Nothing is started or downloaded: a hub model whose architecture is not shipped needs --model-config.
    docs/planner.md compares the predictions with measurements.

    \b
    Examples:
      alignyard plan deepseek_v2_lite --cluster 8xH100
      alignyard plan deepseek_v3 stages.grpo.prompts_per_step=96 --cluster 96xH20 --stage grpo --sweep
      alignyard plan my.yaml --cluster 16xA100 --model-config config.json --mean-share 0.3 --json plan.json
      alignyard plan demo --cluster 1xcpu --measured runs/demo
    """
    from configs.base import neighbour
    from configs.load import load_config
    from configs.stages import Recipe
    from pipeline.planner import layout
    from pipeline.planner.devices import cluster_of
    from pipeline.planner.stage import PLANNED, planned_stage

    devices = cluster_of(cluster)
    if not 0 < mean_share <= 1:
        raise ValueError(f"--mean-share {mean_share}: a share above 0 and up to 1")
    recipe = load_config(file, overrides, Recipe).config
    stages = {name: config for name, config in recipe.stages.items() if isinstance(config, PLANNED)}
    if stage is not None and stage not in stages:
        raise ValueError(f"--stage {stage}: no such stage that trains; {neighbour(stage, list(stages))}")
    results: dict[str, Any] = {}
    for name, config in stages.items():
        if stage not in (None, name):
            continue
        planned = planned_stage(config, recipe, mean_share=mean_share, model_config=model_config)
        own, plans = layout.own_plan(planned, devices), layout.sweep(planned, devices)
        OUT.print(f"\n[bold]{name}[/] ({config.type}) on {devices}", highlight=False)
        _print_plans(planned, own, plans[0], devices.count)
        if measured is not None:
            _print_measured(planned, measured / name, devices.device)
        if sweep:
            _print_sweep(plans)
        results[name] = _stage_values(planned, own, plans, all_plans=sweep)
    OUT.print(f"\n{devices.device.name}: {devices.device.source}", highlight=False, style="dim", soft_wrap=True)
    write_json(results, json_file)
    return 0


def _print_plans(stage: "PlannedStage", own: "Plan", best: "Plan", devices: int) -> None:
    from pipeline.planner.architecture import format_parameters

    model, work = stage.model, stage.work
    grid = Table.grid(padding=(0, 2, 0, 2))
    mtp = f", and {format_parameters(model.mtp)} of multi-token prediction" if model.mtp else ""
    active = format_parameters(model.active).removesuffix(" parameters")
    grid.add_row("model", f"{model.name}: {format_parameters(model.total)}, {active} active{mtp}")
    grid.add_row(
        "step", f"{work.sequences} sequences of {work.mean_tokens:.0f} tokens on average, at most {work.longest}"
    )
    grid.add_row("its own layout", f"{own.placement}\n" + (f"does not fit: {own.reason}" if own.reason else _fit(own)))
    if best.reason:
        grid.add_row("fastest", f"none fits; the closest: {best.placement}\n{best.reason}")
    else:
        grid.add_row("fastest", f"{best.placement}\n{_fit(best)}")
    OUT.print(grid, highlight=False)
    OUT.print(_memory_table(best), highlight=False)
    if not best.reason:
        OUT.print(_time_table(stage, best, devices), highlight=False)


def _print_measured(stage: "PlannedStage", folder: Path, device: "Device") -> None:
    """Print the largest peak of memory of a stage's steps beside its prediction for the same micro-batch."""
    from pipeline.planner.layout import predicted_peak
    from pipeline.reports.files import read_metrics
    from pipeline.train.spec import LONGEST, PEAK

    steps = [row for row in read_metrics(folder) if LONGEST in row]
    if not steps:
        OUT.print(f"  '{folder}' has no measured memory", highlight=False, soft_wrap=True)
        return
    largest = max(steps, key=lambda row: row[PEAK])
    tokens = int(largest[LONGEST])
    predicted = predicted_peak(stage, device, tokens)
    comparison = "no prediction of this stage" if predicted is None else f"predicted {predicted / BYTES_PER_GIB:.2f}"
    peak = f"measured {largest[PEAK]:.2f} GiB in step {largest['step']:.0f}, micro-batch of {tokens} tokens"
    OUT.print(f"  peak of a rank: {peak}; {comparison}", highlight=False, soft_wrap=True)


def _fit(plan: "Plan") -> str:
    return f"fits; {duration(plan.step)} a step"


def _memory_table(plan: "Plan") -> Table:
    """GiB of each component (rows) in each phase (columns)."""
    table = Table("GiB per device", *plan.memory, title="memory")
    components = dict.fromkeys(name for phase in plan.memory.values() for name in phase)
    for name in components:
        cells = (f"{phase[name] / BYTES_PER_GIB:.2f}" if name in phase else "" for phase in plan.memory.values())
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("total", *(f"{sum(phase.values()) / BYTES_PER_GIB:.2f}" for phase in plan.memory.values()))
    if plan.host:
        table.caption = f"and {plan.host / BYTES_PER_GIB:.1f} GiB of the machine's memory per device"
    return table


def _time_table(stage: "PlannedStage", plan: "Plan", devices: int) -> Table:
    table = Table("phase", "seconds", "share", title="a step")
    for phase, seconds in plan.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.4g}", f"{seconds / plan.step:.0%}")
    table.add_section()
    table.add_row("total", f"{plan.step:.4g}", "")
    hours, steps = plan.step * devices / 3600, stage.steps
    facts = [f"{hours:.3g} device-hours a step"]
    if steps:
        facts.append(f"{hours * steps:,.0f} for {steps} steps, {duration(plan.step * steps)}")
    if plan.tail:
        facts.append(f"the longest completions cost {plan.tail:.3g} s of generate")
    table.caption = "; ".join(facts)
    return table


def _print_sweep(plans: list["Plan"]) -> None:
    table = Table("layout", "fullest phase", "GiB", "seconds a step", title=f"{len(plans)} layouts tried")
    for plan in plans[:SWEEP_ROWS]:
        phase = max(plan.memory, key=lambda name: sum(plan.memory[name].values()))
        table.add_row(
            str(plan.placement), phase, f"{plan.fullest / BYTES_PER_GIB:.1f}", plan.reason or f"{plan.step:.4g}"
        )
    OUT.print(table, highlight=False)


def _stage_values(stage: "PlannedStage", own: "Plan", plans: list["Plan"], *, all_plans: bool) -> dict[str, Any]:
    model = stage.model
    return {
        "parameters": {"total": model.total, "active": model.active, "mtp": model.mtp},
        "own": _plan_values(own),
        "best": _plan_values(plans[0]) if not plans[0].reason else None,
        "tried": [_plan_values(plan) for plan in plans] if all_plans else len(plans),
    }


def _plan_values(plan: "Plan") -> dict[str, Any]:
    return {
        "layout": str(plan.placement),
        "reason": plan.reason,
        "memory_bytes": plan.memory,
        "host_bytes": plan.host,
        "seconds": plan.seconds,
        "step_seconds": plan.step,
    }
