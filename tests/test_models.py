import os
import pickle
import urllib.error
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dop_fast import models
from dop_fast.config import TeacherConfig
from dop_fast.errors import ModelError


@pytest.mark.parametrize("name", ["resnet20", "shufflenet_v2_x0_5"])
def test_weights_follow_from_name_classes_and_seed_alone(name: str) -> None:
    first = models.fingerprint(models.build(name, 5, 3))
    torch.rand(7)
    with torch.device("meta"):
        assert models.fingerprint(models.build(name, 5, 3)) == first
    assert models.fingerprint(models.build(name, 5, 4)) != first


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    models.build("resnet20", 10, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", models.AUXILIARY_HEADS)
def test_auxiliary_heads_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **about: weight)  # seconds of it
    model = models.build(name, 4, 0).train()
    assert isinstance(model(torch.zeros(2, 3, 80, 80)), Tensor)


def test_an_unknown_network_is_told_its_neighbours() -> None:
    with pytest.raises(ModelError, match="resnet19") as caught:
        models.build("resnet19", 10, 0)
    assert "resnet18" in caught.value.hint


OWN = """
from torch import nn
def net(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
def odd(width): return nn.Linear(width, width)
def text(num_classes): return "net"
"""


@pytest.mark.parametrize("where", ["root", "cwd"])
def test_own_networks_are_found_in_the_workspace_and_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / f"ours_{where}.py").write_text(OWN)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path if where == "cwd" else elsewhere)
    root = tmp_path if where == "root" else elsewhere
    model = models.build(f"ours_{where}:net", 6, 0, root)
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 6)
    assert models.fingerprint(model) == models.fingerprint(
        models.build(f"ours_{where}:net", 6, 0, root)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ours_bad:nett", "no function 'nett'"),
        ("ours_bad:odd", "width"),
        ("ours_bad:text", "returned str"),
        ("ours_absent:net", "cannot import ours_absent"),
    ],
)
def test_own_networks_that_cannot_be_built_say_why(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "ours_bad.py").write_text(OWN)
    with pytest.raises(ModelError, match=message):
        models.build(name, 3, 0, tmp_path)


def test_saved_weights_come_back_as_a_frozen_teacher(tmp_path: Path) -> None:
    model = models.build("resnet20", 10, 1).to(memory_format=torch.channels_last)
    models.save_weights(tmp_path / "new" / "t.safetensors", model, {"model": "resnet20"})
    teacher = models.load_teacher(TeacherConfig("resnet20", "new/t.safetensors"), 10, tmp_path)
    assert models.fingerprint(teacher) == models.fingerprint(model)
    assert not teacher.training
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.safetensors"]


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    models.save_weights(tmp_path / "tied.safetensors", nn.Sequential(first, second), {"a": "b"})
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert file.metadata()["a"] == "b"
        assert torch.equal(file.get_tensor("0.weight"), file.get_tensor("1.weight"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_are_read_nested_and_parallel(
    tmp_path: Path, nested: bool, prefix: str
) -> None:
    model = models.build("resnet20", 4, 1)
    state = OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "t.pth")
    teacher = models.load_teacher(TeacherConfig("resnet20", "t.pth"), 4, tmp_path)
    assert models.fingerprint(teacher) == models.fingerprint(model)


def test_a_misfit_lists_the_first_differences(tmp_path: Path) -> None:
    state = models.build("resnet20", 4, 1).state_dict()
    state["extra"] = state.pop("conv1.weight")
    save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(ModelError) as caught:
        models.load_teacher(TeacherConfig("resnet20", "t.safetensors"), 5, tmp_path)
    for part in (
        "missing: conv1.weight",
        "unexpected: extra",
        "linear.weight [4, 64] instead of [5, 64]",
    ):
        assert part in caught.value.message
    with pytest.raises(ModelError, match=r"missing: .* and \d+ more"):
        models.load_teacher(TeacherConfig("resnet56", "t.safetensors"), 4, tmp_path)


class Trap:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "ran"), tmp_path / "new.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol=2))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("new.pt", "old.pth", "module.pth"):
        with pytest.raises(ModelError, match="could run code") as caught:
            models.load_teacher(TeacherConfig("resnet20", name), 10, tmp_path)
        assert "safetensors" in caught.value.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_damaged_file_of_weights_is_told(tmp_path: Path, ending: str) -> None:
    model = models.build("resnet20", 10, 1)
    whole = tmp_path / f"whole{ending}"
    if ending == ".pth":
        torch.save(model.state_dict(), whole)
    else:
        models.save_weights(whole, model, {})
    content = whole.read_bytes()
    for kept in (0, 4, 30, 200, 5_000, len(content) // 2, len(content) - 100, len(content) - 1):
        (tmp_path / f"cut{ending}").write_bytes(content[:kept])
        with pytest.raises(ModelError, match="damaged"):
            models.load_teacher(TeacherConfig("resnet20", f"cut{ending}"), 10, tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "no weights yet"),
        ("gone.pth", "no file of weights"),
        ("notes.txt", "must end in|no file of weights"),
        ("list.pt", "not a state dict"),
    ],
)
def test_a_teacher_without_usable_weights_is_refused(
    tmp_path: Path, weights: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match=message) as caught:
        models.load_teacher(TeacherConfig("resnet20", weights), 10, tmp_path)
    assert caught.value.hint


