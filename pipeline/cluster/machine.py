"""This machine as the only node of a local Ray cluster, so that impossible demands are refused before it starts."""

import os

from ray._common.utils import get_system_memory
from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from configs.stages import AnyStage, Recipe
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import stage_demand


def refuse_here(config: AnyStage, recipe: Recipe | None) -> None:
    """Raise ValueError for a stage that needs more than this machine has. With RAY_ADDRESS set, the cluster's nodes are
    checked later, once it is joined."""
    if "RAY_ADDRESS" in os.environ:
        return
    if impossible := stage_demand(config, recipe).why_impossible([this_machine()]):
        raise ValueError(impossible)


def this_machine() -> Node:
    """Describe the node that `ray.init` would find here."""
    resources = ResourceAndLabelSpec().resolve(is_head=True)
    cpus, gpus = float(resources.num_cpus or 0), float(resources.num_gpus or 0)
    return Node("this machine", cpus, gpus, cpus, gpus, memory=float(get_system_memory()))
