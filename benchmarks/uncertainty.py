"""Samples, calibration and triage on the hippocampus models of `hippocampus.py`, by this project's own commands."""
from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from hippocampus import (
    CONFIGURATION,
    DATASET,
    HERE,
    PDDDPM_TRAINERS,
    PLANS,
    STOCK_TRAINER,
    call,
    nnunet_environment,
)

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities, probabilities_to_logits
from nnunet_pdddpm.diffusion.drawing import draw_shifts
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings

TRAINER = PDDDPM_TRAINERS[1]
NUM_VALIDATION = 20
NUM_SAMPLES = 8
SWEEP = [SamplingSettings(steps=0), *(SamplingSettings(t_start=t, steps=k, samples=NUM_SAMPLES)
                                      for t, k in ((500, 1), (700, 1), (900, 1), (960, 1), (1000, 1), (900, 3)))]
ROWS = {'stock (mask, softmax)': None, 'PDDDPM, its defaults': (), 'PDDDPM, half blended': ('-blend', '0.5'),
        'PDDDPM, samples and mask from t_start 900': ('-t_start', '900')}


def sweep(work: Path) -> list[dict[str, Any]]:
    """What each setting gives on the validation cases: mean Dice, NLL, agreement of the samples and what it tells."""
    predictor = VolumePredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        str(work / 'nnUNet_results' / DATASET / f'{TRAINER}__{PLANS}__{CONFIGURATION}'), (0,))
    raw = work / 'nnUNet_raw' / DATASET
    splits = json.loads((work / 'nnUNet_preprocessed' / DATASET / 'splits_final.json').read_text())
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    names = ['stock', *SWEEP]
    entries: dict[Any, list[dict[str, float]]] = {name: [] for name in names}
    for case in splits[0]['val'][:NUM_VALIDATION]:
        data, _, properties = preprocessor.run_case(
            [str(raw / 'imagesTr' / f'{case}_0000.nii.gz')], None, predictor.plans_manager,
            predictor.configuration_manager, predictor.dataset_json)
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / 'labelsTr' / f'{case}.nii.gz'))).round().astype(int)
        truth = truth[tuple(slice(*box) for box in properties['bbox_used_for_cropping'])]
        image, unpad = pad_nd_image(torch.from_numpy(data), predictor.configuration_manager.patch_size, 'constant',
                                    {'value': 0}, True, None)
        unpad = tuple(unpad[1:])
        with torch.inference_mode():
            volume = Volume(predictor, image, torch.device('cpu'))
            stock = logits_to_probabilities(volume.start_fold()[None], False)[0]
            entries['stock'].append(score(stock[(slice(None), *unpad)].numpy(), truth))
            for settings in SWEEP:
                n = settings.samples
                spread = Spread(volume.shape, n, 1, False, torch.device('cpu'))
                sizes = []
                for sample in range(n):
                    p, shifts = volume.sample(settings, sample, n), draw_shifts(3, False, sample, n, settings.seed)
                    spread.add(p, shifts)
                    mask = (probabilities_to_logits(p[None], False)[0] + shifts[:, None, None, None]).argmax(0)[unpad]
                    sizes.append([int((mask == c).sum()) for c in (1, 2)])
                spread.crop(unpad)
                of_samples = {} if n == 1 else {
                    'agreement': float(np.mean([spread.pairwise_dice(c) or 0 for c in (1, 2)])),
                    'inside': float(np.mean([np.quantile(of_label, 0.025) <= (truth == c).sum()
                                             <= np.quantile(of_label, 0.975)
                                             for c, of_label in zip((1, 2), np.transpose(sizes), strict=True)]))}
                entries[settings].append({**score(spread.mean.numpy(), truth), **of_samples})
    rows = []
    for name in names:
        row: dict[str, Any] = {key: float(np.mean([e[key] for e in entries[name]])) for key in entries[name][0]}
        if 'agreement' in row:
            quality, agreement = ([e[key] for e in entries[name]] for key in ('dice', 'agreement'))
            row['correlation'] = float(np.corrcoef(quality, agreement)[0, 1])
        title = name if name == 'stock' else f't_start={name.t_start} k={name.steps}' if name.steps else 'direct (k=0)'
        rows.append({'title': title, **row})
    return rows


