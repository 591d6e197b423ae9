"""`gpt generate`: stream samples from a checkpoint."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli import console
from gptcli.commands import options
from gptcli.errors import ConfigError

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.config import Config
    from gptcli.device import Compute


def generate(
    prompt_argument: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="Text to continue; default: stdin, or none."),
    ] = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1 wilder, below 1 safer, 0 always the likeliest.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest that reach this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this part of the likeliest one.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to draw.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Texts to draw.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Stream samples from a checkpoint."""
    flags = {
        "seed": seed,
        "generate.temperature": temperature,
        "generate.top_k": top_k,
        "generate.top_p": top_p,
        "generate.min_p": min_p,
        "generate.max_new_tokens": max_new_tokens,
        "generate.num_samples": num_samples,
        "generate.stop": stop or None,
        "generate.prompt": _given_prompt(prompt_argument, prompt),
    }
    loaded = options.exactly(options.load(config, set_, flags))
    from gptcli.checkpoint import find_checkpoint, load_model
    from gptcli.device import compute

    machine = compute(loaded)
    trained = load_model(find_checkpoint(checkpoint, loaded), machine.device)
    if config is None:  # then the run's own way of sampling lies below --set and the options
        stored = trained.checkpoint.config
        base = {"generate": dict(stored["generate"]), "seed": stored["seed"]}
        settled = options.load(None, set_, flags, base)
        loaded = settled.model_copy(update={"dtype": loaded.dtype})
    _draw(_Samples(loaded, trained, machine), json_)


def _draw(samples: "_Samples", json_: bool) -> None:
    """Draw all samples, showing them as they come or as one JSON object."""
    for index in range(samples.config.generate.num_samples):
        if index and not json_:
            console.write("\n---------------\n")
        samples.draw(index, show=not json_)
    facts = samples.facts()
    if json_:
        console.result_json(facts)
        return
    console.write("\n")
    console.message(
        f"seed {facts['seed']}  {facts['tokens_per_second']:.1f} tokens/s"
        f"  first token after {facts['seconds_to_first_token']:.2f} s",
        "dim",
    )


def _given_prompt(argument: str | None, option: str | None) -> str | None:
    """Return the prompt from the argument, the option or stdin; None where there is none."""
    if argument is not None and option is not None:
        raise ConfigError("the prompt is given twice: as an argument and with --prompt")
    given = argument if argument is not None else option
    if given is not None or sys.stdin is None or sys.stdin.isatty():
        return given
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r") or None


class _Samples:
    """Draws texts one after the other and keeps what there is to report."""

    def __init__(self, config: "Config", trained: "TrainedModel", machine: "Compute") -> None:
        from gptcli.generation import encode_prompt

        self.config, self.trained, self.machine = config, trained, machine
        block_size = trained.model.config.block_size
        self.prompt = encode_prompt(trained.tokenizer, config.generate.prompt, block_size)
        self.samples: list[dict[str, Any]] = []
        self.began = time.perf_counter()
        self.first_token: float | None = None
        self.decoding = 0.0
        self.n_decoded = 0

    def draw(self, index: int, *, show: bool) -> None:
        """Draw sample `index`, printing it as it comes."""
        from gptcli.generation import TextStream

        generate, tokenizer = self.config.generate, self.trained.tokenizer
        if show and console.is_live() and generate.prompt:
            console.prompt(generate.prompt)
        text = TextStream(self._timed(index), tokenizer, generate)
        for piece in text:
            if show:
                console.write(console.printable(piece))
        self.samples.append(
            {"text": text.text, "tokens": text.n_tokens, "finish_reason": text.finish_reason}
        )

    def _timed(self, index: int) -> Any:
        """Yield drawn ids; the time of the first is the prompt's, that of the others decoding's."""
        from gptcli.generation import stream

        ids = stream(
            self.trained.model, self.prompt, self.config.generate, self.machine,
            eot=self.trained.tokenizer.eot, n_tokens=self.trained.tokenizer.vocab_size,
            seed=self.config.seed, sample=index,
        )  # fmt: skip
        last: float | None = None
        for token in ids:
            now = time.perf_counter()
            if self.first_token is None:
                self.first_token = now - self.began
            if last is not None:
                self.decoding += now - last
                self.n_decoded += 1
            yield token
            last = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """Return the JSON result."""
        return {
            "samples": self.samples,
            "seed": self.config.seed,
            "tokens_per_second": self.n_decoded / self.decoding if self.decoding else 0.0,
            "seconds_to_first_token": self.first_token or 0.0,
        }
