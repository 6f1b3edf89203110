"""Ten raters a cell: the masks of stock nnU-Net and the samples of PDDDPM against the raters' disagreement."""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from hippocampus import call, nnunet_environment, parse, train
from scale import FULL, PLANS

DATASET_ID = 770
DATASET = f'Dataset{DATASET_ID}_Cells'
CONFIGURATION = '2d'
STOCK_TRAINER = 'nnUNetTrainerCells'
CONTROL_TRAINER = 'nnUNetTrainerCellsLonger'
PDDDPM_TRAINERS = ('PDDDPMTrainerCells', 'PDDDPMTrainerCellsTruth', 'PDDDPMTrainerCellsDirect',
                   'PDDDPMTrainerCellsDirectCE')
STAGES = ('prepare', 'stock', 'pdddpm', 'predict', 'evaluate')
SPLIT_SEED = 2210
NUM_TEST = 19
NUM_FOLDS = 3
FEATURES = [16, 32, 64, 128]
PIXEL = 2  # the network's pixels are that many times as wide as the image's: a quarter of the work
HERE = Path(__file__).resolve().parent
# data are augmented in the training process, whose seed is fixed
VARIABLES = {'nnUNet_n_proc_DA': '0', 'nnUNet_def_n_proc': '1', 'nnUNet_pdddpm_presegmenter': STOCK_TRAINER}


def find_data(argument: str | None) -> Path:
    """The folder `bubil_cells`, in the folder from the argument or `NNUNET_PDDDPM_DATA`."""
    value = argument or os.environ.get('NNUNET_PDDDPM_DATA')
    if value is None:
        sys.exit('Say where bubil_cells lies: pass -data FOLDER or set NNUNET_PDDDPM_DATA.')
    folder = Path(value) / 'bubil_cells'
    if not (folder / 'raters').is_dir():
        sys.exit(f'{folder} holds no folder raters; -data must name the folder that contains bubil_cells.')
    return folder


def split_images(images: list[str]) -> tuple[list[str], list[list[str]]]:
    """Test images, and the validation images of each fold."""
    order = [images[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(images))]
    return sorted(order[:NUM_TEST]), [sorted(order[NUM_TEST + fold::NUM_FOLDS]) for fold in range(NUM_FOLDS)]


def prepare(work: Path, data: Path) -> None:
    """Raw data set with one case per image and rater, plan, reduce the plan, preprocess, folds by image."""
    raw, preprocessed = work / 'nnUNet_raw' / DATASET, work / 'nnUNet_preprocessed' / DATASET
    if (preprocessed / 'splits_final.json').is_file():
        return
    test, folds = split_images(sorted(file.stem for file in (data / 'images').glob('*.png')))
    for folder in ('imagesTr', 'labelsTr'):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[str]] = {}
    for image in sum(folds, []):
        for mask in sorted((data / 'raters').glob(f'{image}__*.png')):
            cases.setdefault(image, []).append(mask.stem)
            shutil.copyfile(data / 'images' / f'{image}.png', raw / 'imagesTr' / f'{mask.stem}_0000.png')
            shutil.copyfile(mask, raw / 'labelsTr' / mask.name)
    write_images_and_raters(data, test, work / 'test')
    for fold, images in enumerate(folds):
        write_images_and_raters(data, images, work / validation_part(fold))
    description = {'channel_names': {'0': 'phase contrast'}, 'labels': {'background': 0, 'cell': 1},
                   'numTraining': sum(map(len, cases.values())), 'file_ending': '.png'}
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))

    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID), '-c', CONFIGURATION, '-npfp', '1', '--no_pp',
         '--verify_dataset_integrity')
    if not FULL:
        reduce_plans(preprocessed)
    call(work, 'nnUNetv2_preprocess', '-d', str(DATASET_ID), '-plans_name', PLANS, '-c', CONFIGURATION, '-np', '1')
    splits = [{'train': sorted(case for image in cases if image not in held_out for case in cases[image]),
               'val': sorted(case for image in held_out for case in cases[image])} for held_out in folds]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits, indent=1))


def reduce_plans(preprocessed: Path) -> None:
    """Half of the resolution, a smaller network and batch."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configuration = plans['configurations'][CONFIGURATION]
    configuration.update(data_identifier=f'{PLANS}_{CONFIGURATION}', batch_size=4, spacing=[PIXEL, PIXEL],
                         patch_size=[size // PIXEL for size in configuration['patch_size']])
    network = configuration['architecture']['arch_kwargs']
    for name in ('n_conv_per_stage', 'kernel_sizes', 'strides'):
        network[name] = network[name][:len(FEATURES)]
    network.update(n_stages=len(FEATURES), features_per_stage=FEATURES,
                   n_conv_per_stage_decoder=network['n_conv_per_stage_decoder'][:len(FEATURES) - 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))


def validation_part(fold: int) -> str:
    """Name of the folder with the validation images of a fold."""
    return f'validation_{fold}' if fold else 'validation'


def write_images_and_raters(data: Path, images: list[str], target: Path) -> None:
    """Folders `images`, `raters` and `majority` (a pixel is cell if more than half of the raters say so)."""
    from skimage import io  # reads and writes as nnU-Net does
    for folder in ('images', 'raters', 'majority'):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copyfile(data / 'images' / f'{image}.png', target / 'images' / f'{image}_0000.png')
        masks = sorted((data / 'raters').glob(f'{image}__*.png'))
        for mask in masks:
            shutil.copyfile(mask, target / 'raters' / mask.name)
        majority = np.mean([io.imread(mask) for mask in masks], 0) > 0.5
        io.imsave(target / 'majority' / f'{image}.png', majority.astype(np.uint8), check_contrast=False)


def main() -> None:
    args = parse(__doc__, 'bubil_cells', 'cells.md', STAGES)
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, find_data(args.data))
    if 'stock' in args.stages:
        for fold in range(NUM_FOLDS):
            train(work, STOCK_TRAINER, fold, DATASET, CONFIGURATION, **VARIABLES)
    if 'pdddpm' in args.stages:
        for fold in range(NUM_FOLDS):
            for trainer in (*PDDDPM_TRAINERS, CONTROL_TRAINER):
                train(work, trainer, fold, DATASET, CONFIGURATION, **VARIABLES)
    if {'predict', 'evaluate'} & set(args.stages):
        os.environ.update({**nnunet_environment(work), **VARIABLES})
        sys.path.append(str(HERE / 'trainers'))
        from cells_evaluation import predict  # reads nnU-Net's folders from the environment
        from cells_table import write_results
        if 'predict' in args.stages:
            predict(work)
        if 'evaluate' in args.stages:
            write_results(work, Path(args.table))


if __name__ == '__main__':
    main()
