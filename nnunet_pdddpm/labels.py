"""Labels and regions of a data set by their names, and where they are in a mask."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

Box = tuple[slice, ...]


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name of each label or region of a data set but background and ignore -> the values that it has in a mask."""
    labels = {name: tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
              for name, value in dataset_json['labels'].items() if name != 'ignore'}
    return {name: values for name, values in labels.items() if values != (0,)}


def label_channels(dataset_json: Mapping[str, Any], plans_manager: PlansManager) -> dict[str, int]:
    """Name of each label or region -> its channel in the network's output."""
    labels = foreground_labels(dataset_json)
    manager = plans_manager.get_label_manager(dict(dataset_json))
    if manager.has_regions:
        return {name: channel for channel, name in enumerate(labels)}
    return {name: manager.all_labels.index(values[0]) for name, values in labels.items()}


def boxes_of(labels: np.ndarray, regions: Iterable[tuple[int, ...]]) -> list[Box | None]:
    """The box around each region, given by its values, in a label map (z, y, x); None where it is not there."""
    value_boxes = dict(enumerate(ndimage.find_objects(labels), 1))
    boxes: list[Box | None] = []
    for values in regions:
        parts = [box for value in values if (box := value_boxes.get(value)) is not None]
        boxes.append(tuple(slice(min(part.start for part in along), max(part.stop for part in along))
                           for along in zip(*parts, strict=True)) if parts else None)
    return boxes
