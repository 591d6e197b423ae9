"""`gpt generate`: stream samples from a checkpoint."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli.commands import options
from gptcli.errors import ConfigError
from gptcli.formatting import printable
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.generate import Sampler
    from gptcli.generation import Sample

_BETWEEN = "\n---------------\n"

Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="Text to continue; default: stdin, or none.")
]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling threshold.")]
MinP = Annotated[float | None, typer.Option(help="Minimum probability relative to the top token.")]
Penalty = Annotated[float | None, typer.Option(help="Penalty for repeated tokens; 1 disables it.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Maximum number of new tokens.")]
NumSamples = Annotated[int | None, typer.Option(help="Number of samples, generated as one batch.")]
Seed = Annotated[
    int | None, typer.Option(help="Random seed; in float32 the same seed gives the same text.")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop sequence (repeatable).")]
Quantize = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Use 8-bit weights, with a scale for every 32: slightly less exact."),
]
Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Continue the text with each line you type.")
]
Logprobs = Annotated[
    bool, options.flag("--logprobs", "With --json: log-probability of every token.")
]
Raw = Annotated[bool, options.flag("--raw", "Keep control characters.")]


def generate(
    context: typer.Context,
    prompt_argument: Prompt = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    max_new_tokens: MaxNewTokens = None,
    num_samples: NumSamples = None,
    seed: Seed = None,
    stop: Stop = None,
    quantize: Quantize = None,
    interactive: Interactive = False,
    logprobs: Logprobs = False,
    raw: Raw = False,
    json_: options.JsonOption = False,
) -> None:
    """Sample text from a checkpoint."""
    flags = options.sampling(context)
    flags["generate.prompt"] = _given_prompt(prompt_argument, prompt, interactive)
    if interactive and num_samples is None:
        flags["generate.num_samples"] = 1
    options.refuse({
        "--logprobs needs --json": logprobs and not json_,
        "--interactive and --json cannot be combined": interactive and json_,
        "--num-samples: --interactive draws one text at a time":
            interactive and num_samples not in (None, 1),
    })  # fmt: skip
    settings = options.over_run(config, set_, flags)
    with options.importing():
        from gptcli.api.generate import Sampler

    sampler = Sampler(checkpoint, settings, int8=quantize is not None)
    if sampler.trained.tokenizer.chat is not None:
        console.message("note: this continues a text; `gpt chat` has the model answer")
    clean = str if raw else printable
    if interactive:
        _converse(sampler, clean, settings(None).generate.prompt)
    else:
        _draw(sampler, clean, logprobs=logprobs, json_=json_)


def _given_prompt(argument: str | None, option: str | None, interactive: bool) -> str | None:
    if argument is not None and option is not None:
        raise ConfigError("the prompt is given twice: as an argument and with --prompt")
    given = argument if argument is not None else option
    return given if interactive else given_text(given, "prompt")


def given_text(given: str | None, what: str) -> str | None:
    """Return what was given on the command line, else what is on stdin; None without text."""
    if given is not None or sys.stdin is None or sys.stdin.isatty():
        return given
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the {what} on stdin is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r") or None


def _draw(sampler: "Sampler", clean: Callable[[str], str], *, logprobs: bool, json_: bool) -> None:
    """Print the samples of a prompt as they come, or as one JSON object."""
    samples: list[Sample] = []
    prompt = sampler.config.generate.prompt
    for sample, text in sampler.samples(logprobs=logprobs):
        is_new = not samples or samples[-1] is not sample
        if is_new and not json_:
            console.write(_BETWEEN if samples else "")
            if console.is_live() and prompt:
                console.message(prompt, "dim", end="")  # which the result continues
        samples += [sample] * is_new
        if not json_:
            console.write(clean(text))
    timings, seed = sampler.timings, sampler.config.seed
    speed, first = timings.tokens_per_second, timings.to_first_token or 0.0
    if json_:
        facts = [_facts(sample, sampler, logprobs) for sample in samples]
        console.result_json({"samples": facts, "seed": seed, "tokens_per_second": speed,
                             "seconds_to_first_token": first})  # fmt: skip
        return
    console.write("\n")
    console.message(
        f"seed {seed}  {speed:.1f} tokens/s  first token after {first:.2f} s  {sampler.weights}",
        "dim",
    )


def _facts(sample: "Sample", sampler: "Sampler", logprobs: bool) -> dict[str, Any]:
    text, decode = sample.text, sampler.trained.tokenizer.decode
    facts = {"text": text.text, "tokens": text.n_tokens, "finish_reason": sample.finish_reason}
    if logprobs:
        facts["logprobs"] = [
            {"id": one.id, "token": decode([one.id]), "logprob": one.logprob}
            for one in sample.tokens
        ]
    return facts


def _converse(sampler: "Sampler", clean: Callable[[str], str], line: str | None) -> None:
    console.message("each line continues the text; Ctrl-C stops a reply, Ctrl-D exits", "dim")
    while line is not None or (line := console.ask("> ")) is not None:
        text, line = line, None
        try:
            for piece in sampler.reply(text):
                console.write(clean(piece))
        except ConfigError as error:  # what was typed is not in the vocabulary
            console.error(error.message, error.hint)
            continue
        except KeyboardInterrupt:
            pass
        console.write("\n")