def score(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean Dice of labels 1 and 2, negative log-likelihood in nats a voxel."""
    mask = probabilities.argmax(0)
    dice = [2 * ((mask == c) & (truth == c)).sum() / ((mask == c).sum() + (truth == c).sum()) for c in (1, 2)]
    of_truth = np.take_along_axis(probabilities, truth[None], 0)[0]
    return {'dice': float(np.mean(dice)), 'nll': float(-np.log(np.clip(of_truth, 1e-6, 1)).mean())}


def predict(work: Path, name: str, flags: tuple[str, ...] | None) -> dict[str, Any]:
    """Predict and evaluate the test cases; the evaluation, and seconds a case with everything."""
    raw = work / 'nnUNet_raw' / DATASET
    output = work / 'uncertainty' / ''.join(c if c.isalnum() else '_' for c in name)
    common = ('-i', str(raw / 'imagesTs'), '-o', str(output), '-d', DATASET, '-c', CONFIGURATION, '-p', PLANS, '-f',
              '0', '-device', 'cpu', '--save_probabilities', '-npp', '1', '-nps', '1', '--disable_progress_bar')
    start = time.perf_counter()
    if flags is None:
        call(work, 'nnUNetv2_predict', *common, '-tr', STOCK_TRAINER)
    else:
        call(work, 'nnUNetv2_pdddpm_predict', *common, '-tr', TRAINER, '--uncertainty', '--save_samples', '--report',
             *flags)
    seconds = (time.perf_counter() - start) / len(list((raw / 'imagesTs').iterdir()))
    call(work, 'nnUNetv2_pdddpm_evaluate', '-pred', str(output), '-ref', str(raw / 'labelsTs'), '-np', '1',
         '--disable_progress_bar')
    return {'seconds': seconds, **json.loads((output / 'evaluation.json').read_text())}


def coverage(work: Path, name: str) -> str:
    """How often the 95 % interval of the samples' volumes holds the true volume, and how wide it is."""
    output = work / 'uncertainty' / ''.join(c if c.isalnum() else '_' for c in name)
    with open(output / 'evaluation.csv', newline='') as file:
        truth = {(row['case'], row['label']): float(row['reference_volume_ml']) for row in csv.DictReader(file)}
    inside, width = [], []
    for case in json.loads((output / 'pdddpm_summary.json').read_text())['cases']:
        for label, row in case['labels'].items():
            low, high = row['volume_ml_low'], row['volume_ml_high']
            inside.append(low <= truth[case['case'], label] <= high)
            width.append((high - low) / truth[case['case'], label])
    return f'{sum(inside)} of {len(inside)}, {np.mean(width):.1%} wide'


def write_table(work: Path, rows: list[dict[str, Any]], evaluations: dict[str, dict[str, Any]], file: Path) -> None:
    """The two tables."""
    def number(value: float | None) -> str:
        return '' if value is None or np.isnan(value) else f'{value:.4f}'

    lines = ['# Hippocampus: samples, calibration and triage', '',
             '    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/hippocampus.py -o WORK',
             '    .venv/bin/python benchmarks/uncertainty.py -o WORK', '',
             f'Machine: {platform.machine()}, {os.cpu_count()} CPU cores, no GPU, torch {torch.__version__}. The '
             f'models of [hippocampus.md](hippocampus.md): reduced plans, fold 0, one training seed; noise seed 0, '
             f'{NUM_SAMPLES} samples.', '', f'## {NUM_VALIDATION} validation cases', '',
             'Mirroring spread over the samples. Agreement: Dice between samples. Correlation: of agreement with true '
             'Dice, over cases (Pearson). Inside: share of true volumes within the 95 % interval of the samples.', '',
             '| | Dice | NLL | agreement | correlation | inside |', '|---|---|---|---|---|---|']
    lines += [f'| {r["title"]} | {number(r["dice"])} | {number(r["nll"])} | {number(r.get("agreement"))} | '
              f'{number(r.get("correlation"))} | {number(r.get("inside"))} |' for r in rows]
    cases = len(next(iter(evaluations.values()))['cases'])
    lines += ['', f'## {cases} test cases, by the commands', '',
              'NLL and ECE over all voxels, ECE also within the margin around the reference that docs/evaluation.md '
              'names; AURC: lower is better; ρ: Spearman correlation of estimated with true Dice over cases; interval: '
              'of the volumes, 95 % of 8 samples, which is about smallest to largest. Seconds a case with start of the '
              'program, input, output, samples and report.', '',
              '| | Dice | HD95 mm | NLL | ECE | ECE near | AURC | ρ | true volume in the interval | s/case |',
              '|---|---|---|---|---|---|---|---|---|---|']
    for name, e in evaluations.items():
        everywhere, near, mean = e['voxelwise']['all'], e['voxelwise']['near'], e['foreground_mean']
        estimate = e['estimated_dice'].get('case', {})
        lines.append(
            f'| {name} | {number(mean["dice"])} | {mean["hd95_mm"]:.2f} | {number(everywhere["nll"])} | '
            f'{number(everywhere["ece"])} | {number(near["ece"])} | {number(everywhere["aurc"])} | '
            f'{number(estimate.get("spearman"))} | {coverage(work, name) if ROWS[name] is not None else ""} | '
            f'{e["seconds"]:.1f} |')
    file.write_text('\n'.join(lines) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', required=True, help='work folder of hippocampus.py, with its trained models')
    parser.add_argument('-table', default=str(HERE.parent / 'docs' / 'results' / 'uncertainty.md'))
    args = parser.parse_args()
    work = Path(args.o).resolve()
    os.environ.update(nnunet_environment(work))
    sys.path.append(str(HERE / 'trainers'))
    file = work / 'uncertainty.json'
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if 'sweep' not in done:
        done['sweep'] = sweep(work)
        file.write_text(json.dumps(done))
    for name, flags in ROWS.items():
        if name not in done:
            done[name] = predict(work, name, flags)
            file.write_text(json.dumps(done))
    write_table(work, done['sweep'], {name: done[name] for name in ROWS}, Path(args.table))


if __name__ == '__main__':
    main()
