"""Conversations on several processes: one mean over what all of them train on."""

import contextlib
from functools import partial
from pathlib import Path

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config, load_config
from gptcli.distributed.process_group import process_group
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.parallel import full_tensor
from gptcli.training.setup import set_up
from gptcli.training.step import Stepper
from support.chats import CHATTY, prepare_chats
from support.processes import Start
from support.runs import finish, settings

HOW = (*CHATTY, "train.tokens_per_step=1024", "train.micro_batch_size=2", "model.bias=false")


def write_gradients(config: Config, path: str, rank: int = 0) -> None:
    """Write the gradients of the first step, and the loss of this rank's part of it."""
    with process_group(config.device) as world, contextlib.ExitStack() as stack:
        run = ReadOnlyRun(config.run_folder)
        session = stack.enter_context(contextlib.closing(set_up(run, config, world, resume=False)))
        stepper = Stepper(session)
        total = stepper._accumulate(*stepper._read(), lambda: False)
        stepper.feed.close()
        assert total is not None
        found = {"loss": torch.tensor(world.all_reduce_sum(float(total)))}
        for name, parameter in session.parameters.items():
            if parameter.grad is not None:
                found[name] = full_tensor(parameter.grad)
        if world.is_main:
            torch.save(found, path)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_the_same_on_one_process_and_on_two(start: Start, kind: str) -> None:
    prepare_chats()
    config = load_config(None, settings(*HOW, f"train.parallel={kind}"))
    write_gradients(config, "alone.pt")
    assert start(2, partial(write_gradients, config, "shared.pt")).wait() == [0, 0]
    alone, shared = (torch.load(Path(name)) for name in ("alone.pt", "shared.pt"))
    assert alone.keys() == shared.keys()
    for name, wanted in alone.items():
        assert float((shared[name] - wanted).norm() / wanted.norm()) < 1e-6, name


def test_two_processes_end_where_one_does(start: Start) -> None:
    prepare_chats()
    make = lambda name: load_config(None, settings(*HOW, name=name))  # noqa: E731
    finish(make("alone"))
    assert start(2, lambda rank: finish(make("shared"))).wait() == [0, 0]
    alone, shared = (
        load_checkpoint(make(name).run_folder / "last.pt") for name in ("alone", "shared")
    )
    for name, weight in alone.model.items():
        assert float((shared.model[name] - weight).norm() / weight.norm()) < 1e-5, name
