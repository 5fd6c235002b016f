"""This machine as the only node of a Ray cluster that has yet to start: what it can't give is refused at once."""

import os

from ray._common.utils import get_system_memory
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from configs.stages import AnyStage, Recipe
from pipeline.demand import Node, demand


def refuse_here(config: AnyStage, recipe: Recipe | None) -> None:
    """Raise ValueError for what a stage asks of this machine and can never get. Where RAY_ADDRESS names a cluster, only
    that knows what it has."""
    if "RAY_ADDRESS" in os.environ:
        return
    never = demand(config, recipe).never([this_machine()])
    if never:
        raise ValueError(never)


def this_machine() -> Node:
    """What `ray.init` would find here."""
    found = ResourceAndLabelSpec().resolve(is_head=True)
    cpus, gpus = float(found.num_cpus or 0), float(found.num_gpus or 0)
    return Node("this machine", cpus, gpus, cpus, gpus, memory=float(get_system_memory()))