def test_torchvision_weights_must_know_as_many_classes() -> None:
    with pytest.raises(ModelError, match="1000 classes, the data has 10"):
        models.load_teacher(TeacherConfig("resnet18", "DEFAULT"), 10, Path())
    with pytest.raises(ModelError, match="torchvision has no weights for resnet20"):
        models.load_teacher(TeacherConfig("resnet20", "DEFAULT"), 10, Path())


def test_a_failed_download_says_which_file_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    before = torch.get_rng_state()
    with pytest.raises(ModelError, match="no route") as caught:
        models.load_teacher(TeacherConfig("shufflenet_v2_x0_5", "DEFAULT"), 1000, Path())
    assert "https://" in caught.value.hint
    assert torch.equal(torch.get_rng_state(), before)


def test_teachers_are_named_by_architecture_file_or_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    about = {"mine.safetensors": {"model": "vgg19_cifar"}, "resnet20_cifar10.safetensors": {}}
    for name, metadata in about.items():
        models.save_weights(tmp_path / name, model, metadata)
    torch.save(model.state_dict(), tmp_path / "VGG16_BN-6c64b313.pth")
    expected = {
        "resnet18": ("resnet18", ""),
        "resnet18=DEFAULT": ("resnet18", "DEFAULT"),
        "my.nets:tiny": ("my.nets:tiny", ""),
        "mine.safetensors": ("vgg19_cifar", "mine.safetensors"),
        "resnet20_cifar10.safetensors": ("resnet20", "resnet20_cifar10.safetensors"),
        "VGG16_BN-6c64b313.pth": ("vgg16_bn", "VGG16_BN-6c64b313.pth"),
        "resnet56=mine.safetensors": ("resnet56", "mine.safetensors"),
        "a:b=mine.safetensors": ("a:b", "mine.safetensors"),
    }
    for spec, (name, weights) in expected.items():
        found = models.parse_teacher(spec)
        assert found.name == name
        assert found.weights == (
            str(tmp_path / weights) if weights not in ("", "DEFAULT") else weights
        )


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("resnet200.pth", "NAME=resnet200.pth"),
        ("gone.pth", "path"),
        ("resnet18=gone.pth", "path"),
        ("resnt18", "resnet18"),
        ("resnt18=resnet200.pth", "resnet18"),
    ],
)
def test_a_teacher_that_cannot_be_read_gets_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "resnet200.pth")
    with pytest.raises(ModelError) as caught:
        models.parse_teacher(spec)
    assert hint in caught.value.hint


