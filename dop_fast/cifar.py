"""Networks for images of 32 pixels; global average pooling lets them take any size.

All of them start from the weights that GraSP's code draws (Wang et al., 2020): convolutions
Kaiming normal over the fan-out, linear layers N(0, 0.01), biases zero.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class _PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels, half of them on each side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        missing = outputs - inputs
        self._padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self._padding)


def _projection(inputs: int, outputs: int) -> nn.Module:
    """Return option B: a strided 1x1 convolution with batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        stride = 1 if shortcut is None else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return a map [n c h w] of one [n c h w]."""
        kept = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + kept)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2015), section 4.2: three stages of `blocks` blocks.

    The shortcuts between stages have no parameters (option A), or with `projected` are
    convolutions (option B).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        blocks: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        projected: bool = False,
    ) -> None:
        super().__init__()
        first, second, third = widths
        shortcut = _projection if projected else _PaddedShortcut
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, None)
        self.layer2 = _stage(first, second, blocks, shortcut(first, second))
        self.layer3 = _stage(second, third, blocks, shortcut(second, third))
        self.linear = nn.Linear(third, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n classes] of images [n 3 h w]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, shortcut: nn.Module | None) -> nn.Sequential:
    first = Block(inputs, outputs, shortcut)
    return nn.Sequential(first, *(Block(outputs, outputs, None) for _ in range(blocks - 1)))


class VGG(nn.Module):
    """VGG-19 with batch norm and one linear layer, as pruned by GraSP."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n classes] of images [n 3 h w]; h and w at least 16."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": partial(ResNet, blocks=3),
    "resnet32": partial(ResNet, blocks=5),
    "resnet56": partial(ResNet, blocks=9),
    "resnet32_wide": partial(ResNet, blocks=5, widths=(32, 64, 128), projected=True),
    "vgg19_cifar": VGG,
}
