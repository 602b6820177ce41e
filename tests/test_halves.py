"""A network cut at its bottleneck, and convolutions that add and clip: nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from dop_fast import models
from dop_fast.concepts import fusing
from dop_fast.concepts.activations import Probe
from dop_fast.concepts.fusing import Fused
from dop_fast.concepts.halves import split

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not fusing.available(), reason="a torch without oneDNN")


def batch(count: int = 3, side: int = 32) -> Tensor:
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "layer3"), ("resnet18", "layer2.0.relu"), ("googlenet", "inception4c")],
)
def test_the_two_halves_make_the_whole(name: str, layer: str) -> None:
    model, x = models.build(name, 10, 0).eval(), batch(side=64)
    halves = split(model, layer)
    assert halves is not None
    with torch.no_grad():
        assert torch.equal(halves[1](halves[0](x)), model(x))


class Steps(nn.Module):
    """Counts how often the part behind its layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.runs = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), 0
        self.head.register_forward_hook(self._count)

    def _count(self, *call: object) -> None:
        self.runs += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=(2, 3)))


def test_activations_run_nothing_behind_the_layer() -> None:
    probe = Probe(Steps(), "layer", CPU, "off")
    list(probe.activations([batch(), batch()]))
    assert probe._model.runs == 0
    probe.gradients([batch()], 0, "logit")
    assert probe._model.runs == 1


class Around(Steps):
    """Its logits depend on more than its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=(2, 3))) + x.mean()


class Twice(Steps):
    """Its layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)).mean(dim=(2, 3)))


def test_a_path_around_the_layer_keeps_the_network_whole() -> None:
    model = Around()
    assert split(model, "layer") is None
    probe = Probe(model, "layer", CPU, "off")
    (found,) = probe.activations([batch()])
    assert torch.allclose(found, model.layer(batch()), atol=1e-6)
    gradient = probe.gradients([batch()], 1, "logit")
    by_hand = (model.head.weight[1] / 900)[:, None, None].expand(3, 4, 30, 30)
    assert torch.allclose(gradient, by_hand)


def test_a_layer_that_is_called_twice_counts_at_its_last_call() -> None:
    model = Twice()
    (found,) = Probe(model, "layer", CPU, "off").activations([batch()])
    assert torch.allclose(found, model.layer(model.layer(batch())), atol=1e-6)


def fused(probe: Probe) -> list[Fused]:
    assert probe._halves is not None
    return [module for module in probe._halves[0].modules() if isinstance(module, Fused)]


@needs_onednn
@pytest.mark.parametrize(
    ("name", "layer", "count"),
    [("resnet18", "layer4", 15), ("resnet50", "layer2", 22), ("mobilenet_v2", "features", 0)],
)
def test_fused_convolutions_are_as_near_to_float32_as_plain_ones(
    name: str, layer: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = models.build(name, 10, 0).eval(), batch(5, 64)
    ours = Probe(model, layer, CPU, "bf16")
    assert len(fused(ours)) == count
    monkeypatch.setattr(fusing, "available", lambda: False)
    plain = Probe(model, layer, CPU, "bf16")
    assert not fused(plain)
    (exact,) = Probe(model, layer, CPU, "off").activations([x])
    errors = []
    for probe in (ours, plain):
        (found,) = probe.activations([x])
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous(memory_format=torch.channels_last)
        errors.append(((found.float() - exact).norm() / exact.norm()).item())
    assert errors[0] < 1.1 * errors[1] < 0.05


class Sums(nn.Module):
    """Ways of adding to a convolution; only some leave its fused form possible."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.two(x)
        if self.kind == "used later":
            y = torch.relu(y + x) + x
        elif self.kind == "broadcast":
            y = torch.relu(self.two(y) + self.last(x.mean(dim=(2, 3), keepdim=True)))
        elif self.kind == "to itself":
            y = torch.relu(y + y)
        elif self.kind == "its input":
            y = torch.relu(x + y)
        else:
            y = torch.relu(x + self.three(x.sin()))
        return self.head(self.last(y).mean(dim=(2, 3)))


@needs_onednn
@pytest.mark.parametrize(
    ("kind", "count"),
    [("plain", 1), ("used later", 0), ("broadcast", 0), ("to itself", 0), ("its input", 0)],
)
def test_what_is_added_keeps_its_value_where_it_is_needed(kind: str, count: int) -> None:
    model = Sums(kind).eval()
    probe = Probe(model, "last", CPU, "bf16")
    assert len(fused(probe)) == count
    (exact,) = Probe(model, "last", CPU, "off").activations([batch()])
    for _ in range(2):
        (found,) = probe.activations([batch()])
        assert (found.float() - exact).norm() < 0.02 * exact.norm()


@needs_onednn
def test_what_is_added_may_be_spread_over_the_map() -> None:
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1).bfloat16()
    x = batch(2).bfloat16()
    for shape in ((2, 8, 16, 16), (2, 8, 1, 1), (1, 8, 16, 16)):
        other = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = torch.relu(convolution(x).float() + other.float())
            found = Fused(convolution)(x, other.clone(memory_format=torch.preserve_format))
        assert torch.allclose(found.float(), expected, rtol=0.02, atol=0.02)
