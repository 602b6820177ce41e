"""Sanity checks of masks: how much of them is signal, and what controls keep.

Reliability: the scores of two halves of the material are compared, for more and more items.
Controls: those of Su et al. (2020) and Frankle et al. (2021), each against its original.
"""

from dop_fast.sanity.controls import compare, train
from dop_fast.sanity.reliability import measure
from dop_fast.sanity.study import Study, open_study, read

__all__ = ["Study", "compare", "measure", "open_study", "read", "train"]
