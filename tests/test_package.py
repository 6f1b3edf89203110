"""The wheel: `-tr PDDDPMTrainer` is found with no environment variable, and uninstalling leaves no trace."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import DATASET, DATASET_ID, PLANS, STOCK, Workspace

PROJECT = Path(__file__).resolve().parents[1]


def clean_variables() -> dict[str, str]:
    """The environment without what leads Python or nnU-Net elsewhere."""
    return {k: v for k, v in os.environ.items() if not k.startswith(('nnUNet', 'PYTHON', 'VIRTUAL_ENV'))}


def pip(binaries: Path, command: str, *arguments: str) -> None:
    """A pip of another environment, which a package on PYTHONPATH would look installed to."""
    subprocess.run([str(binaries / 'pip'), command, '-q', *arguments], check=True, env=clean_variables())


@pytest.fixture(scope='module')
def clean_environment(tmp_path_factory) -> Path:
    """Site-packages of a new venv with nnunetv2 in it and nothing of this project; its dependencies are borrowed."""
    venv = tmp_path_factory.mktemp('clean') / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', str(venv)], check=True)
    pip(venv / 'bin', 'install', '--no-deps', f'nnunetv2=={version("nnunetv2")}')
    site = next((venv / 'lib').glob('python*')) / 'site-packages'
    borrowed = venv / 'borrowed'
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()['purelib']).iterdir():
        if not entry.name.lower().startswith(('nnunet', '__editable__')):
            (borrowed / entry.name).symlink_to(entry)
    (site / 'borrowed.pth').write_text(f'{borrowed}\n')
    return site


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob('*') if '__pycache__' not in p.parts}


def copy_of_the_project(folder: Path) -> Path:
    """What the package is built from, without build leftovers; an installation never writes into the checkout."""
    folder.mkdir()
    for name in ('nnunet_pdddpm', 'trainers'):
        shutil.copytree(PROJECT / name, folder / name)
    for name in ('setup.cfg', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(PROJECT / name, folder)
    return folder


def test_an_editable_install_is_found_through_the_variable_that_the_check_names(clean_environment, tmp_path):
    binaries = clean_environment.parents[2] / 'bin'
    source = copy_of_the_project(tmp_path / 'source')
    pip(binaries, 'install', '--no-deps', '-e', str(source))
    environment = {**clean_variables(), 'nnUNet_preprocessed': str(tmp_path), 'nnUNet_results': str(tmp_path)}

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(binaries / 'nnUNetv2_pdddpm_check')], env=environment, text=True, cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    try:
        without = check()
        assert without.returncode == 1
        assert f'export nnUNet_extTrainer={source / "trainers"}' in without.stdout
        environment['nnUNet_extTrainer'] = str(source / 'trainers')
        assert check().returncode == 0
    finally:
        pip(binaries, 'uninstall', '-y', 'nnunet-pdddpm')


def test_a_wheel_install_trains_and_predicts_and_uninstalls_without_a_trace(clean_environment, stock: Workspace,
                                                                           tmp_path):
    site, binaries = clean_environment, clean_environment.parents[2] / 'bin'
    before = listing(site / 'nnunetv2')
    source = copy_of_the_project(tmp_path / 'source')
    pip(binaries, 'wheel', '--no-deps', '-w', str(tmp_path), str(source))
    wheel, = tmp_path.glob('nnunet_pdddpm-*.whl')
    pip(binaries, 'install', '--no-deps', str(wheel))

    results, elsewhere = tmp_path / 'results', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    shutil.copytree(stock.model(STOCK), results / DATASET / f'nnUNetTrainer__{PLANS}__3d_fullres')
    environment = {**clean_variables(), 'nnUNet_results': str(results),
                   **{name: os.environ[name] for name in ('nnUNet_raw', 'nnUNet_preprocessed')}}
    environment.update(nnUNet_def_n_proc='1', nnUNet_n_proc_DA='1')  # each process imports nnU-Net for seconds

    def run(*command: str) -> str:
        result = subprocess.run([str(binaries / command[0]), *command[1:]], env=environment, cwd=elsewhere, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    used = run('python', '-c', 'import nnunet_pdddpm, nnunetv2; print(nnunet_pdddpm.__file__, nnunetv2.__file__)')
    assert all(Path(p).is_relative_to(site) for p in used.split())
    run('nnUNetv2_train', str(DATASET_ID), '3d_fullres', '0', '-tr', 'PDDDPMTrainer_1epoch', '-p', PLANS, '-device',
        'cpu')
    run('nnUNetv2_predict', '-i', str(stock.raw / 'imagesTs'), '-o', str(tmp_path / 'predicted'), '-d',
        str(DATASET_ID), '-c', '3d_fullres', '-tr', 'PDDDPMTrainer_1epoch', '-p', PLANS, '-f', '0', '-device', 'cpu',
        '-npp', '1', '-nps', '1')
    assert {p.name for p in (tmp_path / 'predicted').glob('*.nii.gz')} == {'phantom_009.nii.gz', 'phantom_010.nii.gz'}

    pip(binaries, 'uninstall', '-y', 'nnunet-pdddpm')
    assert listing(site / 'nnunetv2') == before
    assert not (site / 'nnunet_pdddpm').exists()
