"""Segments put together on one canvas: how many it takes, what shows, and what it looks like.

The functions of `cpu` are those of `reference`, to the pixel.
"""

from dop_fast.kernels.paste.cpu import cover, paint, visible

__all__ = ["cover", "paint", "visible"]
