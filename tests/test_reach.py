"""A weight is alive where its removal changes an output: found by removing each of them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from dop_fast import masks, models, reach
from dop_fast.errors import ModelError
from dop_fast.masks import MaskSet

IMAGE = (3, 6, 6)


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **how: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **how})


def residual(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.norm(net.first(x)))
    x = F.relu(net.two(F.relu(net.one(x))) + net.short(x))
    return net.head(x.mean((2, 3)))


def grouped(net: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu_(net.first(x)), 2, ceil_mode=True)
    x = net.depth(F.avg_pool2d(F.pad(x, (0, 1)), 3, 2, padding=1))
    return net.head(F.adaptive_max_pool2d(F.silu(x), 1).flatten(1))


def joined(net: Net, x: Tensor) -> Tensor:
    parts = net.first(x).chunk(2, 1)
    x = torch.cat([parts[1], F.gelu(net.up(parts[0]))[:, :, ::2, 1::2]], 1)
    return net.head(F.max_pool2d(x, 3, stride=2, padding=1, dilation=2).flatten(1))


def plain(net: Net, x: Tensor) -> Tensor:
    return net.head(net.two(net.one(x.flatten(1)).relu()).relu())


NETS = {
    "residual": lambda: Net(
        residual, first=conv(3, 3, stride=2), norm=nn.BatchNorm2d(3), one=conv(3, 3),
        two=conv(3, 4), short=conv(3, 4, 1), head=nn.Linear(4, 3),
    ),
    "grouped": lambda: Net(
        grouped, first=conv(3, 4, groups=1), depth=conv(4, 4, groups=2), head=nn.Linear(4, 2)
    ),
    "joined": lambda: Net(
        joined, first=conv(3, 4, 1), up=nn.ConvTranspose2d(2, 2, 2, stride=2),
        head=nn.Linear(16, 2),
    ),
    "plain": lambda: Net(
        plain, one=nn.Linear(108, 5), two=nn.Linear(5, 4), head=nn.Linear(4, 3)
    ),
}  # fmt: skip


def draw(model: nn.Module, density: float, seed: int) -> MaskSet:
    drawn = torch.Generator().manual_seed(seed)
    weights = models.prunable(model)
    return MaskSet({n: torch.rand(w.shape, generator=drawn) < density for n, w in weights.items()})


def by_removal(model: nn.Module, mask_set: MaskSet) -> dict[str, Tensor]:
    """Return which kept weights change an output of some image when they are removed.

    For some of many draws of the weights: one may lie in front of a ReLU that is off. Biases are
    zero: what they make of a network without input is no path.
    """
    drawn = torch.Generator().manual_seed(5)
    model = model.double().eval()
    images = torch.randn(30, *IMAGE, generator=drawn, dtype=torch.float64)
    alive = {name: torch.zeros_like(mask) for name, mask in mask_set.masks.items()}
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for _ in range(10):
            for name, value in weights.items():
                value.zero_() if name.endswith("bias") else value.normal_(generator=drawn)
            masks.apply_(model, mask_set)
            before = model(images)
            for name, mask in mask_set.masks.items():
                for place in map(tuple, (mask & ~alive[name]).nonzero()):
                    held = weights[name][place].clone()
                    weights[name][place] = 0
                    alive[name][place] = bool(((model(images) - before).abs() > 1e-12).any())
                    weights[name][place] = held
    return alive


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.15, 0.4])
@pytest.mark.parametrize("name", ["residual", "grouped", "joined"])
def test_the_weights_alive_are_those_whose_removal_changes_an_output(
    name: str, density: float, seed: int
) -> None:
    model = NETS[name]()
    mask_set = draw(model, density, seed)
    found = reach.follow(model, mask_set, IMAGE)
    expected = by_removal(model, mask_set)
    for layer, mask in expected.items():
        assert torch.equal(found.alive.masks[layer], mask), layer
    assert not found.guessed


@pytest.mark.parametrize("seed", range(10))
def test_the_weights_alive_of_a_perceptron_lie_on_a_path_of_its_graph(seed: int) -> None:
    model = NETS["plain"]()
    mask_set = draw(model, 0.03 if seed % 2 else 0.2, seed)
    one, two, head = mask_set.masks.values()
    on_paths = {
        edge
        for i in range(108) for j in range(5) for k in range(4) for o in range(3)
        if one[j, i] and two[k, j] and head[o, k]
        for edge in (("one", j, i), ("two", k, j), ("head", o, k))
    }  # fmt: skip
    found = reach.follow(model, mask_set, IMAGE)
    alive = {
        (name.removesuffix(".weight"), *place)
        for name, mask in found.alive.masks.items()
        for place in mask.nonzero().tolist()
    }
    assert alive == on_paths
    assert found.reached == len({edge[1] for edge in on_paths if edge[0] == "head"})
    assert found.collapsed == (not on_paths)


def test_taps_that_see_only_padding_are_on_no_path() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten())
    everything = MaskSet({"0.weight": torch.ones(1, 1, 3, 3, dtype=torch.bool)})
    assert reach.follow(model, everything, (1, 1, 1)).alive.masks["0.weight"].sum() == 1
    assert reach.follow(model, everything, (1, 2, 2)).alive.kept == 9


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "transformer"])
def test_of_an_unpruned_network_every_weight_is_alive(name: str) -> None:
    small = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    model = small if name == "transformer" else models.build(name, 5, 0)
    size = 64 if name == "mobilenet_v2" else 32
    found = reach.follow(model, draw(model, 2.0, 0), (3, size, size))
    assert found.alive.kept == found.alive.total
    assert (found.reached, found.outputs, found.dead, found.guessed) == (5, 5, (), ())


def test_a_deep_network_neither_under_nor_overflows() -> None:
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(120)))
    mask_set = draw(model, 0.5, 0)
    found = reach.follow(model, mask_set, (40,))
    assert found.reached == 40 and found.alive.kept == mask_set.kept


def test_a_gate_that_is_cut_does_not_stop_what_it_scales() -> None:
    def gated(net: Net, x: Tensor) -> Tensor:
        return net.head((x * torch.sigmoid(net.gate(x))).flatten(1))

    model = Net(gated, gate=conv(3, 3, 1), head=nn.Linear(108, 2))
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["gate.weight"].zero_()
    found = reach.follow(model, mask_set, IMAGE)
    assert found.dead == ("gate.weight",) and not found.collapsed
    assert found.alive.masks["head.weight"].all()


def test_attention_without_queries_still_passes_its_values() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x, x, x, need_weights=False)[0].mean(1)

    model = Attention()
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["mix.in_proj_weight"][:4] = False
    alive = reach.follow(model, mask_set, (3, 4)).alive
    assert alive.masks["mix.in_proj_weight"][8:].all()
    mask_set.masks["mix.out_proj.weight"].zero_()
    assert reach.follow(model, mask_set, (3, 4)).cut == ("mix.out_proj.weight",)


# --- collapse
def test_a_collapse_names_the_layer_that_cuts_the_output_off() -> None:
    model = models.build("resnet20", 10, 0)
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["layer1.0.conv1.weight"].zero_()  # a shortcut leads past it
    lost = reach.follow(model, mask_set, (3, 32, 32))
    assert lost.dead == ("layer1.0.conv1.weight", "layer1.0.conv2.weight")
    assert not lost.collapsed and lost.reached == 10 and lost.cut == ()
    mask_set.masks["linear.weight"].zero_()
    cut = reach.follow(model, mask_set, (3, 32, 32))
    assert cut.collapsed and cut.cut == ("linear.weight",)
    assert cut.alive.kept == 0 and len(cut.dead) == 20


def test_a_cut_through_two_branches_names_both() -> None:
    model = NETS["residual"]()
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["two.weight"].zero_()
    assert not reach.follow(model, mask_set, IMAGE).collapsed
    mask_set.masks["short.weight"].zero_()
    assert reach.follow(model, mask_set, IMAGE).cut == ("two.weight", "short.weight")


def test_layers_that_keep_weights_can_still_cut() -> None:
    model = NETS["plain"]()
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["two.weight"][:, 1:] = False  # reads the first neuron,
    mask_set.masks["one.weight"][0] = False  # which gets nothing
    found = reach.follow(model, mask_set, IMAGE)
    assert found.collapsed and found.cut == ("two.weight",)
    assert found.alive.kept == 0 < mask_set.kept


def test_outputs_that_nothing_reaches_are_counted() -> None:
    model = NETS["plain"]()
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["head.weight"][1] = False
    found = reach.follow(model, mask_set, IMAGE)
    assert (found.reached, found.outputs) == (2, 3)


# --- what is protected
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", ["conv1", "linear"]),
        ("resnet18", ["conv1", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4)), "fc"]),
        ("vgg11", ["features.0", "classifier.6"]),
    ],
)
def test_the_sensitive_layers_are_first_last_and_shortcuts(name: str, expected: list[str]) -> None:
    found = reach.sensitive(models.build(name, 10, 0), (3, 32, 32))
    assert found == tuple(f"{layer}.weight" for layer in expected)


# --- manners
def test_the_network_is_left_as_found() -> None:
    model = models.build("resnet20", 10, 0).train()
    before = models.fingerprint(model)
    reach.follow(model, draw(model, 0.5, 0), (3, 32, 32))
    assert models.fingerprint(model) == before
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_an_operation_without_a_rule_passes_everything_on_and_is_named() -> None:
    def sorting(net: Net, x: Tensor) -> Tensor:
        return net.head(torch.fft.rfft(net.first(x).flatten(1)).real[:, :4])

    model = Net(sorting, first=conv(3, 2), head=nn.Linear(4, 2))
    mask_set = draw(model, 2.0, 0)
    mask_set.masks["first.weight"][1] = False
    found = reach.follow(model, mask_set, IMAGE)
    assert found.guessed and found.alive.masks["first.weight"][0].all()


def test_a_forward_that_looks_at_values_is_refused() -> None:
    def choosing(net: Net, x: Tensor) -> Tensor:
        y = net.head(x.flatten(1))
        return y if y.sum().item() > 0 else -y

    with pytest.raises(ModelError, match="cannot be traced"):
        model = Net(choosing, head=nn.Linear(108, 2))
        reach.follow(model, draw(model, 1.0, 0), IMAGE)
