"""Labels and regions of a data set by their names."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


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
