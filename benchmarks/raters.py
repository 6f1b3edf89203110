"""Masks of several people: samples of stock nnU-Net, its controls and PDDDPM against those of a data set's raters."""
from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hippocampus import HERE, call, find_data, fold_folder, nnunet_environment, parse, train
from scale import DEVICE, FULL, PLANS

CONFIGURATION = '2d'
STOCK, LONGER, DENOISER, SECOND, SSN, SHARED = (
    'nnUNetTrainerRaters', 'nnUNetTrainerRatersLonger', 'PDDDPMTrainerRaters', 'PDDDPMTrainerRatersSecond',
    'nnUNetTrainerRatersSSN', 'PDDDPMTrainerRatersSharedNoise')
STAGES = ('prepare', 'train', 'tune', 'measure', 'table')
NUM_FOLDS, SPLIT_SEED, TUNING_MINUTES = 3, 2210, 6


@dataclass(frozen=True)
class RaterSet:
    """A folder `images/*.png` and `raters/<image>__<rater>.png`, of 0 and 1."""
    title: str
    folder: str
    number: int
    """Of nnU-Net's data set."""
    label: str
    shrink: int
    """Pixels of the images, side by side, that become one."""
    features: tuple[int, ...]
    batch_size: int
    patch: int
    """Side of the patches for training; images are predicted whole."""
    iterations: tuple[int, int]
    """Of the stock model, and of all others."""

    @property
    def dataset(self) -> str:
        return f'Dataset{self.number}_{self.label.capitalize()}'

    @property
    def variables(self) -> dict[str, str]:
        """Environment of training: data are augmented in the training process, whose seed is fixed."""
        return {'nnUNet_n_proc_DA': '0', 'nnUNet_def_n_proc': '1', 'nnUNet_pdddpm_presegmenter': STOCK}


SETS = {
    'nuclei': RaterSet('Nuclei in brain sections, five experts an image', 'cfos_nuclei', 772, 'nucleus', 2,
                       (16, 32, 64, 128, 128, 128), 2, 256, (1000, 600)),
    'cells': RaterSet('Cells, ten masks an image', 'bubil_cells', 773, 'cell', 1, (16, 32, 64, 128), 4, 128,
                      (1500, 1500)),
    'nodules': RaterSet('Lung nodules, four radiologists an image', 'lidc_nodules_2d', 774, 'nodule', 1,
                        (16, 32, 64, 128), 4, 128, (3000, 3000))}


def groups_of(of: RaterSet, data: Path) -> dict[str, str]:
    """Image -> what must not be divided (the patient), or is to be spread evenly (the group of nuclei)."""
    images = sorted(file.stem for file in (data / 'images').glob('*.png'))
    if of.label == 'nodule':
        return {image: image.split('_')[0] for image in images}
    if of.label == 'nucleus':
        return {row['image']: row['group'] for row in csv.DictReader((data / 'images.csv').open())
                if row['image'] in images}
    return dict.fromkeys(images, '')


def split(of: RaterSet, data: Path) -> tuple[list[str], list[list[str]]]:
    """Test images, and the validation images of each fold.

    Of nuclei one image of each group is tested; of the others, by image or patient, as many as one fold validates.
    """
    groups, rng = groups_of(of, data), np.random.default_rng(SPLIT_SEED)
    if of.label == 'nodule':
        units = [[image for image in groups if groups[image] == one] for one in sorted(set(groups.values()))]
    else:
        units = [[image] for image in groups]
    units = [units[i] for i in rng.permutation(len(units))]
    if of.label == 'nucleus':
        units.sort(key=lambda unit: groups[unit[0]])  # stable: three of each group in random order
        test, rest = units[::3], [unit for i, unit in enumerate(units) if i % 3]
        rest = [*rest[::2], *np.roll(np.array(rest[1::2]), 1, 0).tolist()]  # those of a group in different folds
    else:
        number = len(units) // (NUM_FOLDS + 1)
        test, rest = units[:number], units[number:]
    return sorted(sum(test, [])), [sorted(sum(rest[fold::NUM_FOLDS], [])) for fold in range(NUM_FOLDS)]


def read_image(of: RaterSet, data: Path, image: str) -> np.ndarray:
    """(Y, X) float, shrunk."""
    from skimage import io  # reads and writes as nnU-Net does
    return shrunk(io.imread(data / 'images' / f'{image}.png').astype(float), of.shrink)


def read_raters(of: RaterSet, data: Path, image: str) -> dict[str, np.ndarray]:
    """File name -> (Y, X) bool, shrunk: at least half of the pixels."""
    from skimage import io
    files = sorted((data / 'raters').glob(f'{image}__*.png'))
    return {file.stem: shrunk(io.imread(file).astype(float), of.shrink) >= 0.5 for file in files}


