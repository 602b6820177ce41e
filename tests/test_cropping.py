import numpy as np
import pytest

from dop_fast import seeding
from dop_fast.patches import cropping


def test_a_guaranteed_crop_keeps_half_of_the_patch_where_the_published_may_keep_nothing() -> None:
    valid = np.zeros((60, 60), np.bool_)
    valid[5:13, 40:52] = np.random.default_rng(0).random((8, 12)) < 0.8
    kept = {"published": [], "guaranteed": []}
    for augment, shares in kept.items():
        for draw in range(300):
            rng = seeding.stream(0, "box", draw)
            top, left, height, width = cropping.choose_box(valid, augment, rng)
            inside = valid[top : top + height, left : left + width].sum()
            shares.append(inside / valid.sum())
            assert 0 <= top <= 60 - height and 0 <= left <= 60 - width
    assert min(kept["published"]) == 0
    assert min(kept["guaranteed"]) >= cropping.SHARE
    crops = {
        cropping.choose_box(valid, "guaranteed", seeding.stream(1, "box", i)) for i in range(50)
    }
    assert len(crops) > 45  # still random, not the whole image


@pytest.mark.parametrize(("share", "expected"), [(15, 0.146), (50, 0.274), (80, 0.325)])
def test_published_crops_miss_the_patch_as_often_as_was_simulated(
    share: int, expected: float
) -> None:
    side, missed = round(224 / share**0.5), 0
    for draw in range(4000):
        rng = seeding.stream(0, "square", draw)
        valid = np.zeros((224, 224), np.bool_)
        top, left = rng.integers(224 - side + 1, size=2)
        valid[top : top + side, left : left + side] = True
        y, x, height, width = cropping.choose_box(valid, "published", rng)
        missed += not valid[y : y + height, x : x + width].any()
    assert abs(missed / 4000 - expected) < 0.03  # four standard deviations of this many draws
