"""The arithmetic of one step: forward, loss, backward and SGD with the mask held."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import ranks
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.errors import ModelError
from dop_fast.images import normalise
from dop_fast.masks import MaskSet
from dop_fast.precision import autocast, training_type
from dop_fast.training.masking import MaskedSGD

Forward: TypeAlias = Callable[[Tensor], Tensor]
COMPILED = {"on": "default", "graphs": "reduce-overhead"}  # torch.compile's names


class Step:
    """Steps a model, in place, on its device; `optimizer` and `scaler` are its state.

    `forward` is what runs: the model, or a faster function of the same parameters.
    """

    def __init__(
        self, model: nn.Module, data: DataConfig, config: TrainConfig, masks: MaskSet | None
    ) -> None:
        self.model, self.data, self.smoothing = model, data, config.label_smoothing
        self.device = next(model.parameters()).device
        self.dtype = training_type(self.device, config.amp)
        self.forward: Forward = ranks.parallel(model)
        if config.compile != "off":
            self.forward = _compiled(self.forward, COMPILED[config.compile])
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

    def __call__(self, pixels: Tensor, labels: Tensor, lr: float, weight: float = 1.0) -> Tensor:
        """Learn from uint8[k s s 3] and int64[k]; return the loss, on the device.

        It is the mean, times the `weight` that it has in the ranks' mean: 0 for one without images.
        """
        idle = not weight
        if idle:  # it goes along, and leaves no trace in batch norm
            pixels, labels = pixels.new_zeros(2, *pixels.shape[1:]), labels.new_zeros(2)
            self.model.eval()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.dtype):
            logits = self.forward(normalise(pixels, self.data.mean, self.data.std))
        loss = cross_entropy(logits.float(), labels, label_smoothing=self.smoothing) * weight
        self.optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if idle:
            self.model.train()
        return loss.detach()


def _compiled(forward: Forward, mode: str) -> Forward:
    from torch._dynamo.exc import BackendCompilerFailed  # heavy: for those who compile

    compiled = torch.compile(forward, mode=mode)

    def call(images: Tensor) -> Tensor:
        try:
            logits: Tensor = compiled(images)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().partition("\n")[0]
            raise ModelError(f"torch.compile fails: {reason}", "try --compile off") from error
        return logits

    return call
