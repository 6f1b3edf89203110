"""Known ambiguity: samples of stock nnU-Net, a second network and PDDDPM against the exact distribution of masks."""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hippocampus import HERE, call, fold_folder, nnunet_environment, parse, train
from phantom_data import Phantom, phantom
from scale import FULL, PLANS, PLANS_IN_WORDS, commit, machine

DATASET_ID = 771
DATASET = f'Dataset{DATASET_ID}_Phantom'
CONFIGURATION = '2d'
STOCK, LONGER, DENOISER, SECOND = ('nnUNetTrainerPhantom', 'nnUNetTrainerPhantomLonger', 'PDDDPMTrainerPhantom',
                                   'PDDDPMTrainerPhantomSecond')
STAGES = ('prepare', 'train', 'measure', 'table')
NUM_CASES, BATCH_SIZE = 1800, 4  # images for training, each with one draw of the truth
NUM_FOLDS = 3
GRIDS = {2: (1, 2), 8: (2, 4), 20: (4, 5)}
"""Number of objects -> rows and columns of cells in a test image."""
NUM_TEST = {2: 30, 8: 8, 20: 3}
TEST_SEED = 20_000  # of the first test image; those for training start at 0
NUM_VALIDATION, VALIDATION_SEED = 40, 900_000  # on which temperatures are fitted
FEATURES = [16, 32, 64]
# data are augmented in the training process, whose seed is fixed
VARIABLES = {'nnUNet_n_proc_DA': '0', 'nnUNet_def_n_proc': '1', 'nnUNet_pdddpm_presegmenter': STOCK}
TEXT = """# A phantom whose distribution of masks is known

    .venv/bin/python benchmarks/phantom.py -o WORK{arguments}

Commit {commit}. Machine: {machine}; float32 prediction, training as `benchmarks/trainers/benchmark_trainers.py` says.
{plans}: features {features}, batches of {batch} patches of 64 x 64. {cases:,} images, two thirds of which train each
of three folds (trainings); stock {stock:,} iterations, all others {others:,}, from stock's weights. {samples}
independent samples an image, no mirroring; one temperature a network, fitted on {validation} further phantoms. The
learning rate was chosen by single trainings of fold 0 on 30 other images.

Each image shows objects whose truth is, independently of each other, one of three shapes: the core, the core with its
rim, or the core with its lobe (`benchmarks/phantom_data.py`). The networks are trained on images of two objects.
Images of 8 and 20 are predicted tile by tile.

± is the standard deviation over trainings. Δ is the paired difference to the best without diffusion, the second network
whose objects are drawn one by one, with a 95 % interval by Student's t over the three trainings. One of the shapes:
share of the objects in the samples whose IoU with the nearest shape is at least 0.85. Frequency error: half of the
summed differences between the frequencies of the shapes and their probabilities. GED²: with pairs of a mask with
itself. NLL and Dice are those of the samples' mean where there is a chain. Calls: of the denoiser, for a sample.

{number}## Two objects, {two} images

| | calls | GED² | Δ | one of the shapes | frequency error | correlation | NLL | Δ | Dice of the mean | Δ |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def folder(work: Path, trainer: str) -> Path:
    """Of a trained model."""
    return fold_folder(work, trainer, 0, DATASET, CONFIGURATION).parent


def prepare(work: Path, number: int = NUM_CASES, batch_size: int = BATCH_SIZE) -> None:
    """Draw so many phantoms, plan, reduce the plan, preprocess, write the folds."""
    from skimage import io  # reads and writes as nnU-Net does
    raw, preprocessed = work / 'nnUNet_raw' / DATASET, work / 'nnUNet_preprocessed' / DATASET
    if (preprocessed / 'splits_final.json').is_file():
        return
    for name in ('imagesTr', 'labelsTr'):
        (raw / name).mkdir(parents=True, exist_ok=True)
    for seed in range(number):
        case = phantom(seed)
        io.imsave(raw / 'imagesTr' / f'phantom_{seed:05d}_0000.png', case.image, check_contrast=False)
        io.imsave(raw / 'labelsTr' / f'phantom_{seed:05d}.png', case.truth.astype('uint8'), check_contrast=False)
    description = {'channel_names': {'0': 'phantom'}, 'labels': {'background': 0, 'object': 1},
                   'numTraining': number, 'file_ending': '.png'}
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))
    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID), '-c', CONFIGURATION, '-npfp', '1', '--no_pp',
         '--verify_dataset_integrity')
    if not FULL:
        reduce_plans(preprocessed, batch_size)
    call(work, 'nnUNetv2_preprocess', '-d', str(DATASET_ID), '-plans_name', PLANS, '-c', CONFIGURATION, '-np', '1')
    cases = [f'phantom_{seed:05d}' for seed in range(number)]
    splits = [{'train': [case for i, case in enumerate(cases) if i % NUM_FOLDS != fold],
               'val': cases[fold::NUM_FOLDS]} for fold in range(NUM_FOLDS)]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits, indent=1))


def reduce_plans(preprocessed: Path, batch_size: int) -> None:
    """A smaller network and batch."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configuration = plans['configurations'][CONFIGURATION]
    configuration.update(data_identifier=f'{PLANS}_{CONFIGURATION}', batch_size=batch_size)
    network = configuration['architecture']['arch_kwargs']
    for name in ('n_conv_per_stage', 'kernel_sizes', 'strides'):
        network[name] = network[name][:len(FEATURES)]
    network.update(n_stages=len(FEATURES), features_per_stage=FEATURES,
                   n_conv_per_stage_decoder=network['n_conv_per_stage_decoder'][:len(FEATURES) - 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))


