import pytest
import torch
from small_networks import chunks, plain, same, score

from dop_fast import masks
from dop_fast.errors import ConfigError


def test_each_layer_keeps_as_many_weights_as_the_mask_it_is_like() -> None:
    like = masks.keep_top(score("snip", plain(), chunks(8)), 0.8)
    drawn = score("same-densities", plain(), (), like=like.masks)
    found = masks.keep_top(drawn, like.sparsity)
    assert [row.kept for row in found.layers()] == [row.kept for row in like.layers()]
    assert not same(found.masks, like.masks)


def test_the_places_are_drawn_by_the_seed() -> None:
    like = {name: torch.rand_like(w) < 0.5 for name, w in score("random", plain(), ()).items()}
    one, other = (score("same-densities", plain(), (), like=like) for _ in range(2))
    assert same(one, other)


def test_without_a_mask_to_be_like_it_says_so() -> None:
    with pytest.raises(ConfigError, match="needs a mask to be like"):
        score("same-densities", plain(), ())
