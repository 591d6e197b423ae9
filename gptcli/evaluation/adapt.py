"""Score-first adaptation: a model that learns from a text, each part of it only once it is scored.

Compressors learn while they read, a model does not; with this it does (dynamic evaluation, Krause
et al. 2018). The model that was given stays as it is.
"""

import copy

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gptcli.device import Runtime
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

# For a small model in the middle of its training: 3 times as much is too high for it, and SGD gains
# two thirds as much. A model that was trained for long takes less.
LR = 1e-3
_BETA1, _BETA2 = 0.9, 0.99  # of Adam
_MAX_NORM = 1.0  # of the gradient of a part's mean loss


class Learner:
    """A copy of a model that takes a step of Adam (Kingma and Ba 2015) on each part of a text."""

    def __init__(self, model: GPT, compute: Runtime, lr: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self._compute, self._lr = compute, lr
        self._parameters: list[Tensor] = list(self.model.parameters())
        self._steps = [torch.zeros((), device=p.device) for p in self._parameters]
        self._means = [torch.zeros_like(p) for p in self._parameters]
        self._squares = [torch.zeros_like(p) for p in self._parameters]

    def learn(self, tokens: Tensor, targets: Tensor) -> None:
        """Take a step on the targets (B, T) that are scored."""
        device = self._compute.device
        with self._compute.autocast():
            loss = self.model(tokens.to(device), targets.to(device)).loss
        (loss / int((targets != IGNORED).sum())).backward()
        nn.utils.clip_grad_norm_(self._parameters, _MAX_NORM)
        with torch.no_grad():
            gradients = [p.grad for p in self._parameters if p.grad is not None]  # all have one
            adamw(
                self._parameters, gradients, self._means, self._squares, [], self._steps,
                fused=True, amsgrad=False, beta1=_BETA1, beta2=_BETA2, lr=self._lr,
                weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
        self.model.zero_grad()
