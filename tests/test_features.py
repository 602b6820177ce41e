"""What segments look like in the network: folding, maps kept or made again, regions of a map."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dop_fast import models
from dop_fast.concepts import features
from dop_fast.concepts.activations import Probe, pool
from dop_fast.concepts.features import Exact, Roi, cells
from dop_fast.concepts.segments import segment
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.errors import ModelError
from dop_fast.kernels.compose import Entry, reference
from dop_fast.types import Segments

SIDE = 32
CONFIG = ExtractConfig(batch_size=16, amp="off")
DATA = DataConfig(size=SIDE)
CPU = torch.device("cpu")


def trained(name: str) -> nn.Module:
    """Return a network whose batch norms have statistics and weights of their own."""
    model = models.build(name, 10, 0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5), (module.bias.data, -0.3, 0.3),
            ):  # fmt: skip
                values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return model.eval()


def batch(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def output_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return a layer's output without anything of ours."""
    seen: list[Tensor] = []
    handle = models.get_layer(model, layer).register_forward_hook(
        lambda module, inputs, output: seen.append(output.clone())
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def norms(probe: Probe) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in probe._model.modules())


@pytest.mark.parametrize(
    ("name", "layer", "left"),
    [
        ("resnet18", "layer4", 0), ("resnet20", "stages.2", 0), ("resnet18", "layer4.1.bn2", 0),
        ("resnet18", "layer4.1.conv2", 1), ("vgg11_bn", "features", 0),
        ("mobilenet_v2", "features", 0),
    ],
)  # fmt: skip
def test_folding_leaves_the_layer_as_it_is(name: str, layer: str, left: int) -> None:
    model = trained(name)
    layer = layer if layer in dict(model.named_modules()) else models.bottleneck(model, batch())
    probe = Probe(model, layer, CPU, "off")
    assert norms(probe) == left
    expected = output_of(model, layer, batch())
    (found,) = probe.activations([batch()])
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_gradients_are_those_of_the_teacher_in_float32_at_what_was_seen(amp: str) -> None:
    model, x = trained("resnet18"), batch()
    probe = Probe(model, "layer3", CPU, amp)
    found = probe.gradients([x], 4, "logprob")
    (seen,) = probe.activations([x]) if amp == "bf16" else (output_of(model, "layer3", x),)
    held = seen.float().clone().requires_grad_()
    logits = model.fc(model.avgpool(model.layer4(held)).flatten(1))
    (expected,) = torch.autograd.grad(logits.log_softmax(1)[:, 4].sum(), held)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_network_that_cannot_be_traced_is_not_folded() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.head((y if y.sum() > 0 else -y).mean(dim=(2, 3)))

    model = Choosy().eval()
    probe = Probe(model, "norm", CPU, "off")
    assert norms(probe) == 1
    (found,) = probe.activations([batch()])
    assert torch.allclose(found, output_of(model, "norm", batch()), atol=1e-6)


@pytest.fixture(scope="module")
def cut() -> tuple[np.ndarray, Segments]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return images, segment(images, CONFIG)


def teacher_probe(amp: str = "off") -> Probe:
    model = trained("resnet20")
    return Probe(model, models.bottleneck(model, batch()), CPU, amp)


def test_segments_are_seen_as_composed_one_by_one(cut: tuple[np.ndarray, Segments]) -> None:
    images, segments = cut
    model = trained("resnet20")
    layer = models.bottleneck(model, batch())
    seen = Exact(Probe(model, layer, CPU, "off"), DATA, CONFIG).segments(images, segments)
    index = np.array([5, 0, len(segments) - 1])
    entry = Entry(SIDE, CONFIG.fill, DATA.mean, DATA.std)
    pixels = torch.from_numpy(reference.compose(images, segments, index, entry))
    expected = output_of(model, layer, pixels.permute(0, 3, 1, 2))
    close = {"rtol": 2e-3, "atol": 2e-3 * expected.abs().max().item()}  # float16 has 11 bits
    assert torch.allclose(seen.rows(index), features.flat(expected), **close)
    assert torch.allclose(seen.pooled[index], pool(expected), **close)


