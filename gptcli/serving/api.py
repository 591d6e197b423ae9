"""OpenAI's interface: from the body of a request to texts to draw, and from texts to answers."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcli.config import GenerateConfig
from gptcli.errors import GptError
from gptcli.generation import encode_prompt
from gptcli.generation.text import ChatPrompt, Piece, Token, chat_prompt, require_chat
from gptcli.serving.models import Model
from gptcli.tokenizers import Message, Tokenizer

MAX_BODY = 1 << 20  # bytes
MAX_TEXTS = 64  # of a request
_MAX_TOKENS = 1 << 16
_SEED_BITS = 31  # of a seed that the server draws

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Ids = Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(max_length=_MAX_TOKENS)]
Fixed = Annotated[float, Field(ge=0, le=0)] | None  # what clients may send as "off"


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(_Strict):
    """What both kinds of completion take."""

    model: str
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    user: str | None = None
    # Sent by clients with the value that means off; others are not supported.
    frequency_penalty: Fixed = None
    presence_penalty: Fixed = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def limit(self) -> int | None:
        """Return the most tokens of a text, where the request says so."""
        return self.max_tokens

    def settings(self, defaults: GenerateConfig) -> GenerateConfig:
        """Return how to sample: what the request says, else as the run does."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given: dict[str, Any] = {
            "max_new_tokens": self.limit(),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": stop,
        }
        update = {key: value for key, value in given.items() if value is not None}
        if self.top_k is not None:
            update["top_k"] = self.top_k if self.top_k > 0 else None
        return defaults.model_copy(update=update | {"prompt": None, "num_samples": 1})


class CompletionRequest(_Request):
    """`/v1/completions`."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(max_length=MAX_TEXTS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
    suffix: Literal[""] | None = None


class _Part(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    def limit(self) -> int | None:
        """Return the most tokens of a reply, where the request says so."""
        return self.max_completion_tokens or self.max_tokens


@dataclass
class Wanted:
    """What a request asks for, checked.

    Attributes:
        prompts: Ids to continue.
        n: Texts of each prompt.
        n_top: Alternatives of each token; None is no log-probabilities.
    """

    is_chat: bool
    prompts: list[list[int]]
    config: GenerateConfig
    n: int
    seed: int
    n_top: int | None
    is_streamed: bool
    has_usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def parse(body: bytes, kind: type[CompletionRequest] | type[ChatRequest]) -> _Request:
    """Return the request that a body holds.

    Raises:
        ApiError: It is not JSON, or a value is not allowed.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        names = [str(part) for part in first["loc"]]
        key, where = names[0] if names else None, ".".join(names)[:100]
        match first["type"]:
            case "json_invalid":
                raise ApiError(400, f"the body is not JSON: {first['msg']}"[:300]) from None
            case "extra_forbidden":
                raise ApiError(
                    400, f"unknown parameter: {where}", param=where, code="unknown_parameter"
                ) from None
            case "missing":
                raise ApiError(400, f"missing parameter: {where}", param=where) from None
        raise ApiError(400, f"{key}: {first['msg']}"[:300], param=key) from None


def wanted(request: _Request, model: Model) -> Wanted:
    """Return what a request asks of a model.

    Raises:
        ApiError: The model cannot do it.
    """
    n, config = request.n or 1, request.settings(model.defaults)
    if isinstance(request, ChatRequest):
        if None not in (request.max_tokens, request.max_completion_tokens):
            raise ApiError(400, "max_tokens: max_completion_tokens replaces it", param="max_tokens")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        prompt = _conversation(request, model, config)
        prompts, config = [prompt.ids], config.model_copy(update={"max_new_tokens": prompt.room})
        n_top = (request.top_logprobs or 0) if request.logprobs else None
    else:
        assert isinstance(request, CompletionRequest)
        prompts, n_top = _prompts(request, model), request.logprobs
        if request.best_of not in (None, n):
            raise ApiError(400, "best_of: only n texts are drawn", param="best_of")
    if len(prompts) * n > MAX_TEXTS:
        raise ApiError(400, f"n: at most {MAX_TEXTS} texts in one request", param="n")
    options = request.stream_options
    if options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return Wanted(
        isinstance(request, ChatRequest),
        prompts,
        config,
        n,
        secrets.randbits(_SEED_BITS) if request.seed is None else request.seed,
        n_top,
        bool(request.stream),
        options is not None and options.include_usage,
    )


