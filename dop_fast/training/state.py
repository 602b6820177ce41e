"""What a training is after a step, as named tensors: to be stored, and to go on from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dop_fast.kernels import bits
from dop_fast.masks import MaskSet
from dop_fast.training.masking import check
from dop_fast.training.step import Step


@dataclass(frozen=True)
class State:
    """The parts that change while training, `average` where one is kept, and the mask.

    Order, augmentation and dropout follow from (seed, epoch, index): they have no state.
    """

    model: nn.Module
    step: Step
    average: AveragedModel | None
    masks: MaskSet | None

    def tensors(self) -> dict[str, Tensor]:
        """Return them as `model.<name>` and so on; `mask.<name>` is bits.

        Asserts that removed weights are zero in model, momentum and average.
        """
        momentum = self._momentum()
        average = self.average.state_dict() if self.average else {}
        check(self.masks, self.model.state_dict(), momentum, self.averaged())
        mask = self.masks.masks if self.masks else {}
        parts: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            "momentum": momentum,
            "scaler": {
                name: torch.tensor(value, dtype=torch.float64 if type(value) is float else None)
                for name, value in self.step.scaler.state_dict().items()
            },
            "average": average,
            "mask": {name: bits.pack(keep) for name, keep in mask.items()},
        }
        return {f"{part}.{name}": value for part, of in parts.items() for name, value in of.items()}

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged network's state; empty where none is kept."""
        return self.average.module.state_dict() if self.average else {}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring `tensors()` back, in place."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        self.model.load_state_dict(part("model."))
        self.step.scaler.load_state_dict({k: v.item() for k, v in part("scaler.").items()})
        if self.average:
            self.average.load_state_dict(part("average."))
        parameters = dict(self.model.named_parameters())
        for name, tensor in part("momentum.").items():
            parameter = parameters[name]
            # in the parameter's own memory layout, which a fused step needs
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            self.step.optimizer.state[parameter]["momentum_buffer"] = buffer

    def _momentum(self) -> dict[str, Tensor]:
        states = self.step.optimizer.state
        buffers = {
            name: states[parameter].get("momentum_buffer")
            for name, parameter in self.model.named_parameters()
            if parameter in states
        }
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}
