"""Files as small as a model's loss says: arithmetic coding with its predictions.

A file becomes tokens, and what no token can give back byte for byte is kept beside them, deflated.
The tokens are cut into streams that advance together, one token of each at a time, through the
windows that `gpt eval` scores. Both directions do the same computation in the same shapes, because
the last bits of a float depend on them; a checksum of the frequencies that each window used tells
where those of another machine differ.
"""

import hashlib
import json
import platform
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptcli.checkpoint import TrainedModel
from gptcli.config.windows import scoring_windows
from gptcli.data.readers import in_pieces
from gptcli.device import restored_threads
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluation.coder import Decoder, Encoder
from gptcli.evaluation.score import windows
from gptcli.model import GPT, KVCache
from gptcli.tokenizers import Ids, Tokenizer

_MAGIC = b"GPTZ\x01"  # its last byte is the version
_SCALE = 1 << 32  # of frequencies: fine enough for a vocabulary of any size
_MOST_STREAMS = 128
_TOKENS_PER_STREAM = 1024  # at least: a stream's first token is coded without a prediction
_CACHE_BYTES = 1 << 30  # of all streams' keys and values
# Bytes that are not UTF-8, with short texts between them: tokens would not pay.
_NOT_TEXT = re.compile("([\udc80-\udcff](?:.{0,15}[\udc80-\udcff])*)", re.DOTALL)
_MOST_TOKENS, _MOST_THREADS = 1 << 48, 1 << 12  # that a file may ask for
_FEWEST_CHARS = 4  # of a text that tokens cannot give back, down to which it is divided
_UNLIKE_WEIGHTS = {"init_from", "dropout", "lora"}  # of the model's settings
_HINT = "decompress it where it was compressed, or with the same versions"

Progress = Callable[[int, int], None]
Grid = npt.NDArray[np.int64]


