"""`gpt train`: the resumable training run, on the screen or as plain lines."""

import shlex
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import distributed, options
from gptcli.distributed.environment import place
from gptcli.errors import ConfigError
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.training.plan import Plan


def train(
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the newest checkpoint (bit-exact on a CPU)."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Rename an existing run and start over.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            metavar="N",
            help="Number of processes, one per GPU (CPU processes without one).",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and estimates, and exit.")
    ] = False,
    verify_resume: Annotated[
        int | None,
        typer.Option(
            "--verify-resume",
            metavar="N",
            help="Check exact resume over N steps, and exit.",
        ),
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Train a model; Ctrl-C saves, --resume continues."""
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts over: use one of them")
    options.require_positive(gpus=gpus)
    if gpus and verify_resume is not None:
        raise ConfigError("--verify-resume compares runs of one process: leave --gpus out")
    loaded = options.load(config, set_)
    from gptcli import trackers  # which imports torch: not before the configuration is right

    trackers.require(loaded.train.loggers)
    if resume:
        _require_place(config, loaded)
    if not loaded.run_dir and not loaded.name:
        loaded = loaded.model_copy(update={"name": _default_name(loaded)})
    if place().is_main:
        _prepare_local(loaded, options.command_for("prepare", config, set_))
    if dry_run:
        _plan(loaded, gpus or 1, resume, json_)
        return
    if verify_resume is not None:
        _verify(loaded, verify_resume, json_)
        return
    if gpus and gpus > 1 and place().size == 1:
        distributed.launch(loaded, gpus, resume=resume)
        return
    _train(loaded, resume, overwrite, json_)


def _require_place(file: str | None, config: "Config") -> None:
    """Refuse the configuration of a run whose paths begin in another folder than this one."""
    from gptcli.runs import CONFIG, RUN

    folder = Path(file or "").resolve().parent
    if file is None or not (Path(file).name == CONFIG and (folder / RUN).is_file()):
        return
    parts = Path(config.run_dir or "").parts
    if folder != config.run_folder.resolve():
        begin = folder.parents[len(parts) - 1] if folder.parts[-len(parts) :] == parts else None
        raise ConfigError(
            f"{file}: its run is {folder}, which run_dir={config.run_dir} does not name from here",
            f"change to the folder that its paths begin at: cd {shlex.quote(str(begin))}"
            if begin
            else "name its folders: -s run_dir=DIR -s data.dir=DIR",
        )


def _train(config: "Config", resume: bool, overwrite: bool, json_: bool) -> None:
    """Train in this process, which may be one of several; only the first of them speaks."""
    from gptcli.terminal.live import TrainScreen
    from gptcli.terminal.text import say_next, summary_text
    from gptcli.trackers import Trackers
    from gptcli.training.events import Finished, Stopped
    from gptcli.training.loop import train as train_model
    from gptcli.training.signals import StopRequest, ignored_interrupts

    stop, speaks = StopRequest(), place().is_main
    curves = Trackers(config.train.loggers if speaks else [], console.message)
    with stop.on_signals(), TrainScreen() if speaks else nullcontext() as screen, curves:
        for event in train_model(config, resume=resume, overwrite=overwrite, stop=stop):
            curves.show(event)
            if screen is not None:
                screen.show(event)
        if not speaks:
            raise typer.Exit(stop.exit_code or 0)
        if isinstance(event, Finished) and event.spent:  # while a signal still ends nothing
            _leave_picture(Path(event.summary.run_dir))
    assert isinstance(event, Stopped | Finished)
    with ignored_interrupts():
        if json_:
            console.result_json(asdict(event.summary))
        else:
            console.result(summary_text(event))
        if isinstance(event, Stopped) or not json_:
            say_next(event, options.same_command("--resume", "--overwrite"))
    if isinstance(event, Stopped):
        raise typer.Exit(stop.exit_code or 0)


def _leave_picture(folder: Path) -> None:
    from gptcli.plotting.figure import leave_picture

    if (why_not := leave_picture(folder)) is not None:
        console.message(f"note: {why_not}")


def _default_name(config: "Config") -> str:
    """Name a run without a configuration file after its data."""
    from gptcli.data.sources import data_dir

    return data_dir(config.data).name or "run"


def _prepare_local(config: "Config", command: str) -> None:
    """Prepare text of this machine if nobody has yet; downloads stay a deliberate act.

    Raises:
        DataError: The data are not prepared and not on this machine; `command` prepares them.
    """
    from gptcli.commands import prepare
    from gptcli.data.sources import data_dir, is_local
    from gptcli.errors import DataError

    folder = data_dir(config.data)
    if (folder / "manifest.json").exists():
        return
    if not is_local(config.data):
        state = "is not prepared" if folder.is_dir() else "does not exist"
        hint = f"name the data to prepare: `{command} DATASET`"
        if config.data.source is not None:
            hint = f"download and prepare it: `{command}`; train prepares text on this machine only"
        raise DataError(f"{folder}: this data folder {state}", hint)
    from gptcli.data.prepare import make_plan

    source = config.data.source
    what = (
        source
        if source is None or isinstance(source, str)
        else (f"{source.train} and {source.val}")
    )
    console.message(f"{folder} is not there yet: preparing {what}")
    manifest = prepare.run(make_plan(config))
    console.message(f"{manifest.tokens.train:,} tokens to train on")


def _plan(config: "Config", n_processes: int, resume: bool, json_: bool) -> None:
    from gptcli.device import resolve_auto
    from gptcli.distributed.launch import require_devices
    from gptcli.terminal.text import show_plan, show_time
    from gptcli.training.plan import plan_with_steps

    require_devices(n_processes, resolve_auto(config).device)
    with ExitStack() as stack:

        def show(found: "Plan") -> None:
            if not json_:
                show_plan(found)
            stack.enter_context(console.bar("measuring for a few seconds"))

        found, timed = plan_with_steps(config, n_processes, resume=resume, on_plan=show)
    if json_:
        console.result_json(found.json(timed))
    else:
        show_time(found, timed)


def _verify(config: "Config", steps: int, json_: bool) -> None:
    """Prove that resuming is exact here; exit 1 if it is not."""
    from gptcli.errors import EXIT_DIFFERS
    from gptcli.training.verify import verify_resume

    if steps < 2:
        raise ConfigError("--verify-resume: at least 2 steps, to stop between them")
    parent = config.run_folder.parent  # on the disk that the run's checkpoints are to go to
    with (
        tempfile.TemporaryDirectory(
            prefix=".verify-", dir=parent if parent.is_dir() else None
        ) as folder,
        console.bar(f"training {steps} steps twice"),
    ):
        verdict = verify_resume(config, steps, Path(folder))
    if json_:
        console.result_json(asdict(verdict))
    how = f"{verdict.steps} steps, stopped after {verdict.stopped_at} and resumed"
    if not verdict.differing:
        what = f"all {verdict.tensors} tensors, the state and the metrics are the same bits"
        if not json_:
            console.result(f"exact: {how}: {what}")
        return
    shown = ", ".join(verdict.differing[:3]) + ", ..." * (len(verdict.differing) > 3)
    console.message(
        f"not exact: {how}: {len(verdict.differing)} of {verdict.tensors} tensors differ, by"
        f" {verdict.largest:.2g} at most ({shown})",
        "bold red",
    )
    console.message("hint: on cuda try -s deterministic=true; on a CPU please report this")
    raise typer.Exit(EXIT_DIFFERS)
