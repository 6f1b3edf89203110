"""Time and memory of `nnUNetv2_pdddpm_predict -samples 8 --uncertainty` against `nnUNetv2_predict`, and where it goes.

Hippocampus with the models of `hippocampus.py`; MSLesion (182 x 218 x 182 voxels, three channels) with models that are
trained here, briefly. Both commands with their defaults, in turn on the same machine.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compatibility import LESION, RUNS, measured
from compatibility import prepare as prepare_lesions
from hippocampus import (
    CONFIGURATION,
    DATASET,
    HERE,
    PDDDPM_TRAINER,
    PLANS,
    STOCK_TRAINER,
    nnunet_environment,
    train,
)

SURE = (1.0, 0.999, 0.9)
DIFF_UNET = 46.6 / (8 * 0.46)  # arithmetic against stock nnU-Net's with mirroring, as counted in the design


class Subject(NamedTuple):
    """A data set, its models, and how much of it is predicted."""
    dataset: str
    stock: str
    refined: str
    cases: int
    repeats: int


SUBJECTS = (Subject(DATASET, STOCK_TRAINER, PDDDPM_TRAINER, 10, 3),
            Subject(LESION, 'nnUNetTrainerLesions', 'PDDDPMTrainerLesions', 1, 2))


def model(work: Path, dataset: str, trainer: str) -> Path:
    """Its folder."""
    return work / 'nnUNet_results' / dataset / f'{trainer}__{PLANS}__{CONFIGURATION}'


def prepare(work: Path, data: str | None) -> None:
    """MSLesion and its models, if they are not there."""
    prepare_lesions(work, data, [run for run in RUNS if run.dataset == LESION])
    subject = SUBJECTS[1]
    for trainer in (subject.stock, subject.refined):
        train(work, trainer, 0, LESION, nnUNet_pdddpm_presegmenter=subject.stock)


def images_of(work: Path, subject: Subject) -> Path:
    """A folder with the images that are predicted."""
    images = work / 'speed' / subject.dataset / 'images'
    if not images.is_dir():
        images.mkdir(parents=True)
        source = work / 'nnUNet_raw' / subject.dataset / 'imagesTs'
        cases = sorted({file.name[:-len('_0000.nii.gz')] for file in source.iterdir()})[:subject.cases]
        for case in cases:
            for file in source.glob(f'{case}_*'):
                shutil.copyfile(file, images / file.name)
    return images


def run(work: Path, subject: Subject, refined: bool, device: str) -> tuple[float, float]:
    """Seconds a case with everything, and GiB of the largest process, of a command on a folder of images."""
    command = ['nnUNetv2_pdddpm_predict', '-tr', subject.refined, '-samples', '8', '--uncertainty'] if refined else \
        ['nnUNetv2_predict', '-tr', subject.stock]
    output = work / 'speed' / subject.dataset / command[0]
    shutil.rmtree(output, ignore_errors=True)
    command += ['-i', str(images_of(work, subject)), '-o', str(output), '-d', subject.dataset, '-c', CONFIGURATION,
                '-p', PLANS, '-f', '0', '-device', device, '--disable_progress_bar']
    seconds, memory = measured(work, subject.stock, *command)
    return seconds / subject.cases, memory


def commands(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """Both commands in turn: seconds a case and GiB, and what PDDDPM's summary says."""
    runs = [{name: run(work, subject, name == 'PDDDPM', device) for name in ('stock', 'PDDDPM')}
            for _ in range(subject.repeats)]
    cases = json.loads((work / 'speed' / subject.dataset / 'nnUNetv2_pdddpm_predict' / 'pdddpm_summary.json')
                       .read_text())['cases']
    return {'runs': runs, 'tiles': float(np.mean([case['refined_tiles'] for case in cases])),
            'settings': cases[0]['settings'][0],
            'calls': {of: sum(case['network_calls'][of] for case in cases) / len(cases)
                      for of in ('stock', 'denoiser')}}


