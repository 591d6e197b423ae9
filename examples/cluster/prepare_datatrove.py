"""Prepare with datatrove: on this machine, on Slurm or on Ray. pip install 'gptcli[cluster]'

After a failure, run it again: ranks that the logs mark as done are skipped.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from gptcli.config import load_config
from gptcli.data.prepare import finalize, make_plan
from gptcli.data.sources import PreparePlan

# tasks is the number of ranks; any number gives the same bytes. workers is how many run at once.
local = partial(LocalPipelineExecutor, tasks=4, workers=4)
slurm = partial(SlurmPipelineExecutor, tasks=64, time="4:00:00", partition="cpu")
ray = partial(RayPipelineExecutor, tasks=64)  # on the Ray cluster that RAY_ADDRESS names

CONFIG = "run.yaml"  # CHANGE (1 of 2): what to prepare, as in gpt prepare -c
EXECUTOR = local  # CHANGE (2 of 2): local, slurm or ray, as set up above


class PrepareShare(PipelineStep):
    """`gpt prepare --rank`: tokenize every world_size-th unit of a plan."""

    name, type = "gpt prepare --rank", "TOKENIZER"

    def __init__(self, plan: PreparePlan, workers: int = 1) -> None:
        super().__init__()
        self.plan, self.workers = plan, workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Prepare the share of `rank`, count its units, bytes and tokens, and pass `data` on."""
        from gptcli.data.prepare import prepare_share  # Slurm's jobs do not run this file's imports

        with self.track_time("rank"):
            records = prepare_share(self.plan, rank, world_size, workers=self.workers)
        self.stat_update("units", value=len(records), unit="rank")
        for record in records:
            self.stat_update("bytes", value=record.bytes.total, unit="unit")
            self.stat_update("tokens", value=record.tokens.total, unit="unit")
        yield from data or ()


class Finalize(PipelineStep):
    """`gpt prepare --finalize` as one task, for executors that only submit the ranks (Slurm)."""

    name, type = "gpt prepare --finalize", "TOKENIZER"

    def __init__(self, plan: PreparePlan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the manifest, count what it lists, and pass `data` on."""
        from gptcli.data.prepare import finalize

        with self.track_time("manifest"):
            manifest = finalize(self.plan)
        self.stat_update("tokens", value=manifest.tokens.total, unit="folder")
        yield from data or ()


if __name__ == "__main__":
    plan = make_plan(load_config(CONFIG))
    logs = f"{plan.folder}.logs"
    ranks = EXECUTOR(pipeline=[PrepareShare(plan)], logging_dir=f"{logs}/ranks")
    ranks.run()
    if EXECUTOR is slurm:  # the ranks have only been submitted so far
        EXECUTOR(
            pipeline=[Finalize(plan)], tasks=1, depends=ranks, logging_dir=f"{logs}/finalize",
            skip_completed=False, sbatch_args={"kill-on-invalid-dep": "yes"},
        ).run()  # fmt: skip
    else:
        finalize(plan)
