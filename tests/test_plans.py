"""Plans of nnU-Net's own planners, of own identifiers, and edited ones."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, BRIEF_STOCK, PLANS, in_this_process, make_trainer, predict_in_process, prepare
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.demo.phantom import write_dataset
from nnunet_pdddpm.diffusion.process import log_likelihood_ratio
from nnunet_pdddpm.network.denoiser import SplitConv
from nnunet_pdddpm.network.refiner import NoisyBatch
from nnunet_pdddpm.training.presegmenters import TrainingContext
from nnunet_pdddpm.training.trainer import PDDDPMTrainer

DATASET_ID = 730
DATASET = f'Dataset{DATASET_ID}_Planned'
PLANNERS = {'ExperimentPlanner': 'nnUNetPlans', 'nnUNetPlannerResEncM': 'nnUNetResEncUNetMPlans',
            'nnUNetPlannerResEncL': 'nnUNetResEncUNetLPlans', 'nnUNetPlannerResEncXL': 'nnUNetResEncUNetXLPlans'}


@pytest.fixture(scope='module')
def planned(folders) -> Path:
    """Raw data set, planned and preprocessed as it is."""
    raw = Path(os.environ['nnUNet_raw']) / DATASET
    write_dataset(raw, num_training=4, num_test=1, shape=(20, 26, 22), seed=6)
    prepare(raw, '3d_fullres', folds=2)
    return raw


@pytest.fixture(autouse=True)
def brief_presegmenter(monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)


def train_and_predict(raw: Path, plans: str, configuration: str, output: Path):
    """The refined trainer after stock and refined training with these plans; the prediction is in `output`."""
    make_trainer(BRIEF_STOCK, 0, configuration, DATASET_ID, plans).run_training()
    trainer = make_trainer(BRIEF, 0, configuration, DATASET_ID, plans)
    trainer.run_training()
    predict_in_process(raw / 'imagesTs', output, DATASET_ID, configuration, BRIEF, plans=plans)
    assert (output / 'phantom_004.nii.gz').is_file()
    return trainer


@pytest.mark.parametrize('planner', ['ExperimentPlanner', 'nnUNetPlannerResEncM'])
def test_plans_as_they_are_made_are_trained_and_predict(planned, planner, tmp_path, monkeypatch):
    monkeypatch.setenv('nnUNet_n_proc_DA', '1')
    with in_this_process():
        assert plan_experiments([DATASET_ID], planner) == PLANNERS[planner]
    monkeypatch.setenv('nnUNet_n_proc_DA', '0')
    trainer = train_and_predict(planned, PLANNERS[planner], '3d_fullres', tmp_path)
    expected = 'ResidualEncoderUNet' if 'ResEnc' in planner else 'PlainConvUNet'
    assert type(trainer.refiner.presegmenter).__name__ == type(trainer.refiner.denoiser.unet).__name__ == expected


@pytest.fixture(scope='module')
def large(planned) -> Path:
    """A data set that is only a fingerprint, of images of 300 x 300 x 250 voxels: nnU-Net plans six stages for it."""
    name = f'Dataset{DATASET_ID + 1}_Large'
    raw, preprocessed = (Path(os.environ[variable]) / name for variable in ('nnUNet_raw', 'nnUNet_preprocessed'))
    write_dataset(raw, num_training=1, num_test=0, shape=(6, 6, 6))
    preprocessed.mkdir()
    fingerprint = json.loads((Path(os.environ['nnUNet_preprocessed']) / DATASET / 'dataset_fingerprint.json'
                              ).read_text())
    fingerprint.update(spacings=[[1.0, 0.8, 0.8]], shapes_after_crop=[[250, 300, 300]])
    (preprocessed / 'dataset_fingerprint.json').write_text(json.dumps(fingerprint))
    return preprocessed


@pytest.mark.parametrize('configuration', ['2d', '3d_fullres'])
@pytest.mark.parametrize('planner', PLANNERS)
def test_planned_networks_start_as_the_stock_network_and_are_trained_in_every_stage(large, planner, configuration,
                                                                                   monkeypatch):
    """With an eighth of the planned features and a small patch: stages, blocks, kernels and strides are as planned."""
    plans_file = large / f'{PLANNERS[planner]}.json'
    if not plans_file.exists():
        monkeypatch.setenv('nnUNet_n_proc_DA', '1')
        with in_this_process():
            plan_experiments([DATASET_ID + 1], planner)
    plans, dataset_json = (json.loads((large / name).read_text()) for name in (plans_file.name, 'dataset.json'))
    plan = plans['configurations'][configuration]
    architecture = plan['architecture']['arch_kwargs']
    features = architecture['features_per_stage'] = [max(4, f // 8) for f in architecture['features_per_stage']]
    assert len(features) >= 6
    context = TrainingContext(plans, configuration, dataset_json)
    torch.manual_seed(0)
    stock = context.planned_network().eval()
    manager = PlansManager(plans)
    refiner = PDDDPMTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 3, True)
    refiner.denoiser.warm_start(stock.state_dict())

    encoder = refiner.denoiser.unet.encoder
    assert (getattr(encoder, 'stem', None) is not None) == ('ResEnc' in planner)
    first = encoder.stem if 'ResEnc' in planner else encoder.stages[0][0]
    assert isinstance(first.convs[0].conv, SplitConv)
    assert sum(isinstance(m, SplitConv) for m in encoder.modules()) == 1
    assert [m.scale_shift.out_features for m in refiner.denoiser.encoder_modulations] == [2 * f for f in features]
    assert len(refiner.denoiser.decoder_modulations) == len(features) - 1

    *size, last = np.prod(architecture['strides'], 0).tolist()
    size = [*size, 2 * last]  # the smallest that is more than one voxel at the bottom
    image = torch.randn(1, 1, *size)
    batch = NoisyBatch(image, torch.randn(1, 3, *size), torch.tensor([-2.0]))
    outputs = refiner(batch)
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], stock(image) + log_likelihood_ratio(batch.noisy, batch.log_snr, -1, 1))
    sum(output.square().mean() for output in outputs).backward()
    assert [name for name, p in refiner.denoiser.named_parameters() if p.grad is None] == []
    assert all(m.scale_shift.weight.grad.abs().max() > 0 for m in refiner.denoiser.encoder_modulations)


def test_an_own_identifier_an_inherited_configuration_and_edited_patch_and_batch(planned, tmp_path):
    preprocessed = Path(os.environ['nnUNet_preprocessed']) / DATASET
    plans = json.loads((preprocessed / f'{PLANS}.json').read_text())
    plans['plans_name'] = 'MyPlans'
    plans['configurations']['3d_fullres_small'] = {'inherits_from': '3d_fullres', 'patch_size': [12, 16, 20],
                                                   'batch_size': 3}
    (preprocessed / 'MyPlans.json').write_text(json.dumps(plans))
    trainer = train_and_predict(planned, 'MyPlans', '3d_fullres_small', tmp_path)
    assert Path(trainer.output_folder_base).name == f'{BRIEF}__MyPlans__3d_fullres_small'
    assert next(trainer.dataloader_train)['data'].shape == (3, 1, 12, 16, 20)
