"""Volumes as the page's script reads them: the image as one compressed picture, masks and map without loss."""
from __future__ import annotations

import base64
import colorsys
import io
import math
import zlib

import numpy as np
from PIL import Image

LOSSLESS_BELOW = 200_000
"""Images of fewer voxels are embedded without loss: they are shown much enlarged."""
UNCERTAINTY_COLOUR = (230, 30, 150)
UNCERTAINTY_LEVELS = 16
MAX_ALPHA = 0.8
COLOURS = ('#4cc9ff', '#ffd60a', '#4be38a', '#ff8c42', '#c0a6ff', '#4a8cff', '#b8f23a', '#ff9aa2')
"""Of outlines: each stands out on black and on grey, and none is close to another, to the uncertainty's or to white,
which the crosshair has."""
GOLDEN_ANGLE = 0.381966


def label_colours(number: int) -> list[str]:
    """As many colours, no two the same: `COLOURS`, then hues as far from each other as they come."""
    more = [colorsys.hls_to_rgb(i * GOLDEN_ANGLE % 1, (0.62, 0.8)[i % 2], 1) for i in range(number - len(COLOURS))]
    return [*COLOURS[:number], *('#' + ''.join(f'{round(255 * part):02x}' for part in rgb) for rgb in more)]


def picture(grey: np.ndarray) -> tuple[str, int]:
    """A volume (z, y, x) uint8 as one image, `data:` URI: its slices row by row; and how many are in a row."""
    depth, height, width = grey.shape
    columns = max(1, min(depth, round(math.sqrt(depth * height / width))))
    tiles = np.zeros((math.ceil(depth / columns) * columns, height, width), np.uint8)
    tiles[:depth] = grey
    sheet = tiles.reshape(-1, columns, height, width).swapaxes(1, 2).reshape(-1, columns * width)
    kind = 'png' if grey.size < LOSSLESS_BELOW else 'webp'
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, kind, **({'optimize': True} if kind == 'png' else {'quality': 75}))
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}', columns


def packed(values: np.ndarray) -> str:
    """Integers as base64 of their compressed bytes, little-endian: 8 bits each, or 16 if one needs them."""
    kind = '<u1' if values.max(initial=0) < 256 else '<u2'
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, kind).tobytes(), 9)).decode()


def levels(uncertainty: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as one of `UNCERTAINTY_LEVELS` numbers each, uint8."""
    return np.rint(np.clip(uncertainty, 0, 1) * (UNCERTAINTY_LEVELS - 1)).astype(np.uint8)


def grey_values(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities as uint8: 0 at window[0] and below, 255 at window[1] and above."""
    low, high = window
    return (np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
