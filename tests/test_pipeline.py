import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from dop_fast import masks, models, pipeline, runs, workspace
from dop_fast.config import ExtractConfig, PruneConfig, StitchConfig, TeacherConfig, TrainConfig
from dop_fast.errors import ConfigError, DataError, ModelError, StoreError
from dop_fast.patches.stitching import stitch_class
from dop_fast.stores import PatchStore
from dop_fast.workspace import Workspace

CPU = torch.device("cpu")
EXTRACT = ExtractConfig(
    images=8, tcav_images=4, n_segments=(6, 12), clusters=4, min_members=4, max_members=8,
    random_sets=4,
)  # fmt: skip
STITCH = StitchConfig(sigma=0.5, per_class=4)
TRAIN = TrainConfig(epochs=2, batch_size=12, lr=0.02)


def init(root: Path, data: Path) -> Workspace:
    made, _, _ = pipeline.init(
        root, data=str(data), size=32, teacher="resnet20", model="", seed=0, force=False
    )
    return made


def drain(steps: pipeline.Training) -> dict[str, float]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: dict[str, float] = end.value
            return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Workspace:
    """A workspace in which everything was run once."""
    space = init(tmp_path_factory.mktemp("space"), tiny_images)
    drain(pipeline.train(space, TRAIN, 0, CPU))
    pipeline.extract(space, EXTRACT, 0, CPU)
    pipeline.stitch(space, STITCH, 0)
    path, kept, _ = pipeline.prune(space, PruneConfig(per_class=4), 0, CPU)
    folder = pipeline.run_folder(space, path.stem, "", 0)
    drain(pipeline.finetune(space, TRAIN, (path.stem, kept), folder, 0, CPU))
    return space


@pytest.fixture
def space(done: Workspace, tmp_path: Path) -> Workspace:
    """A copy that a test may change."""
    shutil.copytree(done.root, tmp_path / "space")
    return workspace.load(tmp_path / "space")


def test_the_whole_job_leaves_its_store_mask_and_run(done: Workspace) -> None:
    store = PatchStore(done.patches)
    assert len(store.stitched()) == 3 * STITCH.per_class
    assert all(store.concepts(class_id).concepts for class_id in range(3))
    (run,) = (run for run in runs.finished_runs(done.runs) if run.about.kind == "finetune")
    assert run.about.facts["material"] == "stitched"
    assert 0 <= run.result["top1"] <= run.result["top5"] == 1
    assert not list(done.root.rglob("*.partial"))


def test_the_mask_holds_in_the_trained_weights_and_keeps_exactly_its_share(
    done: Workspace,
) -> None:
    name, kept = pipeline.open_mask(done, "")
    config = TeacherConfig("resnet20", weights=str(done.runs / name / runs.WEIGHTS))
    weights = models.load_teacher(config, 3, done.root)
    prunable = models.prunable(weights)
    total = sum(weight.numel() for weight in prunable.values())
    zeros = sum(int((weight == 0).sum()) for weight in prunable.values())
    assert kept.kept == round(total * 0.1)
    assert zeros >= total - kept.kept
    for layer, weight in prunable.items():
        assert not weight[~kept.masks[layer]].any()


def test_pruning_twice_gives_the_same_mask(space: Workspace) -> None:
    path, kept, _ = pipeline.prune(space, PruneConfig(per_class=4), 0, CPU)
    _, again, _ = pipeline.prune(space, PruneConfig(per_class=4), 0, CPU, force=True)
    assert all(torch.equal(kept.masks[name], again.masks[name]) for name in kept.masks)
    assert masks.load(path).about == kept.about


@pytest.mark.parametrize("material", ["images", "patches", "random-segments", "ones"])
@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_every_material_scores(space: Workspace, criterion: str, material: str) -> None:
    config = PruneConfig(criterion=criterion, material=material, per_class=4, sparsity=0.5)
    path, kept, _ = pipeline.prune(space, config, 0, CPU)
    assert path.stem == f"{criterion}-{material}-0.5-s0"
    assert kept.kept == round(kept.total * 0.5)


def test_random_pruning_needs_no_store(tmp_path: Path, tiny_images: Path) -> None:
    space = init(tmp_path / "space", tiny_images)
    path, _, _ = pipeline.prune(space, PruneConfig(criterion="random"), 3, CPU)
    assert path.stem == "random-0.9-s3"


