"""`gpt eval`: loss, perplexity and bits per byte of a checkpoint, or of several side by side."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.commands.scores import compare, describe, facts_of, show_tasks
from gptcli.errors import CheckpointError, ConfigError, is_out_of_memory
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.checkpoint import TrainedModel
    from gptcli.device import Runtime
    from gptcli.evaluation import Evaluation, SpanOf, TokenSequence

# OpenAI's GPT-2 on OpenWebText's validation part, nats per token, as nanoGPT publishes them.
GPT2_ON_OPENWEBTEXT = {"124M": 3.12, "350M": 2.84, "774M": 2.67, "1558M": 2.54}


Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Files, runs, gpt2, hf:org/name or folders; several are compared. Default: newest"
        " best.",
        show_default=False,
        autocompletion=complete.checkpoints,
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="Prepared data; default: the run's own."),
]
TextFile = Annotated[
    str | None, typer.Option("--text", metavar="FILE", help="Score a text file instead.")
]
Split = Annotated[str, typer.Option("--split", help="train or val.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Sliding-window stride; default: the context.")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Score a subset of about this many tokens.")
]
Yardsticks = Annotated[
    bool, typer.Option("--yardsticks", help="Also compress the validation text with gzip and xz.")
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="lm-eval tasks or YAML files to run instead."),
]
Limit = Annotated[int | None, typer.Option("--limit", help="With --tasks: examples per task.")]


def evaluate(
    checkpoints: Checkpoints = None,
    checkpoint: options.CheckpointOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    data: Data = None,
    text: TextFile = None,
    split: Split = "val",
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    yardsticks: Yardsticks = False,
    tasks: Tasks = None,
    limit: Limit = None,
    json_: options.JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte; compare checkpoints."""
    if limit is not None and tasks is None:
        raise ConfigError("--limit: only --tasks have questions; --max-tokens shortens a text")
    if tasks is not None and (data or text or stride or max_tokens or yardsticks or split != "val"):
        raise ConfigError("--tasks bring their own text: of the other options, only --limit fits")
    options.require_positive(limit=limit)
    if checkpoints and checkpoint is not None:
        raise ConfigError("the checkpoint is given twice: as an argument and with --checkpoint")
    loaded = options.exactly(options.load(config, set_))
    wanted = _Wanted(data, text, split, stride, max_tokens, loaded.data.encoding_errors)
    wanted.check(yardsticks)
    from gptcli.device import init_runtime
    from gptcli.interop.pretrained import open_model

    machine = init_runtime(loaded)
    names: list[str | None] = [*checkpoints] if checkpoints else [checkpoint]
    folder = Path(data) if data else None
    trained = [open_model(name, loaded, machine.device, folder) for name in names]
    if tasks is not None:
        _run_tasks(trained, tasks.split(","), limit, json_)
        return
    scored = _score_all(trained, wanted, loaded.data.seq_len, machine)
    extra: dict[str, Any] = {}
    if text is None and (known := _references(wanted.folder(trained[0]), trained[0])):
        extra["references"] = known
    if yardsticks:
        extra |= _yardsticks(wanted.folder(trained[0]), trained[0])
    if len(scored) == 1:
        facts = scored[0][0] | extra
        console.result_json(facts) if json_ else console.result(describe(facts))
    else:
        compare(scored, extra, json_)


@dataclass(frozen=True)
class _Wanted:
    """The text to score and its windows, as the command line names them."""

    data: str | None
    text: str | None
    split: str
    stride: int | None
    max_tokens: int | None
    encoding_errors: str

    def check(self, yardsticks: bool) -> None:
        """Refuse options that do not name one text to score."""
        options.require_positive(stride=self.stride, max_tokens=self.max_tokens)
        if self.data is not None and self.text is not None:
            raise ConfigError("--data and --text exclude each other: there is one text to score")
        if self.split not in ("train", "val"):
            raise ConfigError(f"--split: expected train or val, got '{self.split}'")
        if self.text is not None and yardsticks:
            raise ConfigError("--yardsticks needs prepared data: it compresses both splits")
        if self.split != "val" and yardsticks:
            raise ConfigError("--yardsticks compresses the validation text: leave --split out")

    def check_contexts(self, contexts: list[int]) -> None:
        """Refuse windows that skip tokens, or that differ from network to network."""
        shortest = min(contexts)
        if self.stride is not None and self.stride > shortest:
            raise ConfigError(
                f"--stride: {self.stride} would skip tokens; the context is {shortest}"
            )
        if self.max_tokens is None or len(contexts) == 1:
            return
        if self.text is not None:
            raise ConfigError(
                "--max-tokens: networks are compared on the whole of a text",
                "shorten the file itself",
            )
        if shortest < max(contexts):
            raise ConfigError(
                f"--max-tokens: contexts of {shortest} and {max(contexts)} tokens would choose"
                " different parts of the text",
                f"give all the same with -s data.seq_len={shortest}, or leave --max-tokens out",
            )

    def folder(self, trained: "TrainedModel") -> Path:
        """Return the prepared data to score."""
        return Path(self.data) if self.data else trained.data_dir


