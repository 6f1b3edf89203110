"""nnUNetv2_pdddpm_predict in the process of a test, and what it has written."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, DATASET_ID, PLANS, REFINED, run_command
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy.spatial.transform import Rotation

from nnunet_pdddpm.commands.predict import main
from nnunet_pdddpm.demo.phantom import make_case

MARGIN = ((2, 3), (3, 2), (4, 1))  # zeros around 'odd', which nnU-Net crops away
SAMPLING = ('-samples', '4', '-start', '0.9', '-steps', '2')
EVERYTHING = (*SAMPLING, '--uncertainty', 'all', '--save_samples', '--save_presegmentation', '--save_probabilities')
QUICK = ('--disable_tta', '-step_size', '1', '--save_samples')
OF_STOCK = ('-mask_stock', '1', '-mask_blind', '0')
OF_SAMPLES = ('-mask_stock', '0', '-mask_blind', '0')
NOT_RESULTS = ('predict_from_raw_data_args.json', 'dataset.json', 'plans.json', 'pdddpm_summary.json',
               'pdddpm_summary.csv')


def arguments(source: Path, output: Path, *flags: str, folds=(0,), trainer: str = REFINED) -> list[str]:
    return ['-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres', '-tr', trainer,
            '-p', PLANS, '-f', *map(str, folds), '-device', 'cpu', '--disable_progress_bar', *flags]


def predict(source: Path, output: Path, *flags: str, **kwargs) -> Path:
    """The command in this process, all of it: importing nnU-Net takes longer than predicting."""
    main(arguments(source, output, *flags, '-npp', '0', '-nps', '0', **kwargs))
    return output


def predict_by_nnunet(source: Path, output: Path, folds: tuple[int, ...], model: Path, **kwargs) -> Path:
    """nnU-Net's own prediction, as `nnUNetv2_predict` makes it, with probabilities."""
    predictor = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False, **kwargs)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    output.mkdir(parents=True)
    predictor.predict_from_files_sequential(str(source), str(output), save_probabilities=True)
    return output


def model_folder(trainer: str = REFINED, dataset: str = DATASET, configuration: str = '3d_fullres') -> Path:
    return Path(os.environ['nnUNet_results']) / dataset / f'{trainer}__{PLANS}__{configuration}'


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def rows(folder: Path) -> dict[str, dict]:
    """The summary's rows by case, without what differs from run to run."""
    cases = json.loads((folder / 'pdddpm_summary.json').read_text())['cases']
    return {row['case']: {key: value for key, value in row.items() if key != 'seconds'} for row in cases}


def images(folder: Path) -> dict[str, bytes]:
    """Everything but the summary and what nnU-Net notes about the call: relative path -> content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*')
            if file.is_file() and file.name not in NOT_RESULTS and file.parent.name != 'pdddpm_cases'}


def assert_same_results(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    of_one, of_other = images(one), images(other)
    assert of_one.keys() == of_other.keys()
    assert [name for name in of_one if of_one[name] != of_other[name]] == []


def refusal(call, *args, **kwargs) -> str:
    """What is said when a call is refused: one line, with exit status 1."""
    with pytest.raises(SystemExit) as refused:
        call(*args, **kwargs)
    assert isinstance(refused.value.code, str)  # Python prints it and exits with 1
    assert refused.value.code.startswith('Error: ') and '\n' not in refused.value.code
    return refused.value.code


def write_odd_case(folder: Path, degrees: tuple[float, float, float] = (20, -35, 50)) -> None:
    """A phantom with its own spacing, origin, oblique axes and a margin of zeros."""
    image = sitk.GetImageFromArray(np.pad(make_case((17, 25, 19), 77)[0], MARGIN))
    image.SetSpacing((1.1, 1.3, 1.2))
    image.SetOrigin((17.0, -230.5, 81.25))
    image.SetDirection(Rotation.from_euler('xyz', degrees, degrees=True).as_matrix().ravel())
    folder.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(folder / 'odd_0000.nii.gz'))


def samples_of(folder: Path) -> list[np.ndarray]:
    return [read(file) for file in sorted((folder / 'samples').iterdir())]


def command(flags: list[str]) -> subprocess.CompletedProcess[str]:
    """The console script where it is installed, else the module."""
    script = Path(sys.executable).parent / 'nnUNetv2_pdddpm_predict'
    if script.exists():
        return run_command(script.name, *flags)
    return run_command(Path(sys.executable).name, '-m', 'nnunet_pdddpm.commands.predict', *flags)