def test_images(objects: int) -> list[Phantom]:
    """Those with so many objects."""
    return [phantom(TEST_SEED + i, *GRIDS[objects]) for i in range(NUM_TEST[objects])]


def measure(work: Path, folds: Sequence[int] = range(NUM_FOLDS)) -> None:
    """Scores of every row, training and image, as `measured/ROW__FOLD__OBJECTS.json`; what is there is left alone."""
    from phantom_samplers import draw, open_model, opened, rows, scores, temperatures
    results = work / 'measured'
    results.mkdir(exist_ok=True)
    validation = [phantom(VALIDATION_SEED + i) for i in range(NUM_VALIDATION)]
    for fold in folds:
        for trainer in (DENOISER, SECOND):
            predictor = open_model(folder(work, trainer), fold)
            settings = temperatures(predictor, validation)
            table = dict(zip(predictor.refiner.table.log_snr, predictor.refiner.table.share, strict=True))
            (results / f'levels__{trainer}__{fold}.json').write_text(json.dumps(table))
            for row in rows(DENOISER, SECOND):
                for objects in GRIDS:
                    file = results / f'{name_of(row.title)}__{fold}__{objects}.json'
                    if row.trainer != trainer or file.is_file() or not (row.large or objects == 2):
                        continue
                    print(row.title, 'fold', fold, objects, 'objects', flush=True)
                    values = [scores(case, *draw(opened(predictor, case), row.change(settings).for_case(str(seed)),
                                                 independent=True), seed)
                              for seed, case in enumerate(test_images(objects))]
                    file.write_text(json.dumps(values))


def name_of(title: str) -> str:
    """Of a row, in a file's name."""
    return ''.join(c if c.isalnum() else '_' for c in title)


def read(work: Path, title: str, objects: int) -> dict[str, np.ndarray]:
    """Metric -> (trainings, images) of a row."""
    from statistics_of_trainings import files_of_trainings
    folds = [json.loads(file.read_text())
             for file in files_of_trainings(work / 'measured', name_of(title), f'__{objects}.json')]
    return {metric: np.array([[image[metric] for image in fold] for fold in folds]) for metric in folds[0][0]}


def ideal(objects: int) -> dict[str, np.ndarray]:
    """Of exact samples, with the exact probability map."""
    from phantom_samplers import exact_samples, scores
    sets = [[scores(case, *exact_samples(case, 100 * seed + repeat), seed)
             for seed, case in enumerate(test_images(objects))] for repeat in range(10)]
    return {metric: np.mean([[image[metric] for image in one] for one in sets], 0, keepdims=True)
            for metric in sets[0][0]}


