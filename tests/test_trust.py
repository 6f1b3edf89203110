"""Nothing in a model is executed by this project's own loading, and nothing goes to the network."""
from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import socket
from pathlib import Path

import pytest
import torch
from conftest import BRIEF, DATASET, DATASET_ID, PLANS, REFINED, STOCK, Workspace, in_this_process, make_trainer

import nnunet_pdddpm
from nnunet_pdddpm.commands import check, evaluate, predict, tune
from nnunet_pdddpm.commands.check_dataset import check_model
from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.tuning import sweep


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def results(refined: Workspace, tmp_path: Path, monkeypatch) -> Path:
    """An own results folder with the stock models and the refined one."""
    for trainer in (STOCK, REFINED):
        shutil.copytree(refined.model(trainer), tmp_path / 'results' / DATASET / refined.model(trainer).name,
                        ignore=shutil.ignore_patterns('validation', '*.png', 'checkpoint_best.pth'))
    monkeypatch.setenv('nnUNet_results', str(tmp_path / 'results'))
    return tmp_path / 'results' / DATASET


def arguments(source: Path, output: Path) -> list[str]:
    return ['-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres', '-tr', REFINED,
            '-p', PLANS, '-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar',
            '--disable_tta', '-step_size', '1', '-samples', '2', '--report']


@pytest.mark.parametrize('where', ['extra', 'logging', 'network_weights'])
def test_a_model_with_a_payload_is_refused_before_it_runs(results, refined, tmp_path, where):
    executed = tmp_path / 'executed'
    file = results / refined.model(REFINED).name / 'fold_0' / 'checkpoint_final.pth'
    checkpoint = torch.load(file, weights_only=False)
    inside = checkpoint if where == 'extra' else checkpoint[where]
    inside['payload'] = Payload(executed)
    torch.save(checkpoint, file)

    with pytest.raises(SystemExit, match='holds objects that nnU-Net does not write') as refused:
        predict.main(arguments(refined.raw / 'imagesTs', tmp_path / 'out'))
    assert '\n' not in refused.value.code and str(file) in refused.value.code
    problem, _ = check_model(file)
    assert 'holds objects that nnU-Net does not write' in problem
    with pytest.raises(CheckpointError, match='holds objects that nnU-Net does not write'):
        make_trainer(BRIEF, 0).load_checkpoint(str(file))
    assert not executed.exists() and not (tmp_path / 'out').exists()

    torch.load(file, weights_only=False)  # the payload is one
    assert executed.is_dir()


@pytest.fixture
def no_network(monkeypatch):
    """Sockets that cannot be connected, names that cannot be looked up."""
    def closed(*args, **kwargs):
        raise AssertionError(f'the network was asked for: {args}')
    for name in ('connect', 'connect_ex', 'sendto', 'bind'):
        monkeypatch.setattr(socket.socket, name, closed)
    for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
        monkeypatch.setattr(socket, name, closed)


def test_training_tuning_prediction_report_evaluation_and_check_need_no_network(results, refined, tmp_path, no_network,
                                                                                capsys, monkeypatch):
    for module in pkgutil.walk_packages(nnunet_pdddpm.__path__, 'nnunet_pdddpm.'):
        importlib.import_module(module.name)
    with in_this_process():
        make_trainer(BRIEF, 0).run_training()
    for name, values in {'STARTS': (1.0,), 'FIRST_STEPS': (1,), 'MORE_STEPS': (), 'DEPENDENCES': (1.0,)}.items():
        monkeypatch.setattr(sweep, name, values)
    tune.main([str(DATASET_ID), '3d_fullres', '0', '-tr', REFINED, '-p', PLANS, '-device', 'cpu',
               '--disable_progress_bar'])
    predict.main(arguments(refined.raw / 'imagesTs', tmp_path / 'out'))
    evaluate.main(['-pred', str(tmp_path / 'out'), '-ref', str(refined.raw / 'labelsTs')])
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert 'src="http' not in page and 'href="http' not in page and 'url(http' not in page
    check.main([str(DATASET_ID), '-p', PLANS])
    assert 'Ready.' in capsys.readouterr().out
    with pytest.raises(AssertionError, match='the network was asked for'):  # the sockets are closed
        socket.create_connection(('localhost', 80))
