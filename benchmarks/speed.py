"""Seconds of prediction against stock nnU-Net's, at equal precision: the hippocampus, and MSLesion, a volume of many
tiles, with models that are trained for a moment.

In turn on one machine, in one process: the preprocessed image to logits and maps, with mirroring, without files. With
the export that `speed_synthetic.py` measures.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.hippocampus import HIPPOCAMPUS
from datasets.hippocampus import prepare as prepare_hippocampus
from machine import DEVICE, PLANS, timed
from matplotlib.figure import Figure
from nnunet import MEAN_OF_SAMPLES, Dataset, find_data
from page import markdown, write

from nnunet_pdddpm.cpu import cpu_has_bfloat16

STAGES = ('prepare', 'measure', 'table')
OF_BLIND = {'mask_stock': 0.0, 'mask_blind': 1.0}
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    'stock `nnUNetv2_predict`': ('stock', None),
    '`nnUNetv2_predict -tr PDDDPMTrainer`, blind mask': ('denoiser', None),
    **{f'8 samples, {steps} step{"s" if steps > 1 else ""}, {name}, all maps':
       ('denoiser', {**mask, 'samples_from': 'chain', 'start': 0.8, 'steps': steps, 'samples': 8})
       for name, mask in (('their mean as the mask', MEAN_OF_SAMPLES), ('blind mask', OF_BLIND)) for steps in (1, 2)},
    '8 samples, thresholds of the blind mask, which is the mask, all maps':
        ('denoiser', {**OF_BLIND, 'samples_from': 'blind', 'samples': 8})}
"""Name -> network, and the sampling settings of `nnUNetv2_pdddpm_predict`; None: nnU-Net's own predictor."""
LESIONS = Dataset(6, 'MSLesion', '3d_fullres', 'Benchmark', (8, 16, 32, 64),
                  (('batch_size', 2), ('patch_size', [96, 96, 96])), (1, 1), (20, 20), one_thread=False)
DATASETS = (replace(HIPPOCAMPUS, epochs=(1, 1), iterations=(20, 20)), LESIONS)
CASES, REPEATS, TRAINING_STEPS = {'Hippocampus': 6, 'MSLesion': 1}, {'Hippocampus': 3, 'MSLesion': 2}, 12
EXPORT = 'speed_export.json'
"""File of what needs no trained model."""
STEPS = ('training step of stock', 'training step of PDDDPM')
GOALS = {**{name: 1.25 for name in METHODS if name.startswith('8 samples, 1 step,')}, list(METHODS)[1]: 2.05,
         STEPS[1]: 1.1}
"""Row -> how many times stock's time it should take at most."""


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, args.data)
    for dataset in DATASETS if 'measure' in args.stages else ():
        if not (file := file_of(work, dataset)).is_file():
            measure(work, dataset, file)
    if 'measure' in args.stages and not (file := work / EXPORT).is_file():
        from speed_synthetic import export_seconds
        file.write_text(json.dumps(export_seconds()))
    if 'table' in args.stages:
        write_page(work, args.page)


def file_of(work: Path, dataset: Dataset) -> Path:
    """Of a data set's measurement."""
    return work / f'speed_{dataset.name}.json'


def prepare(work: Path, data: str | None) -> None:
    """Data planned and preprocessed; both models of fold 0 trained for a moment: their masks are worth nothing."""
    prepare_hippocampus(work, find_data(data, HIPPOCAMPUS.title, 'dataset.json'))
    if not LESIONS.is_prepared(work):
        source = find_data(data, LESIONS.title, 'dataset.json')
        shutil.copytree(source, LESIONS.raw(work), dirs_exist_ok=True)
        cases = sorted(file.name[:-len('.nii.gz')] for file in (source / 'labelsTr').glob('*.nii.gz'))
        LESIONS.plan(work, json.loads((source / 'dataset.json').read_text()), [(cases[1:], cases[:1])])
    for dataset in DATASETS:
        for network in ('stock', 'denoiser'):
            dataset.train(work, network, 0)


