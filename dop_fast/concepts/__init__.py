"""ACE: segments, activations, clusters, concept activation vectors."""

from dop_fast.concepts.extract import Extractor

__all__ = ["Extractor"]
