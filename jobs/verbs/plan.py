"""`alignyard plan RECIPE --cluster 96xH20`: what a recipe takes on a cluster that nobody needs to own yet."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jobs.command import OUT, Verbs, add_overrides, add_verb, duration

if TYPE_CHECKING:
    from pipeline.planner.devices import Device
    from pipeline.planner.layout import Plan
    from pipeline.planner.stage import PlannedStage

PLAN = """\
Predicts memory and time of every training stage on a cluster: parameters, bytes of a device by phase and component,
whether the recipe's own layout fits, the fastest layout that does or the reason why none does, and the seconds of a
step. It starts and fetches nothing: a hub model whose architecture is not shipped needs --model-config. docs/planner.md
compares the predictions with measurements.

examples:
  alignyard plan deepseek_v2_lite --cluster 8xH100
  alignyard plan deepseek_v3 stages.grpo.prompts_per_step=96 --cluster 96xH20 --stage grpo --sweep
  alignyard plan my.yaml --cluster 16xA100 --model-config config.json --mean-share 0.3 --json plan.json
  alignyard plan demo --cluster 1xcpu --measured runs/demo
"""
_GIB = 2**30
SHOWN_LAYOUTS = 20
"""Layouts of a sweep in the table; --json gets all of them."""


def add_plan(verbs: Verbs) -> None:
    """Adds `plan` to the command's verbs."""
    parser = add_verb(verbs, "plan", _plan, "what a recipe takes on a cluster: memory, layout, time", PLAN)
    parser.add_argument("file", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    add_overrides(parser)
    parser.add_argument("--cluster", metavar="NxDEVICE", required=True, help="so many devices of a kind, as in 96xH20")
    parser.add_argument("--stage", metavar="STAGE", help="plan this stage alone")
    parser.add_argument("--sweep", action="store_true", help="show every layout that was tried, the quickest first")
    parser.add_argument(
        "--mean-share",
        metavar="SHARE",
        type=float,
        default=0.5,
        help="mean length of prompts, completions and texts, as a share of the longest allowed (default: 0.5)",
    )
    parser.add_argument("--model-config", metavar="FILE", help="config.json to plan with instead of the recipe's model")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the plans there")
    parser.add_argument("--measured", metavar="RUN", type=Path, help="compare with the memory that a run measured")


def _plan(args: argparse.Namespace) -> int:
    from configs.base import neighbour
    from configs.load import load
    from configs.stages import Recipe
    from pipeline.disk.files import write_atomic
    from pipeline.planner.devices import cluster_of
    from pipeline.planner.layout import own_plan, sweep
    from pipeline.planner.stage import PLANNED, planned_stage

    cluster = cluster_of(args.cluster)
    if not 0 < args.mean_share <= 1:
        raise ValueError(f"--mean-share {args.mean_share}: a share above 0 and up to 1")
    recipe = load(args.file, args.overrides, Recipe).config
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, PLANNED)}
    if args.stage is not None and args.stage not in stages:
        raise ValueError(f"--stage {args.stage}: no such stage that trains; {neighbour(args.stage, list(stages))}")
    figures: dict[str, Any] = {}
    for name, stage in stages.items():
        if args.stage not in (None, name):
            continue
        planned = planned_stage(stage, recipe, mean_share=args.mean_share, model_config=args.model_config)
        own, tried = own_plan(planned, cluster), sweep(planned, cluster)
        OUT.print(f"\n[bold]{name}[/] ({stage.type}) on {cluster}", highlight=False)
        _print_plan(planned, own, tried[0], cluster.count)
        if args.measured is not None:
            _print_measured(planned, args.measured / name, cluster.device)
        if args.sweep:
            _print_sweep(tried)
        model = planned.model
        figures[name] = {
            "parameters": {"total": model.total, "active": model.active, "mtp": model.mtp},
            "own": _figures(own),
            "best": _figures(tried[0]) if not tried[0].reason else None,
            "tried": [_figures(plan) for plan in tried] if args.sweep else len(tried),
        }
    OUT.print(f"\n{cluster.device.name}: {cluster.device.source}", highlight=False, style="dim", soft_wrap=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, json.dumps(figures, indent=2) + "\n")
    return 0