def shrunk(image: np.ndarray, by: int) -> np.ndarray:
    """Means of squares of pixels."""
    height, width = (n // by * by for n in image.shape)
    return image[:height, :width].reshape(height // by, by, width // by, by).mean((1, 3))


def prepare(of: RaterSet, work: Path, data: Path) -> None:
    """A raw data set with one case an image and rater, planned, reduced, preprocessed; folds by image."""
    from skimage import io
    raw, preprocessed = work / 'nnUNet_raw' / of.dataset, work / 'nnUNet_preprocessed' / of.dataset
    if (preprocessed / 'splits_final.json').is_file():
        return
    folds = split(of, data)[1]
    every = raters_of_cases(of, work)
    for folder in (raw / 'imagesTr', raw / 'labelsTr', every):
        folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[str]] = {}
    for image in sum(folds, []):
        pixels = np.round(read_image(of, data, image)).astype(np.uint8)
        raters = read_raters(of, data, image)
        for name, mask in raters.items():
            case = name.replace('__', '-')
            cases.setdefault(image, []).append(case)
            io.imsave(raw / 'imagesTr' / f'{case}_0000.png', pixels, check_contrast=False)
            io.imsave(raw / 'labelsTr' / f'{case}.png', mask.astype(np.uint8), check_contrast=False)
            for other in raters:  # of every case, for the tuning
                (every / f'{case}__{other.split("__")[1]}.png').symlink_to(
                    raw / 'labelsTr' / f'{other.replace("__", "-")}.png')
    description = {'channel_names': {'0': 'grey'}, 'labels': {'background': 0, of.label: 1},
                   'numTraining': sum(map(len, cases.values())), 'file_ending': '.png'}
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))
    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(of.number), '-c', CONFIGURATION, '-npfp', '1', '--no_pp')
    if not FULL:
        reduce_plans(preprocessed, of)
    call(work, 'nnUNetv2_preprocess', '-d', str(of.number), '-plans_name', PLANS, '-c', CONFIGURATION, '-np', '1')
    splits = [{'train': [case for image in cases if image not in held_out for case in cases[image]],
               'val': [case for image in held_out for case in cases[image]]} for held_out in folds]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits, indent=1))


def raters_of_cases(of: RaterSet, work: Path) -> Path:
    """Folder in which every case, an image with one rater's mask, has the masks of all."""
    return work / f'raters_{of.label}'


def reduce_plans(preprocessed: Path, of: RaterSet) -> None:
    """A smaller network, patch and batch."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configuration = plans['configurations'][CONFIGURATION]
    configuration.update(data_identifier=f'{PLANS}_{CONFIGURATION}', batch_size=of.batch_size,
                         patch_size=[of.patch] * 2)
    network = configuration['architecture']['arch_kwargs']
    for name in ('n_conv_per_stage', 'kernel_sizes', 'strides'):
        network[name] = network[name][:len(of.features)]
    network.update(n_stages=len(of.features), features_per_stage=list(of.features),
                   n_conv_per_stage_decoder=network['n_conv_per_stage_decoder'][:len(of.features) - 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))


def train_all(of: RaterSet, work: Path, folds: Sequence[int] = range(NUM_FOLDS)) -> None:
    """Every network of the folds."""
    for fold in folds:
        for trainer in (STOCK, LONGER, DENOISER, SECOND, SSN, *((SHARED,) if of.label == 'nucleus' else ())):
            train(work, trainer, fold, of.dataset, CONFIGURATION, **of.variables,
                  benchmark_iterations=str(of.iterations[trainer != STOCK]))


def tune(of: RaterSet, work: Path, fold: int) -> None:
    """`nnUNetv2_pdddpm_tune` unless it has been."""
    if not (fold_folder(work, DENOISER, fold, of.dataset, CONFIGURATION) / 'sampling_sweep.json').is_file():
        call(work, 'nnUNetv2_pdddpm_tune', of.dataset, CONFIGURATION, str(fold), '-tr', DENOISER, '-p', PLANS,
             '-device', DEVICE, '-budget', str(TUNING_MINUTES), '-raters', str(raters_of_cases(of, work)),
             '--disable_progress_bar', **of.variables)


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in SETS else None
    if name is None and not {'-h', '--help'} & set(sys.argv):
        sys.exit(f'Name one of {", ".join(SETS)} first: benchmarks/raters.py nuclei -o WORK.')
    of = SETS[name or 'nuclei']
    args = parse(f'{__doc__} First argument: {", ".join(SETS)}.', of.folder, f'{name}.md', STAGES)
    work, data = Path(args.o).resolve(), find_data(args.data, of.folder, 'raters')
    if 'prepare' in args.stages:
        prepare(of, work, data)
    if 'train' in args.stages:
        train_all(of, work)
    for fold in range(NUM_FOLDS) if 'tune' in args.stages else ():
        tune(of, work, fold)
    os.environ.update({**nnunet_environment(work), **of.variables})
    sys.path.append(str(HERE / 'trainers'))
    if 'measure' in args.stages:
        from raters_rows import measure  # reads nnU-Net's folders from the environment
        measure(of, work, data)
    if 'table' in args.stages:
        from raters_table import write_table
        write_table(of, work, Path(args.table))


if __name__ == '__main__':
    main()
