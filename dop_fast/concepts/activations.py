"""Batches through the teacher: activations at the bottleneck, and gradients of a class there."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor, nn

from dop_fast import threads
from dop_fast.concepts import fusing
from dop_fast.concepts.folding import fold
from dop_fast.concepts.halves import cast, split
from dop_fast.errors import ModelError
from dop_fast.models import get_layer, twin
from dop_fast.precision import autocast, in_bf16


def pool(activation: Tensor) -> Tensor:
    """Return one vector per image: the mean over space [n c h w] or tokens [n t c], or itself.

    In float32.
    """
    activation = activation.float()
    if activation.dim() == 4:
        return activation.mean(dim=(2, 3))
    return activation.mean(dim=1) if activation.dim() == 3 else activation


class Probe:
    """A teacher seen at its bottleneck layer l.

    Works on a copy in eval mode on `device`, channels-last, batch norms folded into convolutions;
    the teacher stays as it is. Where `torch.fx` can follow it, nothing behind the layer is run for
    activations. All methods take batches [k 3 h w], normalised, on the device. A layer that is
    called more than once counts at its last call. `amp` is as in `ExtractConfig`.
    """

    def __init__(self, teacher: nn.Module, layer: str, device: torch.device, amp: str) -> None:
        get_layer(teacher, layer)  # refuses an unknown name before the copy
        self.layer, self.device, self.amp = layer, device, amp
        model = copy.deepcopy(teacher).eval().requires_grad_(False)
        fold(model, layer)
        self._model = model.to(device).to(memory_format=torch.channels_last)
        self._own = local()
        self._own.model = self._model  # this thread's
        self._halves = split(self._model, layer)
        if self._halves and self.dtype == torch.bfloat16:
            trunk, head = cast(self._halves[0]), self._halves[1]
            if device.type == "cpu" and fusing.available():
                fusing.fuse(trunk)
            self._halves = trunk, head

    @property
    def dtype(self) -> torch.dtype:
        """The type that batches are best made in."""
        return torch.bfloat16 if in_bf16(self.device, self.amp) else torch.float32

    def activations(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the layer's output for each batch, [k c h w], [k tokens c] or [k c].

        Float32, or bfloat16 where the layer computes in it. Asks for `ahead` batches before it is
        done with the first of them: on a CPU one for each thread that `threads` says, and another.
        """
        turns = map if self.ahead == 1 else threads.spread
        yield from turns(self._activation, batches)

    @property
    def ahead(self) -> int:
        """How many batches are in use at once."""
        several = self.device.type == "cpu" and threads.width() > 1
        return threads.width() + 1 if several else 1

    @torch.inference_mode()
    def _activation(self, batch: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            if self._halves:
                return self._checked(self._halves[0](batch))
            if not hasattr(self._own, "model"):
                self._own.model = twin(self._model)
            with self._hooked(self._own.model, keep_gradient=False) as seen:
                self._own.model(batch)
                return seen[-1]

    def gradients(self, batches: Iterable[Tensor], class_id: int, kind: str) -> Tensor:
        """Return d h_k / d l of Eq. 5, float32 shaped as the layer's output, for k = `class_id`.

        h_k is log p(k), or with `kind` "logit" the logit. Behind a linear head the logit's
        gradient is the same for all images, so that its TCAV scores are 0 or 1. The part behind
        the layer computes in float32.
        """
        found: list[Tensor] = []
        for activation, logits in self._logits(batches):
            h = logits if kind == "logit" else logits.log_softmax(dim=1)
            found += torch.autograd.grad(h[:, class_id].sum(), activation)
        return torch.cat(found)

    def _logits(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield activations, as leaves, and the logits that follow from them."""
        if self._halves:
            for given in self.activations(batches):
                activation = given.to(torch.float32, copy=True).requires_grad_()
                yield activation, self._halves[1](activation.clone())
            return
        with self._hooked(self._model, keep_gradient=True) as seen:
            for batch in batches:
                logits = self._model(batch.float())
                yield seen[-1], logits
                seen.clear()

    @contextmanager
    def _hooked(self, model: nn.Module, keep_gradient: bool) -> Iterator[list[Tensor]]:
        """Collect the layer's outputs; with `keep_gradient` as leaves that the rest depends on."""
        seen: list[Tensor] = []

        def look(module: nn.Module, inputs: object, output: object) -> Tensor:
            seen.append(self._checked(output).detach().requires_grad_(keep_gradient))
            return seen[-1].clone()  # what follows may work in place

        handle = get_layer(model, self.layer).register_forward_hook(look)
        try:
            yield seen
        finally:
            handle.remove()

    def _checked(self, output: object) -> Tensor:
        if not isinstance(output, Tensor) or not 2 <= output.dim() <= 4:
            kind = type(get_layer(self._model, self.layer)).__name__
            raise ModelError(
                f"layer {self.layer} ({kind}) gives no map, tokens or vector",
                "name another layer: dopfast extract --layer NAME",
            )
        return output
