"""Prepare under datatrove: on this machine, on Slurm or on Ray. pip install 'gptcli[cluster]'

Run it again after a failure: ranks that the logs mark as done are not run again.
"""

from functools import partial

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

from gptcli.config import load_config
from gptcli.data.datatrove import Finalize, PrepareShare
from gptcli.data.prepare import finalize, make_plan

# tasks is the number of ranks; any number gives the same bytes. workers is how many run at once.
local = partial(LocalPipelineExecutor, tasks=4, workers=4)
slurm = partial(SlurmPipelineExecutor, tasks=64, time="4:00:00", partition="cpu")
ray = partial(RayPipelineExecutor, tasks=64)  # on the Ray that RAY_ADDRESS names

CONFIG = "run.yaml"  # CHANGE (1 of 2): what to prepare, as in gpt prepare -c
EXECUTOR = local  # CHANGE (2 of 2): local, slurm or ray, as they are set up above

if __name__ == "__main__":
    plan = make_plan(load_config(CONFIG))
    logs = f"{plan.folder}.logs"
    ranks = EXECUTOR(pipeline=[PrepareShare(plan)], logging_dir=f"{logs}/ranks")
    ranks.run()
    if EXECUTOR is slurm:  # where the ranks are only submitted by now
        EXECUTOR(
            pipeline=[Finalize(plan)], tasks=1, depends=ranks, logging_dir=f"{logs}/finalize",
            skip_completed=False, sbatch_args={"kill-on-invalid-dep": "yes"},
        ).run()  # fmt: skip
    else:
        finalize(plan)