def correlation(of: dict[str, np.ndarray]) -> float:
    """Of the objects of a sample, pooled over images, mean over trainings."""
    return float(np.mean(of['covariance'].sum(1) / np.maximum(of['variance_objects'].sum(1), 1e-12)))


def lines(work: Path, objects: int) -> list[str]:
    """Of a table."""
    from phantom_samplers import rows
    from statistics_of_trainings import difference, spread
    table = [row for row in rows(DENOISER, SECOND) if row.large or objects == 2]
    found = {row: read(work, row.title, objects) for row in table}
    base = next(of for row, of in found.items() if row.trainer == SECOND and 'copula' in row.title)
    text = []
    for row, of in [*found.items(), (None, ideal(objects))]:
        def against(metric: str, of: dict[str, np.ndarray] = of, row: object = row) -> str:
            return '' if of is base or row is None else difference(of[metric], base[metric], 4)
        title, calls = ('exact samples', '') if row is None else (row.title, str(row.calls))
        show = (lambda values, digits=3: f'{values.mean():.{digits}f}') if row is None else spread
        if objects == 2:
            text.append(f'| {title} | {calls} | {show(of["ged"], 4)} | {against("ged")} | {show(of["clean"])} '
                        f'| {show(of["frequency_error"])} | {correlation(of):+.2f} | {show(of["nll"], 4)} '
                        f'| {against("nll")} | {show(of["dice"], 4)} | {against("dice")} |')
        else:
            ratio = np.sqrt(of['variance'].mean(1) / of['true_variance'].mean(1))
            text.append(f'| {title} | {calls} | {show(of["crps"], 4)} | {against("crps")} | {show(ratio[:, None], 2)} '
                        f'| {show(of["clean"])} | {show(of["frequency_error"])} | {correlation(of):+.2f} |')
    return text


def write_table(work: Path, file: Path, number: int, batch_size: int) -> None:
    """The page of a training with so many images."""
    import phantom_trainers
    trainings = len(list((work / 'measured').glob(f'levels__{DENOISER}__*.json')))
    text = TEXT.format(commit=commit(), machine=machine(), plans=PLANS_IN_WORDS, features=FEATURES, cases=number,
                       arguments='' if (number, batch_size) == (NUM_CASES, BATCH_SIZE) else
                       f' -images {number} -batch {batch_size} -table docs/results/{file.name}', batch=batch_size,
                       number='' if trainings == NUM_FOLDS else
                       f'Trained so far: {trainings} of the {NUM_FOLDS} folds, which gives no verdict.\n\n',
                       stock=phantom_trainers.nnUNetTrainerPhantom.iterations * 3,
                       others=phantom_trainers.Phantom.iterations * 3, samples=16, validation=NUM_VALIDATION,
                       two=NUM_TEST[2]) + '\n'.join(lines(work, 2))
    for objects in (8, 20):
        text += (f'\n\n## {objects} objects, {NUM_TEST[objects]} images\n\nCRPS of the total area, and sd of the '
                 'samples\' total over the exact one (1 is right). The area is relative to its mean.\n\n'
                 '| | calls | CRPS of the total | Δ '
                 '| sd ratio | one of the shapes | frequency error | correlation of the objects |\n'
                 '|---|---|---|---|---|---|---|---|\n') + '\n'.join(lines(work, objects))
    file.write_text(text + '\n')


def main() -> None:
    args = parse(__doc__, 'nothing: this data set is a phantom', 'phantom.md', STAGES,
                 {'-images': (NUM_CASES, 'for training, two thirds of them for each of three folds'),
                  '-batch': (BATCH_SIZE, 'patches in a batch')})
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, args.images, args.batch)
    if 'train' in args.stages:
        for fold in range(NUM_FOLDS):
            for trainer in (STOCK, DENOISER, SECOND):
                train(work, trainer, fold, DATASET, CONFIGURATION, **VARIABLES)
    os.environ.update({**nnunet_environment(work), **VARIABLES})
    sys.path.append(str(HERE / 'trainers'))
    if {'measure', 'table'} & set(args.stages):
        import torch
        torch.set_num_threads(1)
    if 'measure' in args.stages:
        measure(work)
    if 'table' in args.stages:
        write_table(work, Path(args.table), args.images, args.batch)


if __name__ == '__main__':
    main()
