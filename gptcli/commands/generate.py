"""`gpt generate`: stream samples from a checkpoint."""

import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import options
from gptcli.errors import ConfigError
from gptcli.formatting import printable
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.config import Config
    from gptcli.generation import Sample
    from gptcli.tokenizers import Tokenizer

_BETWEEN = "\n---------------\n"


class Quantize(StrEnum):
    """Weights of fewer than 16 bits."""

    INT8 = "int8"


Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="Text to continue; default: stdin, or none."),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling threshold.")]
MinP = Annotated[float | None, typer.Option(help="Minimum probability relative to the top token.")]
Penalty = Annotated[float | None, typer.Option(help="Penalty for repeated tokens; 1 disables it.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Maximum number of new tokens.")]
NumSamples = Annotated[int | None, typer.Option(help="Number of samples, as one batch.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Random seed; in float32 the same seed gives the same text."),
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop sequence (repeatable).")]
QuantizeOption = Annotated[
    Quantize | None, typer.Option(help="8-bit weights: less memory, slightly less exact.")
]
Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Continue the text with each line you type.")
]
Logprobs = Annotated[
    bool, typer.Option("--logprobs", help="With --json: log-probability of every token.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Keep control characters.")]


def generate(
    prompt_argument: Prompt = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    prompt: PromptOption = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    max_new_tokens: MaxNewTokens = None,
    num_samples: NumSamples = None,
    seed: Seed = None,
    stop: Stop = None,
    quantize: QuantizeOption = None,
    interactive: Interactive = False,
    logprobs: Logprobs = False,
    raw: Raw = False,
    json_: options.JsonOption = False,
) -> None:
    """Sample text from a checkpoint."""
    flags = {
        "seed": seed,
        "generate.temperature": temperature,
        "generate.top_k": top_k,
        "generate.top_p": top_p,
        "generate.min_p": min_p,
        "generate.repetition_penalty": repetition_penalty,
        "generate.max_new_tokens": max_new_tokens,
        "generate.num_samples": num_samples,
        "generate.stop": stop or None,
        "generate.prompt": _given_prompt(prompt_argument, prompt, interactive),
    }
    if logprobs and not json_:
        raise ConfigError("--logprobs: they are shown with --json only")
    if interactive and json_:
        raise ConfigError("--interactive and --json exclude each other")
    if interactive and num_samples not in (None, 1):
        raise ConfigError("--num-samples: a conversation has one text")
    loaded, trained = _load(checkpoint, config, set_, flags)
    n_samples = 1 if interactive else loaded.generate.num_samples
    weights = _lighten(loaded, trained, n_samples, int8=quantize is not None)
    clean = str if raw else printable
    if interactive:
        _converse(loaded, trained, clean, options.load(config, set_, flags).generate.prompt)
    else:
        _draw(loaded, trained, clean, weights, logprobs=logprobs, json_=json_)


def _load(
    checkpoint: str | None,
    config: str | None,
    set_: list[str] | None,
    flags: dict[str, Any],
) -> "tuple[Config, TrainedModel]":
    """Return the configuration and the network; without a file, its own way of sampling holds."""
    loaded = options.load(config, set_, flags)
    from gptcli.device import init_runtime
    from gptcli.interop.pretrained import open_model

    trained = open_model(checkpoint, loaded, init_runtime(loaded).device)
    if config is None:  # then the run's own settings lie below --set and the options
        stored = trained.checkpoint.config
        base = {"generate": dict(stored["generate"]), "seed": stored["seed"]}
        loaded = options.load(None, set_, flags, base)
    return loaded, trained


def _given_prompt(argument: str | None, option: str | None, interactive: bool) -> str | None:
    """Return the prompt from the argument, the option or stdin; None where there is none."""
    if argument is not None and option is not None:
        raise ConfigError("the prompt is given twice: as an argument and with --prompt")
    given = argument if argument is not None else option
    if given is not None or interactive or sys.stdin is None or sys.stdin.isatty():
        return given
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r") or None


