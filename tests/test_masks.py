"""Masks keep exactly what was asked, survive a file, and damaged files are told as such."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from dop_fast import masks
from dop_fast.errors import ConfigError, ModelError, StoreError
from dop_fast.masks import MaskSet, keep_top

ABOUT = {"criterion": "grasp", "sparsity": 0.9, "seed": 3, "settings": {"per_class": 10}}


def flat(mask_set: MaskSet) -> list[bool]:
    return [bool(kept) for mask in mask_set.masks.values() for kept in mask.flatten()]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 7), nn.Linear(7, 3)
    )


def some_masks() -> MaskSet:
    """Return masks of `network()`, of sizes that fill no whole number of bytes."""
    drawn = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (5, 3, 3, 3), "3.weight": (7, 45), "4.weight": (3, 7)}
    made = {name: torch.rand(shape, generator=drawn) < 0.3 for name, shape in shapes.items()}
    return MaskSet(made, ABOUT)


def equal(a: MaskSet, b: MaskSet) -> bool:
    return list(a.masks) == list(b.masks) and all(
        torch.equal(a.masks[name], b.masks[name]) for name in a.masks
    )


# --- selection
def sorting_twin(values: list[float], sparsity: float) -> list[bool]:
    k = max(1, round(len(values) * (1 - sparsity)))
    best = sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]
    return [index in best for index in range(len(values))]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    layers=st.lists(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1e-38, 1.0]) | finite, min_size=1, max_size=8),
        min_size=1, max_size=4,
    ),
    sparsity=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
@settings(deadline=None)
def test_keeping_the_top_is_keeping_the_first_of_a_stable_sort(
    layers: list[list[float]], sparsity: float
) -> None:
    scores = {str(i): torch.tensor(values) for i, values in enumerate(layers)}
    values = [float(value) for layer in scores.values() for value in layer]
    assert flat(keep_top(scores, sparsity)) == sorting_twin(values, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.98, 0.999])
def test_equal_scores_keep_the_exact_count_from_the_front(sparsity: float) -> None:
    kept = flat(keep_top({"a": torch.zeros(30, 20), "b": torch.zeros(400)}, sparsity))
    k = round(1000 * (1 - sparsity))
    assert kept == [True] * k + [False] * (1000 - k)


def test_sparsity_zero_keeps_all_and_one_weight_always_stays() -> None:
    scores = {"a": torch.tensor([0.5, -2.0, 3.0])}
    assert flat(keep_top(scores, 0.0)) == [True, True, True]
    assert flat(keep_top(scores, 0.999)) == [False, False, True]


def test_the_count_is_global_and_negative_scores_may_stay() -> None:
    found = keep_top({"a": torch.tensor([[-1.0, -2.0]]), "b": torch.tensor([-3.0, -4.0])}, 0.5)
    assert found.masks["a"].tolist() == [[True, True]]
    assert found.masks["b"].tolist() == [False, False]
    assert [row.density for row in found.layers()] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scores_of_other_precisions_are_ranked_as_they_are(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.0 + 2**-40, 1.0 + 2**-7, 0.5], dtype=dtype)
    found = keep_top({"a": values}, 0.5)
    assert flat(found) == sorting_twin(values.tolist(), 0.5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_no_number_names_its_layer(wrong: float) -> None:
    scores = {"first": torch.zeros(3), "second": torch.tensor([0.0, wrong])}
    with pytest.raises(ModelError, match="second"):
        keep_top(scores, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        keep_top({"a": torch.zeros(3)}, sparsity)


def test_no_scores_are_refused() -> None:
    with pytest.raises(ModelError, match="no weights"):
        keep_top({}, 0.5)


def test_resnet50_at_95_percent_keeps_the_known_number_in_a_file_of_a_bit_a_weight(
    tmp_path: Path,
) -> None:
    model = torchvision.models.resnet50()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.ndim in (2, 4)}
    found = keep_top(weights, 0.95)
    assert (found.kept, found.total) == (1_275_146, 25_502_912)
    assert found.sparsity == pytest.approx(0.95, abs=1e-7)
    assert found.overall_sparsity(model) == pytest.approx(0.9480, abs=5e-5)
    masks.save(tmp_path / "m.safetensors", found)
    assert (tmp_path / "m.safetensors").stat().st_size < 25_502_912 / 8 + 20_000
    assert equal(masks.load(tmp_path / "m.safetensors"), found)


# --- two of every four
PAIRS = list(combinations(range(4), 2))


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]) | finite, min_size=4, max_size=4))
def test_two_of_four_is_the_best_of_the_six_pairs(values: list[float]) -> None:
    kept = masks.keep_two_of_four({"a": torch.tensor([values])})
    # the first of the best pairs holds the lower indices
    best = max(PAIRS, key=lambda pair: sorted((values[i] for i in pair), reverse=True))
    assert flat(kept) == [i in best for i in range(4)]


def test_fours_run_along_the_inputs_at_each_output_and_place_of_a_kernel() -> None:
    torch.manual_seed(0)
    score = torch.randn(3, 8, 2, 2)
    kept = masks.keep_two_of_four({"a": score}).masks["a"]
    for out in range(3):
        for four in (slice(0, 4), slice(4, 8)):
            for y in range(2):
                for x in range(2):
                    own = score[out, four, y, x]
                    best = {int(i) for i in own.argsort(descending=True)[:2]}
                    chosen = kept[out, four, y, x].nonzero().flatten().tolist()
                    assert set(chosen) == best


def test_layers_whose_inputs_are_no_multiple_of_four_stay_dense() -> None:
    shapes = {"first": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "odd": (2, 6), "even": (2, 12)}
    kept = masks.keep_two_of_four({name: torch.randn(shape) for name, shape in shapes.items()})
    assert [row.density for row in kept.layers()] == [1, 1, 1, 0.5]


def test_two_of_four_refuses_what_has_no_order() -> None:
    with pytest.raises(ModelError, match="score in a is NaN"):
        masks.keep_two_of_four({"a": torch.tensor([[1.0, math.nan, 2.0, 3.0]])})


# --- use
def test_applying_zeroes_the_removed_weights_and_nothing_else() -> None:
    model, before, mask_set = network(), network().state_dict(), some_masks()
    weight = model[3].weight
    with torch.no_grad():
        weight[~mask_set.masks["3.weight"]] = torch.nan  # also what a product would leave
    masks.apply_(model, mask_set)
    assert model[3].weight is weight
    for name, value in model.state_dict().items():
        mask = mask_set.masks.get(name)
        expected = before[name] if mask is None else torch.where(mask, before[name], 0.0)
        assert torch.equal(value, expected)
        assert mask is None or not value[~mask].signbit().any()
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 3, 4))
    size = sum(value.numel() for value in model.parameters())
    assert mask_set.overall_sparsity(model) == zeros / size
    assert mask_set.density + mask_set.sparsity == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("3.weight"), "3.weight has no mask"),
        (lambda made: made.update({"9.weight": made["3.weight"]}), "9.weight is not in"),
        (
            lambda made: made.update({"3.weight": made["3.weight"].T}),
            r"is \[7, 45\], its mask \[45",
        ),
    ],
)
def test_a_mask_of_another_network_is_refused_whole(change: Any, message: str) -> None:
    model, mask_set = network(), some_masks()
    change(mask_set.masks)
    with pytest.raises(ModelError, match=message):
        masks.apply_(model, mask_set)
    untouched = network().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())


def test_a_mask_of_a_shallower_network_is_refused() -> None:
    deeper = nn.Sequential(*network(), *(nn.Linear(3, 3) for _ in range(9)))
    with pytest.raises(ModelError, match=r"5\.weight has no mask.*; and 4 more"):
        masks.apply_(deeper, some_masks())


# --- files
def test_a_saved_mask_comes_back_with_what_it_is_about(tmp_path: Path) -> None:
    path, mask_set = tmp_path / "masks" / "mine.safetensors", some_masks()
    reverse = MaskSet(dict(reversed(mask_set.masks.items())), ABOUT)
    for made in (mask_set, reverse):  # the order of layers is the model's, not the file format's
        masks.save(path, made)
        back = masks.load(path)
        assert equal(back, made)
        assert back.about == ABOUT
        assert back.layers() == made.layers()
    assert [file.name for file in path.parent.iterdir()] == ["mine.safetensors"]
    model, expected = network(), network()
    masks.apply_(model, masks.load(path))
    masks.apply_(expected, mask_set)
    assert torch.equal(model[3].weight, expected[3].weight)


@given(shape=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_masks_of_any_shape_come_back(
    shape: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    mask_set = MaskSet({"a": torch.rand(shape, generator=drawn) < 0.5})
    path = tmp_path_factory.getbasetemp() / "shape.safetensors"
    masks.save(path, mask_set)
    assert equal(masks.load(path), mask_set)


def test_densities_can_be_read_without_dopfast(tmp_path: Path) -> None:
    masks.save(tmp_path / "m", some_masks())
    size = int.from_bytes((tmp_path / "m").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "m").read_bytes()[8 : 8 + size])
    layers = json.loads(header["__metadata__"]["layers"])
    assert [(name, tuple(row["shape"]), row["kept"]) for name, row in layers.items()] == [
        row[:3] for row in some_masks().layers()
    ]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    masks.save(path, some_masks())
    with pytest.raises(TypeError):
        masks.save(path, MaskSet(some_masks().masks, {"path": path}))
    assert equal(masks.load(path), some_masks())


def test_a_missing_mask_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no mask at") as missing:
        masks.load(tmp_path / "m.safetensors")
    assert "dopfast prune" in missing.value.hint


def rewritten(path: Path, change: Any) -> Path:
    """Change the tensors and the metadata of a mask file; `layers` is handed over as a table."""
    masks.save(path, some_masks())
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    tensors, layers = load_file(path), json.loads(metadata["layers"])
    change(tensors, metadata, layers)
    if metadata.get("layers"):
        metadata["layers"] = json.dumps(layers)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, r: m.update(version="2"), "version 2, this dopfast reads"),
        (lambda t, m, r: m.update(schema="other"), "is other version 1"),
        (lambda t, m, r: m.clear(), "is None version None"),
        (lambda t, m, r: m.pop("layers"), "no layers"),
        (lambda t, m, r: m.update(about="{"), "no about"),
        (lambda t, m, r: m.update(about="[]"), "about are not a table"),
        (lambda t, m, r: r.clear(), "not those of its table"),
        (lambda t, m, r: t.pop("3.weight"), "not those of its table"),
        (lambda t, m, r: r.update({"3.weight": [7, 45]}), "row of 3.weight"),
        (lambda t, m, r: r["3.weight"].update(kept="many"), "row of 3.weight"),
        (lambda t, m, r: r["3.weight"].update(shape=[7, 45.0]), "row of 3.weight"),
        (lambda t, m, r: r["3.weight"].update(shape=[7, 46]), "do not fit its shape"),
        (lambda t, m, r: r["3.weight"].update(shape=[-7, -45]), "do not fit its shape"),
        (lambda t, m, r: t.update({"3.weight": t["3.weight"][None]}), "do not fit its shape"),
        (lambda t, m, r: t.update({"3.weight": t["3.weight"].view(np.int8)}), "holds I8"),
        (lambda t, m, r: t["3.weight"].__ixor__(1), "keeps .* its table says"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_file_is_told_as_such(
    tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(StoreError, match=message) as refused:
        masks.load(rewritten(tmp_path / "m.safetensors", change))
    assert "dopfast prune --force" in refused.value.hint


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_are_told_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    masks.save(path, some_masks())
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "at")] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        read = masks.load(path)
    except StoreError:
        return
    shapes = [mask.shape for mask in read.masks.values()]
    assert [row.kept for row in read.layers()] == [row.kept for row in some_masks().layers()]
    assert sum(map(torch.Size.numel, shapes)) == some_masks().total


def test_weights_are_not_a_mask(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(StoreError, match="this dopfast reads"):
        masks.load(tmp_path / "w.safetensors")


def test_the_selection_does_not_change_the_scores() -> None:
    scores: dict[str, Tensor] = {"a": torch.tensor([3.0, 1.0, 2.0])}
    keep_top(scores, 0.3)
    assert scores["a"].tolist() == [3.0, 1.0, 2.0]
