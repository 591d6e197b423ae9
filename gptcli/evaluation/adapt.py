"""Score-first adaptation: a model that learns from a text, each part of it only once it is scored.

Compressors learn while they read, a model does not; with this it does (dynamic evaluation, Krause
et al. 2018). The model that was given stays as it is.
"""

import copy

import torch
from torch import Tensor, nn

from gptcli.device import Runtime
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

# For a small model in the middle of its training: 3 times as much is too high for it. A model that
# was trained for long takes less.
LR = 3e-4
_TABLES = 100  # times the rate: of a row that is looked up once in hundreds of steps
_DECAY = 0.99  # of the mean squares
_LOOKED_UP = ("wte", "bigram", "value_embeds")
_MAX_NORM = 1.0  # of the gradient of a part's mean loss


class Learner:
    """A copy of a model that takes a step of Adam without momentum on each part of a text."""

    def __init__(self, model: GPT, compute: Runtime, lr: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self._compute = compute
        parameters = dict(self.model.named_parameters())  # a tied table is the head's, too
        tables = {name for name in parameters if name.split(".")[0] in _LOOKED_UP}
        if self.model.config.tie_embeddings:
            tables.discard("wte.weight")
        rest = parameters.keys() - tables
        groups = [
            {"params": [parameters[name] for name in sorted(names)], "lr": lr * factor}
            for names, factor in ((tables, _TABLES), (rest, 1))
        ]
        self._adam = torch.optim.AdamW(groups, betas=(0.0, _DECAY), weight_decay=0.0, fused=True)

    def learn(self, tokens: Tensor, targets: Tensor) -> None:
        """Take a step on the targets (B, T) that are scored."""
        device = self._compute.device
        with self._compute.autocast():
            loss = self.model(tokens.to(device), targets.to(device)).loss
        (loss / int((targets != IGNORED).sum())).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_NORM)
        self._adam.step()
        self.model.zero_grad()