def _score_all(
    trained: "list[TrainedModel]", wanted: _Wanted, seq_len: int | None, machine: "Runtime"
) -> "list[tuple[dict[str, Any], Evaluation]]":
    """Score every network on the same text; return what there is to tell about each."""
    from gptcli.evaluation.texts import split_tokens, text_tokens

    contexts = [_context(seq_len, one) for one in trained]
    wanted.check_contexts(contexts)
    place = Path(wanted.text) if wanted.text is not None else wanted.folder(trained[0])
    is_mixed = len({one.tokenizer.fingerprint for one in trained}) > 1
    texts: list[tuple[TokenSequence, SpanOf | None]] = []
    for one in trained:  # all are opened before the first is scored: refusals come at once
        if wanted.text is not None:
            tokens, parts, warning = text_tokens(place, one, wanted.encoding_errors)
            if warning:
                console.message(warning)
            texts.append((tokens, parts if is_mixed else None))
        else:
            texts.append((split_tokens(place, wanted.split, one), None))  # type: ignore[arg-type]
    scored = []
    for one, context, (tokens, span_of) in zip(trained, contexts, texts, strict=True):
        began = time.perf_counter()
        score = _score(one, tokens, span_of, machine, context, wanted)
        split = wanted.split if wanted.text is None else "text"
        scored.append((facts_of(one, str(place), split, score, time.perf_counter() - began), score))
    return scored


def _score(
    trained: "TrainedModel",
    tokens: "TokenSequence",
    span_of: "SpanOf | None",
    machine: "Runtime",
    context: int,
    wanted: _Wanted,
) -> "Evaluation":
    from gptcli.evaluation import TokenStats
    from gptcli.evaluation import evaluate as evaluate_model

    model = trained.model.compiled() if machine.compile else trained.model
    with tokens, console.bar(f"evaluating {trained.path}") as bar:
        try:
            found = evaluate_model(
                model, tokens, machine,
                context=context, stride=wanted.stride, max_tokens=wanted.max_tokens,
                units=TokenStats(trained.tokenizer), span_of=span_of, on_progress=bar.update,
            )  # fmt: skip
        except RuntimeError as error:
            if not machine.compile or is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            raise ConfigError(f"compile: not possible here ({reason})",
                              "-s compile=false does without") from error  # fmt: skip
    assert found is not None
    if not math.isfinite(found.nats):
        raise CheckpointError(
            f"{trained.path}: the model's output is not finite",
            "if its weights are sound, -s dtype=float32 has room for it",
        )
    return found


def _context(wanted: int | None, trained: "TrainedModel") -> int:
    block_size = trained.model.config.block_size
    if wanted is not None and wanted > block_size:
        raise ConfigError(
            f"data.seq_len: {wanted} is longer than the context of {block_size}"
            + (f" that {trained.path} was trained on" if trained.is_cut else "")
        )
    return wanted or block_size


def _references(folder: Path, trained: "TrainedModel") -> dict[str, float]:
    """Return published losses, nats per token, that a loss on this data can be held against."""
    from gptcli.data.shards import read_manifest

    recipe = read_manifest(folder).recipe
    applies = "openwebtext" in recipe.source.lower() and trained.tokenizer.name == "gpt2"
    return GPT2_ON_OPENWEBTEXT if applies else {}


def _yardsticks(folder: Path, trained: "TrainedModel") -> dict[str, Any]:
    from gptcli.data.shards import SPLITS, TokenReader, read_manifest
    from gptcli.evaluation.compare import measure

    manifest = read_manifest(folder)
    texts: list[bytes] = []
    with console.bar("compressing with gzip and xz"):
        for split in SPLITS:
            with TokenReader(folder, manifest, split) as tokens:
                ids = tokens.read(0, len(tokens)).tolist()
            texts.append(trained.tokenizer.decode_bytes(ids))
        return {"yardsticks": measure(*texts)}


def _run_tasks(
    trained: "list[TrainedModel]", names: list[str], limit: int | None, json_: bool
) -> None:
    """Run lm-eval's tasks on every network and print their metrics."""
    from gptcli.interop.lm_eval import run_tasks

    results: list[dict[str, Any]] = []
    for one in trained:
        device = str(one.model.wte.weight.device)
        scores = run_tasks(one, names, limit=limit, device=device)
        results.append({"checkpoint": str(one.path), "step": one.step, "tasks": scores})
    if json_:
        console.result_json(results[0] if len(results) == 1 else {"results": results})
        return
    show_tasks(results)
