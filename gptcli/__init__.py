"""gptcli: from text to a trained, evaluated, talking GPT.

Importing the package costs nothing: the names below come from their modules when they are first
asked for, and torch is loaded by the modules that compute.
"""

import os
import sys

TYPE_CHECKING = False  # that of typing, which takes time to import
if TYPE_CHECKING:
    from gptcli.api.evaluate import evaluate, load
    from gptcli.api.generate import generate
    from gptcli.api.prepare import Prepared, prepare
    from gptcli.api.train import Training, train
    from gptcli.config import Config, load_config
    from gptcli.errors import GptError

# libgomp reads this when torch loads it (see waiting.py): threads spin for a millisecond, which is
# more than lies between two products, but sleep at once where they are more than the cores. Every
# way in passes here; what the user set holds.
SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}
if "torch" not in sys.modules and not SPINNING.keys() & os.environ.keys():
    os.environ.update(SPINNING)

__version__ = "0.1.0"
_HOMES = {
    "Config": "gptcli.config",
    "GptError": "gptcli.errors",
    "Prepared": "gptcli.api.prepare",
    "Training": "gptcli.api.train",
    "evaluate": "gptcli.api.evaluate",
    "generate": "gptcli.api.generate",
    "load": "gptcli.api.evaluate",
    "load_config": "gptcli.config",
    "prepare": "gptcli.api.prepare",
    "train": "gptcli.api.train",
}
__all__ = ["Config", "GptError", "Prepared", "Training", "__version__", "evaluate", "generate",
           "load", "load_config", "prepare", "train"]  # fmt: skip


def __getattr__(name: str) -> object:
    """Return a public name from the module it lives in (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'gptcli' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
