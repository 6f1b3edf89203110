"""A prediction of phantoms as a report shows it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_pdddpm.demo.phantom import LABELS, make_case, write_image
from nnunet_pdddpm.files import identity
from nnunet_pdddpm.report import write_report

NASTY = 'fünf <script>document.title="taken"</script> & "quoted"'.replace('/', '∕')  # no slash in a file name
QUALITY = {'good': 0.97, 'poor': 0.61, 'fair 10': 0.8, NASTY: 0.9, 'unknown': None}
ORDER = ['unknown', 'poor', 'fair 10', NASTY, 'good']
VOLUMES = {'good': 8.0, 'poor': 12.3, 'fair 10': 30.0, NASTY: 0.5, 'unknown': 100.4}
SHAPE = (14, 40, 34)
HOT = (5, 12, 20)
COMMAND = 'nnUNetv2_pdddpm_predict -i "my images" --report'
SETTINGS = {'model': 'Dataset701_Phantom/PDDDPMTrainer__nnUNetPlans__3d_fullres/checkpoint_final.pth', 'fold': 3,
            'weights': '7d5ca183', 'start': 0.6, 'steps': 2, 'samples': 2, 'samples_from': 'chain', 'seed': 17}


def entry(case: str, quality: float | None, ml: float = 12.3) -> dict[str, Any]:
    """A case of pdddpm_summary.json; the organ's entry has no calibrated interval."""
    organ = {'volume_ml': 250.0, 'samples_low_ml': 240.0, 'samples_high_ml': 260.0}
    lesion = {'volume_ml': ml, 'volume_ml_mean': 1.01 * ml, 'volume_ml_sd': 0.05 * ml, 'volume_ml_low': 0.9 * ml,
              'volume_ml_high': 1.13 * ml, 'interval_level': 0.95, 'samples_low_ml': 0.8 * ml, 'samples_high_ml': ml,
              'volume_ml_stock': 0.98 * ml, 'components': 3, 'pairwise_dice': quality,
              'uncertain_share': 0.2}
    return {'case': case, 'estimated_dice': quality, 'uncertain_share': 0.08, 'seconds': 12.3,
            'order': {'by': 'estimated_dice', 'statement': ''},
            'num_samples': 2, 'settings': [SETTINGS, {**SETTINGS, 'fold': 4, 'weights': '11aa22bb', 'steps': 1}],
            'flags': ['lesion: 3 components'] if case == 'poor' else [], 'network_calls': {'denoiser': 8},
            'labels': {'organ': organ, 'lesion': lesion}}


def describe(folder: Path, entries: list[dict[str, Any]], reader: str = 'SimpleITKIO', ending: str = '.nii.gz',
             labels: dict[str, Any] = LABELS) -> None:
    """The JSON files of an output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = {'labels': labels, 'channel_names': {'0': 'phantom'}, 'file_ending': ending}
    plans = {'image_reader_writer': reader, 'dataset_name': 'Dataset701_Phantom'}
    summary = {'cases': [{'versions': {'nnunet-pdddpm': '0.1'}, 'mask': identity(folder / f'{entry["case"]}{ending}'),
                          **entry} for entry in entries]}
    for name, content in (('dataset', dataset), ('plans', plans), ('pdddpm_summary', summary)):
        (folder / f'{name}.json').write_text(json.dumps(content))


def uncertainty_map(labels: np.ndarray) -> np.ndarray:
    """Certain but for a blob at HOT, and a single voxel that is still less certain."""
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(labels.shape), HOT, strict=True)))
    uncertainty = np.clip(0.9 - distance / 4, 0, 1).astype(np.float32)
    uncertainty[1, 1, 1] = 1
    return uncertainty


def write_prediction(folder: Path, cases: list[str]) -> dict[str, list[Path]]:
    """Masks, stock masks and maps of phantoms; returns their images."""
    images = {}
    for seed, case in enumerate(cases):
        image, labels = make_case(SHAPE, seed)
        images[case] = [folder.parent / 'images' / f'{case}_0000.nii.gz']
        write_image(image, images[case][0])
        write_image(labels, folder / f'{case}.nii.gz')
        write_image(np.roll(labels, 2, 2), folder / 'presegmentation' / f'{case}.nii.gz')
        write_image(uncertainty_map(labels), folder / 'uncertainty' / f'{case}_uncertainty.nii.gz')
        if case == 'poor':
            for i in range(2):
                write_image(sample_of(labels, i), folder / 'samples' / f'{case}_s{i:02d}.nii.gz')
    return images


def sample_of(labels: np.ndarray, number: int) -> np.ndarray:
    """The mask moved; the second one has no lesion."""
    sample = np.roll(labels, number + 1, 1)
    return np.where((sample == 2) & (number == 1), 1, sample).astype(np.uint8)


def report_of_phantoms(folder: Path) -> tuple[Path, dict[str, list[Path]]]:
    """Output folder with its report, and the images of its cases."""
    images = write_prediction(folder, list(QUALITY))
    describe(folder, [entry(case, quality, VOLUMES[case]) for case, quality in QUALITY.items()])
    write_report(folder, images, COMMAND, '2026-11-29 18:02')
    return folder, images
