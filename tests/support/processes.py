"""Processes: forks of this one, forks of one that has imported torch, ranks, and the store."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

from .commands import Result

COMMAND = "from gptcli.__main__ import main; main()"
# The same with the package that PYTHONPATH names.
COMMAND_OF_A_COPY = f"""
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "gptcli"]:
    del sys.modules[name]
{COMMAND}
"""
# Imports what takes seconds and reads no environment, and forks itself for each request. A fork has
# its own environment and output, and ends as any process does, but for taking torch apart.
SERVER = """
import atexit, contextlib, gc, importlib, json, os, signal, sys, threading

for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):  # which may be an extra, or of another version
        importlib.import_module(name)
gc.freeze()
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
given = json.loads(line)
signal.alarm(120)
os.chdir(given["folder"])
os.environ.clear()
os.environ.update(given["env"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
for number, (name, how) in enumerate(zip(given["files"], ("r", "w", "w"))):
    opened = os.open(name, os.O_WRONLY if how == "w" else os.O_RDONLY)
    os.dup2(opened, number)
    os.close(opened)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)
sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
sys.argv = ["gpt", *given["words"]]
code = 0
try:
    exec(given["code"], {"__name__": "__main__"})
except SystemExit as error:
    code = int(error.code or 0)
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
IMPORTED = (
    "torch", "tiktoken", "tokenizers", "pyarrow.dataset", "pyarrow.parquet", "pandas", "dill",
    "fsspec", "multiprocess", "xxhash", "tqdm", "httpx2", "httpx", "typer", "rich.console",
    "gptcli.api", "gptcli.training.loop", "gptcli.data.prepare", "gptcli.interop.pretrained",
    "gptcli.generation", "gptcli.evaluation",
)  # fmt: skip


class ForkServer:
    """Runs command lines, each in a process that need not import torch any more."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *IMPORTED],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(
        self,
        *words: str,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        code: str = COMMAND,
        folder: Path | None = None,
    ) -> Result:
        """Run `gpt` with these words, or other code; `env` is all of its environment."""
        assert self._process.stdin is not None
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place, name) for name in ("in", "out", "err")]
            for file, held in zip(files, (stdin, b"", b""), strict=True):
                file.write_bytes(held)
            request = {
                "words": words, "code": code, "folder": str(folder or Path.cwd()),
                "env": dict(os.environ) if env is None else env, "files": list(map(str, files)),
            }  # fmt: skip
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            ended = int(self._answer())
            return Result(ended, files[1].read_text("utf-8"), files[2].read_text("utf-8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


def forked(work: Callable[[], object], **env: str) -> int:
    """Do something in a child that has torch at hand already; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(env)
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float = 120) -> int:
    """Wait for a child; return its exit code, or the negative number of the signal."""
    end, is_late = time.monotonic() + seconds, False
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end and not is_late:
            print(f"process {child}: killed by the test after {seconds:.0f} s", file=sys.stderr)
            os.kill(child, signal.SIGKILL)
            is_late = True
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition, and fail if it never holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def is_running(process: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def die() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


class Ranks:
    """Forked processes with what torchrun tells its own in the environment."""

    def __init__(self, size: int, work: Callable[[int], object], restarts: int, port: int) -> None:
        self.pids = [
            forked(
                lambda rank=rank: work(rank),  # type: ignore[misc]
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT=str(restarts),
                TORCHELASTIC_ERROR_FILE=str(Path(f"error-{rank}-{restarts}.json").resolve()),
            )
            for rank in range(size)
        ]

    def wait(self, seconds: float = 240) -> list[int]:
        """Return the exit codes, by rank; the negative number of a signal that killed."""
        end = time.monotonic() + seconds
        return [wait(pid, max(0.0, end - time.monotonic())) for pid in self.pids]


Start = Callable[..., Ranks]


def store_process() -> tuple[int, int]:
    """Keep a store in a process of its own, for its threads would not survive our forks.

    Returns:
        The process id and the port.
    """
    from torch.distributed import TCPStore

    read, write = os.pipe()
    child = os.fork()
    if not child:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, f"{store.port}\n".encode())
        signal.pause()
    os.close(write)
    with os.fdopen(read) as file:
        return child, int(file.readline())


def end(child: int) -> None:
    """Kill a process, which may be the child of another one."""
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
