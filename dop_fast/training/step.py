"""The arithmetic of one step: forward, loss, backward and SGD with the mask held."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast.config import DataConfig, TrainConfig
from dop_fast.images import normalise
from dop_fast.masks import MaskSet
from dop_fast.precision import autocast
from dop_fast.training.masking import HeldMask


class Step:
    """Steps a model, in place, on its device; `optimizer` and `held` are its state."""

    def __init__(
        self, model: nn.Module, data: DataConfig, config: TrainConfig, masks: MaskSet | None
    ) -> None:
        self.model, self.data, self.amp = model, data, config.amp
        self.held = HeldMask(model, masks)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def __call__(self, pixels: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Learn from uint8[k s s 3] and int64[k]; return the mean loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(pixels.device, self.amp):
            logits = self.model(normalise(pixels, self.data.mean, self.data.std))
        loss = cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.held.mask_gradients()
        self.optimizer.step()
        return loss.detach()
