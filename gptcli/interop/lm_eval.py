"""The tasks of lm-eval (EleutherAI's harness) on a model, through a temporary export."""

import contextlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptcli.checkpoint import TrainedModel
from gptcli.errors import ConfigError, DataError
from gptcli.interop import Format, optional_package
from gptcli.interop.export import export

Scores = dict[str, dict[str, float]]


def run_tasks(
    trained: TrainedModel, names: list[str], *, limit: int | None = None, device: str = "cpu"
) -> Scores:
    """Run tasks in float32 and return the metrics of each, with their standard errors.

    The names are those of lm-eval's tasks or groups, or YAML files; `limit` is the examples per
    task.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or no export holds the model.
        DataError: The data set of a task is not available.
    """
    lm_eval = optional_package("lm_eval", "--tasks", "bench")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [_task(name) for name in names]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place) / "model"
        export(trained, Format.HF, folder)
        try:
            scores = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": "float32"},
                tasks=tasks,
                limit=limit,
                device=device,
                batch_size=1,
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"--tasks: {error}", "lm-eval's names: lm-eval ls tasks") from error
        except (ConnectionError, FileNotFoundError) as error:
            raise DataError(f"--tasks: {error}") from error
    return {task: _metrics(values) for task, values in scores["results"].items()}


def _task(name: str) -> str:
    """Return what lm-eval takes for a task: its name, or the absolute path of a file."""
    if not name.endswith((".yaml", ".yml")):
        return name
    if not Path(name).is_file():
        raise ConfigError(f"--tasks: {name}: no such file")
    return str(Path(name).resolve())


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a task by their names without the filter, as in acc_norm."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
