"""From the disk to its loss, a token passes the five files that the design names."""

import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gptcli
from gptcli.distributed.process_group import SINGLE_PROCESS
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.setup import set_up
from gptcli.training.step import Stepper
from support.runs import Tiny

HOUSE = Path(gptcli.__file__).parent


def holds_tokens(value: Any) -> bool:
    """Tell whether a value is an array of ids."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and not value.is_floating_point()
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "ui"


def test_from_the_disk_to_its_loss_a_token_passes_the_files_that_the_design_names(
    tiny: Tiny,
) -> None:
    passed = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "return" and path.is_relative_to(HOUSE):
            if any(map(holds_tokens, (argument, *frame.f_locals.values()))):
                passed.add(path.relative_to(HOUSE).as_posix())

    config = tiny()
    session = set_up(ReadOnlyRun(config.run_folder), config, SINGLE_PROCESS, resume=False)
    threading.setprofile(note)  # before the thread that reads ahead begins
    sys.setprofile(note)
    try:
        stepper = Stepper(session)
        assert stepper.step(lambda: False) is not None
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    stepper.feed.close()
    session.close()
    page = " ".join((HOUSE.parent / "docs" / "design.md").read_text(encoding="utf-8").split())
    [sentence] = re.findall(r"From a token on disk to its loss, [^:]* five files: (.*?py`)\.", page)
    assert passed == set(re.findall(r"`([a-z/]+\.py)`", sentence)) and len(passed) == 5
