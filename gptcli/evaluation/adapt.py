"""Score-first adaptation: a model that learns from a text, each part of it only once it is scored.

Compressors learn while they read, a model does not; with this it does (dynamic evaluation, Krause
et al. 2018). The model that was given stays as it is.
"""

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gptcli.device import Runtime
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

# For a small model in the middle of its training: 2 was too high for it, 0.3 almost as good.
LR = 0.5
_MAX_NORM = 1.0  # of the gradient of a part's mean loss


class Learner:
    """A copy of a model that takes a step of gradient descent on each part of a text.

    Attributes:
        model: The copy.
    """

    def __init__(self, model: GPT, compute: Runtime, lr: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self._compute, self._lr = compute, lr
        self._parameters = list(self.model.parameters())

    def learn(self, raw: npt.NDArray[np.int64], scored: npt.NDArray[np.bool_]) -> None:
        """Take a step on rows of tokens (B, T + 1), whose targets (B, T) count where scored."""
        if not self._lr:
            return
        rows, device = torch.from_numpy(raw), self._compute.device
        targets = rows[:, 1:].masked_fill(torch.from_numpy(~scored), IGNORED)
        with self._compute.autocast():
            loss = self.model(rows[:, :-1].to(device), targets.to(device)).loss
        (loss / int(scored.sum())).backward()
        nn.utils.clip_grad_norm_(self._parameters, _MAX_NORM)
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=self._lr)
                    parameter.grad = None