def test_all_weights_of_resnet50_but_norms_and_biases_are_prunable() -> None:
    with torch.device("meta"):
        weights = models.prunable(torchvision.models.resnet50())
    assert len(weights) == 54
    assert sum(weight.numel() for weight in weights.values()) == 25_502_912


def test_attention_and_transposed_convolutions_are_prunable_and_shared_weights_count_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.same = nn.MultiheadAttention(4, 2)
            self.other = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    assert list(models.prunable(Net())) == [
        "up.weight",
        "same.in_proj_weight",
        "same.out_proj.weight",
        "other.q_proj_weight",
        "other.k_proj_weight",
        "other.v_proj_weight",
        "other.out_proj.weight",
        "first.weight",
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg16_bn", "features"),
        ("squeezenet1_1", "features"),  # its head is a convolution
        ("mobilenet_v3_small", "features"),
        ("densenet121", "features"),
        ("convnext_tiny", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("vit_b_16", "encoder"),
        ("swin_t", "permute"),  # from here on channels come first
    ],
)
def test_the_bottleneck_is_the_last_map(name: str, layer: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        assert models.bottleneck(model, torch.empty(2, 3, 224, 224)) == layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet20", "layer3"),
        ("resnet32_wide", "layer3"),
        ("vgg19_cifar", "features"),
        ("resnet18", "layer3"),
    ],  # at 32 pixels its layer4 has one position left
)
def test_the_bottleneck_of_small_images_still_has_positions(name: str, layer: str) -> None:
    model = models.build(name, 10, 0)
    assert models.bottleneck(model, torch.zeros(1, 3, 32, 32)) == layer


def test_a_network_without_maps_gives_what_enters_its_last_layer() -> None:
    layers = [
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    ]
    assert models.bottleneck(nn.Sequential(*layers), torch.zeros(1, 3, 2, 2)) == "4"
    with pytest.raises(ModelError, match="no layer before"):
        models.bottleneck(nn.Linear(4, 2), torch.zeros(1, 4))


def test_a_module_that_runs_twice_is_no_bottleneck() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.relu, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv2(self.relu(self.conv1(x))))
            return self.head(x.mean(dim=(2, 3)))

    assert models.bottleneck(Net(), torch.zeros(1, 3, 8, 8)) == "conv2"


def test_looking_for_the_bottleneck_leaves_the_network_as_found() -> None:
    model = models.build("resnet20", 10, 0).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = models.fingerprint(model)
    models.bottleneck(model, torch.randn(2, 3, 16, 16))
    assert [module.training for module in model.modules()] == modes
    assert models.fingerprint(model) == state
    assert not any(module._forward_hooks for module in model.modules())


def test_images_of_the_wrong_size_are_told() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_32()
        with pytest.raises(ModelError, match=r"\[3, 32, 32\]"):
            models.bottleneck(model, torch.empty(1, 3, 32, 32))
        assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_layer_is_told_its_neighbours() -> None:
    model = models.build("resnet20", 10, 0)
    assert models.get_layer(model, "layer3.0.conv1") is model.layer3[0].conv1
    for wrong, near in (("layer4", "layer3"), ("", "layer1"), ("zzz", "layer1")):
        with pytest.raises(ModelError) as caught:
            models.get_layer(model, wrong)
        assert near in caught.value.hint


def test_a_fingerprint_sees_names_shapes_types_and_bits_but_not_memory() -> None:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4)
    base = {"a": weight, "count": torch.tensor(3)}
    same = {"count": torch.tensor(3), "a": weight.to(memory_format=torch.channels_last)}
    assert models.fingerprint(same) == models.fingerprint(base)
    bit = weight.clone()
    bit[0, 0, 0, 0] = -0.0
    others = [
        {"b": weight, "count": torch.tensor(3)},
        {"a": weight.reshape(2, 1, 3, 4), "count": torch.tensor(3)},
        {"a": weight.view(torch.int32), "count": torch.tensor(3)},
        {"a": bit, "count": torch.tensor(3)},
    ]
    assert len({models.fingerprint(state) for state in (base, *others)}) == 5
