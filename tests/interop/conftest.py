"""Models of other programs, in folders as those programs write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from support.pretrained import KINDS, shaken


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Save a network of `KINDS` as transformers does; return it with its folder."""

    def save(kind: str = "gpt2", **how: Any) -> tuple[PreTrainedModel, Path]:
        theirs, folder = shaken(KINDS[kind]()), tmp_path / f"theirs-{kind}"
        theirs.save_pretrained(folder, **how)
        return theirs, folder

    return save