def predictors(work: Path, dataset: Dataset) -> tuple[list[torch.Tensor], dict[str, Callable[[torch.Tensor], Any]]]:
    """Preprocessed images of a data set; and of every method what predicts one."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor

    def of(network: str, settings: dict[str, Any] | None) -> Callable[[torch.Tensor], Any]:
        if settings is None:
            return dataset.open(work, network, [0], nnUNetPredictor).predict_logits_from_preprocessed_data
        predictor = dataset.open(work, network, [0], VolumePredictor, overrides=settings)
        predictor.bfloat16 = False  # the same precision for all
        return lambda image: predictor.predict_volume(image, case='case', stock=False).spread.maps()
    stock = dataset.open(work, 'stock', [0], nnUNetPredictor)
    return images(stock, work, dataset), {name: of(*method) for name, method in METHODS.items()}


def images(predictor: Any, work: Path, dataset: Dataset) -> list[torch.Tensor]:
    """The first test cases, preprocessed; of a data set without any the first others."""
    raw, configuration = dataset.raw(work), predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    folder = next(raw / name for name in ('imagesTs', 'imagesTr') if (raw / name).is_dir())
    found, ending = [], '_0000.nii.gz'
    for first in sorted(folder.glob(f'*{ending}'))[:CASES[dataset.name]]:
        channels = [str(file) for file in sorted(folder.glob(f'{first.name[:-len(ending)]}_????.nii.gz'))]
        image, *_ = preprocessor.run_case(channels, None, predictor.plans_manager, configuration,
                                          predictor.dataset_json)
        found.append(torch.from_numpy(np.asarray(image)))
    return found


def measure(work: Path, dataset: Dataset, file: Path) -> None:
    """Seconds of every precision, method, repeat and case, as a file."""
    dataset.enter(work)
    os.environ['nnUNet_n_proc_DA'] = '0'
    device, (all_images, all_methods) = torch.device(DEVICE), predictors(work, dataset)
    seconds: dict[str, dict[str, list[float]]] = {}
    # nnU-Net autocasts by itself on a GPU
    precisions = {'float16': nullcontext} if device.type == 'cuda' else {
        'float32': nullcontext, **({'bfloat16': lambda: torch.autocast('cpu', torch.bfloat16)} if cpu_has_bfloat16()
                                   else {})}
    not_counted = int(dataset != LESIONS)  # a first call takes longer, which does not matter where all do
    for precision, context in list(precisions.items())[:1 if dataset == LESIONS else None]:  # which take long
        of = seconds[precision] = {name: [] for name in all_methods}
        for repeat in range(REPEATS[dataset.name] + not_counted):
            for name, predict in all_methods.items():
                with context(), torch.inference_mode():
                    mean = float(np.mean([timed(device, partial(predict, image)) for image in all_images]))
                if repeat >= not_counted:
                    of[name].append(mean)
        seconds[precision].update(training_steps(work, dataset, device, context))
    file.write_text(json.dumps(seconds))


def training_steps(work: Path, dataset: Dataset, device: torch.device,
                   context: Callable[[], AbstractContextManager[Any]]) -> dict[str, list[float]]:
    """Seconds of a training step on one batch, of stock and PDDDPM in turn."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_pdddpm.training.trainer import PDDDPMTrainer

    class nnUNetTrainerSpeed(nnUNetTrainer):
        """With a folder of its own."""

    class PDDDPMTrainerSpeed(PDDDPMTrainer):
        """With a folder of its own."""
    folder = dataset.preprocessed(work)
    plans, description = (json.loads((folder / f'{name}.json').read_text()) for name in (PLANS, 'dataset'))
    trainers: dict[str, Any] = {STEPS[0]: nnUNetTrainerSpeed, STEPS[1]: PDDDPMTrainerSpeed}
    for name, kind in trainers.items():
        trainers[name] = trainer = kind({**plans, 'continue_training': False}, dataset.configuration, 0, description,
                                        device)
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


def draw(measured: list[tuple[str, str, dict[str, list[float]]]], file: Path) -> None:
    """Figure of the time of every method, over that of stock in the same repeat, by data set and precision."""
    names = list(METHODS)
    figure = Figure(figsize=(8, 3), layout='constrained')
    axis = figure.subplots()
    for number, (dataset, precision, seconds) in enumerate(measured):
        for y, name in enumerate(names):
            ratio = np.array(seconds[name]) / np.array(seconds[names[0]])
            at, label = -y + 0.2 * (1 - number), f'{dataset}, {precision}' if y == 0 else None
            axis.plot([ratio.min(), ratio.max()], [at, at], color=f'C{number}', linewidth=1.5)
            axis.plot(np.median(ratio), at, 'os^'[number], color=f'C{number}', markersize=5, label=label)
    axis.set_yticks(range(0, -len(names), -1), [name.replace('`', '') for name in names], fontsize=7)
    axis.set_xlim(0)
    axis.set_xlabel('time of a prediction, stock nnU-Net with mirroring = 1', fontsize=8)
    axis.tick_params('x', labelsize=7)
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def goals_in_words(ratios: dict[str, list[float]]) -> str:
    """Which of the `GOALS` are reached in every data set and precision; `ratios`: row -> its medians, to stock."""
    said = [f'- {name}: at most {most}: {"reached" if max(ratios[name]) < most + 0.005 else "**missed**"} '
            f'({min(ratios[name]):.2f} to {max(ratios[name]):.2f})' for name, most in GOALS.items()]
    return '\n'.join(['Goals, in times of stock, and the medians of all data sets and precisions:', '', *said])


def write_page(work: Path, file: Path) -> None:
    """Of what is measured."""
    from speed_synthetic import export_in_words
    measured = [(dataset.name, precision, seconds) for dataset in DATASETS
                for precision, seconds in json.loads(file_of(work, dataset).read_text()).items()]
    rows, ratios = [], dict[str, list[float]]()
    for dataset, precision, seconds in measured:
        for name, values in seconds.items():
            ratio = np.array(values) / np.array(seconds[STEPS[0] if name in STEPS else next(iter(METHODS))])
            ratios.setdefault(name, []).append(float(np.median(ratio)))
            rows.append([dataset, precision, name, f'{np.median(values):.2f}',
                         f'{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})'])
    draw(measured, file.with_suffix('.png'))
    write(file, 'speed', figure=f'![Time over that of stock]({file.stem}.png)',
          cases=CASES['Hippocampus'], repeats=REPEATS['Hippocampus'], lesion_cases=CASES['MSLesion'],
          lesion_repeats=REPEATS['MSLesion'],
          iterations=LESIONS.iterations[0], steps=TRAINING_STEPS,
          table=markdown(['data', 'precision', '', 'seconds a case, or a step', 'of stock'], rows),
          goals=goals_in_words(ratios),
          export=export_in_words(json.loads((work / EXPORT).read_text())))
