"""The arithmetic of one step: forward, loss, backward and SGD with the mask held."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast.config import DataConfig, TrainConfig
from dop_fast.images import normalise
from dop_fast.masks import MaskSet
from dop_fast.precision import autocast, training_type
from dop_fast.training.masking import MaskedSGD

COMPILED = {"on": "default", "graphs": "reduce-overhead"}  # torch.compile's names


class Step:
    """Steps a model, in place, on its device; `optimizer` and `scaler` are its state.

    `forward` is what runs: the model, or a faster function of the same parameters.
    """

    def __init__(
        self, model: nn.Module, data: DataConfig, config: TrainConfig, masks: MaskSet | None
    ) -> None:
        self.data, self.smoothing = data, config.label_smoothing
        self.device = next(model.parameters()).device
        self.dtype = training_type(self.device, config.amp)
        self.forward: Callable[[Tensor], Tensor] = model
        if config.compile != "off":
            self.forward = torch.compile(model, mode=COMPILED[config.compile])
        self.optimizer = MaskedSGD(
            model,
            masks,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        # only float16 is so narrow that small gradients vanish
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __call__(self, pixels: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Learn from uint8[k s s 3] and int64[k]; return the mean loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.dtype):
            logits = self.forward(normalise(pixels, self.data.mean, self.data.std))
        loss = cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()
