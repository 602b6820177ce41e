"""Pixels through the teacher: activations at the bottleneck, and gradients of a class there."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dop_fast.config import DataConfig
from dop_fast.errors import ModelError
from dop_fast.images import normalise
from dop_fast.models import get_layer
from dop_fast.types import Array, Segments


def compose(
    sources: Array, segments: Segments, index: Array, size: int, fill: int
) -> NDArray[np.uint8]:
    """Return the segments at `index` int[k] as the network sees them, uint8[k size size 3].

    Each tight box of `sources` uint8[n h w 3] (`segments.image` indexes them) is stretched to the
    whole input, bicubic, with `fill` where the box is not the segment, as in ACE.
    """
    pixels = np.empty((len(index), size, size, 3), np.uint8)
    for view, i in zip(pixels, index, strict=True):
        top, left, bottom, right = segments.box[i]
        crop = sources[segments.image[i], top:bottom, left:right].copy()
        crop[~segments.mask(i)] = fill
        cv2.resize(crop, (size, size), dst=view, interpolation=cv2.INTER_CUBIC)
    return pixels


def pool(activation: Tensor) -> Tensor:
    """Return one vector per image: the mean over space [n c h w] or tokens [n t c], or itself."""
    if activation.dim() == 4:
        return activation.mean(dim=(2, 3))
    return activation.mean(dim=1) if activation.dim() == 3 else activation


class Probe:
    """A teacher seen at its bottleneck layer l.

    Works on a copy in eval mode and channels-last on `device`; the teacher stays as it is. All
    methods take pixels uint8[k h w 3], batch by batch, and return tensors on the device. A layer
    that is called more than once counts at its last call.
    """

    def __init__(
        self, teacher: nn.Module, layer: str, data: DataConfig, device: torch.device
    ) -> None:
        get_layer(teacher, layer)  # refuses an unknown name before the copy
        self.layer, self.data, self.device = layer, data, device
        model = copy.deepcopy(teacher).eval().requires_grad_(False).to(device)
        self._model = model.to(memory_format=torch.channels_last)

    def pooled(self, batches: Iterable[Array]) -> Tensor:
        """Return pooled activations float32[n c]."""
        return self._forward(batches, pooled=True)

    def maps(self, batches: Iterable[Array]) -> Tensor:
        """Return whole activations, flattened, float32[n d]."""
        return self._forward(batches, pooled=False)

    @torch.inference_mode()
    def _forward(self, batches: Iterable[Array], pooled: bool) -> Tensor:
        found = []
        with self._hooked(keep_gradient=False) as seen:
            for pixels in batches:
                self._model(self._enter(pixels))
                found.append(pool(seen[-1]) if pooled else seen[-1].flatten(1))
                seen.clear()
        return torch.cat(found)

    def gradients(self, batches: Iterable[Array], class_id: int, kind: str) -> Tensor:
        """Return d h_k / d l of Eq. 5, flattened, float32[n d], for k = `class_id`.

        h_k is log p(k), or with `kind` "logit" the logit. Behind a linear head the logit's
        gradient is the same for all images, so that its TCAV scores are 0 or 1.
        """
        found = []
        with self._hooked(keep_gradient=True) as seen:
            for pixels in batches:
                logits = self._model(self._enter(pixels))
                h = logits if kind == "logit" else logits.log_softmax(dim=1)
                (gradient,) = torch.autograd.grad(h[:, class_id].sum(), seen[-1])
                found.append(gradient.flatten(1))
                seen.clear()
        return torch.cat(found)

    def _enter(self, pixels: Array) -> Tensor:
        on_device = torch.from_numpy(pixels).to(self.device)
        return normalise(on_device, self.data.mean, self.data.std)

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
