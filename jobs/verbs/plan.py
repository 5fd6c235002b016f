"""`alignyard plan RECIPE --cluster 96xH20`: what a recipe takes on a cluster that nobody needs to own yet."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jobs.command import OUT, Verbs, add_overrides, add_verb, duration

if TYPE_CHECKING:
    from pipeline.planner.asked import Asked
    from pipeline.planner.layout import Plan

PLAN = """\
Says for each stage that trains: parameters, bytes of a device by phase and component, whether the recipe's own layout
fits the cluster and the quickest one that does, or why none does, and what a step costs. Nothing is started, and
nothing fetched: a hub model whose architecture is not shipped needs --model-config. docs/planner.md says how far the
predictions are from what was measured.

examples:
  alignyard plan deepseek_v2_lite --cluster 8xH100
  alignyard plan deepseek_v3 stages.grpo.prompts_per_step=96 --cluster 96xH20 --stage grpo --sweep
  alignyard plan my.yaml --cluster 16xA100 --model-config config.json --mean-share 0.3 --json plan.json
"""
GIB = 2**30
SHOWN = 20
"""Layouts of a sweep that are shown; all of them are written to --json."""


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


def _plan(args: argparse.Namespace) -> int:
    from configs.base import neighbour
    from configs.load import load_config
    from configs.stages import Recipe
    from pipeline.disk.files import write_atomic
    from pipeline.planner.asked import PLANNED, asked_of
    from pipeline.planner.devices import cluster_of
    from pipeline.planner.layout import own_plan, sweep

    cluster = cluster_of(args.cluster)
    if not 0 < args.mean_share <= 1:
        raise ValueError(f"--mean-share {args.mean_share}: a share above 0 and up to 1")
    recipe = load_config(args.file, args.overrides, Recipe).config
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, PLANNED)}
    if args.stage is not None and args.stage not in stages:
        raise ValueError(f"--stage {args.stage}: no such stage that trains; {neighbour(args.stage, list(stages))}")
    told: dict[str, Any] = {}
    for name, stage in stages.items():
        if args.stage not in (None, name):
            continue
        asked = asked_of(stage, recipe, mean_share=args.mean_share, model_config=args.model_config)
        own, tried = own_plan(asked, cluster), sweep(asked, cluster)
        OUT.print(f"\n[bold]{name}[/] ({stage.type}) on {cluster}", highlight=False)
        _tell(asked, own, tried[0], cluster.count)
        if args.sweep:
            _tell_sweep(tried)
        told[name] = {
            "parameters": {"total": asked.model.total, "active": asked.model.active, "mtp": asked.model.mtp},
            "own": _figures(own),
            "best": _figures(tried[0]) if not tried[0].reason else None,
            "tried": [_figures(plan) for plan in tried] if args.sweep else len(tried),
        }
    OUT.print(f"\n{cluster.device.name}: {cluster.device.source}", highlight=False, style="dim", soft_wrap=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, json.dumps(told, indent=2) + "\n")
    return 0


def _tell(asked: "Asked", own: "Plan", best: "Plan", devices: int) -> None:
    from pipeline.planner.architecture import told_parameters

    model = asked.model
    grid = Table.grid(padding=(0, 2, 0, 2))
    mtp = f", and {told_parameters(model.mtp)} of multi-token prediction" if model.mtp else ""
    active = told_parameters(model.active).removesuffix(" parameters")
    grid.add_row("model", f"{model.name}: {told_parameters(model.total)}, {active} active{mtp}")
    work = asked.work
    grid.add_row(
        "step", f"{work.sequences} sequences of {work.mean_tokens:.0f} tokens on average, at most {work.longest}"
    )
    grid.add_row("its own layout", f"{own}\n" + (f"does not fit: {own.reason}" if own.reason else _took(own)))
    if best.reason:
        grid.add_row("quickest", f"none fits; the closest: {best}\n{best.reason}")
    else:
        grid.add_row("quickest", f"{best}\n{_took(best)}")
    OUT.print(grid, highlight=False)
    OUT.print(_memory_table(best), highlight=False)
    if not best.reason:
        OUT.print(_time_table(asked, best, devices), highlight=False)


def _took(plan: "Plan") -> str:
    return f"fits; {duration(plan.step)} a step"


def _memory_table(plan: "Plan") -> Table:
    table = Table("GiB of a device", *plan.memory, title="memory")
    names = dict.fromkeys(name for parts in plan.memory.values() for name in parts)
    for name in names:
        table.add_row(name, *(f"{parts[name] / GIB:.2f}" if name in parts else "" for parts in plan.memory.values()))
    table.add_section()
    table.add_row("in all", *(f"{sum(parts.values()) / GIB:.2f}" for parts in plan.memory.values()))
    if plan.host:
        table.caption = f"and {plan.host / GIB:.1f} GiB a device of its machine's memory"
    return table


def _time_table(asked: "Asked", plan: "Plan", devices: int) -> Table:
    table = Table("phase", "seconds", "share", title="a step")
    for phase, seconds in plan.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.4g}", f"{seconds / plan.step:.0%}")
    table.add_section()
    table.add_row("in all", f"{plan.step:.4g}", "")
    hours = plan.step * devices / 3600
    told = [f"{hours:.3g} device-hours a step"]
    if asked.steps:
        told.append(f"{hours * asked.steps:,.0f} for {asked.steps} steps, {duration(plan.step * asked.steps)}")
    if plan.tail:
        told.append(f"the longest completions cost {plan.tail:.3g} s of generate")
    table.caption = "; ".join(told)
    return table


def _tell_sweep(plans: list["Plan"]) -> None:
    table = Table("layout", "fullest phase", "GiB", "seconds a step", title=f"{len(plans)} layouts tried")
    for plan in plans[:SHOWN]:
        phase = max(plan.memory, key=lambda name: sum(plan.memory[name].values()))
        table.add_row(str(plan), phase, f"{plan.excess / GIB:.1f}", plan.reason or f"{plan.step:.4g}")
    OUT.print(table, highlight=False)


def _figures(plan: "Plan") -> dict[str, Any]:
    return {
        "layout": str(plan),
        "reason": plan.reason,
        "memory_bytes": plan.memory,
        "host_bytes": plan.host,
        "seconds": plan.seconds,
        "step_seconds": plan.step,
    }
