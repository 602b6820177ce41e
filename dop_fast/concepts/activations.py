"""Batches through the teacher: activations at the bottleneck, and gradients of a class there."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dop_fast.concepts.folding import fold
from dop_fast.errors import ModelError
from dop_fast.models import get_layer
from dop_fast.precision import autocast, in_bf16


def pool(activation: Tensor) -> Tensor:
    """Return one vector per image: the mean over space [n c h w] or tokens [n t c], or itself."""
    if activation.dim() == 4:
        return activation.mean(dim=(2, 3))
    return activation.mean(dim=1) if activation.dim() == 3 else activation


class Probe:
    """A teacher seen at its bottleneck layer l.

    Works on a copy in eval mode on `device`, channels-last, batch norms folded into convolutions;
    the teacher stays as it is. All methods take batches [k 3 h w], normalised, on the device, and
    return float32 there. A layer that is called more than once counts at its last call. `amp`, as
    in `ExtractConfig`, is for activations; gradients are those of float32.
    """

    def __init__(self, teacher: nn.Module, layer: str, device: torch.device, amp: str) -> None:
        get_layer(teacher, layer)  # refuses an unknown name before the copy
        self.layer, self.device, self.amp = layer, device, amp
        model = copy.deepcopy(teacher).eval().requires_grad_(False)
        fold(model, layer)
        self._model = model.to(device).to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """The type that batches are best made in."""
        return torch.bfloat16 if in_bf16(self.device, self.amp) else torch.float32

    @torch.inference_mode()
    def activations(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the layer's output for each batch, [k c h w], [k tokens c] or [k c]."""
        with self._hooked(keep_gradient=False) as seen:
            for batch in batches:
                with autocast(self.device, self.amp):
                    self._model(batch)
                yield seen.pop().float()
                seen.clear()

    def gradients(self, batches: Iterable[Tensor], class_id: int, kind: str) -> Tensor:
        """Return d h_k / d l of Eq. 5, shaped as the layer's output, for k = `class_id`.

        h_k is log p(k), or with `kind` "logit" the logit. Behind a linear head the logit's
        gradient is the same for all images, so that its TCAV scores are 0 or 1.
        """
        found = []
        with self._hooked(keep_gradient=True) as seen:
            for batch in batches:
                logits = self._model(batch.float())
                h = logits if kind == "logit" else logits.log_softmax(dim=1)
                (gradient,) = torch.autograd.grad(h[:, class_id].sum(), seen[-1])
                found.append(gradient)
                seen.clear()
        return torch.cat(found)

    @contextmanager
    def _hooked(self, keep_gradient: bool) -> Iterator[list[Tensor]]:
        """Collect the layer's outputs; with `keep_gradient` as leaves that the rest depends on."""
        seen: list[Tensor] = []

        def look(module: nn.Module, inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor) or not 2 <= output.dim() <= 4:
                raise ModelError(
                    f"layer {self.layer} ({type(module).__name__}) gives no map, tokens or vector",
                    "name another layer: dopfast extract --layer NAME",
                )
            seen.append(output.detach().requires_grad_(keep_gradient))
            return seen[-1].clone()  # what follows may work in place

        handle = get_layer(self._model, self.layer).register_forward_hook(look)
        try:
            yield seen
        finally:
            handle.remove()
