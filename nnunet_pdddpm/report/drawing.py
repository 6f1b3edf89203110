"""Slices as small images inside the page, masks as outlines in SVG, uncertainty as a transparent layer."""
from __future__ import annotations

import base64
import io

import contourpy
import numpy as np
from PIL import Image

MAX_SIDE = 400
"""Pixels along the longer side of an embedded slice; larger ones are reduced. Outlines keep full resolution."""
LOSSLESS_BELOW = 128 * 128
"""Slices of fewer pixels are embedded without loss: they are shown much enlarged."""
UNCERTAINTY_COLOUR = (230, 30, 150)
UNCERTAINTY_LEVELS = 16
MAX_ALPHA = 0.8


def data_uri(image: Image.Image, kind: str, **options: object) -> str:
    """The image as a `data:` URI of the type `kind` (webp or png)."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def reduced(image: Image.Image) -> Image.Image:
    """The image, made smaller by averaging if its longer side exceeds MAX_SIDE."""
    factor = max(image.size) / MAX_SIDE
    if factor <= 1:
        return image
    return image.resize((max(1, round(image.width / factor)), max(1, round(image.height / factor))),
                        Image.Resampling.BOX)


def grey_layer(plane: np.ndarray, window: tuple[float, float]) -> str:
    """A slice (h, w) of the image as `data:` URI: black at window[0] and below, white at window[1] and above."""
    low, high = window
    grey = np.clip((plane - low) / (high - low), 0, 1) * 255
    image = reduced(Image.fromarray(grey.astype(np.uint8)))
    if image.width * image.height < LOSSLESS_BELOW:
        return data_uri(image, 'png', optimize=True)
    return data_uri(image, 'webp', quality=75)


def uncertainty_layer(plane: np.ndarray) -> str:
    """A slice (h, w) of the map, values in [0, 1], as `data:` URI: one colour, the more opaque the less certain."""
    image = reduced(Image.fromarray((np.clip(plane, 0, 1) * 255).astype(np.uint8)))
    levels = np.rint(np.asarray(image) / 255 * (UNCERTAINTY_LEVELS - 1)).astype(np.uint8)
    layer = Image.fromarray(levels)
    layer.putpalette(UNCERTAINTY_COLOUR * UNCERTAINTY_LEVELS)
    opacity = np.linspace(0, 255 * MAX_ALPHA, UNCERTAINTY_LEVELS).astype(np.uint8)
    return data_uri(layer, 'png', transparency=opacity.tobytes(), optimize=True)


def outline(mask: np.ndarray) -> str:
    """The boundary of a mask (h, w) as SVG path data in half pixels: pixel (i, j) fills (2j, 2i) to (2j + 2, 2i + 2).

    The lines run between the centres of a pixel inside and its neighbour outside, so corners are cut, and where the
    mask ends at the border of the slice the outline closes along it. '' for an empty mask.
    """
    if not mask.any():
        return ''
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    return ''.join(_path(np.rint(2 * np.asarray(line) - 1).astype(int)) for line in lines)


def _path(points: np.ndarray) -> str:
    """A closed line (n, 2) of (x, y), with only the points where it turns, as relative SVG path data."""
    steps = np.diff(points, axis=0)
    turns = np.any(steps[1:] != steps[:-1], axis=1)
    corners = points[np.concatenate([[True], turns, [False]])]
    relative = ' '.join(str(n) for n in np.diff(corners, axis=0).ravel())
    return f'M{corners[0, 0]} {corners[0, 1]}l{relative}z'.replace(' -', '-')