def test_an_extraction_goes_on_with_the_classes_it_lacks(space: Workspace) -> None:
    wanted = PatchStore(space.patches)
    members = wanted.concepts(1).concepts[0].members
    begun = space.patches.with_name(space.patches.name + ".partial")
    space.patches.rename(begun)
    shutil.rmtree(begun / "stitched")
    shutil.rmtree(begun / "classes" / "1")
    before = (begun / "classes/0/zarr.json").stat().st_mtime_ns
    del zarr.open_group(begun).attrs["finished"]
    store = pipeline.extract(space, EXTRACT, 0, CPU)
    assert (space.patches / "classes/0/zarr.json").stat().st_mtime_ns == before
    assert store.header == wanted.header
    np.testing.assert_array_equal(store.concepts(1).concepts[0].members, members)


def test_a_finished_stage_is_not_done_again(space: Workspace) -> None:
    before = {path: path.stat().st_mtime_ns for path in space.patches.rglob("zarr.json")}
    pipeline.extract(space, EXTRACT, 0, CPU)
    pipeline.stitch(space, STITCH, 0)
    assert before == {path: path.stat().st_mtime_ns for path in space.patches.rglob("zarr.json")}


def test_a_full_target_is_refused_and_kept(space: Workspace) -> None:
    with pytest.raises(StoreError, match="other data, teacher or settings"):
        pipeline.extract(space, dataclasses.replace(EXTRACT, fill=0), 0, CPU)
    with pytest.raises(StoreError, match="already has stitched patches"):
        pipeline.stitch(space, StitchConfig(sigma=0.9, per_class=4), 0)
    assert PatchStore(space.patches).stitching == {**STITCH.to_dict(), "seed": 0}
    config = PruneConfig(criterion="random", sparsity=0.5)
    pipeline.prune(space, config, 0, CPU, name="mine")
    with pytest.raises(StoreError, match="other settings"):
        pipeline.prune(space, dataclasses.replace(config, sparsity=0.6), 0, CPU, name="mine")
    assert masks.load(space.masks / "mine.safetensors").sparsity == pytest.approx(0.5, abs=1e-5)


def test_stored_pixels_stitch_as_the_images_do(done: Workspace) -> None:
    store, (train, _) = PatchStore(done.patches), pipeline.open_data(done)
    found = store.concepts(1)
    stored = store.stitched(np.arange(STITCH.per_class, 2 * STITCH.per_class))
    decoded = stitch_class(found, train.load, STITCH, store.header.fill, 0)
    np.testing.assert_array_equal(decoded.pixels, stored.pixels)
    assert store.sources(found) is not None


def test_the_job_runs_with_its_store_at_an_address(space: Workspace) -> None:
    remote = dataclasses.replace(space, store="memory://bucket/job.zarr")
    pipeline.extract(remote, EXTRACT, 0, CPU)
    made = pipeline.stitch(remote, STITCH, 0)
    here = PatchStore(space.patches).stitched()
    np.testing.assert_array_equal(made.store.stitched().pixels, here.pixels)
    assert made.visible == pytest.approx(np.nanmean(here.visible, axis=0).tolist())
    pipeline.prune(remote, PruneConfig(per_class=4), 0, CPU, force=True)


def test_stitching_before_extracting_names_the_command(tmp_path: Path, tiny_images: Path) -> None:
    with pytest.raises(StoreError) as caught:
        pipeline.stitch(init(tmp_path / "space", tiny_images), STITCH, 0)
    assert "dopfast extract" in caught.value.hint


def test_extracting_before_training_names_the_command(tmp_path: Path, tiny_images: Path) -> None:
    with pytest.raises(ModelError) as caught:
        pipeline.extract(init(tmp_path / "space", tiny_images), EXTRACT, 0, CPU)
    assert "dopfast train" in caught.value.hint


def test_a_layer_that_does_not_exist_names_the_nearest(space: Workspace) -> None:
    other = dataclasses.replace(space, teacher=TeacherConfig("resnet20", layer="layer33"))
    with pytest.raises(ModelError) as caught:
        pipeline.extract(other, EXTRACT, 0, CPU, force=True)
    assert "layer3" in caught.value.hint


def test_a_store_of_other_images_is_refused(space: Workspace, tiny_copy: Path) -> None:
    next((tiny_copy / "train").rglob("*.png")).unlink()
    other = dataclasses.replace(space, data=dataclasses.replace(space.data, path=str(tiny_copy)))
    with pytest.raises(StoreError, match="other images"):
        pipeline.stitch(other, STITCH, 0)


