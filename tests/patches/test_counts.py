"""How much a network is scored on: exact counts, even chunks, and classes that have too little."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from little_store import CLASSES, denormal, gather

from dop_fast.config import DataConfig
from dop_fast.errors import DataError, StoreError
from dop_fast.images import ImageSet
from dop_fast.patches.material import KINDS
from dop_fast.stores import PatchStore
from dop_fast.types import ClassConcepts

BALANCED = tuple(kind for kind in KINDS if kind not in ("images-random", "less-patch"))


@pytest.mark.parametrize("per_class", [1, 5, 6])
@pytest.mark.parametrize("kind", BALANCED)
def test_every_class_gives_exactly_as_many_as_asked(
    kind: str, per_class: int, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    made = gather(kind, store, images, data, per_class=per_class)
    labels = [label for _, batch in made for label in batch.tolist()]
    assert Counter(labels) == dict.fromkeys(range(CLASSES), per_class)
    assert made.notes == ()


@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 7, 100])
def test_chunks_are_even_and_never_of_one(
    per_class: int, batch_size: int, images: ImageSet, data: DataConfig
) -> None:
    made = gather("ones", None, images, data, per_class=per_class, batch_size=batch_size)
    sizes = [len(labels) for _, labels in made]
    assert sum(sizes) == per_class * CLASSES
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)


def test_chunks_mix_the_classes(images: ImageSet, data: DataConfig) -> None:
    made = gather("ones", None, images, data, per_class=200, batch_size=100)
    for _, labels in made:
        assert (torch.bincount(labels, minlength=CLASSES) > 15).all()


def test_too_few_stitched_patches_say_how_to_make_more(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    with pytest.raises(StoreError, match=r"6 stitched patches .* 9 are asked") as caught:
        gather("stitched", store, images, data, per_class=9)
    assert "dopfast stitch --per-class 9 --force" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "have"), [("patches", 24), ("random-segments", 64), ("images", 12)]
)
def test_a_class_with_fewer_gives_all_of_them_repeatedly_and_is_named(
    kind: str, have: int, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    assert gather(kind, store, images, data, per_class=have).notes == ()
    made = gather(kind, store, images, data, per_class=have + 3)
    items = denormal(made, data)
    assert Counter(label for label, _ in items) == dict.fromkeys(range(CLASSES), have + 3)
    shown = Counter((label, pixels.tobytes()) for label, pixels in items)
    assert set(shown.values()) == {1, 2} and len(shown) == have * CLASSES
    (note,) = made.notes
    assert f"than {have + 3}" in note and f"blue ({have})" in note and f"red ({have})" in note


def test_a_class_with_fewer_concepts_is_named_and_one_without_is_refused(
    store: PatchStore, images: ImageSet, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    concepts = PatchStore.concepts

    def fewer(left: int) -> None:
        def cut(self: PatchStore, class_id: int) -> ClassConcepts:
            found = concepts(self, class_id)
            return replace(found, concepts=found.concepts[: left if class_id == 1 else 3])

        monkeypatch.setattr(PatchStore, "concepts", cut)

    fewer(2)
    made = gather("patches", store, images, data)
    (note,) = made.notes
    assert "fewer concepts than 3" in note and "green (2)" in note and "blue" not in note
    assert Counter(label for _, batch in made for label in batch.tolist())[1] == 5
    fewer(0)
    with pytest.raises(DataError, match="class green has nothing"):
        gather("patches", store, images, data)
