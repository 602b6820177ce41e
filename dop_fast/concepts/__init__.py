"""ACE: segments, activations, clusters, concept activation vectors."""
