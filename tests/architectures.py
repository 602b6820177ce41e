"""Classifiers of every family, as narrow as their library allows, for 3 classes and 32 pixels."""

from collections.abc import Callable
from typing import Any

import pytest
import torchvision.models as vision
from torch import nn


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=3, **settings)

    return make


def _hugging_face(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.for_model(kind, num_labels=3, **settings)
        model = transformers.AutoModelForImageClassification.from_config(config)
        model.register_forward_hook(lambda network, images, output: output.logits)
        return model

    return make


def _convnext() -> nn.Module:
    blocks = vision.convnext.CNBlockConfig(16, 32, 1), vision.convnext.CNBlockConfig(32, None, 1)
    return vision.ConvNeXt(list(blocks), num_classes=3)


def _vgg() -> nn.Module:
    """Return VGG's convolutions before two linear layers that are not 4096 wide."""
    features = vision.vgg.make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True)
    head = nn.Linear(64 * 16, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 3)
    return nn.Sequential(features, nn.Flatten(), *head)


def _mixer() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.mlp_mixer.MlpMixer(num_classes=3, num_blocks=2, **TOKENS)


TOKENS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: vision.ResNet(vision.resnet.BasicBlock, [1, 1, 1, 1], 3),
    "mobilenet_v2": lambda: vision.mobilenet_v2(num_classes=3, width_mult=0.25),
    "mobilenet_v3": lambda: vision.mobilenet_v3_small(num_classes=3, width_mult=0.5),
    "shufflenet_v2": lambda: vision.shufflenet_v2_x0_5(num_classes=3),
    "squeezenet": lambda: vision.squeezenet1_1(num_classes=3),
    "convnext": _convnext,
    "densenet": lambda: vision.DenseNet(8, (2, 2, 2, 2), 16, num_classes=3),
    "vit": lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=3),
    "swin": lambda: vision.SwinTransformer([2, 2], 24, [2, 2], [2, 2], [4, 4], num_classes=3),
    "vgg": _vgg,
    "timm efficientnet": _timm("efficientnet_b0"),
    "timm regnet": _timm("regnety_002"),
    "timm mixer": _mixer,
    "timm vit": _timm("vit_tiny_patch16_224", depth=2, num_heads=2, **TOKENS),
    "hf vit": _hugging_face(
        "vit", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    ),
    "hf swin": _hugging_face(
        "swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
        window_size=4,
    ),
    "hf resnet": _hugging_face(
        "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
}  # fmt: skip
