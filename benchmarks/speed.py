"""Seconds of prediction against stock nnU-Net's, at equal precision, with the models of the benchmark hippocampus.

In turn on one machine, in one process: the preprocessed image to logits and maps, with mirroring, without files. And
the export of a synthetic volume of 25 classes to files, which needs no model: `-export` measures and prints that alone.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.hippocampus import HIPPOCAMPUS, names
from machine import DEVICE, PLANS, commit, machine, results

OF_SAMPLES = {'mask_stock': 0.0, 'mask_blind': 0.0}
OF_BLIND = {'mask_stock': 0.0, 'mask_blind': 1.0}
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    'stock `nnUNetv2_predict`': ('stock', None),
    '`nnUNetv2_predict -tr PDDDPMTrainer`, blind mask': ('denoiser', None),
    **{f'8 samples, {steps} step{"s" if steps > 1 else ""}, {name}, all maps':
       ('denoiser', {**mask, 'samples_from': 'chain', 'start': 0.8, 'steps': steps, 'samples': 8})
       for name, mask in (('their mean as the mask', OF_SAMPLES), ('blind mask', OF_BLIND)) for steps in (1, 2)}}
"""Name -> network, and the sampling settings of `nnUNetv2_pdddpm_predict`; None: nnU-Net's own predictor."""
CASES, REPEATS, TRAINING_STEPS = 6, 3, 12
STEPS = ('training step of stock', 'training step of PDDDPM')
CLASSES, GRID, IMAGE = 25, (160, 128, 128), (240, 192, 192)
"""Of the volume that is exported: a CT scaled down, resampled from 1.5 to 1 mm."""


def timed(device: torch.device, do: Callable[[], Any]) -> float:
    """Seconds, until the device is done."""
    synchronise = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronise()
    start = time.perf_counter()
    do()
    synchronise()
    return time.perf_counter() - start


def predictors(work: Path) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Of every way: what predicts a preprocessed image."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor

    def of(network: str, settings: dict[str, Any] | None) -> Callable[[torch.Tensor], Any]:
        if settings is None:
            opened = HIPPOCAMPUS.open(work, network, [0], nnUNetPredictor)
            return opened.predict_logits_from_preprocessed_data
        predictor = HIPPOCAMPUS.open(work, network, [0], VolumePredictor, overrides=settings)
        predictor.bfloat16 = False  # the same precision for all
        return lambda image: predictor.predict_volume(image, case='case', stock=False).spread.maps()
    return {name: of(*way) for name, way in WAYS.items()}


def measure(work: Path, file: Path) -> None:
    """Seconds of every way, precision, repeat and case, as a file."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from volumes import cases
    opened = HIPPOCAMPUS.open(work, 'stock', [0], nnUNetPredictor)
    images = [image for _, image, _ in cases(opened, work, 'Ts', names(work)[:CASES])]
    device, all_ways = torch.device(DEVICE), predictors(work)
    seconds: dict[str, dict[str, list[float]]] = {}
    # nnU-Net autocasts by itself on a GPU
    precisions = {'float16': nullcontext} if device.type == 'cuda' else {
        'float32': nullcontext, 'bfloat16': lambda: torch.autocast('cpu', torch.bfloat16)}
    for precision, context in precisions.items():
        of = seconds[precision] = {name: [] for name in all_ways}
        for repeat in range(REPEATS + 1):
            for name, predict in all_ways.items():
                with context(), torch.inference_mode():
                    mean = float(np.mean([timed(device, partial(predict, image)) for image in images]))
                if repeat:  # the first one is not counted
                    of[name].append(mean)
        seconds[precision].update(training_steps(work, device, context))
    file.write_text(json.dumps(seconds))


def training_steps(work: Path, device: torch.device, context: Callable[[], AbstractContextManager[Any]]
                   ) -> dict[str, list[float]]:
    """Seconds of a training step on one batch, of stock and PDDDPM in turn."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_pdddpm.training.trainer import PDDDPMTrainer

    class nnUNetTrainerSpeed(nnUNetTrainer):
        """With a folder of its own."""

    class PDDDPMTrainerSpeed(PDDDPMTrainer):
        """With a folder of its own."""
    os.environ['nnUNet_n_proc_DA'] = '0'
    folder = HIPPOCAMPUS.preprocessed(work)
    plans, description = (json.loads((folder / f'{name}.json').read_text()) for name in (PLANS, 'dataset'))
    trainers: dict[str, Any] = {STEPS[0]: nnUNetTrainerSpeed, STEPS[1]: PDDDPMTrainerSpeed}
    for name, kind in trainers.items():
        trainers[name] = trainer = kind({**plans, 'continue_training': False}, HIPPOCAMPUS.configuration, 0,
                                        description, device)
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
        trainer.on_train_epoch_start()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(3 + TRAINING_STEPS):
        for name, trainer in trainers.items():
            with context():
                taken = timed(device, partial(trainer.train_step, batch))
            if step >= 3:
                seconds[name].append(taken)
    return seconds


