"""What the rows of the crash suite share: a small run, children that are killed, and the table.

`make chaos` runs the long form and prints one line with figures for each row.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.training.loop import train

LONG = os.environ.get("GPTCLI_CHAOS") == "long"
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
THOROUGH = (
    "train.max_steps=20", "train.eval_every=4", "train.save_every=3", "train.log_every=2",
    "model.dropout=0.1", "train.micro_batch_size=2", "train.tokens_per_step=96",
    "optim.warmup_steps=3", "generate.max_new_tokens=1",
)  # fmt: skip
_FIGURES = pytest.StashKey[list[str]]()

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*.py"]  # Windows has no fork to kill


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(_FIGURES, []):
        terminalreporter.write_line(f"chaos: {line}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the children do: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the table that is printed at the end."""
    return request.config.stash[_FIGURES].append


def forked(work: Callable[[], None]) -> int:
    """Do something in a child that has torch at hand already; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Wait for a child; return its exit code, or the negative number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def finish(config: Config, resume: bool = False) -> None:
    """Train to the end."""
    for _ in train(config, resume=resume):
        pass


def result_of(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return all bits a run ended with, and its history without times."""
    found = load_checkpoint(config.run_folder / "last.pt")
    tensors = {f"model {name}": tensor for name, tensor in found.model.items()}
    for name, state in found.optimizer.items():
        tensors |= {f"optimizer {name} {key}": tensor for key, tensor in state.items()}
    bits = {key: tensor.reshape(-1).numpy().tobytes() for key, tensor in tensors.items()}
    facts = {key: value for key, value in found.state.items() if key != "seconds"}
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    history = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return {**bits, "state": facts}, history


def flip(path: Path, bit: int) -> bytes:
    """Flip a bit of a file, as a new file (others may be links of it); return the old content."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    put(path, bytes(changed))
    return content


def put(path: Path, content: bytes) -> None:
    """Make a new file of `path`."""
    path.unlink()
    path.write_bytes(content)