def _print_plan(stage: "PlannedStage", own: "Plan", best: "Plan", devices: int) -> None:
    from pipeline.planner.architecture import format_parameters

    model, work = stage.model, stage.work
    grid = Table.grid(padding=(0, 2, 0, 2))
    mtp = f", and {format_parameters(model.mtp)} of multi-token prediction" if model.mtp else ""
    active = format_parameters(model.active).removesuffix(" parameters")
    grid.add_row("model", f"{model.name}: {format_parameters(model.total)}, {active} active{mtp}")
    grid.add_row(
        "step", f"{work.sequences} sequences of {work.mean_tokens:.0f} tokens on average, at most {work.longest}"
    )
    grid.add_row("its own layout", f"{own.placement}\n" + (f"does not fit: {own.reason}" if own.reason else _fits(own)))
    if best.reason:
        grid.add_row("fastest", f"none fits; the closest: {best.placement}\n{best.reason}")
    else:
        grid.add_row("fastest", f"{best.placement}\n{_fits(best)}")
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
    comparison = "no prediction of this stage" if predicted is None else f"predicted {predicted / _GIB:.2f}"
    measured = f"measured {largest[PEAK]:.2f} GiB in step {largest['step']:.0f}, micro-batch of {tokens} tokens"
    OUT.print(f"  peak of a rank: {measured}; {comparison}", highlight=False, soft_wrap=True)


def _fits(plan: "Plan") -> str:
    return f"fits; {duration(plan.step)} a step"


def _memory_table(plan: "Plan") -> Table:
    table = Table("GiB of a device", *plan.memory, title="memory")
    names = dict.fromkeys(name for parts in plan.memory.values() for name in parts)
    for name in names:
        table.add_row(name, *(f"{parts[name] / _GIB:.2f}" if name in parts else "" for parts in plan.memory.values()))
    table.add_section()
    table.add_row("in all", *(f"{sum(parts.values()) / _GIB:.2f}" for parts in plan.memory.values()))
    if plan.host:
        table.caption = f"and {plan.host / _GIB:.1f} GiB a device of its machine's memory"
    return table


def _time_table(stage: "PlannedStage", plan: "Plan", devices: int) -> Table:
    table = Table("phase", "seconds", "share", title="a step")
    for phase, seconds in plan.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.4g}", f"{seconds / plan.step:.0%}")
    table.add_section()
    table.add_row("in all", f"{plan.step:.4g}", "")
    hours = plan.step * devices / 3600
    costs = [f"{hours:.3g} device-hours a step"]
    if stage.steps:
        costs.append(f"{hours * stage.steps:,.0f} for {stage.steps} steps, {duration(plan.step * stage.steps)}")
    if plan.tail:
        costs.append(f"the longest completions cost {plan.tail:.3g} s of generate")
    table.caption = "; ".join(costs)
    return table


def _print_sweep(plans: list["Plan"]) -> None:
    table = Table("layout", "fullest phase", "GiB", "seconds a step", title=f"{len(plans)} layouts tried")
    for plan in plans[:SHOWN_LAYOUTS]:
        phase = max(plan.memory, key=lambda name: sum(plan.memory[name].values()))
        table.add_row(str(plan.placement), phase, f"{plan.fullest / _GIB:.1f}", plan.reason or f"{plan.step:.4g}")
    OUT.print(table, highlight=False)


def _figures(plan: "Plan") -> dict[str, Any]:
    return {
        "layout": str(plan.placement),
        "reason": plan.reason,
        "memory_bytes": plan.memory,
        "host_bytes": plan.host,
        "seconds": plan.seconds,
        "step_seconds": plan.step,
    }
