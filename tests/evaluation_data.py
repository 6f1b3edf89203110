"""Predictions and references to evaluate."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_pdddpm.commands.evaluate import main
from nnunet_pdddpm.demo.phantom import make_case, oblique_direction

SHAPE, SPACING = (14, 18, 16), (2.5, 1.0, 0.8)
LABELS = {'background': 0, 'organ': 1, 'lesion': 2}
REGIONS = {'background': 0, 'whole': [1, 2], 'lesion': 2}
OUTPUTS = ('evaluation.json', 'evaluation.csv', 'evaluation_reliability.svg')


def write(file: Path, array: np.ndarray, spacing=SPACING, origin=(3.0, -7.0, 11.0), direction=None) -> None:
    """An image (z, y, x) with an oblique direction; spacing in that order, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    image.SetDirection(direction or oblique_direction())
    sitk.WriteImage(image, str(file))


def soft(mask: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities (3, z, y, x) whose argmax is about the mask."""
    rng = np.random.default_rng(seed)
    channels = np.stack([gaussian_filter((mask == c).astype(float), 1) + 0.05 * rng.random(mask.shape)
                         for c in range(3)])
    return (channels / channels.sum(0)).astype(np.float16)


def variant(mask: np.ndarray, seed: int) -> np.ndarray:
    """Another plausible mask: moved by up to two voxels."""
    return np.roll(mask, tuple(np.random.default_rng(seed).integers(-1, 3, 2)), (1, 2))


@dataclass
class Data:
    """Folders of five cases and the arrays that were written into them."""
    root: Path
    references: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]

    @property
    def pred(self) -> Path:
        return self.root / 'pred'

    @property
    def ref(self) -> Path:
        return self.root / 'ref'

    @property
    def raters(self) -> Path:
        return self.root / 'raters'

    def describe(self, labels: dict[str, Any], **more: Any) -> None:
        dataset = {'labels': labels, 'file_ending': '.nii.gz', 'channel_names': {'0': 'T1'}, **more}
        (self.pred / 'dataset.json').write_text(json.dumps(dataset))
        (self.pred / 'plans.json').write_text(json.dumps({'label_manager': 'LabelManager'}))

    def add_probabilities(self) -> dict[str, np.ndarray]:
        arrays = {case: soft(mask, i) for i, (case, mask) in enumerate(self.predictions.items())}
        for case, array in arrays.items():
            np.savez_compressed(self.pred / f'{case}.npz', probabilities=array)
        return arrays

    def add_samples(self, number: int = 4) -> dict[str, np.ndarray]:
        arrays = {case: np.stack([variant(mask, 10 * i + s) for s in range(number)])
                  for i, (case, mask) in enumerate(self.predictions.items())}
        for case, masks in arrays.items():
            for s, mask in enumerate(masks):
                write(self.pred / 'samples' / f'{case}_s{s:02d}.nii.gz', mask)
        return arrays

    def add_raters(self, number: int = 3) -> dict[str, np.ndarray]:
        arrays = {case: np.stack([variant(mask, 100 * i + r) for r in range(number)])
                  for i, (case, mask) in enumerate(self.references.items())}
        for case, masks in arrays.items():
            for r, mask in enumerate(masks):
                write(self.raters / f'{case}__dr_{r}.nii.gz', mask)
        return arrays

    def evaluate(self, *flags: str, raters: bool = False) -> dict[str, Any]:
        """Run the command in this process; what evaluation.json holds."""
        main(['-pred', str(self.pred), '-ref', str(self.ref), '-np', '1', '--disable_progress_bar', *flags,
              *(['-raters', str(self.raters)] if raters else [])])

        def refuse(constant: str) -> None:
            raise AssertionError(f'{constant} is no JSON')
        return json.loads((self.pred / 'evaluation.json').read_text(), parse_constant=refuse)

    def partly(self, *flags: str, raters: bool = False) -> tuple[str, dict[str, Any]]:
        """Run the command, which must do what it can and then exit with one sentence; that, and evaluation.json."""
        with pytest.raises(SystemExit) as stop:
            self.evaluate(*flags, raters=raters)
        message = str(stop.value.code)
        assert message.startswith('Error: ') and '\n' not in message
        return message, json.loads((self.pred / 'evaluation.json').read_text())

    def fails(self, *flags: str, raters: bool = False) -> str:
        """Run the command, which must exit with one sentence and leave earlier results alone; the sentence."""
        for name in OUTPUTS:
            (self.pred / name).write_text('earlier')
        with pytest.raises(SystemExit) as stop:
            self.evaluate(*flags, raters=raters)
        assert all((self.pred / name).read_text() == 'earlier' for name in OUTPUTS)
        assert not list(self.pred.glob('.evaluation*'))
        message = str(stop.value.code)
        assert message.startswith('Error: ') and '\n' not in message
        return message


def phantoms(folder: Path) -> Data:
    """References of five phantoms, and masks that are off by some voxels, as nnUNetv2_predict leaves them."""
    references = {f'case_{i}': make_case(SHAPE, i)[1] for i in range(5)}
    made = Data(folder, references, {case: variant(mask, 7 + i) for i, (case, mask) in enumerate(references.items())})
    for case in references:
        write(made.ref / f'{case}.nii.gz', made.references[case])
        write(made.pred / f'{case}.nii.gz', made.predictions[case])
    made.describe(LABELS)
    return made


def of_points(shape: tuple[int, ...], *points: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for point in points:
        mask[point] = 1
    return mask
