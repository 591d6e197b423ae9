"""`gpt`, `python -m gptcli`, and what torchrun starts."""

import _thread
import os
import signal
import sys
import time
from types import FrameType

_IMPORT = "<frozen importlib._bootstrap>"
_COMMANDS = ("gptcli.__main__", "gptcli.cli", "gptcli.commands", "__main__")
_state = ""  # a Ctrl-C that waits for an import to end: "pressed", then "looking"


def main() -> None:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not one that nohup ignores
        signal.signal(signal.SIGINT, _interrupt)
    try:
        # Imported here: each worker process imports this module, and has no use for the program.
        from gptcli.cli import main as run

        run()
    except KeyboardInterrupt:
        _end()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not within an import, which may print or swallow it.

    An import that a command makes before it has begun anything ends here. Others are waited for,
    unless Ctrl-C is pressed again.
    """
    global _state
    importer, pressed_before = None, _state == "pressed"
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            importer = frame.f_back
        frame = frame.f_back
    if importer is None:
        _state = ""
        raise KeyboardInterrupt
    if pressed_before or importer.f_globals.get("__name__", "").startswith(_COMMANDS):
        _end()
    _state = "pressed"
    _thread.start_new_thread(_look_again, ())


def _look_again() -> None:
    global _state
    time.sleep(0.02)
    _state = "looking"
    _thread.interrupt_main()


def _end() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if "--json" in sys.argv and "RANK" not in os.environ:
            os.write(1, b'{"error": "interrupted", "hint": null, "exit_code": 130}\n')
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
