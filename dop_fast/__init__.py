"""dopfast: data-aware one-shot pruning at initialisation with discriminative image patches."""

__version__ = "0.1.0"
