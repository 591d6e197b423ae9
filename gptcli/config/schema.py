"""The one schema that `prepare`, `train`, `eval` and `generate` share.

The text under a field is its documentation wherever it appears: help, JSON Schema, reference.
A null means "derive it"; how is said in the field's text. Knows nothing of files.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gptcli.config.model import (
    Fraction,
    ModelConfig,
    NotNegative,
    NotNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Size,
    Threads,
    clipped,
    invalid,
    is_utf8,
)
from gptcli.config.windows import MixSource, check_mix

Split = Literal["train", "val"]
LoggerName = Literal["tensorboard", "wandb"]
DEFAULT_BPE_SIZE = 4096
DataFormat = Literal["text", "messages", "conversations", "prompt", "instruction", "docstrings"]


class SplitSource(Section):
    """Separate training and validation text."""

    train: PathText
    """A preset name, a path or glob of text, or `hf:org/name`, to train on."""
    val: PathText
    """The same, to validate on."""


class FilterConfig(Section):
    """Rules that leave documents out. All but the lengths look at the first 4 MB of a document."""

    min_chars: PositiveInt | None = Field(default=None, examples=[200])
    """Leave out documents with fewer characters."""
    max_chars: PositiveInt | None = Field(default=None, examples=[100_000])
    """Leave out documents with more characters."""
    min_letters: Fraction | None = Field(default=None, examples=[0.6])
    """Leave out documents with a smaller share of letters among the characters that are not white
    space."""
    max_repeated_lines: Fraction | None = Field(default=None, examples=[0.3])
    """Leave out documents in which a larger share of the lines (empty ones aside) repeats an
    earlier line of the document."""
    exclude: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["lorem"])
    """Leave out documents in which this regular expression is found; one search that takes more
    than 10 seconds is an error."""
    languages: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, examples=[["en"]]
    )
    """Leave out documents in other languages than these, by their codes; py3langid tells them by
    the first 2,000 characters (extra `language`)."""


class DataConfig(Section):
    """The source of the text, its split, and the training windows."""

    source: PathText | SplitSource | None = Field(default=None, examples=["stdlib"])
    """A preset, a path or glob of text, an address (https://, s3://, gs://), `hf:org/name`, `-`
    (stdin), or {train: ..., val: ...}."""
    mix: list[MixSource] | None = Field(
        default=None, examples=[[{"source": "stdlib", "weight": 0.7},
                                 {"source": "notes.txt", "weight": 0.3, "max_epochs": 4}]]
    )  # fmt: skip
    """Several sources in place of one, each with the weight that is its share of the tokens drawn:
    a number, or [[fraction of the run, weight], ...]. Each is prepared to its own folder, with one
    tokenizer; a source may also name a prepared folder. max_epochs limits the passes over one."""
    config: str | None = Field(default=None, examples=["sample-10BT"])
    """The configuration (subset) of a Hub dataset."""
    text_field: str = Field(default="text", examples=["content"])
    """The column or key that holds the text in files of rows, such as jsonl, csv and Parquet."""
    format: DataFormat | None = Field(default=None, examples=["messages"])
    """What rows hold: text, or conversations as messages (role, content), conversations (from,
    value), prompt and completion, or instruction, input and output; docstrings makes questions and
    answers from Python sources. Null: by the fields of the first row, text if it has text_field."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that are no conversation (an unknown role, a second system message, an empty turn, no
    turn of the assistant): stop and name the first, or skip and count them."""
    dedup: Literal["exact", "near"] | None = Field(default=None, examples=["exact"])
    """Leave out documents that repeat an earlier one: exact compares their text, where line ends
    and tabs count as spaces; near also finds similar ones by MinHash (extra `dedup`). Null: keep
    all."""
    filters: FilterConfig | None = Field(default=None, examples=[{"min_chars": 200}])
    """Rules that leave documents out: {min_chars: 200, languages: [en]}. Null: none."""
    dir: PathText | None = Field(default=None, examples=["data/books"])
    """Folder of token shards, or its address: https://host/folder, s3://bucket/folder. Null:
    data/<name of the source>."""
    cache_gb: PositiveFloat = Field(default=50.0, examples=[200])
    """Disk space for the shards of folders behind addresses, in GB; the least recently used make
    room."""
    val_fraction: Fraction | None = Field(default=None, examples=[0.05])
    """Fraction held out for validation; 0 disables validation. Null: 0.0005 for sources of 50 MB
    or more, else 0.1."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: stop and name the position, or replace with U+FFFD."""
    keep_downloads: bool = True
    """Keep downloaded files in the Hub's cache after their shards are written."""
    shard_tokens: PositiveInt = Field(default=100_000_000, examples=[10_000_000])
    """Maximum tokens per shard file."""
    seq_len: PositiveInt | None = Field(default=None, examples=[512])
    """Tokens per training window. Null: model.block_size."""
    stride: PositiveInt | None = Field(default=None, examples=[512])
    """Tokens between the starts of neighboring training windows. Null: seq_len."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mix is None:
            return self
        for key in ("source", "dir", "config"):
            if getattr(self, key) is not None:
                reason = "data.mix names all sources, and each has a folder"
                raise invalid(f"data.{key}", reason, "data.mix")
        check_mix(self.mix)
        return self


class TokenizerConfig(Section):
    """The tokenizer."""

    name: str = Field(default="gpt2", examples=["bpe"])
    """gpt2, char, bytes, bpe (trained on the data), or any tiktoken encoding."""
    vocab_size: Size | None = Field(default=None, examples=[8192])
    """Maximum size of a trained bpe vocabulary, including end-of-text. Null: 4096."""
    path: PathText | None = Field(default=None, examples=["data/books"])
    """Existing vocabulary: a data folder or its tokenizer.json; for char, also a text file of its
    characters (vocab.txt)."""


class TrainConfig(Section):
    """Training length, batch sizes, evaluation and checkpoint intervals."""

    max_steps: PositiveInt | None = Field(default=None, examples=[5000])
    """Optimizer steps. Null: from max_epochs or max_minutes; all null: one epoch."""
    max_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(default=None, examples=[3])
    """Passes over the training windows; if max_steps is set too, the first limit ends the run."""
    max_minutes: PositiveFloat | None = Field(default=None, examples=[10])
    """Time of the run, evaluations and checkpoints included: a few steps are timed on this machine
    before the first, and set max_steps. The first limit ends the run."""
    tokens_per_step: PositiveInt | None = Field(default=None, examples=[65536])
    """Tokens per optimizer step over all devices. Null: micro_batch_size * seq_len."""
    micro_batch_size: Size | Literal["auto"] = Field(default=8, examples=[32])
    """Sequences per forward pass; auto selects the largest that fits, and needs tokens_per_step."""
    eval_every: PositiveInt = Field(default=250, examples=[500])
    """Steps between evaluations; the last step is always evaluated."""
    eval_tokens: PositiveInt | None = Field(default=None, examples=[65536])
    """Tokens per evaluation, in evenly spaced windows. Null: the whole split, at most 1M."""
    save_every: PositiveInt = Field(default=250, examples=[1000])
    """Steps between checkpoints; evaluations and the last step also save."""
    sample_every: PositiveInt | None = Field(default=None, examples=[500])
    """Steps between samples. Null: one sample at the end."""
    log_every: PositiveInt = Field(default=10, examples=[1])
    """Steps between lines of metrics.jsonl and the plain log."""
    keep_last: PositiveInt = Field(default=2, examples=[5])
    """Number of newest checkpoints to keep, besides the best."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Non-finite loss or gradient: stop, or skip the step, up to three in a row."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more compute."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Multi-process training: full copies (ddp), shards (fsdp), or shards only if needed (auto)."""
    async_save: bool | Literal["auto"] = "auto"
    """Write checkpoints in the background; auto does so on cuda."""
    hang_timeout: Annotated[float, Field(gt=0, le=1e9)] = Field(default=600.0, examples=[1800])
    """Seconds without progress after which a multi-process run is stopped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, examples=[0.99])
    """Decay of an average of the weights, which evaluation, best.pt and export use. Null: off."""
    stop_after: PositiveInt | None = Field(default=None, examples=[5])
    """Stop after this many evaluations without a better validation loss. Null: off."""
    freeze: list[str] = Field(default=[], examples=[["wte", "h.0-5"]])
    """Modules to freeze, by name or range of blocks: [wte, wpe, "h.0-5"]."""
    loggers: list[LoggerName] = Field(default=[], examples=[["tensorboard"]])
    """Trackers besides metrics.jsonl: tensorboard, wandb (each needs the extra of that name)."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the block matrices and adamw for the rest."""
    lr: PositiveFloat = Field(default=6.0e-4, examples=[3e-4])
    """Peak learning rate."""
    embed_lr: PositiveFloat | None = Field(default=None, examples=[0.01])
    """Peak learning rate of the embeddings, a tied head's among them. Null: lr."""
    head_lr: PositiveFloat | None = Field(default=None, examples=[2e-3])
    """Peak learning rate of an untied head. Null: lr."""
    scalar_lr: PositiveFloat | None = Field(default=None, examples=[0.01])
    """Peak learning rate of vectors and scalars: norms and biases. Null: lr."""
    min_lr: NotNegative | None = Field(default=None, examples=[3e-5])
    """Final learning rate; those of embeddings, head and vectors fall alike. Null: lr / 10."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after warm-up; wsd holds the peak, then decays linearly over the last 20%."""
    warmup_steps: NotNegativeInt = Field(default=0, examples=[100])
    """Linear warm-up steps."""
    weight_decay: NotNegative = Field(default=0.1, examples=[0.05])
    """Decoupled weight decay, on matrices only; each step takes lr * weight_decay of them."""
    beta1: Fraction = Field(default=0.9, examples=[0.95])
    """Decay rate of AdamW's gradient average."""
    beta2: Fraction = Field(default=0.95, examples=[0.99])
    """Decay rate of AdamW's squared-gradient average."""
    momentum: Fraction = Field(default=0.95, examples=[0.9])
    """Decay rate of Muon's gradient average; lower it for runs of a few hundred steps."""
    grad_clip: NotNegative = Field(default=1.0, examples=[0.5])
    """Maximum global gradient norm; 0 disables clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr is not None and self.min_lr > self.lr:
            raise invalid("optim.min_lr", f"{self.min_lr:g} is above lr = {self.lr:g}", "optim.lr")
        if self.name != "muon" and self.momentum != 0.95:
            raise invalid("optim.momentum", "only name = muon has it; adamw's is beta1")
        return self


class GenerateConfig(Section):
    """Sampling defaults."""

    prompt: str | None = Field(default=None, examples=["Once upon a time"])
    """Text to continue. Null: start from end-of-text."""
    max_new_tokens: PositiveInt = Field(default=256, examples=[100])
    """Maximum number of new tokens."""
    temperature: NotNegative = Field(default=0.8, examples=[0.7])
    """Sampling temperature; 0 is greedy."""
    top_k: PositiveInt | None = Field(default=None, examples=[50])
    """Sample from the k most likely tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, examples=[0.95])
    """Nucleus sampling threshold."""
    min_p: Fraction | None = Field(default=None, examples=[0.05])
    """Minimum probability relative to the most likely token."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = Field(default=1.0, examples=[1.1])
    """Penalty for tokens already in the context; 1 disables it."""
    num_samples: Size = Field(default=1, examples=[4])
    """Number of samples."""
    stop: list[str] = Field(default=[], examples=[["\n\n"]])
    """Stop sequences."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "" in self.stop:
            raise invalid("generate.stop", "an empty string would stop before the first token")
        return self


