"""Models that chat, in other programs: the same ids for a conversation, and the same answers."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError
from gptcli.interop.export import export
from gptcli.interop.pretrained import open_pretrained
from gptcli.interop.weights import Pretrained, resize_vocab
from gptcli.tokenizers import (
    CHAT_TEMPLATE,
    ByteTokenizer,
    CharTokenizer,
    Message,
    Tokenizer,
    encode_conversation,
    with_chat_tokens,
)
from gptcli.tokenizers.bpe import gpt2, train_bpe
from support.chat import END, END_OF_TEXT, START, parrot
from support.draws import ids_drawn
from support.texts import HOSTILE as HOSTILE_ELSEWHERE

from .exports import HOSTILE, LLAMA, TEXT, loaded, trained

TEXTS = [text for text in (*HOSTILE, *HOSTILE_ELSEWHERE, TEXT) if "<|" not in text]
# One that spells a special token is read as the token there: it is rendered as text.


def chat_tokenizer(kind: str) -> Tokenizer:
    """Return a tokenizer with chat tokens."""
    match kind:
        case "gpt2":
            return with_chat_tokens(gpt2())
        case "bytes":
            return with_chat_tokens(ByteTokenizer())
        case "char":
            every = set("".join(TEXTS) + "system user assistant\nBe brief.")
            return with_chat_tokens(CharTokenizer("".join(sorted(every))))
    return with_chat_tokens(train_bpe([TEXT], 400))


def conversation(*contents: str) -> list[Message]:
    """Return a conversation of a user and an assistant."""
    roles = ("user", "assistant") * len(contents)
    return [Message(*pair) for pair in zip(roles, contents, strict=False)]  # type: ignore[arg-type]


def ids_of(tokenizer: Tokenizer, messages: list[Message], *, reply: bool) -> list[int]:
    """Return what training sees."""
    ids: list[int] = encode_conversation(tokenizer, messages, reply=reply)[0].tolist()
    return ids


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bytes", "char"])
def test_apply_chat_template_gives_the_ids_of_training(kind: str) -> None:
    ours = chat_tokenizer(kind)
    export(trained(ours, n_layer=1), "hf", Path("out"))
    theirs = AutoTokenizer.from_pretrained("out")
    every = [[Message("system", "Be brief."), *conversation(*TEXTS)]]
    every += [conversation(text, text, text) for text in TEXTS]
    for messages in every:
        rows = [message._asdict() for message in messages]
        for reply in (False, True):
            ids = theirs.apply_chat_template(rows, add_generation_prompt=reply, return_dict=False)
            assert ids == ids_of(ours, messages, reply=reply), messages


def test_the_end_of_a_turn_is_an_end_and_special_in_transformers() -> None:
    ours = chat_tokenizer("bpe")
    export(trained(ours, **LLAMA), "hf", Path("out"))
    theirs = AutoTokenizer.from_pretrained("out")
    assert ours.chat is not None
    assert theirs.eos_token == "<|im_end|>" and theirs.eos_token_id == ours.chat.end
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"]) == [
        ours.chat.start, ours.eot
    ]  # fmt: skip
    ids = ids_of(ours, conversation("the cat"), reply=True)
    assert theirs.decode(ids, skip_special_tokens=True) == "user\nthe cat\nassistant\n"
    settings = json.loads(Path("out/generation_config.json").read_text())
    assert settings["eos_token_id"] == [ours.eot, ours.chat.end]
    assert len(theirs) == ours.vocab_size
    card = Path("out/README.md").read_text()
    assert "ChatML" in card and "Every document begins" not in card


@pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])
def test_transformers_answers_as_we_do(shape: dict[str, Any]) -> None:
    made = trained(chat_tokenizer("bpe"), block_size=128, **shape)
    export(made, "hf", Path("out"))
    ids = ids_of(made.tokenizer, conversation("the cat sat"), reply=True)
    greedy = GenerateConfig(temperature=0, max_new_tokens=50)
    ours = ids_drawn(made.model, ids, greedy)
    network = loaded(Path("out"))
    network.generation_config.eos_token_id = None  # what follows an end is compared too
    theirs = network.generate(torch.tensor([ids]), do_sample=False, max_length=len(ids) + 50)
    assert len(ours) == 50 and theirs[0, len(ids) :].tolist() == ours


@pytest.mark.parametrize("end", [END, END_OF_TEXT])
def test_transformers_ends_an_answer_where_we_do(gpt: Any, end: int) -> None:
    parrot("Hey!", end)
    assert gpt("export", "--to", "hf", "out").code == 0
    theirs, network = AutoTokenizer.from_pretrained("out"), loaded(Path("out"))
    asked = [{"role": "user", "content": "Hello"}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    answer = network.generate(**ids)[0, ids["input_ids"].shape[1] :].tolist()
    assert answer == [*b"Hey!", end]
    assert theirs.decode(answer, skip_special_tokens=True) == "Hey!"
    asked = gpt("chat", "--checkpoint", "out", "Hello", "--temperature", "0")
    assert asked.code == 0 and asked.out == "Hey!\n", asked.err


def test_gguf_names_the_template_and_both_ends() -> None:
    made = trained(chat_tokenizer("bpe"))
    export(made, "gguf", Path("out.gguf"))
    fields = gguf.GGUFReader("out.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    chat = made.tokenizer.chat
    assert chat is not None
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert found["tokenizer.ggml.eos_token_id"] == made.tokenizer.eot
    assert found["tokenizer.ggml.eot_token_id"] == chat.end
    assert found["tokenizer.ggml.tokens"][-2:] == ["<|im_start|>", "<|im_end|>"]
    assert found["tokenizer.ggml.token_type"][-4:] == [1, 3, 3, 3], "special tokens are CONTROL"


def test_nanogpt_has_no_chat_tokens() -> None:
    with pytest.raises(ConfigError, match="nanoGPT's format does not hold this model"):
        export(trained(chat_tokenizer("gpt2"), mlp="gelu_erf"), "nanogpt", Path("ckpt.pt"))


def started(base: Tokenizer, rows: int | None = None) -> Pretrained:
    """Open a run of ours that was trained with a tokenizer."""
    trained(base, rows=rows)
    return open_pretrained("made.pt")


@pytest.mark.parametrize("rows", [None, 258, 259, 320])
def test_a_base_model_gets_rows_for_the_chat_tokens(rows: int | None) -> None:
    base = started(ByteTokenizer(), rows)
    chat = chat_tokenizer("bytes")
    base.require_tokenizer(chat)
    shape = base.shape_for(chat)
    assert shape.vocab_size == max(259, rows or 0)
    before = base.weights()["wte.weight"][:257]
    after = resize_vocab(base.weights(), shape, base.n_known)["wte.weight"]
    assert torch.equal(after[:257], before)
    assert torch.equal(after[257:], before.mean(0).expand(len(after) - 257, -1))


def test_chat_tokens_that_the_weights_have_are_theirs() -> None:
    chat = started(chat_tokenizer("bytes"))
    chat.require_tokenizer(chat_tokenizer("bytes"))
    assert chat.shape_for(chat_tokenizer("bytes")) == chat.model and chat.n_known == END + 1
    with pytest.raises(ConfigError, match="trained on other tokens") as caught:
        chat.require_tokenizer(chat_tokenizer("bpe"))
    assert caught.value.hint == "prepare the data with -s tokenizer.path=data/x"
    assert START == END - 1
