"""The `model` section, in GPT-2's and nanoGPT's names, and what every section is made of."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# No setting is larger: sums and products of a few of these stay far from the ends of 64 bits and
# of a float's exponent. Help lists all bounds but this one.
MAX_VALUE = 10**12
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # what file systems and Linux take


def _integral(value: Any) -> Any:
    """Let 1e9 and 1.0e5 stand for integers; leave everything else to the strict check."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def is_utf8(text: str) -> bool:
    """Tell whether `text` has no half of a character; file names that are not UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_path(value: str) -> str:
    """Return `value` unless no file system takes it as a path.

    Raises:
        PydanticCustomError: It is none, which is a ValueError that says what is expected.
    """
    if not is_utf8(value) or "\0" in value:
        raise PydanticCustomError("path", "a path in UTF-8 without NUL")
    names = value.encode().replace(b"\\", b"/").split(b"/")
    if len(value.encode()) > _MAX_PATH_BYTES or max(map(len, names)) > _MAX_NAME_BYTES:
        most = f"{_MAX_PATH_BYTES} bytes, each name in it of at most {_MAX_NAME_BYTES}"
        raise PydanticCustomError("path", f"a path of at most {most}")
    return value


# The bounds come first: behind a validator, pydantic would not write them into the JSON Schema.
_INTEGRAL = BeforeValidator(_integral)
NotNegativeInt = Annotated[int, Field(ge=0, le=MAX_VALUE), _INTEGRAL]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_VALUE), _INTEGRAL]
Threads = Annotated[int, Field(gt=0, le=4096), _INTEGRAL]  # with many more, OpenMP crashes
Seed = Annotated[int, Field(ge=0, lt=2**63), _INTEGRAL]
Size = Annotated[int, Field(gt=0, le=2**20), _INTEGRAL]  # rows, widths, vocabularies
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_VALUE)]
NotNegative = Annotated[float, Field(ge=0, le=MAX_VALUE)]
PathText = Annotated[str, AfterValidator(require_path)]  # or a name that looks like one


def clipped(text: str) -> str:
    """Return the beginning of a text, enough to recognize it."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def invalid(key: str, reason: str, *others: str) -> PydanticCustomError:
    """Make the error of a check across keys; the loader names the line of the first that is set."""
    context = {"reason": reason, "key": key, "others": others}
    return PydanticCustomError("cross_check", "{reason}", context)