def network_part(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """Of one image, or of a part of a large one: seconds of a call, what comes on top, the costliest operators."""
    import speed_parts as measure
    predictor, image = open_image(work, subject, device)
    if subject.dataset == LESION:
        image = image[:, 20:164, 40:184, 20:164]
    return {'call': measure.seconds_a_call(predictor), 'overhead': measure.overhead(predictor, image, 3),
            'shape': list(image.shape), 'top': measure.top_costs(predictor, image)}


def cost(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """Against samples, steps and size; and other ways to call the denoiser."""
    import speed_parts as measure
    predictor, image = open_image(work, subject, device)
    return {'cost': measure.cost_of_settings(predictor, image, 2), 'ways': measure.ways_to_call(predictor, 7)}


def share(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """Against the share of tiles that are denoised, of a volume of four times the voxels."""
    import speed_parts as measure
    predictor, image = open_image(work, subject, device)
    return measure.cost_of_share(predictor, image, 2)


def accuracy(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """What bfloat16 costs."""
    from speed_accuracy import bfloat16
    return bfloat16(work)


def open_image(work: Path, subject: Subject, device: str, **settings: Any) -> tuple[Any, torch.Tensor]:
    """A predictor with the data set's PDDDPM model and eight samples, and the first image."""
    import speed_parts as measure
    predictor = measure.opened(model(work, subject.dataset, subject.refined), device, overrides={'samples': 8},
                               **settings)
    return predictor, measure.preprocessed(predictor, images_of(work, subject), 1)[0]


def sure(work: Path, subject: Subject, device: str) -> dict[str, Any]:
    """Share of refined tiles, calls and seconds with -sure, and how far the probabilities are from those without."""
    rows: dict[str, Any] = {}
    before = None
    for value in SURE:
        predictor, image = open_image(work, subject, device, sure=value, use_mirroring=False)
        prediction = predictor.predict_volume(image)
        p = torch.softmax(prediction.logits.float(), 0)
        before = p if before is None else before
        rows[str(value)] = {'tiles': prediction.refined_tiles, 'seconds': prediction.seconds,
                            'calls': prediction.network_calls,
                            'other labels': int((p.argmax(0) != before.argmax(0)).sum()),
                            'largest difference': float((p - before).abs().max())}
    return rows


def training(work: Path, subject: Subject, device: str, repeats: int = 15) -> dict[str, list[float]]:
    """Seconds of an iteration of the stock trainer and of PDDDPM's, interleaved."""
    import speed_parts as measure
    from nnunetv2.run.run_training import get_trainer_from_args
    trainers = {name: get_trainer_from_args(DATASET, CONFIGURATION, 0, trainer, PLANS, device=torch.device(device))
                for name, trainer in (('stock', STOCK_TRAINER), ('PDDDPM', PDDDPM_TRAINER))}
    for trainer in trainers.values():
        trainer.initialize()
    return measure.training_iterations(trainers, repeats)


MEASUREMENTS = {DATASET: (commands, network_part, cost, share, accuracy, training),
                LESION: (commands, network_part, sure)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-data', help=f'folder that contains {LESION} (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help='work folder of hippocampus.py, with its trained models')
    parser.add_argument('-device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('-table', default=str(HERE.parent / 'docs' / 'results' / 'speed.md'))
    args = parser.parse_args()
    work = Path(args.o).resolve()
    os.environ.update(nnunet_environment(work), nnUNet_n_proc_DA='0', nnUNet_compile='false')
    file = work / 'speed' / f'measured_{args.device}.json'
    results = json.loads(file.read_text()) if file.is_file() else {}
    prepare(work, args.data)
    for subject in SUBJECTS:
        for measure in MEASUREMENTS[subject.dataset]:
            if (name := f'{measure.__name__} {subject.dataset}') not in results:
                results[name] = measure(work, subject, args.device)
                file.write_text(json.dumps(results, indent=1))
    from speed_table import write_table
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{os.cpu_count()} CPU cores, no GPU'
    write_table(results, f'{platform.machine()}, {device}, torch {torch.__version__}', Path(args.table))


if __name__ == '__main__':
    main()
