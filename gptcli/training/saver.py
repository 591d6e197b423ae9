"""Writes checkpoints, in a thread of its own where training can go on meanwhile.

Knows no format: what to write is for the caller to say.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gptcli.training.events import Saved


class AsyncCheckpointWriter:
    """One checkpoint at a time; what goes wrong is raised where it is next looked for."""

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._saving: Future[Saved | None] | None = None

    def submit(self, save: Callable[[], Saved | None]) -> None:
        """Save now, or begin to; whatever was begun before must have been waited for."""
        assert self._saving is None
        if self.in_background:
            self._saving = self._thread.submit(save)
        else:
            done: Future[Saved | None] = Future()
            done.set_result(save())
            self._saving = done

    def finished(self, *, wait: bool = False) -> list[Saved]:
        """Return what has been saved since this was last asked, if it is to be told.

        Args:
            wait: For what is being saved.

        Raises:
            GptError: It could not be saved.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return []
        saving, self._saving = self._saving, None
        saved = saving.result()
        return [] if saved is None else [saved]

    def close(self) -> None:
        """Let what was begun come to its end."""
        self._thread.shutdown(wait=True)
