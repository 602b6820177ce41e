"""Files for other programs hold the network's zeros, load there, and come back as the same mask."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dop_fast import interop, masks, models
from dop_fast.errors import ConfigError, ModelError, StoreError
from dop_fast.interop import fours
from dop_fast.masks import MaskSet
from dop_fast.reach.flops import flops
from dop_fast.workspace import EXPORTS

IMAGE = (3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 3),
    ).eval()  # fmt: skip


def pruned(model: nn.Module, sparsity: float = 0.9) -> MaskSet:
    scores = {name: weight.detach().abs() for name, weight in models.prunable(model).items()}
    # its worst layer loses everything
    scores["3.weight"] = torch.zeros_like(scores["3.weight"])
    return MaskSet(masks.keep_top(scores, sparsity).masks, {"criterion": "magnitude", "init": "x"})


def masked(model: nn.Module, kept: MaskSet) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, mask in kept.masks.items():
        state[name][~mask] = 0
    return state


def same(a: MaskSet, b: MaskSet) -> bool:
    return list(a.masks) == list(b.masks) and all(
        torch.equal(mask, b.masks[name]) for name, mask in a.masks.items()
    )


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_file_of_every_kind_comes_back_as_the_same_mask(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    model = network()
    kept, before = pruned(model), models.fingerprint(model)
    made = interop.export(tmp_path / f"x.{EXPORTS[kind]}", model, kept, kind, IMAGE)
    assert models.fingerprint(model) == before
    assert made.bytes == made.path.stat().st_size
    found = interop.read(made.path, network())
    assert same(found, kept) and found.about == kept.about
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


def test_dense_is_the_state_with_its_zeros(tmp_path: Path) -> None:
    model = network()
    kept = pruned(model)
    interop.export(tmp_path / "x.safetensors", model, kept, "dense", IMAGE)
    assert models.fingerprint(load_file(tmp_path / "x.safetensors")) == models.fingerprint(
        masked(model, kept)
    )


def test_prune_loads_into_modules_that_pytorch_has_prepared(tmp_path: Path) -> None:
    model, prepared = network(), network()
    kept = pruned(model)
    interop.export(tmp_path / "x.safetensors", model, kept, "prune", IMAGE)
    for name, mask in kept.masks.items():
        layer = prepared.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", torch.ones(mask.shape))
    prepared.load_state_dict(load_file(tmp_path / "x.safetensors"))
    images = torch.randn(2, *IMAGE)
    model.load_state_dict(masked(model, kept))
    assert torch.equal(prepared(images), model(images))
    assert prune.is_pruned(prepared)


def test_attentions_projection_too_loads_into_a_prepared_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, prepared = (
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 32, batch_first=True))
        for _ in "12"
    )
    scores = {name: weight.detach().abs() for name, weight in models.prunable(model).items()}
    assert "1.self_attn.in_proj_weight" in scores
    kept = masks.keep_top(scores, 0.5)
    interop.export(tmp_path / "x.safetensors", model, kept, "prune", IMAGE)
    for name, mask in kept.masks.items():
        owner, _, attribute = name.rpartition(".")
        prune.custom_from_mask(prepared.get_submodule(owner), attribute, torch.ones(mask.shape))
    prepared.load_state_dict(load_file(tmp_path / "x.safetensors"))
    attend = prepared[1].self_attn
    found = attend.in_proj_weight_orig * attend.in_proj_weight_mask
    assert torch.equal(found, masked(model, kept)["1.self_attn.in_proj_weight"])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_rows_are_the_weights_as_matrices(tmp_path: Path) -> None:
    model = network()
    kept = pruned(model)
    with torch.no_grad():  # a kept zero stays stored
        model[5].weight[kept.masks["5.weight"].nonzero()[0].unbind()] = 0
    interop.export(tmp_path / "x.safetensors", model, kept, "csr", IMAGE)
    state = load_file(tmp_path / "x.safetensors")
    for name, value in masked(model, kept).items():
        if name not in kept.masks:
            assert torch.equal(state[name], value)
            continue
        parts = [state[f"{name}.{part}"] for part in ("crow_indices", "col_indices", "values")]
        rows = torch.sparse_csr_tensor(*parts, value.flatten(1).shape, check_invariants=True)
        assert torch.equal(rows.to_dense().view(value.shape), value)
        assert rows.values().numel() == int(kept.masks[name].sum())


def test_masks_of_25_million_weights_take_about_three_megabytes(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 2, (5000, 5000), generator=drawn, dtype=torch.bool)
    masks.save(tmp_path / "x.safetensors", MaskSet({"0.weight": mask}))
    assert (tmp_path / "x.safetensors").stat().st_size < 25e6 / 8 + 1000


def test_onnx_runs_on_any_number_of_images_with_its_zeros(tmp_path: Path) -> None:
    runtime, onnx = map(pytest.importorskip, ("onnxruntime", "onnx"))
    pytest.importorskip("onnxscript")
    model = network()
    kept = pruned(model)
    made = interop.export(tmp_path / "x.onnx", model, kept, "onnx", IMAGE)
    assert made.difference is not None and made.difference < 1e-5
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    model.load_state_dict(masked(model, kept))
    images = torch.randn(5, *IMAGE)
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach())
    arrays = {each.name: each for each in onnx.load(made.path).graph.initializer}
    for name, mask in kept.masks.items():
        assert not onnx.numpy_helper.to_array(arrays[name])[~mask.numpy()].any()
    assert str(Path(torch.__file__).parent).encode() not in made.path.read_bytes()


def test_a_network_of_which_onnxruntime_makes_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Session:
        def __init__(self, content: bytes, options: object, providers: list[str]) -> None: ...

        def run(self, outputs: None, inputs: dict[str, Any]) -> tuple[Any]:
            return (torch.ones(2, 3).numpy(),)

    monkeypatch.setattr(runtime, "InferenceSession", Session)
    with pytest.raises(ModelError, match="onnxruntime"):
        interop.export(tmp_path / "x.onnx", network(), pruned(network()), "onnx", IMAGE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit"])
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    model = architectures.NETWORKS[name]().eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    found = flops(model, (3, 32, 32))
    assert sum(found.values()) == counter.get_total_flops()
    assert set(found) - {""} <= set(models.prunable(model))


def test_sparse_flops_are_each_layers_share(tmp_path: Path) -> None:
    model = network()
    kept = pruned(model)
    made = interop.export(tmp_path / "x.safetensors", model, kept, "masks", IMAGE)
    places = {"0.weight": 36, "3.weight": 16, "5.weight": 1, "6.weight": 1}
    each = {row.name: (2 * places[row.name] * row.total, row.density) for row in kept.layers()}
    assert made.flops == sum(count for count, _ in each.values())
    assert made.sparse_flops == round(sum(count * share for count, share in each.values()))
    assert made.parameters - made.kept == kept.total - kept.kept


# --- masks of other programs
def test_a_state_of_masks_by_name_is_read(tmp_path: Path) -> None:
    kept = pruned(network())
    torch.save({name: mask.int() for name, mask in kept.masks.items()}, tmp_path / "mask.pth")
    assert same(interop.read(tmp_path / "mask.pth", network()), kept)


def test_masks_beside_the_weights_are_read(tmp_path: Path) -> None:
    model = network()
    kept = pruned(model)
    state = OrderedDict(model.state_dict())  # its weights are not zero
    state.update({f"{name}_mask": mask.float() for name, mask in kept.masks.items()})
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    assert same(interop.read(tmp_path / "model.pt", model), kept)


class Trap:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"0.weight": Trap(tmp_path / "ran")}, tmp_path / "mask.pth")
    with pytest.raises(ModelError, match="could run code"):
        interop.read(tmp_path / "mask.pth", network())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"5.weight_mask": torch.full((64, 128), 0.5)}, "other values than 0 and 1"),
        ({"5.weight_mask": torch.zeros(64, 5)}, "5.weight is .64, 128., its mask .64, 5."),
        ({"5.weight": None}, "neither a mask nor weights of 5.weight"),
        ({"5.weight.crow_indices": torch.arange(65)}, "rows but no columns"),
        (
            {
                "5.weight.crow_indices": torch.arange(65),
                "5.weight.col_indices": torch.full((64,), 500),
            },
            "rows of 5.weight are damaged",
        ),
    ],
)
def test_what_is_no_mask_of_the_model_is_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {**network().state_dict(), **change}
    save_file({name: t for name, t in state.items() if t is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        interop.read(tmp_path / "x.safetensors", network())


def test_dense_weights_without_zeros_are_no_mask(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="removes no weight"):
        interop.read(tmp_path / "x.safetensors", network())


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth", "x.onnx"):
        (tmp_path / name).write_bytes(b"\x03\x00\x00\x00\x00\x00\x00\x00abc")
        with pytest.raises((ModelError, StoreError), match="damaged"):
            interop.read(tmp_path / name, network())
        with pytest.raises(ModelError, match="no file"):
            interop.read(tmp_path / f"absent{Path(name).suffix}", network())


def test_an_unknown_kind_is_told_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        interop.export(tmp_path / "x", network(), pruned(network()), "pickle", IMAGE)
    assert "onnx" in caught.value.hint


@pytest.mark.gpu
@pytest.mark.skipif(not fours.available(), reason="needs sparse tensor cores")
def test_the_speed_of_two_of_four_is_measured_where_a_gpu_has_it() -> None:
    model = network()
    scores = {name: weight.detach().abs() for name, weight in models.prunable(model).items()}
    assert list(fours.speedups(model, masks.keep_two_of_four(scores))) == ["5"]
    assert not fours.speedups(model, pruned(model, 0.1))


def test_the_metadata_name_the_network(tmp_path: Path) -> None:
    model = models.build("resnet20", 3, 0)
    scores = {name: weight.detach().abs() for name, weight in models.prunable(model).items()}
    kept = MaskSet(masks.keep_top(scores, 0.9).masks, {"model": "resnet20"})
    path = tmp_path / "x.safetensors"
    interop.export(path, model, kept, "dense", (3, 32, 32))
    assert models.parse_teacher(str(path)).name == "resnet20"
    assert json.loads(json.dumps(kept.about)) == interop.read(path, model).about


def test_importing_it_prints_nothing() -> None:
    code = "import dop_fast.api, dop_fast.report, dop_fast.sweep"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
