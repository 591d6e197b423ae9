"""What can be said of a run before its first step: what it needs, and advice about it.

Plain values; knows neither torch nor files.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """An estimate of the memory that one process needs, in bytes.

    Attributes:
        weights: In float32, or its share of them.
        gradients: Of all that learns.
        optimizer: Its averages.
        activations: Kept by a forward pass for the backward pass, the loss included.
        program: Taken already, by Python and torch; 0 where the device has memory of its own.
        available: What all processes of this machine can have together; None if unknown.
        processes: That share it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    program: int
    available: int | None
    processes: int = 1

    @property
    def model(self) -> int:
        """What the network and its optimizer need, whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it, for one process."""
        return self.model + self.activations + self.program

    @property
    def fits(self) -> bool:
        """Whether there is as much; not known to be too much counts as yes."""
        return self.available is None or self.total * self.processes <= self.available


@dataclass(frozen=True)
class Disk:
    """What checkpoints need, in bytes.

    Attributes:
        checkpoint: One of them.
        needed: As many as are on the disk at once.
        held: Taken by those that are there already.
        free: On the disk of the run folder.
    """

    checkpoint: int
    needed: int
    held: int
    free: int


@dataclass(frozen=True)
class Advice:
    """A setting that few runs have on purpose.

    Attributes:
        what: The setting, with its value.
        why: What is to be expected of it, and what helps that is no setting.
        set: What to try instead, as words of a command line, perhaps with "or"; empty if nothing.
    """

    what: str
    why: str
    set: str = ""

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{self.what}: {self.why}" + (f"; try: {self.set}" if self.set else "")


@dataclass(frozen=True)
class Requirements:
    """What a run needs and what there is to say about it.

    Attributes:
        memory: Of one process.
        disk: For checkpoints.
        flops_per_token: Floating-point operations that training on one token takes.
        peak_flops: Of one device, a second, in the run's precision; None if unknown.
        advice: One line each.
    """

    memory: Memory
    disk: Disk
    flops_per_token: int
    peak_flops: float | None
    advice: tuple[Advice, ...] = ()
