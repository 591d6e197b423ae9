"""Preparing, training, evaluating and sampling from Python: what the commands do, as functions.

They raise `GptError` and print nothing. `gptcli` offers these names itself; docs/python.md shows
them at work. Knows no terminal; what the loggers say goes to Python's logger `gptcli`.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.checkpoint import TrainedModel
from gptcli.config import Config, load_config
from gptcli.data import prepare as preparing
from gptcli.data.adopt import adopt, fetch_ready_made, token_files
from gptcli.data.shards import Manifest, Split
from gptcli.data.sources import data_dir
from gptcli.device import init_runtime
from gptcli.distributed.environment import place
from gptcli.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError
from gptcli.evaluation import Evaluation, TokenStats
from gptcli.evaluation import evaluate as score
from gptcli.evaluation.texts import split_tokens, text_tokens
from gptcli.generation import draw_samples, encode_prompt, prepare_for_decoding
from gptcli.interop.pretrained import open_model
from gptcli.trackers import Trackers, require
from gptcli.training.events import Event, Finished, Stopped, Summary
from gptcli.training.loop import train as train_events
from gptcli.training.signals import StopRequest

Checkpoint = str | os.PathLike[str] | TrainedModel | None


@dataclass(frozen=True)
class Prepared:
    """A folder of token shards.

    Attributes:
        folder: What `data.dir` names.
        manifest: What is in it: tokenizer, documents, tokens and bytes of each split.
    """

    folder: Path
    manifest: Manifest


def prepare(source: str | Config, *, workers: int = 1, force: bool = False) -> Prepared:
    """Download, tokenize and write shards; what is finished already is left as it is.

    Args:
        source: A configuration, or what its `data.source` would be: a preset, a path or glob of
            text, or hf:org/name.
        workers: Processes that tokenize; above 1 only in a program that guards its main module.
        force: Write anew over a folder that holds other data.

    Raises:
        GptError: The configuration, the text or the disk does not allow it.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {workers}")
    config = source
    if not isinstance(config, Config):
        config = load_config(None, flags={"data.source": config})
    if (ready := token_files(config.data)) is not None:
        folder, preset, part = ready
        if preset is not None:
            fetch_ready_made(preset, part, folder)
        return Prepared(folder, adopt(folder, config))
    plan = preparing.make_plan(config)
    return Prepared(plan.folder, preparing.prepare(plan, workers=workers, force=force))