class Config(Section):
    """One run: data, tokenizer, model, training and sampling."""

    name: str | None = Field(default=None, examples=["first-try"])
    """Name of the run; its folder is runs/<name>. Null: the config file's stem."""
    run_dir: PathText | None = Field(default=None, examples=["runs/first-try"])
    """Folder of the run. Null: runs/<name>."""
    seed: Seed = Field(default=1337, examples=[42])
    """Random seed; every draw is a function of the seed, the step and the position."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto selects cuda, then mps, then cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; trained weights and sums stay float32. Auto: bfloat16 for
    training if the hardware supports it, float32 for evaluation, 16 bits for generation."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model with torch.compile for train; true also compiles it for eval."""
    deterministic: bool | Literal["auto"] = "auto"
    """Use only deterministic operations; affects only cuda."""
    threads: Threads | Literal["auto"] = Field(default="auto", examples=[1])
    """Threads that compute on a CPU. Auto: all cores; for a long run of a small model, the number
    that is fastest when it starts. A resumed run uses the number it started with."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    generate: GenerateConfig = GenerateConfig()

    @property
    def seq_len(self) -> int:
        """Tokens in one training row."""
        return self.data.seq_len or self.model.block_size

    @property
    def trained_context(self) -> int:
        """Context length that is usable once the model is trained."""
        return self.model.trained_context(self.data.seq_len)

    @property
    def stride(self) -> int:
        """Tokens between the starts of neighboring training windows."""
        return self.data.stride or self.seq_len

    @property
    def rows(self) -> int:
        """Sequences of one forward pass; 1 while micro_batch_size is auto."""
        return 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.train.tokens_per_step or self.rows * self.seq_len

    @property
    def min_lr(self) -> float:
        """Learning rate at the end of the schedule."""
        return self.optim.lr / 10 if self.optim.min_lr is None else self.optim.min_lr

    @property
    def run_folder(self) -> Path:
        """Folder of the run's files."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / (self.name or "run")

    def is_set(self, key: str) -> bool:
        """Tell whether `key` (dotted) was given by a file or the command line."""
        parent, _, last = key.rpartition(".")
        section = self.get(parent) if parent else self
        return section is not None and last in section.model_fields_set

    def get(self, key: str) -> Any:
        """Return the value of `key` (dotted); None below a section that is null."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part, None)
        if isinstance(value, list):
            is_plain = not all(isinstance(each, Section) for each in value)
            return value if is_plain else [each.model_dump(exclude_none=True) for each in value]
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optim.head_lr is not None and self.model.tie_embeddings and self.model.is_whole:
            reason = "a tied head is the embedding, whose rate is embed_lr"
            raise invalid("optim.head_lr", reason, "model.tie_embeddings")
        if self.tokenizer.vocab_size is not None and self.tokenizer.name != "bpe":
            raise invalid("tokenizer.vocab_size", "only a bpe vocabulary is trained to a size")
        if self.name is not None and not _is_file_name(self.name):
            reason = f"{clipped(repr(self.name))} cannot be a folder's name; use run_dir for paths"
            raise invalid("name", reason)
        if not self.model.is_whole:
            return self  # checked again with the imported shape
        block_size, total = self.model.block_size, self.tokens_per_step
        unit = self.rows * self.seq_len
        if self.seq_len > block_size:
            reason = f"{self.seq_len} is longer than model.block_size = {block_size}"
            raise invalid("data.seq_len", reason, "model.block_size")
        if self.train.micro_batch_size == "auto" and self.train.tokens_per_step is None:
            raise invalid("train.micro_batch_size", "auto needs train.tokens_per_step")
        if total % unit:
            nearest = max(unit, round(total / unit) * unit)
            raise invalid(
                "train.tokens_per_step",
                f"{total} is not a multiple of micro_batch_size * seq_len = {unit}; {nearest} is",
                "train.micro_batch_size", "data.seq_len", "model.block_size",
            )  # fmt: skip
        return self


def _is_file_name(name: str) -> bool:
    """Tell whether `name` is one path component on every system, with room for an ending."""
    if not is_utf8(name) or len(name.encode()) > 200 or not name.strip(". "):
        return False
    return not re.search(r'[/\\:*?"<>|\0-\x1f\x7f]', name)
