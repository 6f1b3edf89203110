"""nnU-Net's own integration test with the stock trainer and PDDDPM.

nnU-Net's four integration data sets (hippocampus as plain labels, with regions, with an ignore label, with both) x 2d,
3d_lowres, 3d_fullres, 3d_cascade_fullres x three folds, then the best configuration over both trainers, prediction with
the commands it prints, ensembling and postprocessing. A handful of iterations on a few cases: that every path runs is
what it shows. Ends with an error if any did not.
"""
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hippocampus import DATASET, HERE, find_data, nnunet_environment

DATASETS = {996: 'regions and an ignore label', 997: 'regions', 998: 'ignore label', 999: 'plain labels'}
CONFIGURATIONS = ('2d', '3d_lowres', '3d_fullres', '3d_cascade_fullres')
STOCK, REFINED = 'nnUNetTrainerIntegration', 'PDDDPMTrainerIntegration'
NUM_TRAINING, NUM_TEST = 9, 2


def copy_cases(data: Path, raw: Path, num_training: int, num_test: int, **description: object) -> None:
    """The first cases of a data set as a raw data set of their own, with some entries of dataset.json replaced."""
    shutil.rmtree(raw, ignore_errors=True)
    cases = sorted(p.name[:-len('.nii.gz')] for p in (data / 'labelsTr').glob('*.nii.gz'))[:num_training + num_test]
    for i, case in enumerate(cases):
        part = 'Tr' if i < num_training else 'Ts'
        for kind, named in (('images', f'{case}_????.nii.gz'), ('labels', f'{case}.nii.gz')):
            target = raw / (kind + part)
            target.mkdir(parents=True, exist_ok=True)
            for file in (data / f'{kind}Tr').glob(named):
                shutil.copyfile(file, target / file.name)
    original = json.loads((data / 'dataset.json').read_text())
    (raw / 'dataset.json').write_text(json.dumps({**original, 'numTraining': num_training, **description}))


def run_dataset(work: Path, dataset: int) -> dict:
    """Run one data set in a process of its own; what it got done is in its results file, whether it failed or not."""
    results = work / f'results_{dataset}.json'
    results.unlink(missing_ok=True)
    environment = {**nnunet_environment(work), 'nnUNet_pdddpm_presegmenter': STOCK, 'nnUNet_n_proc_DA': '0',
                   'nnUNet_def_n_proc': '1', 'nnUNet_npp': '0', 'nnUNet_nps': '0', 'OMP_NUM_THREADS': '1'}
    log = work / f'log_{dataset}.txt'
    start = time.monotonic()
    with log.open('w') as file:
        code = subprocess.run([sys.executable, str(HERE / 'integration_dataset.py'), str(dataset), str(results)],
                              env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    done = json.loads(results.read_text()) if results.is_file() else {}
    if code:
        print(f'Dataset {dataset} failed (exit status {code}); the end of {log}:')
        print('\n'.join(log.read_text().splitlines()[-30:]))
    return {**done, 'failed': bool(code), 'minutes': (time.monotonic() - start) / 60}


def table(results: dict[int, dict]) -> str:
    """What was done, as Markdown; what is missing or after a failure stands as FAILED."""
    lines = ['| data set | configuration | folds trained and validated: stock, PDDDPM | Dice in cross-validation: '
             'stock, PDDDPM |', '|---|---|---|---|']
    for dataset, done in results.items():
        for configuration in CONFIGURATIONS:
            folds = [done.get('folds', {}).get(f'{trainer} {configuration}', 0) for trainer in (STOCK, REFINED)]
            dice = [done.get('dice', {}).get(f'{trainer} {configuration}') for trainer in (STOCK, REFINED)]
            lines.append(f'| {dataset} ({DATASETS[dataset]}) | {configuration} | {folds[0]}, {folds[1]} | '
                         f'{", ".join("FAILED" if d is None else f"{d:.3f}" for d in dice)} |')
    lines += ['', '| data set | best of 8 models and 28 ensembles | its printed commands, postprocessing included | '
              'cascades of both by `-prev_stage_predictions`, their ensemble, postprocessed | minutes | result |',
              '|---|---|---|---|---|---|']
    for dataset, done in results.items():
        steps = [done.get(step, 'FAILED') for step in ('best', 'printed', 'ensemble')]
        lines.append(f'| {dataset} | {" | ".join(map(str, steps))} | {done["minutes"]:.1f} | '
                     f'{"FAILED" if done["failed"] else "passed"} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-data', help=f'folder that contains {DATASET} (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help="work folder: nnU-Net's three folders, predictions and logs")
    parser.add_argument('-d', nargs='+', type=int, choices=DATASETS, default=list(DATASETS), help='data sets to run')
    args = parser.parse_args()
    work = Path(args.o).resolve()
    copy_cases(find_data(args.data), work / 'nnUNet_raw' / DATASET, NUM_TRAINING, NUM_TEST)
    results = {}
    for dataset in sorted(args.d, reverse=True):
        results[dataset] = run_dataset(work, dataset)
    print(table(results))
    if any(done['failed'] for done in results.values()):
        sys.exit('Something failed, see above.')


if __name__ == '__main__':
    main()