class Section(BaseModel):
    """A section of the configuration: unknown keys, NaN and silent conversions are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Heads = Annotated[int, Field(gt=0, le=2**14), _INTEGRAL]
LoraTarget = Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_gate", "mlp.c_proj"]


class LoraConfig(Section):
    """Low-rank adapters: train small updates of frozen matrices."""

    rank: Size = Field(default=8, examples=[16])
    """Rank of each update."""
    alpha: PositiveFloat = Field(default=16.0, examples=[32])
    """The update is scaled by alpha / rank."""
    targets: Annotated[list[LoraTarget], Field(min_length=1)] | None = Field(
        default=None, examples=[["attn.c_attn"]]
    )
    """Layers of a block that get an adapter. Null: all."""

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / self.rank


class ModelConfig(Section):
    """The model; the keys have GPT-2's and nanoGPT's names."""

    init_from: PathText = Field(default="scratch", examples=["gpt2"])
    """scratch, or weights to start from: gpt2[-medium|-large|-xl], hf:org/name[@revision], a
    Hugging Face folder, a nanoGPT ckpt.pt, or a checkpoint or run of gptcli."""
    n_layer: Annotated[int, Field(gt=0, le=1000), _INTEGRAL] = Field(default=12, examples=[6])
    """Transformer blocks."""
    n_head: Heads = Field(default=12, examples=[6])
    """Attention heads per block; divides n_embd."""
    n_kv_head: Heads | None = Field(default=None, examples=[4])
    """Key and value heads (grouped queries); divides n_head. Null: n_head."""
    n_embd: Size = Field(default=768, examples=[384])
    """Width of the residual stream."""
    n_inner: Size | None = Field(default=None, examples=[2048])
    """Width of the feed-forward branch. Null: 4 * n_embd, or two thirds of that for swiglu,
    rounded up to a multiple of 8."""
    head_dim: Heads | None = Field(default=None, examples=[128])
    """Width of one attention head. Null: n_embd / n_head."""
    block_size: Annotated[int, Field(gt=0, le=2**24), _INTEGRAL] = Field(
        default=1024, examples=[256]
    )
    """Context length: the maximum number of tokens the model can attend to."""
    vocab_size: Size | None = Field(default=None, examples=[50304])
    """Rows of the embedding; may exceed the tokenizer's vocabulary. Null: the tokenizer's."""
    dropout: Fraction = Field(default=0.0, examples=[0.1])
    """Dropout of embeddings, attention and residual branches during training."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections. Null: bias."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization before each branch and before the head."""
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = Field(default=1e-5, examples=[1e-6])
    """Epsilon of the normalization layers."""
    position: Literal["learned", "rope"] = "learned"
    """Position encoding: a learned table, or rotary embeddings."""
    rope_theta: PositiveFloat = Field(default=10000.0, examples=[500000])
    """Base of the rotary wavelengths."""
    mlp: Literal["gelu", "gelu_erf", "swiglu", "relu2"] = "gelu"
    """Activation of the feed-forward branch: GPT-2's tanh GELU, nanoGPT's exact GELU, gated SiLU,
    or squared ReLU."""
    qk_norm: bool = False
    """Apply RMS norm to the queries and keys of each head before attention."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    x0_scalars: bool = False
    """Add the embedding again before each block, scaled by a learned number."""
    n_value_embd: Annotated[int, Field(ge=0, le=1000), _INTEGRAL] = Field(default=0, examples=[2])
    """Number of last blocks with a separate token embedding, added to the attention's values."""
    bigram_rows: Annotated[int, Field(ge=0, le=2**28), _INTEGRAL] = Field(
        default=0, examples=[16384]
    )
    """Rows of an embedding of hashed token pairs, added to the token embedding; 0: none."""
    key_offset: bool = False
    """Take half of each key from the token before, so that one block finds what followed."""
    init_std: PositiveFloat | Literal["width"] = Field(default=0.02, examples=["width"])
    """Standard deviation of the initial weights; width: 0.58 / sqrt(n_embd)."""
    zero_init: bool = False
    """Initialize the projections into the residual stream to zero."""
    zero_init_head: bool = False
    """Initialize an untied head to zero."""
    lora: LoraConfig | None = Field(default=None, examples=[{"rank": 16}])
    """Train only low-rank adapters: {rank: 8, alpha: 16, targets: null}; needs init_from."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward branch."""
        if self.n_inner is not None:
            return self.n_inner
        # SwiGLU (Shazeer 2020) has three matrices: two thirds of the width cost the same.
        return (8 * self.n_embd // 3 + 7) // 8 * 8 if self.mlp == "swiglu" else 4 * self.n_embd

    def resolved(self) -> Self:
        """Return the same model with the values that null stands for."""
        derived = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "n_inner": self.mlp_width,
            "head_dim": self.head_size,
            "qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias,
        }
        return self.model_copy(update=derived)

    def trained_context(self, seq_len: int | None) -> int:
        """Return the longest context that training on rows of `seq_len` tokens makes usable.

        Positions of a learned table that the run draws are trained only as far as its rows go.
        """
        drawn = self.position == "learned" and self.init_from == "scratch"
        return min(seq_len or self.block_size, self.block_size) if drawn else self.block_size

    @property
    def is_whole(self) -> bool:
        """Tell whether the shape is known: all of it, unless weights are imported that bring it."""
        return self.init_from == "scratch" or set(type(self).model_fields) <= self.model_fields_set

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora is not None and self.init_from == "scratch":
            raise invalid("model.lora", "adapters need weights to adapt; set model.init_from")
        drawn = {"zero_init": False, "zero_init_head": False, "init_std": 0.02}
        for key, default in drawn.items() if self.init_from != "scratch" else ():
            if getattr(self, key) != default:
                raise invalid(f"model.{key}", "imported weights are not drawn", "model.init_from")
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if not self.is_whole:
            return self  # checked again with the imported shape
        if self.zero_init_head and self.tie_embeddings:
            reason = "a tied head is the embedding; set model.tie_embeddings=false"
            raise invalid("model.zero_init_head", reason, "model.tie_embeddings")
        n_embd, n_head, targets = self.n_embd, self.n_head, self.lora and self.lora.targets
        if n_embd % n_head and self.head_dim is None:
            reason = f"{n_embd} is not divisible by n_head = {n_head}"
            raise invalid("model.n_embd", reason, "model.n_head")
        if self.n_kv_head and n_head % self.n_kv_head:
            reason = f"{self.n_kv_head} does not divide n_head = {n_head}"
            raise invalid("model.n_kv_head", reason, "model.n_head")
        if self.position == "rope" and self.head_size % 2:
            reason = f"rope needs an even n_embd / n_head, not {self.head_size}"
            raise invalid("model.position", reason)
        if self.key_offset and self.head_size % 4:
            reason = f"needs heads of a multiple of 4, not {self.head_size}"
            raise invalid("model.key_offset", reason, "model.n_head")
        if self.n_value_embd > self.n_layer:
            reason = f"{self.n_value_embd} is more than n_layer = {self.n_layer}"
            raise invalid("model.n_value_embd", reason, "model.n_layer")
        if self.position != "rope" and self.rope_theta != 10000.0:
            raise invalid("model.rope_theta", "only position = rope has wavelengths")
        if self.mlp != "swiglu" and "mlp.c_gate" in (targets or ()):
            raise invalid("model.lora.targets", "only mlp = swiglu has a mlp.c_gate", "model.mlp")
        return self