def synthetic_logits(generator: torch.Generator, common: torch.Tensor) -> np.ndarray:
    """Of a sample with 25 labels, (C, Z, Y, X) float16: smooth fields, most of them common to all samples."""
    own = torch.randn(common.shape, generator=generator)
    fields = torch.nn.functional.interpolate((8 * common + own)[None], GRID, mode='trilinear')[0]
    return (fields - fields.amax(0)).clamp_(-13.8).half().numpy()


def export_seconds() -> dict[str, float]:
    """CPU seconds of one thread: stock nnU-Net's export of a mask; here that of mask and entropy map; of 8 samples."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_pdddpm.inference.export import CaseExport, Outputs
    planned = {'architecture': {}, 'spacing': [1.5] * 3, 'resampling_fn_probabilities': 'resample_data_or_seg_to_shape',
               'resampling_fn_probabilities_kwargs': {'is_seg': False, 'order': 1, 'order_z': 0,
                                                      'force_separate_z': None}}
    plans = PlansManager({'configurations': {'3d_fullres': planned}, 'image_reader_writer': 'SimpleITKIO',
                          'label_manager': 'LabelManager', 'transpose_forward': [0, 1, 2],
                          'transpose_backward': [0, 1, 2]})
    labels = {'background': 0, **{f'label {i}': i for i in range(1, CLASSES)}}
    description = {'labels': labels, 'file_ending': '.nii.gz'}
    properties = {'spacing': [1.0] * 3, 'bbox_used_for_cropping': [[0, n] for n in IMAGE],
                  'shape_before_cropping': IMAGE, 'shape_after_cropping_and_before_resampling': IMAGE,
                  'sitk_stuff': {'spacing': [1.0] * 3, 'origin': [0.0] * 3, 'direction': np.eye(3).ravel().tolist()}}
    generator = torch.Generator().manual_seed(0)
    common = torch.randn((CLASSES, *(n // 32 for n in GRID)), generator=generator)
    mask, *samples = (synthetic_logits(generator, common) for _ in range(9))
    seconds = {}
    torch.set_num_threads(1)

    def measured(name: str, do: Callable[[], Any]) -> None:
        start = time.process_time()
        do()
        seconds[name] = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        export = CaseExport(plans, plans.get_configuration('3d_fullres'), description, properties, Path(folder), 'case',
                            Outputs(uncertainty='entropy', samples=True))
        measured('stock', lambda: export_prediction_from_logits(
            mask, properties, export.configuration_manager, plans, description, f'{folder}/stock', False, 1))
        measured('rest', lambda: export.write_prediction(mask, None, {'uncertainty': np.zeros(GRID, np.float16)}))
        measured('samples', lambda: [export.sample(of, number) for number, of in enumerate(samples)])
    return seconds


def export_in_words() -> str:
    """What the export of a synthetic volume takes."""
    of = export_seconds()
    return (f'Export of a synthetic volume of {CLASSES} classes, {GRID} voxels resampled to {IMAGE}, to files, on one '
            f'thread: mask and entropy map {of["rest"]:.1f} s, 8 samples {of["samples"]:.1f} s, together '
            f'{(of["rest"] + of["samples"]) / of["stock"]:.2f} times the {of["stock"]:.1f} s of stock nnU-Net\'s mask.')


def write_table(seconds: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The page."""
    lines = []
    for precision, of in seconds.items():
        for name, values in of.items():
            ratio = np.array(values) / np.array(of[STEPS[0] if name in STEPS else next(iter(WAYS))])
            lines.append(f'| {precision} | {name} | {np.median(values):.2f} | {np.median(ratio):.2f} '
                         f'({ratio.min():.2f} to {ratio.max():.2f}) |')
    file.write_text('\n'.join([
        '# Seconds of prediction', '', '    .venv/bin/python benchmarks/speed.py -o WORK', '',
        f'Commit {commit()}. Machine: {machine()}. Models of fold 0 of [hippocampus.md](hippocampus.md), {CASES} test '
        f'cases, {REPEATS} repeats in turn after one that is not counted: median, and the range of ratios. From the '
        "preprocessed image to logits and all maps, with mirroring, in one process; nnU-Net's reading, resampling and "
        'writing of files are not in it. Everything is in the precision named, chains and blind mask, too. Training: '
        f'{TRAINING_STEPS} steps in turn on one batch of two patches, without data loading.',
        '', '| precision | | seconds a case, or a step | of stock |', '|---|---|---|---|', *lines,
        '', export_in_words(), '']))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', help='work folder of the benchmark hippocampus')
    parser.add_argument('-export', action='store_true', help='print what export of a synthetic volume takes, no more')
    parser.add_argument('-table', default=str(results() / 'speed.md'), help='the table to write')
    args = parser.parse_args()
    if args.export:
        print(export_in_words())
        return
    if not args.o:
        parser.error('the following argument is required: -o')
    work = Path(args.o).resolve()
    os.environ.update(HIPPOCAMPUS.environment(work))
    sys.path.append(str(Path(__file__).parent / 'trainers'))
    file = work / 'speed.json'
    if not file.is_file():
        measure(work, file)
    write_table(json.loads(file.read_text()), Path(args.table))


if __name__ == '__main__':
    main()