def test_maps_too_large_to_keep_are_made_again(
    cut: tuple[np.ndarray, Segments], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, segments = cut
    probe, index = teacher_probe(), np.array([3, 20, 1])
    kept = Exact(probe, DATA, CONFIG).segments(images, segments)
    monkeypatch.setattr(features, "KEPT_BYTES", 1000)
    again = Exact(probe, DATA, CONFIG).segments(images, segments)
    assert torch.equal(kept.pooled, again.pooled)
    assert not torch.equal(kept.rows(index), again.rows(index))
    assert torch.allclose(kept.rows(index), again.rows(index), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_what_was_seen_before_is_not_what_is_seen_now(
    cut: tuple[np.ndarray, Segments], amp: str
) -> None:
    images, segments = cut
    exact, index = Exact(teacher_probe(amp), DATA, CONFIG), np.array([2, 11])
    first = exact.segments(images, segments)
    rows = first.rows(index).float()
    memory = exact._memory
    fewer = exact.segments(images[::-1].copy(), segments.select(np.arange(20)))
    assert exact._memory is memory  # used again
    assert not torch.allclose(fewer.rows(index).float(), rows, rtol=1e-2, atol=1e-2)
    assert torch.allclose(first.rows(index).float(), rows, rtol=1e-2, atol=1e-2)


def test_a_cpu_takes_large_images_in_small_batches() -> None:
    config = ExtractConfig(batch_size=100)
    sizes = [features.at_once(config, side, CPU) for side in (32, 224, 2000)]
    assert sizes == [100, 16, 1]
    assert features.at_once(config, 224, torch.device("cuda")) == 100


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (7, 5), (32, 32)])
def test_cells_are_the_shares_of_area_by_counting(
    cut: tuple[np.ndarray, Segments], grid: tuple[int, int]
) -> None:
    _, segments = cut
    found = cells(segments, grid).reshape(-1, *grid)
    assert np.allclose(found.sum(axis=(1, 2)), 1, atol=1e-5)
    for i in (0, 7, len(segments) - 1):
        whole = np.zeros(segments.canvas)
        top, left, bottom, right = segments.box[i]
        whole[top:bottom, left:right] = segments.mask(i)
        fine = whole.repeat(grid[0], axis=0).repeat(grid[1], axis=1)  # a cell is whole pixels
        counted = fine.reshape(grid[0], SIDE, grid[1], SIDE).sum(axis=(1, 3)) / fine.sum()
        assert np.allclose(found[i], counted, atol=1e-5)


def test_a_region_is_the_mean_of_the_map_under_its_mask(cut: tuple[np.ndarray, Segments]) -> None:
    images, segments = cut
    probe = teacher_probe()
    found = Roi(probe, DATA, CONFIG)
    seen = found.segments(images, segments)
    maps = found._maps(images)
    weights = torch.from_numpy(cells(segments, tuple(maps.shape[2:]))).reshape(-1, *maps.shape[2:])
    for i in (0, 9, len(segments) - 1):
        expected = (maps[segments.image[i]] * weights[i]).sum(dim=(1, 2))
        assert torch.allclose(seen.pooled[i], expected, atol=1e-5)
        assert torch.equal(seen.rows(np.array([i]))[0], seen.pooled[i])


def test_the_gradient_of_a_region_is_a_step_at_every_position() -> None:
    probe = teacher_probe()
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    whole = Exact(probe, DATA, CONFIG).gradients(images, 2)
    summed = Roi(probe, DATA, CONFIG).gradients(images, 2)
    assert torch.allclose(
        summed, whole.reshape(len(summed), -1, summed.shape[1]).sum(dim=1), atol=1e-6
    )


def test_regions_need_a_map() -> None:
    model = trained("resnet18")
    probe = Probe(model, "avgpool", CPU, "off")
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    assert Roi(probe, DATA, CONFIG).photos(images).shape == (2, 512)  # a map of one cell
    flat = Probe(model, "fc", CPU, "off")
    with pytest.raises(ModelError, match="no map"):
        Roi(flat, DATA, CONFIG).photos(images)


def test_bfloat16_is_near_float32(cut: tuple[np.ndarray, Segments]) -> None:
    images, segments = cut
    single = Exact(teacher_probe(), DATA, CONFIG).segments(images, segments).pooled
    half = Exact(teacher_probe("bf16"), DATA, CONFIG).segments(images, segments).pooled
    assert half.dtype == torch.float32
    assert not torch.equal(single, half)
    assert torch.corrcoef(torch.stack([single.flatten(), half.flatten()]))[0, 1] > 0.99
