"""ACE of one class after the other: from images to ranked concepts."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import nn

from dop_fast import ranks, seeding, threads
from dop_fast.concepts.activations import Probe
from dop_fast.concepts.cavs import RandomSets, hold, p_value, tcav
from dop_fast.concepts.clusters import Cluster, cluster
from dop_fast.concepts.features import Exact, Features, Roi
from dop_fast.concepts.randoms import Pool, remembered
from dop_fast.concepts.segments import segment
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.errors import DataError
from dop_fast.images import ImageSet
from dop_fast.models import bottleneck, fingerprint
from dop_fast.precision import in_bf16
from dop_fast.types import Array, ClassConcepts, Concept, Segments, Track, untracked

FEWEST_IMAGES = 8
"""Images a class needs to be split into some to find concepts in and others to score them on."""
APART = ("tcav_images", "clusters", "min_members", "cav", "gradient", "null", "alpha", "top")
"""Settings without any part in the activations of random sets."""


@dataclass(eq=False)
class Extractor:
    """Finds the concepts that `teacher` holds for the classes of `images`.

    An empty `layer` becomes the teacher's bottleneck. What one class gives depends on the seed
    and on the class alone, not on the classes extracted before. `cache`: where activations of the
    random sets are stored, and read again by an extraction that would make the same. `track` sees
    the classes that they are made of.
    """

    teacher: nn.Module
    layer: str
    images: ImageSet
    data: DataConfig
    config: ExtractConfig
    seed: int
    device: torch.device
    cache: Path | str | None = None
    track: Track = untracked

    def __post_init__(self) -> None:
        if not self.layer:
            side = self.images.size
            self.layer = bottleneck(self.teacher, torch.zeros(1, 3, side, side))

    @cached_property
    def features(self) -> Features:
        """What all activations come from."""
        kind = Roi if self.config.features == "roi" else Exact
        probe = Probe(self.teacher, self.layer, self.device, self.config.amp)
        return kind(probe, self.data, self.config)

    def extract(self, class_id: int) -> ClassConcepts:
        """Return all segments of the class's discovery images, and its `config.top` concepts.

        The most important concept stands first. Concepts that are not significant are left out,
        unless none is. Raises DataError where the class has fewer than `FEWEST_IMAGES` images.
        """
        discovery, held_out = self.split(class_id)
        sources = self.images.load(discovery)
        segments = segment(sources, self.config)
        if not len(segments):
            raise DataError(
                f"class {self.images.classes[class_id]} has no segment of the size asked",
                f"ask for less than {self.config.min_area:g}: dopfast extract --min-area 0",
            )
        photos = self.images.load(held_out)
        with threads.single(), threadpool_limits(1):  # of BLAS and of scikit-learn
            # first: sees segments of all classes
            null, against = self.background(class_id, photos)
            found = self._concepts(class_id, sources, segments, null, against)
        placed = replace(segments, image=discovery[segments.image].astype(np.int32))
        return ClassConcepts(class_id, placed, self._best(found))

    def _concepts(
        self, class_id: int, sources: Array, segments: Segments, null: Array, against: RandomSets
    ) -> list[tuple[Concept, Cluster]]:
        seen = self.features.segments(sources, segments)
        clusters = cluster(
            seen.pooled.cpu().numpy(), segments.image, self.config, self._derive(class_id, "kmeans")
        )
        found = []
        for number, group in enumerate(clusters):
            seed = self._derive(class_id, "separate", number)
            runs, accuracy = tcav(seen.rows(group.members), against, self.config.cav, seed)
            p = p_value(runs, null)
            concept = Concept(group.members, float(runs.mean()), runs, p, accuracy)
            found.append((concept, group))
        return found

    def split(self, class_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the class's images to find concepts in, and others to score them on, sorted.

        A class with too few of them for both is split in proportion.
        """
        config = self.config
        images = self.images.of_class(class_id)
        if len(images) < FEWEST_IMAGES:
            raise DataError(
                f"class {self.images.classes[class_id]} has {len(images)} images to extract "
                f"concepts from, {FEWEST_IMAGES} are needed",
                "add images of that class, or leave its folder out",
            )
        asked = config.images + config.tcav_images
        share = round(config.images * min(1, len(images) / asked))
        count = min(max(share, 4), len(images) - 1)
        order = seeding.stream(self.seed, "extract", class_id, "images").permutation(images)
        return np.sort(order[:count]), np.sort(order[count : count + config.tcav_images])

    def _derive(self, class_id: int, *path: str | int) -> int:
        return seeding.derive(self.seed, "extract", class_id, *path)

    @cached_property
    def random(self) -> Pool:
        """Activations of random segments or photos of all classes [n d], and their classes [n].

        Even without its own part, a class finds enough of them here for all of its random sets.
        Ranks make it together: each has to ask for it, before classes are dealt out.
        """
        if len(self.images.classes) < 2:
            raise DataError(
                "concepts are held against other classes, and there is only one class",
                "add a folder of images of something else",
            )
        key = self._random_key() if self.cache else {}
        rows, labels = remembered(self.cache, key, self._new_random)
        return rows.to(self.device), labels

    def _random_key(self) -> dict[str, Any]:
        """Return everything that activations of the random sets depend on."""
        config = self.config.to_dict()
        return {
            "teacher": fingerprint(self.teacher),
            "layer": self.layer,
            "images": self.images.fingerprint,
            "seed": self.seed,
            "device": self.device.type,
            "bf16": in_bf16(self.device, self.config.amp),
            "entry": [list(self.data.mean), list(self.data.std)],
            "config": {name: config[name] for name in config if name not in APART},
        }

    def _new_random(self) -> Pool:
        names = self.images.classes
        classes, needed = len(names), (self.config.random_sets + 1) * self.config.max_members
        each, share = -(-needed // (classes - 1)), ranks.share(range(classes))
        seen = self.track(
            share, lambda i: f"random {self.config.negatives}: {names[i]}", len(share)
        )
        parts = ranks.collect([self._random_of(class_id, each).cpu() for class_id in seen])
        return torch.cat(parts), np.repeat(np.arange(classes), [len(part) for part in parts])

    def _random_of(self, class_id: int, count: int) -> torch.Tensor:
        rng = seeding.stream(self.seed, "extract", class_id, "pool")
        images = rng.permutation(self.images.of_class(class_id))
        if self.config.negatives == "photos":
            photos = self.images.load(images[:count])
            with threads.single():
                return self.features.photos(photos)
        sources = self.images.load(images[: min(count, self.config.images)])
        segments = segment(sources, self.config)
        chosen = rng.permutation(len(segments))[:count]
        with threads.single():
            seen = self.features.segments(sources, segments.select(np.sort(chosen)))
            return seen.rows(np.arange(len(chosen)))

    def background(self, class_id: int, photos: Array) -> tuple[Array, RandomSets]:
        """Return the TCAV scores to beat [s], and the random sets they are taken over.

        Gradients are those of `photos` uint8[t h w 3]. For two random sets, each as likely the
        concept, a score above one half is as likely as one below. ACE's single random concept
        scores by its own luck instead: two of them agree on half of the significant concepts.
        """
        rows, labels = self.random
        size, sets = self.config.max_members, self.config.random_sets + 1
        others = np.flatnonzero(labels != class_id)
        rng = seeding.stream(self.seed, "extract", class_id, "random")
        rounds = -(-size * sets // len(others))  # more than one: too few for all sets to differ
        drawn = np.concatenate([rng.permutation(others) for _ in range(rounds)])[: size * sets]
        groups = rows[torch.from_numpy(drawn).to(rows.device)].reshape(sets, size, -1)
        gradients = self.features.gradients(photos, class_id)
        against = hold(groups[1:], gradients)
        if self.config.null == "half":
            return np.full(sets - 1, 0.5), against
        null, _ = tcav(groups[0], against, self.config.cav, self._derive(class_id, "null"))
        return null, against

    def _best(self, found: list[tuple[Concept, Cluster]]) -> tuple[Concept, ...]:
        """Rank by mean TCAV, then CAV accuracy, then tightness; keep the significant ones."""
        order = sorted(found, key=lambda one: (-one[0].tcav, -one[0].cav_accuracy, one[1].cost))
        ranked = [concept for concept, _ in order]
        kept = [concept for concept in ranked if concept.significant(self.config.alpha)]
        return tuple((kept or ranked)[: self.config.top])
