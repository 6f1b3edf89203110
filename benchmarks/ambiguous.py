"""A known ambiguity: stock nnU-Net, its controls and PDDDPM against the exact distribution of the truth."""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from hippocampus import call, fold_folder, nnunet_environment, parse, train
from scale import DEVICE, FULL, PLANS

DATASET_ID = 771
DATASET = f'Dataset{DATASET_ID}_Ambiguous'
CONFIGURATION = '2d'
STOCK_TRAINER = 'nnUNetTrainerAmbiguous'
CONTROL_TRAINER = 'nnUNetTrainerAmbiguousLonger'
PDDDPM_TRAINER = 'PDDDPMTrainerAmbiguous'
TRUTH_TRAINER = 'PDDDPMTrainerAmbiguousTruth'
DIRECT_TRAINER = 'PDDDPMTrainerAmbiguousDirect'
DIRECT_CE_TRAINER = 'PDDDPMTrainerAmbiguousDirectCE'
PAPER_TRAINER = 'PDDDPMTrainerAmbiguousPaper'
STAGES = ('prepare', 'stock', 'pdddpm', 'tune', 'predict', 'evaluate')
NUM_CASES = 180  # for training, each with one draw of the truth
NUM_FOLDS = 3
NUM_TEST = 30
TEST_SEED = 10_000  # of the first test image; those for training start at 0
FEATURES = [16, 32, 64]
TUNING_MINUTES = 2
HERE = Path(__file__).resolve().parent
# data are augmented in the training process, whose seed is fixed
VARIABLES = {'nnUNet_n_proc_DA': '0', 'nnUNet_def_n_proc': '1', 'nnUNet_pdddpm_presegmenter': STOCK_TRAINER}


def model_fold(work: Path, trainer: str, fold: int) -> Path:
    """Folder of a trained model."""
    return fold_folder(work, trainer, fold, DATASET, CONFIGURATION)


def prepare(work: Path, number: int = NUM_CASES) -> None:
    """Draw the phantoms, plan, reduce the plan, preprocess, write the folds."""
    from ambiguous_phantom import phantom
    from skimage import io  # reads and writes as nnU-Net does
    raw, preprocessed = work / 'nnUNet_raw' / DATASET, work / 'nnUNet_preprocessed' / DATASET
    if (preprocessed / 'splits_final.json').is_file():
        return
    for folder in ('imagesTr', 'labelsTr', 'imagesTs'):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for seed in range(number):
        case = phantom(seed)
        io.imsave(raw / 'imagesTr' / f'phantom_{seed:05d}_0000.png', case.image, check_contrast=False)
        io.imsave(raw / 'labelsTr' / f'phantom_{seed:05d}.png', case.truth.astype('uint8'), check_contrast=False)
    for seed in range(TEST_SEED, TEST_SEED + NUM_TEST):
        io.imsave(raw / 'imagesTs' / f'phantom_{seed:05d}_0000.png', phantom(seed).image, check_contrast=False)
    description = {'channel_names': {'0': 'phantom'}, 'labels': {'background': 0, 'object': 1},
                   'numTraining': number, 'file_ending': '.png'}
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))

    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID), '-c', CONFIGURATION, '-npfp', '1', '--no_pp',
         '--verify_dataset_integrity')
    if not FULL:
        reduce_plans(preprocessed)
    call(work, 'nnUNetv2_preprocess', '-d', str(DATASET_ID), '-plans_name', PLANS, '-c', CONFIGURATION, '-np', '1')
    cases = [f'phantom_{seed:05d}' for seed in range(number)]
    splits = [{'train': [case for i, case in enumerate(cases) if i % NUM_FOLDS != fold],
               'val': cases[fold::NUM_FOLDS]} for fold in range(NUM_FOLDS)]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits, indent=1))


def reduce_plans(preprocessed: Path) -> None:
    """A smaller network and batch."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configuration = plans['configurations'][CONFIGURATION]
    configuration.update(data_identifier=f'{PLANS}_{CONFIGURATION}', batch_size=4)
    network = configuration['architecture']['arch_kwargs']
    for name in ('n_conv_per_stage', 'kernel_sizes', 'strides'):
        network[name] = network[name][:len(FEATURES)]
    network.update(n_stages=len(FEATURES), features_per_stage=FEATURES,
                   n_conv_per_stage_decoder=network['n_conv_per_stage_decoder'][:len(FEATURES) - 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))


def tune(work: Path, trainer: str, fold: int) -> None:
    """`nnUNetv2_pdddpm_tune` unless it has been."""
    if not (model_fold(work, trainer, fold) / 'sampling_sweep.json').is_file():
        call(work, 'nnUNetv2_pdddpm_tune', DATASET, CONFIGURATION, str(fold), '-tr', trainer, '-p', PLANS, '-device',
             DEVICE, '-budget', str(TUNING_MINUTES), '--disable_progress_bar', **VARIABLES)


def main() -> None:
    args = parse(__doc__, 'nothing: this data set is a phantom', 'ambiguous.md', STAGES)
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work)
    if 'stock' in args.stages:
        for fold in range(NUM_FOLDS):
            train(work, STOCK_TRAINER, fold, DATASET, CONFIGURATION, **VARIABLES)
    if 'pdddpm' in args.stages:
        for fold in range(NUM_FOLDS):
            for trainer in (PDDDPM_TRAINER, CONTROL_TRAINER, DIRECT_TRAINER, DIRECT_CE_TRAINER, TRUTH_TRAINER,
                            PAPER_TRAINER):
                train(work, trainer, fold, DATASET, CONFIGURATION, **VARIABLES)
    if 'tune' in args.stages:
        for trainer in (PDDDPM_TRAINER, TRUTH_TRAINER):
            for fold in range(NUM_FOLDS):
                tune(work, trainer, fold)
    if {'predict', 'evaluate'} & set(args.stages):
        os.environ.update({**nnunet_environment(work), **VARIABLES})
        sys.path.append(str(HERE / 'trainers'))
        from ambiguous_evaluation import predict  # reads nnU-Net's folders from the environment
        from ambiguous_table import write_results
        if 'predict' in args.stages:
            predict(work)
        if 'evaluate' in args.stages:
            write_results(work, Path(args.table))


if __name__ == '__main__':
    main()
