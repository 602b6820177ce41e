"""Segments put together on one canvas: how many it takes, and what it looks like.

The functions of `cpu` are those of `reference`, to the pixel.
"""

from dop_fast.kernels.paste.cpu import cover, paint

__all__ = ["cover", "paint"]