def _lighten(config: "Config", trained: "TrainedModel", n_samples: int, *, int8: bool) -> str:
    """Give the network the weights to decode with; return what they are."""
    from gptcli.device import init_runtime
    from gptcli.generation import prepare_for_decoding, rows_together

    model = trained.model
    machine = init_runtime(config)
    if machine.compile:
        console.message("note: compile applies to train and eval; generate uses its own kernels")
    is_open = config.dtype == "auto" and machine.device.type == "cpu"  # then kernels are raced
    dtype = None if is_open else machine.dtype
    return prepare_for_decoding(model, dtype, rows=rows_together(model, n_samples), int8=int8)


def _draw(
    config: "Config",
    trained: "TrainedModel",
    clean: Callable[[str], str],
    weights: str,
    *,
    logprobs: bool,
    json_: bool,
) -> None:
    """Draw the samples of a prompt, as they come or as one JSON object."""
    from gptcli.generation import DecodeTimings, Sample, draw_samples, encode_prompt

    wanted, tokenizer = config.generate, trained.tokenizer
    prompt = encode_prompt(tokenizer, wanted.prompt, trained.model.config.block_size)
    clock, samples = DecodeTimings(), list[Sample]()
    for sample, text in draw_samples(
        trained.model, tokenizer, prompt, wanted,
        seed=config.seed, numbers=range(wanted.num_samples), clock=clock, logprobs=logprobs,
    ):  # fmt: skip
        is_new = not samples or samples[-1] is not sample
        if is_new and not json_:
            console.write(_BETWEEN if samples else "")
            if console.is_live() and wanted.prompt:
                console.prompt(wanted.prompt)
        samples += [sample] * is_new
        if not json_:
            console.write(clean(text))
    speed, first = clock.tokens_per_second, clock.to_first_token or 0.0
    if json_:
        facts = [_facts(sample, tokenizer if logprobs else None) for sample in samples]
        console.result_json({"samples": facts, "seed": config.seed, "tokens_per_second": speed,
                             "seconds_to_first_token": first})  # fmt: skip
        return
    console.write("\n")
    told = f"seed {config.seed}  {speed:.1f} tokens/s  first token after {first:.2f} s  {weights}"
    console.message(told, "dim")


def _facts(sample: "Sample", tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """Return a sample as JSON has it, with log-probabilities if there is a tokenizer."""
    text = sample.text
    facts = {"text": text.text, "tokens": text.n_tokens, "finish_reason": text.finish_reason}
    if tokenizer is None:
        return facts
    return facts | {
        "logprobs": [
            {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}
            for _, token, logprob in sample.drawn
        ]
    }


def _converse(
    config: "Config", trained: "TrainedModel", clean: Callable[[str], str], line: str | None
) -> None:
    """Continue line after line of a person; all that was said before is in the context."""
    from gptcli.generation import draw_samples, extend_context

    console.message("each line continues the text; Ctrl-C stops a text, Ctrl-D leaves", "dim")
    tokenizer, block_size = trained.tokenizer, trained.model.config.block_size
    said: list[int] = []
    turn = 0
    while line is not None or (line := console.ask("> ")) is not None:
        text, line, sample = line, None, None
        try:
            said = extend_context(tokenizer, said, text, block_size)
            drawing = draw_samples(
                trained.model, tokenizer, said, config.generate, seed=config.seed, numbers=[turn]
            )
            for sample, piece in drawing:  # noqa: B007  # the sample is what remains of the turn
                console.write(clean(piece))
        except ConfigError as error:  # what was typed is not in the vocabulary
            console.error(error.message, error.hint)
            continue
        except KeyboardInterrupt:
            pass
        console.write("\n")
        if sample is not None:
            said += [drawn.token for drawn in sample.drawn]
            said += [tokenizer.eot] * sample.text.is_ended
        turn += 1