@dataclass
class Packed:
    """A compressed file."""

    model: str  # a sha256 of what predicts
    content: str  # a sha256 of the content
    n_bytes: int  # of the content
    n_tokens: int
    n_streams: int
    context: int
    stride: int
    n_threads: int
    checkpoint: str  # where the model was, for messages; so is `machine`
    machine: str
    sums: list[int]  # a checksum of the frequencies used, for each window
    aside: bytes  # what the tokens cannot give back, with its places, deflated
    payload: bytes  # what the coder wrote

    def to_bytes(self) -> bytes:
        """Return the file: what it is, two parts with their lengths, the payload, a checksum."""
        head = {key: value for key, value in vars(self).items() if not isinstance(value, bytes)}
        parts = (zlib.compress(json.dumps(head).encode(), 9), self.aside)
        framed = (len(part).to_bytes(8, "little") + part for part in parts)
        data = b"".join((_MAGIC, *framed, self.payload))
        return data + zlib.crc32(data).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the parts of a file.

        Raises:
            DataError: It is damaged, or not a compressed file of this version.
        """
        if not data.startswith(_MAGIC):
            raise DataError("not a file of gpt compress, or of another version of it")
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise DataError("damaged: its content does not match its checksum")
        parts, at = list[bytes](), len(_MAGIC)
        for _ in range(2):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            parts.append(data[at + 8 : end])
            at = end
        try:
            head = json.loads(zlib.decompress(parts[0]))
            packed = cls(**head, aside=parts[1], payload=data[at:-4])
            n, counts = packed.n_tokens, (packed.n_streams, packed.stride, packed.n_threads)
            is_possible = {*map(type, (n, packed.context, *counts, *packed.sums))} == {int}
            is_possible &= min(counts) > 0 <= n < _MOST_TOKENS and counts[0] <= max(1, n)
            is_possible &= packed.stride <= packed.context and counts[-1] <= _MOST_THREADS
        except (TypeError, ValueError, zlib.error):
            is_possible = False
        if not is_possible:
            raise DataError("damaged: what it says of itself cannot be")
        return packed

    @property
    def length(self) -> int:
        """Tokens of a stream; the last streams may have fewer."""
        return -(-self.n_tokens // self.n_streams)


def compress(
    content: bytes,
    trained: TrainedModel,
    *,
    stride: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Packed:
    """Compress any bytes.

    Args:
        content: The bytes.
        trained: A model on the CPU.
        stride: Tokens that a window adds, as `gpt eval` has it; the context if None.
        on_progress: Called with (tokens done, tokens in all).

    Raises:
        ConfigError: The stride is longer than the context.
    """
    context = trained.model.config.block_size
    if (stride or context) > context:
        raise ConfigError(f"stride: {stride} would skip tokens; the context is {context}")
    tokens, aside = _split(content, trained)
    if _joined(trained.tokenizer.decode_bytes(tokens.tolist()), aside) != content:
        tokens, aside = tokens[:0], _set_aside([0, len(content)], [content])
    packed = Packed(
        _fingerprint(trained), hashlib.sha256(content).hexdigest(), len(content), len(tokens),
        _n_streams(len(tokens), trained.model), context, stride or context,
        torch.get_num_threads(), f"{'/'.join(trained.path.parts[-2:])} (step {trained.step:,})",
        machine(), [], aside, b"",
    )  # fmt: skip
    grid = np.zeros((packed.n_streams, packed.length), np.int64)
    grid.reshape(-1)[: len(tokens)] = tokens
    encoder = Encoder()

    def write(table: Grid, rows: int, position: int) -> Grid:
        tokens = grid[:rows, position]
        every = np.arange(rows)
        starts = table[every, tokens]
        found = np.stack((starts, table[every, tokens + 1] - starts, table[:rows, -1]), axis=1)
        for start, frequency, total in found.tolist():
            encoder.encode(start, frequency, total)
        return found

    _advance(trained.model, packed, grid, write, packed.sums.append, on_progress)
    packed.payload = encoder.finish()
    return packed


def decompress(
    packed: Packed, trained: TrainedModel, on_progress: Progress = lambda done, total: None
) -> bytes:
    """Return the content of a compressed file.

    Raises:
        CheckpointError: It belongs to another model.
        DataError: The model computes other frequencies here than where it was compressed.
    """
    if packed.model != _fingerprint(trained):
        hint = f"name that checkpoint with --checkpoint: {packed.checkpoint}"
        raise CheckpointError(f"compressed with another model than {trained.path}", hint)
    if packed.context != trained.model.config.block_size:
        raise DataError("damaged: its context is not that of its model")
    grid = np.zeros((packed.n_streams, packed.length), np.int64)
    sums = iter(enumerate(packed.sums, 1))
    decoder = Decoder(packed.payload)

    def read(table: Grid, rows: int, position: int) -> Grid:
        found = np.empty((rows, 3), np.int64)
        for row, total in enumerate(table[:rows, -1].tolist()):
            token = int(table[row].searchsorted(decoder.target(total), "right")) - 1
            start, end = table[row, token : token + 2].tolist()
            decoder.decode(start, end - start)
            grid[row, position] = token
            found[row] = start, end - start, total
        return found

    def check(checksum: int) -> None:
        number, expected = next(sums, (len(packed.sums) + 1, None))
        if checksum != expected:
            raise DataError(
                f"part {number} of {len(packed.sums)} decodes differently here ({machine()})"
                f" than where it was compressed ({packed.machine}); nothing was written", _HINT
            )  # fmt: skip

    _advance(trained.model, packed, grid, read, check, on_progress)
    tokens = grid.reshape(-1)[: packed.n_tokens].tolist()
    try:
        content = _joined(trained.tokenizer.decode_bytes(tokens), packed.aside)
    except (ValueError, struct.error, zlib.error) as error:
        raise DataError("damaged: what was kept aside does not fit the rest") from error
    if hashlib.sha256(content).hexdigest() != packed.content:
        raise DataError(
            "what it decodes to does not match its checksum; nothing was written", _HINT
        )
    return content


@torch.inference_mode()
@restored_threads()
def _advance(
    model: GPT,
    packed: Packed,
    grid: Grid,
    code: Callable[[Grid, int, int], Grid],
    close: Callable[[int], None],
    on_progress: Progress,
) -> None:
    """Code all tokens of a grid (streams, tokens), a column at a time.

    Args:
        code: From cumulative frequencies (S, V + 1), the rows that have a token, and the column, to
            each token's start, frequency and total, (rows, 3); a decoder fills in the column.
        close: Called after each window with the checksum of what `code` returned.
    """
    # Set when compressing too: until it is set for the first time, a library under torch may choose
    # to use fewer threads than it says.
    torch.set_num_threads(packed.n_threads)
    n_streams, length = grid.shape
    checksum = n_done = 0

    def column(table: Grid, position: int) -> None:
        nonlocal checksum, n_done
        rows = min(n_streams, -(-(packed.n_tokens - position) // length))  # the last may be shorter
        checksum = zlib.crc32(code(table, rows, position).tobytes(), checksum)
        n_done += rows
        on_progress(n_done, packed.n_tokens)

    if length:
        column(np.broadcast_to(np.arange(model.n_tokens + 1), (n_streams, model.n_tokens + 1)), 0)
    for start, first, last in _windows(packed):
        cache, begin = KVCache(packed.context), start
        for position in range(first, last + 1):
            seen = torch.from_numpy(grid[:, begin:position])
            column(_cumulative(model.next_logits(seen, cache)), position)
            begin = position
        close(checksum)
        checksum = 0


def _windows(packed: Packed) -> Iterator[tuple[int, int, int]]:
    """Yield where each window of a stream starts, and the first and last token that it codes."""
    shape = (packed.length, packed.context, packed.stride)
    window = windows(*shape)
    for index in range(scoring_windows(*shape)[1] if packed.length > 1 else 0):
        w = window(index)
        yield w.start, w.start + w.length - w.n_scored + 1, w.start + w.length


def _cumulative(logits: Tensor) -> Grid:
    """Return sums of integer frequencies, (S, V + 1), from logits (S, V)."""
    if not bool(logits.isfinite().all()):
        raise CheckpointError("the model's output is not finite")
    table = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.int64)
    frequencies = (logits.double().softmax(-1) * _SCALE).long().add_(1)  # no token is impossible
    torch.cumsum(frequencies, -1, out=table[:, 1:])
    return table.numpy()


def _n_streams(n_tokens: int, model: GPT) -> int:
    shape = model.config
    width = (shape.n_kv_head or shape.n_head) * shape.head_size
    most = _CACHE_BYTES // (2 * 4 * shape.n_layer * width * shape.block_size)
    return max(1, min(_MOST_STREAMS, most, n_tokens // _TOKENS_PER_STREAM))


def _split(content: bytes, trained: TrainedModel) -> tuple[Ids, bytes]:
    """Return the tokens of what is text, and the rest with its places."""
    tokenizer, tokens, gap = trained.tokenizer, list[Ids](), 0
    places, others = list[int](), list[bytes]()
    for piece in _pieces(content, tokenizer, trained.model.n_tokens):
        if isinstance(piece, bytes):
            places += gap, len(piece)
            others.append(piece)
            gap = 0
        else:
            tokens.append(piece)
            gap += len(tokenizer.decode_bytes(piece.tolist()))
    ids = np.concatenate(tokens) if tokens else np.zeros(0, np.uint32)
    return ids, _set_aside(places, others) if others else b""


def _set_aside(places: list[int], others: list[bytes]) -> bytes:
    """Return bytes with their places: for each, the bytes of text before it, and its length."""
    table = struct.pack(f"<Q{len(places)}Q", len(places), *places)
    return zlib.compress(table + b"".join(others), 9)


def _pieces(content: bytes, tokenizer: Tokenizer, n_tokens: int) -> Iterator[Ids | bytes]:
    for number, text in enumerate(_NOT_TEXT.split(content.decode("utf-8", "surrogateescape"))):
        if number % 2:
            yield text.encode("utf-8", "surrogateescape")
            continue
        waiting = list(in_pieces(text, tokenizer.safe_cut))[::-1] if text else []
        while waiting:
            part = waiting.pop()
            if (ids := _exact_tokens(part, tokenizer, n_tokens)) is not None:
                yield ids
            elif len(part) <= _FEWEST_CHARS:
                yield part.encode()
            else:
                waiting += part[len(part) // 2 :], part[: len(part) // 2]


def _exact_tokens(text: str, tokenizer: Tokenizer, n_tokens: int) -> Ids | None:
    """Return tokens that the model has and that give `text` back; None if there are none."""
    try:
        ids = tokenizer.encode(text)
    except DataError:
        return None
    is_known = int(ids.max(initial=0)) < n_tokens
    return ids if is_known and tokenizer.decode_bytes(ids.tolist()) == text.encode() else None


def _joined(text: bytes, aside: bytes) -> bytes:
    """Put what was kept aside back into its places."""
    if not aside:
        return text
    rest = zlib.decompress(aside)
    [n] = struct.unpack_from("<Q", rest)
    places = struct.unpack_from(f"<{n}Q", rest, 8)
    pieces, at, start = list[bytes](), 0, 8 * (n + 1)
    for gap, length in zip(places[::2], places[1::2], strict=True):
        pieces += text[at : at + gap], rest[start : start + length]
        at, start = at + gap, start + length
    return b"".join((*pieces, text[at:]))


def _fingerprint(trained: TrainedModel) -> str:
    """Return a sha256 over what decides the predictions: weights, architecture, vocabulary."""
    shape = trained.model.config.model_dump(exclude_defaults=True, exclude=_UNLIKE_WEIGHTS)
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    digest.update(trained.tokenizer.fingerprint.encode())
    for name, weight in sorted(trained.model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def machine() -> str:
    """Return what the last bits of a float depend on, as far as it can be known."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {platform.machine()}"