class Training:
    """A run on its way: an iterable of its events, which can be gone through once.

    The run goes on as its events are asked for. A loop that is left early lets go of the run folder
    when `close` is called or the object is forgotten; what was saved until then can be resumed.

    Attributes:
        summary: How the run stands; None before its last event.
    """

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        self.summary: Summary | None = None
        self._stop = StopRequest()
        self._is_asked = False
        self._events = self._run(config, resume, overwrite)

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def stop(self) -> None:
        """Ask the run to save its state and end; its last event is then `Stopped`."""
        self._is_asked = True
        self._stop.request()

    def close(self) -> None:
        """End at once, without saving."""
        self._events.close()

    def finish(self) -> Summary:
        """Train to the end and return how the run stands.

        Raises:
            GptError: Every kind that a user can cause; what is saved stays usable.
            KeyboardInterrupt: Ctrl-C, or the notebook's stop button; the state is saved.
            SystemExit: SIGTERM or SIGUSR1; the state is saved.
        """
        in_main = threading.current_thread() is threading.main_thread()
        with self._stop.on_signals() if in_main else contextlib.nullcontext():
            for _ in self:
                pass
        code = self._stop.exit_code
        if code == EXIT_INTERRUPTED and not self._is_asked:
            raise KeyboardInterrupt
        if code is not None and not self._is_asked:
            raise SystemExit(code)
        assert self.summary is not None, "this run was gone through before"
        return self.summary

    def _run(self, config: Config, resume: bool, overwrite: bool) -> Generator[Event]:
        names = config.train.loggers if place().is_main else []
        with Trackers(names, logging.getLogger("gptcli").info) as curves:
            for event in train_events(config, resume=resume, overwrite=overwrite, stop=self._stop):
                curves.show(event)
                if isinstance(event, Finished | Stopped):
                    self.summary = event.summary
                yield event


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Training:
    """Train a network: `for event in train(config)`, or `train(config).finish()`.

    Args:
        config: The run; its data must be prepared. Without a name it has that of its data.
        resume: Go on from the newest checkpoint that verifies.
        overwrite: Set an old run in the folder aside and begin anew.

    Raises:
        GptError: The configuration does not allow it; what comes to light later, the events raise.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"train takes a Config, not a {type(config).__name__}", "train(load_config('run.yaml'))"
        )
    if resume and overwrite:
        raise ConfigError("resume continues a run and overwrite starts over: use one of them")
    require(config.train.loggers)
    if not config.run_dir and not config.name:
        config = config.model_copy(update={"name": data_dir(config.data).name or "run"})
    return Training(config, resume=resume, overwrite=overwrite)


def load(
    checkpoint: Checkpoint = None,
    *,
    device: str = "auto",
    data: str | os.PathLike[str] | None = None,
) -> TrainedModel:
    """Return a model, its tokenizer and what its checkpoint says.

    Args:
        checkpoint: A file, a run folder or a run's name, or what `model.init_from` takes: gpt2,
            hf:org/name, a Hugging Face folder, a nanoGPT ckpt.pt. None is the newest run's best.
        device: auto, cpu, cuda or mps.
        data: Prepared data whose tokenizer the weights of another program have.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ConfigError: Nothing says which tokens it has, or they are not those of `data`.
    """
    if isinstance(checkpoint, TrainedModel):
        return checkpoint
    config = load_config(None, flags={"device": device})
    name = None if checkpoint is None else os.fspath(checkpoint)
    folder = None if data is None else Path(data)
    return open_model(name, config, init_runtime(config).device, folder)


def evaluate(
    checkpoint: Checkpoint = None,
    *,
    text: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    split: Split = "val",
    stride: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Evaluation:
    """Score a network on text: loss, perplexity, bits per byte, and how sure they are.

    Args:
        checkpoint: As for `load`, or what it returned.
        text: A file to score.
        data: Prepared data to score; None is what the network was trained on.
        split: Of the data: train or val.
        stride: Tokens a window adds; None is the network's context.
        max_tokens: Score about this many, evenly spaced; None is all.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        GptError: The checkpoint or the text cannot be used, or the arguments contradict each other.
    """
    if text is not None and data is not None:
        raise ConfigError("data and text exclude each other: there is one text to score")
    if split not in ("train", "val"):
        raise ConfigError(f"split: expected train or val, got {split!r}")
    trained = load(checkpoint, device=device, data=data)
    context = trained.model.config.block_size
    for name, value, most in (("stride", stride, context), ("max_tokens", max_tokens, math.inf)):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{name}: expected 1 to {most}, got {value}")
    where = trained.model.wte.weight.device.type
    machine = init_runtime(load_config(None, flags={"device": where, "dtype": dtype}))
    if text is not None:
        tokens, _, warning = text_tokens(Path(text), trained, "strict")
        if warning:
            logging.getLogger("gptcli").warning(warning)
    else:
        folder = trained.data_dir if data is None else Path(data)
        tokens = split_tokens(folder, split, trained)
    with tokens:
        found = score(
            trained.model, tokens, machine, context=context, stride=stride, max_tokens=max_tokens,
            units=TokenStats(trained.tokenizer),
        )  # fmt: skip
    assert found is not None
    if not math.isfinite(found.nats):
        raise CheckpointError(f"{trained.path}: the model's output is not finite")
    return found


def generate(
    checkpoint: Checkpoint = None,
    prompt: str | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] | None = None,
    seed: int | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Yield a text that continues the prompt, piece by piece; "".join(...) makes it one.

    What is not given is as the run's own configuration has it. A checkpoint named here decodes with
    the weights that are fastest; what `load` returned stays as it is, in float32.

    Args:
        checkpoint: As for `load`, or what it returned.
        prompt: Text to continue; None starts from end-of-text.
        max_new_tokens: Most tokens to draw.
        temperature: Above 1 wilder, below 1 safer, 0 always the likeliest.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest that reach this probability.
        min_p: Drop tokens below this part of the likeliest.
        repetition_penalty: Above 1, tokens that were there before are less likely.
        stop: End before any of these texts.
        seed: Of the draws; in float32, the same seed gives the same text.
        device: auto, cpu, cuda or mps.

    Raises:
        GptError: The checkpoint cannot be used, or an argument is out of range; at once.
    """
    trained = load(checkpoint, device=device)
    stored = trained.checkpoint.config
    flags = {
        "seed": seed,
        "device": trained.model.wte.weight.device.type,
        "generate.prompt": prompt,
        "generate.max_new_tokens": max_new_tokens,
        "generate.temperature": temperature,
        "generate.top_k": top_k,
        "generate.top_p": top_p,
        "generate.min_p": min_p,
        "generate.repetition_penalty": repetition_penalty,
        "generate.stop": None if stop is None else list(stop),
    }
    base = {"generate": dict(stored["generate"]), "seed": stored["seed"]}
    config = load_config(None, (), flags, base)
    ids = encode_prompt(trained.tokenizer, config.generate.prompt, trained.model.config.block_size)
    if not isinstance(checkpoint, TrainedModel):
        machine = init_runtime(config)
        prepare_for_decoding(trained.model, None if machine.device.type == "cpu" else machine.dtype)
    drawing = draw_samples(
        trained.model, trained.tokenizer, ids, config.generate, seed=config.seed, numbers=[0]
    )
    return (piece for _, piece in drawing)