def test_a_store_of_another_teacher_is_refused(space: Workspace) -> None:
    stranger = models.build("resnet20", 3, 99)
    models.save_weights(space.teacher_weights, stranger, {"model": "resnet20"})
    with pytest.raises(StoreError, match="another teacher"):
        pipeline.stitch(space, STITCH, 0)


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        ("resnet32", r"layer1\.3\.conv1\.weight has no mask"),
        ("resnet32_wide", r"conv1\.weight is \[32, 3, 3, 3\], its mask \[16, 3, 3, 3\]"),
        ("vgg19_cifar", r"conv1\.weight is not in the model"),
    ],
)
def test_a_mask_of_another_model_is_refused_with_the_difference(
    space: Workspace, model: str, difference: str
) -> None:
    name, kept = pipeline.open_mask(space, "")
    other = dataclasses.replace(space, model=dataclasses.replace(space.model, name=model))
    with pytest.raises(ModelError, match=difference):
        drain(pipeline.finetune(other, TRAIN, (name, kept), space.runs / "x", 0, CPU))
    assert not (space.runs / "x").exists()


def test_a_mask_of_other_initial_weights_is_refused_with_both_fingerprints(
    space: Workspace,
) -> None:
    name, kept = pipeline.open_mask(space, "")
    own = kept.about["init"]
    kept = dataclasses.replace(kept, about={**kept.about, "seed": 1})
    drawn = models.fingerprint(models.build("resnet20", 3, 1))
    with pytest.raises(StoreError, match=f"seed 1, fingerprint {own} instead of {drawn}"):
        drain(pipeline.finetune(space, TRAIN, (name, kept), space.runs / "x", 0, CPU))
    assert not (space.runs / "x").exists()


def test_a_mask_for_another_number_of_classes_is_refused(space: Workspace, tiny_copy: Path) -> None:
    name, kept = pipeline.open_mask(space, "")
    for part in ("train", "val"):
        shutil.rmtree(tiny_copy / part / "red")
    other = dataclasses.replace(space, data=dataclasses.replace(space.data, path=str(tiny_copy)))
    with pytest.raises(ModelError, match=r"linear\.weight is \[2, 64\], its mask \[3, 64\]"):
        drain(pipeline.finetune(other, TRAIN, (name, kept), space.runs / "x", 0, CPU))


def test_a_teacher_of_another_number_of_classes_is_refused(
    space: Workspace, tiny_copy: Path
) -> None:
    for part in ("train", "val"):
        shutil.rmtree(tiny_copy / part / "red")
    other = dataclasses.replace(space, data=dataclasses.replace(space.data, path=str(tiny_copy)))
    with pytest.raises(ModelError, match=r"linear\.weight \[3, 64\] instead of \[2, 64\]"):
        pipeline.extract(other, EXTRACT, 0, CPU, force=True)


def test_a_class_too_small_to_extract_from_is_told_at_once(tiny_copy: Path, tmp_path: Path) -> None:
    smallest = sorted((tiny_copy / "train").iterdir())[1]
    for path in sorted(smallest.iterdir())[3:]:
        path.unlink()
    train, _ = pipeline.open_data(init(tmp_path / "space", tiny_copy))
    assert pipeline.small_classes(train) == {smallest.name: 3}


@pytest.mark.parametrize("count", [0, 3])
def test_a_class_with_too_few_images_is_named(tmp_path: Path, tiny_copy: Path, count: int) -> None:
    smallest = sorted((tiny_copy / "train").iterdir())[1]
    for path in sorted(smallest.iterdir())[count:]:
        path.unlink()
    with pytest.raises(DataError, match=smallest.name):
        space = init(tmp_path / "space", tiny_copy)
        models.save_weights(
            space.teacher_weights, models.build("resnet20", 3, 0), {"model": "resnet20"}
        )
        pipeline.extract(space, EXTRACT, 0, CPU)


def test_an_unreadable_image_is_named_and_nothing_is_half_written(
    space: Workspace, tiny_copy: Path
) -> None:
    for path in (tiny_copy / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60].ljust(path.stat().st_size))
    other = dataclasses.replace(space, data=dataclasses.replace(space.data, path=str(tiny_copy)))
    with pytest.raises(DataError, match=r"cannot read the image .*\.png"):
        pipeline.extract(other, dataclasses.replace(EXTRACT, fill=1), 0, CPU, force=True)
    assert PatchStore(space.patches).header.fill == 117


def test_a_workspace_is_not_made_over_another(space: Workspace, tiny_images: Path) -> None:
    init(space.root, tiny_images)  # once more: the same
    settings = space.root / "dopfast.toml"
    settings.write_text(mended := settings.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(StoreError, match="is a workspace already"):
        init(space.root, tiny_images)
    assert settings.read_text() == mended


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no device 'gpu'"):
        pipeline.device_of("gpu")


def test_the_model_is_returned_as_it_was_scored(space: Workspace) -> None:
    _, kept, model = pipeline.prune(space, PruneConfig(criterion="snip", per_class=4), 0, CPU)
    assert isinstance(model, nn.Module)
    assert models.fingerprint(model) == kept.about["init"]
