"""`gpt prepare --rank` and `--finalize` as steps of datatrove (extra `cluster`).

datatrove's executors (local, Slurm, Ray) start the ranks, keep a log and a mark of completion of
each, and start anew what is missing. Knows nothing of which of them it runs under;
`examples/cluster/prepare_datatrove.py` shows how they are put together.
"""

from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from gptcli.data.prepare import PreparePlan, finalize, prepare_share


class PrepareShare(PipelineStep):  # type: ignore[misc]  # datatrove ships no types
    """Tokenize every world_size-th unit of a plan; each rank of the executor is one share.

    The source is looked at once, where the plan is made, so that all ranks agree on it.

    Args:
        plan: What to prepare; its paths must mean the same on every machine.
        workers: Processes that tokenize, in each rank.
    """

    name = "gpt prepare --rank"
    type = "TOKENIZER"

    def __init__(self, plan: PreparePlan, workers: int = 1) -> None:
        super().__init__()
        self.plan = plan
        self.workers = workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Prepare the share of `rank`, count its units, bytes and tokens, and pass `data` on."""
        with self.track_time("rank"):
            records = prepare_share(self.plan, rank, world_size, workers=self.workers)
        self.stat_update("units", value=len(records), unit="rank")
        for record in records:
            self.stat_update("bytes", value=record.bytes.train + record.bytes.val, unit="unit")
            self.stat_update("tokens", value=record.tokens.train + record.tokens.val, unit="unit")
        yield from data or ()


class Finalize(PipelineStep):  # type: ignore[misc]
    """Write the manifest when the ranks have ended: one task, that depends on theirs.

    For executors that only submit (Slurm); after others, `finalize(plan)` is the simpler way. To be
    run with `skip_completed=False`: finalizing again costs nothing, and a folder that is not what
    the plan asks for is refused.

    Args:
        plan: The plan of the ranks.
    """

    name = "gpt prepare --finalize"
    type = "TOKENIZER"

    def __init__(self, plan: PreparePlan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the manifest, count what it lists, and pass `data` on."""
        with self.track_time("manifest"):
            manifest = finalize(self.plan)
        self.stat_update("tokens", value=manifest.tokens.train + manifest.tokens.val, unit="folder")
        yield from data or ()