def _prompts(request: CompletionRequest, model: Model) -> list[list[int]]:
    """Return the ids of each prompt."""
    prompt, most = request.prompt, request.truncate_prompt_tokens
    if most == 0:
        raise ApiError(
            400, "truncate_prompt_tokens: expected -1, or 1 and more",
            param="truncate_prompt_tokens",
        )  # fmt: skip
    is_several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts: list[Any] = prompt if is_several else [prompt]  # type: ignore[assignment]
    found = []
    for one in prompts:
        if isinstance(one, list) and one:
            ids = one
        else:
            try:
                ids = encode_prompt(model.trained.tokenizer, one or None, MAX_BODY)
            except GptError as error:
                raise ApiError(400, _sentence(error), param="prompt") from None
        if most is not None:
            ids = ids[-(min(most, model.context) if most > 0 else model.context) :]
        if len(ids) > model.context:
            message = f"the prompt has {len(ids)} tokens, and the context holds {model.context}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        if max(ids) >= model.trained.model.n_tokens:
            known = model.trained.model.n_tokens
            raise ApiError(400, f"prompt: token ids must be below {known}", param="prompt")
        found.append(ids)
    return found


def _conversation(request: ChatRequest, model: Model, config: GenerateConfig) -> ChatPrompt:
    """Return the ids of a conversation, up to where the reply begins, and the room for it."""
    tokenizer, param = model.trained.tokenizer, "model"
    messages = [
        Message("system" if one.role == "developer" else one.role, one.text)
        for one in request.messages
    ]
    try:
        require_chat(tokenizer, model.id)
        param = "messages"
        return chat_prompt(tokenizer, messages, model.context, config.max_new_tokens)
    except GptError as error:
        raise ApiError(400, _sentence(error), param=param) from None


def _sentence(error: GptError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def usage(job_wanted: Wanted, n_drawn: int) -> dict[str, int]:
    """Return what a request has used."""
    n_prompt = sum(map(len, job_wanted.prompts))
    return {"prompt_tokens": n_prompt, "completion_tokens": n_drawn,
            "total_tokens": n_prompt + n_drawn}  # fmt: skip


def head(asked: Wanted, model: Model, *, is_chunk: bool) -> dict[str, Any]:
    """Return what every answer and every chunk of a stream begins with."""
    kind = "chat.completion" if asked.is_chat else "text_completion"
    if is_chunk and asked.is_chat:
        kind += ".chunk"
    prefix = "chatcmpl" if asked.is_chat else "cmpl"
    return {"id": f"{prefix}-{asked.id}", "object": kind, "created": asked.created,
            "model": model.id, "seed": asked.seed}  # fmt: skip


def choice(asked: Wanted, piece: Piece, model: Model, *, is_chunk: bool) -> dict[str, Any]:
    """Return a text, or a piece of one, as OpenAI has it."""
    found: dict[str, Any] = {"index": piece.index}
    tokenizer = model.trained.tokenizer
    if asked.is_chat:
        message = {"role": "assistant", "content": piece.text}
        found |= {"delta" if is_chunk else "message": message}
    else:
        found["text"] = piece.text
    found["logprobs"] = None
    if asked.n_top is not None:
        prompt = asked.prompts[piece.index // asked.n]
        found["logprobs"] = (
            _chat_logprobs(piece.tokens, tokenizer)
            if asked.is_chat
            else _logprobs(piece.tokens, prompt, tokenizer)
        )
    return found | {"finish_reason": piece.finish_reason}


def _logprobs(tokens: list[Token], prompt: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the log-probabilities of a completion, and the ids, which OpenAI does not have."""

    def entry(id: int, logprob: float) -> list[Any]:
        return [id, logprob, list(tokenizer.token_bytes(id))]

    more = {
        "tokens": [entry(token.id, token.logprob) for token in tokens],
        "top": [[entry(*other) for other in token.top] for token in tokens],
        "prompt": prompt if tokens and tokens[0].offset == 0 else None,  # with the first
    }
    return {
        "tokens": [_shown(token.id, tokenizer) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {_shown(id, tokenizer): logprob for id, logprob in token.top} for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
        "gptcli": more,
    }


def _chat_logprobs(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id)
        return {"token": _shown(id, tokenizer), "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(token.id, token.logprob)
        | {"top_logprobs": [entry(id, logprob) for id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _shown(id: int, tokenizer: Tokenizer) -> str:
    """Return a token's text; as OpenAI, its bytes where they are no whole characters."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode() if raw else f"<|{id}|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
