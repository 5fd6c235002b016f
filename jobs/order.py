"""The order of a run, from the process that a user started to the conductor."""

from pathlib import Path

from configs.base import Settings
from configs.graph import chosen, graph
from configs.stages import Recipe
from jobs.shipment import Shipment
from pipeline.disk.run_record import RunRecord, StageRecord

ORDER = "ALIGNYARD_ORDER"
"""Environment variable with the order, as JSON."""


class Order(Settings):
    """A run to conduct."""

    recipe: Recipe
    """The recipe."""
    folder: Path
    """Absolute folder of the run."""
    working_directory: Path
    """Folder that relative paths of the recipe start from."""
    shipment: Shipment | None = None
    """The recipe's files, in the folder that the conductor's Ray job starts in; None on a cluster of its own."""
    start: str | None = None
    """The first stage to run (see configs.graph.chosen)."""
    until: str | None = None
    """The last stage to run."""
    only: str | None = None
    """The stage to run alone."""
    address: str = ""
    """Job server of the cluster to run on, as the user calls it; empty for a cluster of its own."""
    job: str = ""
    """The conductor's own Ray job; empty if it is a process."""

    @property
    def stages(self) -> list[str]:
        """Names of the selected stages, in the recipe's order."""
        return chosen(graph(self.recipe), start=self.start, until=self.until, only=self.only)

    def new_record(self, earlier: RunRecord | None) -> RunRecord:
        """A record of the run before it starts, which keeps the jobs and times of stages that ran before."""
        stages = {
            name: StageRecord(self.recipe.stages[name].type, waits_for)
            for name, waits_for in graph(self.recipe).items()
        }
        for name, stage in stages.items():
            if earlier is not None and name in earlier.stages:
                before = earlier.stages[name]
                stage.job, stage.started, stage.ended = before.job, before.started, before.ended
        name, folder = self.recipe.name, str(self.folder)
        return RunRecord(name, folder, stages, reason="starting", address=self.address, job=self.job)
