"""A model that says what a test wants: each token has one that follows it, whatever came before."""

from pathlib import Path
from typing import Any

import torch

from gptcli.checkpoint import Checkpoint, save_checkpoint
from gptcli.config import Config
from gptcli.config.model import ModelConfig
from gptcli.model import GPT
from gptcli.tokenizers import ByteTokenizer, with_chat_tokens

BYTES = with_chat_tokens(ByteTokenizer())
END_OF_TEXT, START, END = 256, 257, 258


def parrot(says: str | list[int], then: int = END, block_size: int = 64, name: str = "x") -> Path:
    """Write a run whose model answers everything with `says`, no byte of it twice, then `then`."""
    said = list(says.encode()) if isinstance(says, str) else says
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=260, block_size=block_size, vocab_size=259,
                        bias=False, tie_embeddings=False)  # fmt: skip
    network = GPT(shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.get_parameter("ln_f.weight").fill_(1)
        network.wte.weight.copy_(torch.eye(259, 260))
        for token, following in zip([10, *said], [*said, then], strict=True):
            network.lm_head.weight[following, token] = 9.0
    config = Config(model=shape).model_dump(mode="json")
    config["generate"] |= {"max_new_tokens": 32, "temperature": 0.0}
    path = Path("runs", name, "best.pt")
    path.parent.mkdir(parents=True)
    (path.parent / "run.json").write_text("{}")
    model = {name: parameter.detach() for name, parameter in network.named_parameters()}
    state: dict[str, Any] = {"step": 7, "origin": {}}
    save_checkpoint(path, Checkpoint(model, {}, config, BYTES.definition(), {}, state))
    return path
