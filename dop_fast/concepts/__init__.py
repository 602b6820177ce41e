"""ACE: segments, activations, clusters, concept activation vectors."""

from dop_fast.concepts.extract import FEWEST_IMAGES, Extractor

__all__ = ["FEWEST_IMAGES", "Extractor"]
