"""`gpt train`: the resumable training run, on the screen or as plain lines."""

import shlex
import sys
import tempfile
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import options
from gptcli.distributed.environment import place
from gptcli.errors import EXIT_DIFFERS, EXIT_DISTRIBUTED, ConfigError, DistributedError, PeerError
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.training.plan import Plan


def train(
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    resume: Annotated[
        bool, options.flag("--resume", "Resume from the newest checkpoint (bit-exact on a CPU).")
    ] = False,
    overwrite: Annotated[
        bool, options.flag("--overwrite", "Rename an existing run and start over.")
    ] = False,
    gpus: Annotated[
        int | None,
        options.number("Number of processes: one per GPU, or on the CPU if there is none."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Time of the whole run (train.max_minutes).")
    ] = None,
    dry_run: Annotated[
        bool, options.flag("--dry-run", "Print the plan and estimates, and exit.")
    ] = False,
    verify_resume: Annotated[
        int | None, typer.Option(metavar="N", help="Check exact resume over N steps, and exit.")
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Train a model; Ctrl-C saves, --resume continues."""
    if gpus and verify_resume is not None:
        raise ConfigError("--verify-resume compares runs of one process: omit --gpus")
    loaded = options.load(config, set_, {"train.max_minutes": minutes})
    if resume:
        _require_place(config, loaded)
    from gptcli.api.train import ready

    with console.byte_bars() as advance:
        loaded = ready(
            loaded, resume=resume, overwrite=overwrite, workers=None, on_bytes=advance,
            command=options.command_for("prepare", config, set_),
        )  # fmt: skip
    if dry_run:
        _plan(loaded, gpus or 1, resume, json_)
    elif verify_resume is not None:
        _verify(loaded, verify_resume, json_)
    elif gpus and gpus > 1 and place().size == 1:
        _launch(loaded, gpus, resume)
    else:
        _train(loaded, resume, overwrite, json_)


def _require_place(file: str | None, config: "Config") -> None:
    """Refuse the configuration of a run whose paths begin in another folder than this one."""
    from gptcli.runs import CONFIG, RUN

    folder = Path(file or "").resolve().parent
    if file is None or not (Path(file).name == CONFIG and (folder / RUN).is_file()):
        return
    parts = Path(config.run_dir or "").parts
    if folder == config.run_folder.resolve():
        return
    hint = "set its folders: -s run_dir=DIR -s data.dir=DIR"
    if folder.parts[-len(parts) :] == parts:
        begin = shlex.quote(str(folder.parents[len(parts) - 1]))
        hint = f"change to the folder that its paths are relative to: cd {begin}"
    raise ConfigError(
        f"{file}: from here, run_dir={config.run_dir} does not lead to its run, {folder}", hint
    )


def _train(config: "Config", resume: bool, overwrite: bool, json_: bool) -> None:
    """Train in this process, which may be one of several; only the first of them prints."""
    from gptcli.api import train as api
    from gptcli.terminal.live import TrainScreen
    from gptcli.terminal.text import say_next, summary_text
    from gptcli.training.events import Finished, Stopped
    from gptcli.training.signals import ignored_interrupts

    run = api.train(config, resume=resume, overwrite=overwrite)
    is_main = place().is_main
    with run.on_signals(), TrainScreen() if is_main else nullcontext() as screen, closing(run):
        for event in run:
            if screen is not None:
                screen.show(event)
    if not is_main:
        raise typer.Exit(run.exit_code or 0)
    assert isinstance(event, Stopped | Finished)
    with ignored_interrupts():
        if json_:
            console.result_json(asdict(event.summary))
        else:
            console.result(summary_text(event))
        if isinstance(event, Stopped) or not json_:
            minutes = config.train.max_minutes
            say_next(event, options.same_command("--resume", drop="--overwrite"), minutes)
    if isinstance(event, Stopped):
        raise typer.Exit(run.exit_code or 0)


def _launch(config: "Config", n_processes: int, resume: bool) -> None:
    """Run this command line in several processes, and end as they do."""
    from gptcli.device import resolve_auto
    from gptcli.distributed.launch import launch, require_devices, require_files
    from gptcli.runs.folder import Run
    from gptcli.training.plan import plan

    require_files(n_processes)
    require_devices(n_processes, resolve_auto(config).device)
    if not resume:
        plan(config, n_processes)  # a fresh run is checked while there is one process
    run = Run(config.run_folder)
    before = run.read_status()
    ended = launch(sys.argv[1:], n_processes)
    if ended.exit_code == 0:
        return
    status = run.read_status()
    if status != before and status.get("exit_code"):
        if status["state"] == "stopped":
            raise typer.Exit(status["exit_code"])
        raise PeerError(status.get("error", ended.message), status["exit_code"], ended.hint)
    if ended.is_stopped:  # before there was anything to save
        message = f"{ended.message} before training began; nothing has changed"
        console.message(message)
        raise PeerError(message, ended.exit_code or 0)
    if ended.exit_code:  # before there was a run, or after it
        raise PeerError(ended.message, ended.exit_code, ended.hint)
    if status:
        run.write_failure(EXIT_DISTRIBUTED, ended.message)
    raise DistributedError(ended.message, "resume from the last checkpoint with --resume")


def _plan(config: "Config", n_processes: int, resume: bool, json_: bool) -> None:
    from gptcli.device import resolve_auto
    from gptcli.distributed.launch import require_devices
    from gptcli.terminal.text import show_plan, show_time
    from gptcli.training.plan import plan_with_steps

    require_devices(n_processes, resolve_auto(config).device)
    with ExitStack() as stack:

        def show(plan: "Plan") -> None:
            if not json_:
                show_plan(plan)
            stack.enter_context(console.bar("measuring for a few seconds"))

        plan, timed = plan_with_steps(config, n_processes, resume=resume, on_plan=show)
    console.result_json(plan.json(timed)) if json_ else show_time(plan, timed)


def _verify(config: "Config", steps: int, json_: bool) -> None:
    """Check that resuming is exact here; exit with 1 if it is not."""
    from gptcli.api.verify import verify_resume

    if steps < 2:
        raise ConfigError("--verify-resume: expected at least 2 steps, to stop between them")
    parent = config.run_folder.parent  # on the disk that the run's checkpoints are to go to
    where = parent if parent.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix=".verify-", dir=where) as folder,
        console.bar(f"training {steps} steps twice"),
    ):
        check = verify_resume(config, steps, Path(folder))
    how = f"{check.steps} steps, stopped after {check.stopped_at} and resumed"
    if json_:
        console.result_json(asdict(check))
    elif not check.differing:
        same = f"all {check.tensors} tensors, the state and the metrics are bit-identical"
        console.result(f"exact: {how}: {same}")
    if check.differing:
        first = ", ".join(check.differing[:3]) + ", ..." * (len(check.differing) > 3)
        differ = f"{len(check.differing)} of {check.tensors} tensors differ ({first})"
        console.message(f"not exact: {how}: {differ}", "bold red")
        console.message("hint: on cuda try -s deterministic=true; on a CPU please report this")
        raise typer.Exit(EXIT_DIFFERS)
