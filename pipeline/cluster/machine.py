"""This machine as the only node of a Ray cluster that is yet to start, so that impossible demands are refused early."""

import os

from ray._common.utils import get_system_memory
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from configs.stages import AnyStage, Recipe
from pipeline.cluster.demand import Node, demand


def refuse_here(config: AnyStage, recipe: Recipe | None) -> None:
    """Raise ValueError for a stage whose demand this machine can never meet. Nothing is checked where RAY_ADDRESS names
    a cluster, whose nodes are known once it is joined."""
    if "RAY_ADDRESS" in os.environ:
        return
    never = demand(config, recipe).never([this_machine()])
    if never:
        raise ValueError(never)


def this_machine() -> Node:
    """The node that `ray.init` would find here."""
    resources = ResourceAndLabelSpec().resolve(is_head=True)
    cpus, gpus = float(resources.num_cpus or 0), float(resources.num_gpus or 0)
    return Node("this machine", cpus, gpus, cpus, gpus, memory=float(get_system_memory()))
