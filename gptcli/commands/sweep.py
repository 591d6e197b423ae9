"""`gpt sweep`: train one configuration with several settings, and rank them."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import complete, options
from gptcli.formatting import NONE, fixed, loss, plural
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.sweep import Sweep, Trial


def sweep(
    space: Annotated[
        list[str],
        options.offered(
            complete.settings, "KEY=A,B|LO..HI[:log]...", "Keys to vary, with choices or a range."
        ),
    ],
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Time budget of each run.")
    ] = None,
    trials: Annotated[
        int | None, options.number("Settings to try; default: 20, or a whole grid.")
    ] = None,
    seeds: Annotated[int, options.number("Runs of each setting.")] = 3,
    json_: options.JsonOption = False,
) -> None:
    """Train with several settings and rank them; the same command continues."""
    from gptcli.config.space import read_space

    loaded = options.load(config, set_, {"train.max_minutes": minutes})
    swept = read_space(space, loaded)
    from gptcli.api.sweep import Sweep
    from gptcli.api.train import ready

    with console.byte_bars() as advance:
        command = options.command_for("prepare", config, set_)
        loaded = ready(loaded, workers=None, on_bytes=advance, command=command)
    found = Sweep(loaded, swept, trials, seeds)
    runs = f"{plural(found.n_trials, 'trial')} x {plural(seeds, 'seed')}"
    console.message(f"{found.folder}: {runs}; Ctrl-C saves, and the same command continues")
    while found.exit_code is None and (unit := found.next()) is not None:
        console.message(_train(found, *unit))
    _show(found, found.results(), json_)
    if found.exit_code is not None:
        console.message(f"next: {options.same_command()}")
        raise typer.Exit(found.exit_code)


def _train(found: "Sweep", one: "Trial", seed: int) -> str:
    """Train a run under a bar; return a line on what came of it."""
    from gptcli.training.events import Event, Started, StepDone

    values = " ".join(f"{key}={value}" for key, value in one.settings.items())
    name, max_steps = f"trial {one.number}, seed {seed}, {values}", 1
    with console.bar(name) as bar:

        def show(event: Event) -> None:
            nonlocal max_steps
            if isinstance(event, Started):
                max_steps = event.spec.max_steps
            if isinstance(event, Started | StepDone):
                bar.update(event.step, max_steps)

        return f"{name}: {found.train(one, seed, show)}"


def _show(found: "Sweep", ranked: "list[Trial]", json_: bool) -> None:
    from gptcli.api.sweep import BEST, PICTURE

    files = {name: found.folder / file for name, file in (("best", BEST), ("picture", PICTURE))}
    if json_:
        there = {name: str(file) if file.exists() else None for name, file in files.items()}
        trials = [asdict(one) for one in ranked]
        console.result_json({"folder": str(found.folder), **there, "trials": trials})
        return
    rows = [
        (f"{one.number}", *map(str, one.settings.values()), loss(one.mean), _margin(one.margin),
         _margin(one.above, "+"), _margin(one.above_margin), one.error or one.verdict)
        for one in ranked
    ]  # fmt: skip
    keys = (swept.key for swept in found.space)
    console.table(("trial", *keys, "val loss", "±", "above best", "±", ""), rows)
    if files["best"].exists():
        console.result(f"best: gpt train -c {files['best']}")


def _margin(value: float | None, sign: str = "") -> str:
    if value is None or value != value:
        return NONE
    return sign * (value >= 0) + fixed(value, 4)
