"""What can be said of a run before its first step, put together."""

from dataclasses import replace

import torch

from gptcli.config.schema import Config
from gptcli.training.advice import advise
from gptcli.training.flops import flops_per_token, peak_flops
from gptcli.training.memory import Size, estimate_disk, estimate_memory, size_of
from gptcli.training.parallel import Parallelism, all_local
from gptcli.training.requirements import Requirements
from gptcli.training.setup import Session
from gptcli.training.work import RunCounts


def estimate_requirements(
    config: Config, size: Size, counts: RunCounts, kind: Parallelism = "none", taken: int = 0
) -> Requirements:
    """Estimate what a run needs, and give advice about it.

    Args:
        config: Settled.
        size: Of its network.
        counts: What its data and network come to.
        kind: How its processes share the network.
        taken: Bytes of what is estimated that this process holds already.
    """
    memory = estimate_memory(config, size, counts.rows, kind, counts.processes)
    if memory.available is not None:  # what this process holds is what it may go on to hold
        held = memory.program or taken
        memory = replace(memory, available=memory.available + held)
    memory = replace(memory, program=max(0, memory.program - taken))
    n_frozen = size.parameters - size.learning
    name = torch.cuda.get_device_name() if config.device == "cuda" else ""
    return Requirements(
        memory=memory,
        disk=estimate_disk(config, size),
        flops_per_token=flops_per_token(config.model, size.parameters, n_frozen, config.seq_len),
        peak_flops=peak_flops(name, config.dtype),
        advice=advise(config, counts),
    )


def requirements_of(session: Session) -> Requirements:
    """Return the outlook of a run that is set up, whose memory is partly taken by now."""
    config, size = session.config, size_of(session.config)
    counts = RunCounts.of(
        session.manifest,
        n_params=size.parameters,
        train_tokens=len(session.train_tokens),
        val_tokens=session.n_val_tokens,
        max_steps=session.max_steps,
        n_windows=session.loader.n_windows,
        rows=session.rows,
        processes=session.world.size,
    )
    taken = sum(local.nbytes for local in all_local(session.model.parameters()))
    return estimate_requirements(config, size, counts, session.kind, taken)
