"""Micro-batches on the device, prepared a little ahead by a thread of their own."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gptcli.data.loader import Batch, TokenLoader


class Feed:
    """The loader's micro-batches in order; the next is read while one is worked on.

    Attributes:
        waited: Seconds that were spent waiting for a batch.
    """

    def __init__(
        self,
        loader: TokenLoader,
        size: int,
        device: torch.device,
        turn: tuple[int, int] = (0, 1),
    ) -> None:
        """Read nothing yet.

        Args:
            loader: Where batches come from.
            size: Rows of a micro-batch.
            device: Where they are to be.
            turn: Rank and number of those who take the micro-batches of a step in turn.
        """
        self._loader, self._size, self._device = loader, size, device
        self._turn = turn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self.waited = 0.0

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of a step, and have those of the next step read meanwhile."""
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._read, step)
        batches = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        self.waited += time.perf_counter() - began
        for tokens, targets in batches:
            yield (
                tokens.to(self._device, non_blocking=True),
                targets.to(self._device, non_blocking=True),
            )

    def _read(self, step: int) -> list[Batch]:
        batches = list(self._loader.micro_batches(step, self._size, self._turn))
        if self._device.type != "cuda":
            return batches
        # Only from pinned memory does a copy run beside the computation.
        return [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in batches]

    def close(self) -> None:
        """End the thread; what it still reads is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
