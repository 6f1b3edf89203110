"""A GPU gives what a CPU gives: prediction and training on both. Without a GPU the same runs on a CPU alone."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_model import plans, write_model

from nnunet_pdddpm.inference import volume_predictor
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.tuning.case_sweep import CaseSweep
from nnunet_pdddpm.tuning.cases import Case
from nnunet_pdddpm.tuning.sweep import mask_candidates

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
CLASSES = {'background': 0, 'cell': 1, 'nucleus': 2}
REGIONS = {'background': 0, 'whole': [1, 2], 'nucleus': [2]}
LABELS = {'classes': {'labels': CLASSES}, 'ignore': {'labels': {**CLASSES, 'ignore': 3}},
          'regions': {'labels': REGIONS, 'regions_class_order': [1, 2]},
          'regions and ignore': {'labels': {**REGIONS, 'ignore': 3}, 'regions_class_order': [1, 2]}}
MIXED = {'samples': 2, 'steps': 2, 'mask_stock': 0.25, 'mask_blind': 0.25}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """nnU-Net's, empty; and the trainers."""
    for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv('nnUNet_extTrainer', str(Path(__file__).parent.parent / 'trainers'))
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', 'nnUNetTrainer')
    monkeypatch.setenv('nnUNet_compile', 'false')


def description(labels):
    return {'channel_names': {'0': 'image'}, 'numTraining': 1, 'file_ending': '.nii.gz', **LABELS[labels]}


def image():
    return torch.randn(1, 18, 24, 20, generator=torch.Generator().manual_seed(1))


def opened(kind, folder, device, tile_batch=1, **settings):
    """A predictor of the model in a folder."""
    predictor = kind(device=torch.device(device), allow_tqdm=False, **settings)
    predictor.bfloat16, predictor.tile_batch = False, tile_batch
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def assert_close(logits, expected, regions):
    """As probabilities, in half precision; single voxels of a sample are drawn otherwise."""
    p, q = (of.cpu().float().sigmoid() if regions else of.cpu().float().softmax(0) for of in (logits, expected))
    assert (p - q).abs().mean() < 0.01 and (p > 0.5).ne(q > 0.5).float().mean() < 0.02


@devices
@pytest.mark.parametrize(('labels', 'dims'), [('classes', 3), ('regions', 3), ('classes', 2)])
def test_a_volume_is_predicted_as_on_a_cpu_a_tile_at_a_time(tmp_path, labels, dims, device):
    model = write_model(tmp_path / 'model', plans('SimpleITKIO', dims, 1), description(labels))
    regions = labels == 'regions'
    expected, found = (opened(VolumePredictor, model, *way, overrides=MIXED) for way in (('cpu', 1), (device, 4)))
    seen = {'expected': [], 'found': []}
    one, other = (predictor.predict_volume(image(), lambda number, logits, name=name: seen[name].append(logits.clone()))
                  for name, predictor in (('expected', expected), ('found', found)))
    assert_close(other.logits, one.logits, regions)
    assert_close(other.presegmentation, one.presegmentation, regions)
    for sample, drawn in zip(seen['found'], seen['expected'], strict=True):
        assert_close(sample, drawn, regions)
    assert not torch.equal(*seen['found'])
    for name, values in one.spread.maps().items():
        assert (other.spread.maps()[name].cpu().float() - values.float()).abs().mean() < 0.02, name


@devices
def test_nnunets_own_predictor_gives_the_blind_mask_as_on_a_cpu(tmp_path, device):
    model = write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), description('classes'))
    expected, found = (opened(nnUNetPredictor, model, of).predict_logits_from_preprocessed_data(image())
                       for of in ('cpu', device))
    assert_close(found, expected, False)


@needs_gpu
def test_a_volume_that_does_not_fit_on_the_gpu_is_the_same_from_main_memory(tmp_path, monkeypatch, caplog):
    model = write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), description('classes'))
    expected = opened(VolumePredictor, model, 'cuda', overrides=MIXED).predict_volume(image())
    real = volume_predictor.Spread

    def full(*args):
        if args[-1].type == 'cuda':
            torch.empty(2 ** 50, device='cuda')  # torch's own error
        return real(*args)
    monkeypatch.setattr(volume_predictor, 'Spread', full)
    found = opened(VolumePredictor, model, 'cuda', overrides=MIXED).predict_volume(image())
    assert volume_predictor.DOES_NOT_FIT in caplog.text
    assert_close(found.logits, expected.logits, False)
    assert_close(found.presegmentation, expected.presegmentation, False)


@devices
@pytest.mark.parametrize('labels', ['classes', 'regions'])
def test_a_case_is_measured_for_tuning_as_on_a_cpu(tmp_path, labels, device):
    model, scores = write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), description(labels)), []
    truth = torch.randint(0, 3, (18, 24, 20), generator=torch.Generator().manual_seed(6)).numpy()
    settings = SamplingSettings(samples=2, steps=2, dependence=0.5)
    for of in ('cpu', device):
        predictor = opened(VolumePredictor, model, of, 1 if of == 'cpu' else 4)
        with torch.inference_mode():
            case = CaseSweep(predictor, Case(image(), truth, [], {}, 'case'))
            assert case.device.type == of
            scores.append([*case.energies([settings], range(2)), *case.masks(mask_candidates(settings, 8))])
    torch.testing.assert_close(*(torch.tensor(of) for of in scores), rtol=0.02, atol=0.02)


def bare_trainer(kind, labels, device, folder):
    """Without data, not initialised, with deep supervision at two scales."""
    of_all = plans('SimpleITKIO', 3, 1)
    of_all['configurations']['3d_fullres']['architecture']['arch_kwargs'].update(
        n_stages=3, features_per_stage=[4] * 3, kernel_sizes=[[3] * 3] * 3, strides=[[1] * 3, [2] * 3, [2] * 3],
        n_conv_per_stage=[1] * 3, n_conv_per_stage_decoder=[1] * 2)
    data = folder / 'nnUNet_preprocessed' / of_all['dataset_name'] / 'plain'
    data.mkdir(parents=True, exist_ok=True)
    (data / 'none.b2nd').touch()  # by whose ending nnU-Net knows the format
    return kind({**of_all, 'continue_training': False}, '3d_fullres', 0, description(labels), torch.device(device))


def make_trainer(kind, labels, device, folder):
    """The same, initialised. That of PDDDPM has an untrained stock model."""
    trainer = bare_trainer(kind, labels, device, folder)
    trainer.initialize()
    return trainer


def make_batch(trainer, labels):
    """Noise, and labels in blocks, at both scales."""
    generator = torch.Generator().manual_seed(2)
    ignore = 'ignore' in labels
    blocks = torch.randint(0, 3 + ignore, (2, 1, 4, 4, 4), generator=generator).float()
    full, half = (torch.nn.functional.interpolate(blocks, (n,) * 3) for n in (16, 8))
    targets = [torch.cat([(of == 1) | (of == 2), of == 2, *[of == 3] * ignore], 1) if 'regions' in labels
               else of.short() for of in (full, half)]
    return {'data': torch.randn(full.shape, generator=generator) + full, 'target': targets, 'keys': ['a', 'b']}


@devices
@pytest.mark.parametrize('labels', LABELS)
def test_training_goes_as_on_a_cpu(tmp_path, monkeypatch, labels, device):
    torch.manual_seed(0)
    stock = make_trainer(nnUNetTrainer, labels, 'cpu', tmp_path)
    stock.save_checkpoint(str(Path(stock.output_folder) / 'checkpoint_final.pth'))
    randn, losses, noisy = torch.randn, [], []
    for of in ('cpu', device):
        torch.manual_seed(3)
        trainer, generator = make_trainer(PDDDPMTrainer, labels, of, tmp_path), torch.Generator().manual_seed(4)
        monkeypatch.setattr(torch, 'randn', lambda *shape, generator=None, device=None, of=generator:
                            randn(*shape, generator=of).to(device or 'cpu'))
        trainer.on_train_epoch_start()
        before, batch = copy.deepcopy(trainer.refiner.denoiser.state_dict()), make_batch(trainer, labels)
        made, _ = trainer.make_noisy_batch(batch['data'].to(of), batch['target'][0].to(of))
        noisy.append([part.cpu() for part in made])
        losses.append([float(trainer.train_step(copy.deepcopy(batch))['loss']) for _ in range(8)])
        monkeypatch.setattr(torch, 'randn', randn)
        assert {value.device.type for value in trainer.network.state_dict().values()} == {of}
        after = trainer.refiner.denoiser.state_dict()
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(before[name], value) for name, value in after.items())
        assert trainer.meter.count.sum() > 0
    for part, expected in zip(*noisy, strict=True):
        off = ~torch.isclose(part.float(), expected.float(), rtol=1e-3, atol=1e-3)
        assert off.float().mean() < 0.01  # where labels are to be ignored the stock mask stands in
    assert losses[1] == pytest.approx(losses[0], rel=0.03, abs=0.02)
    file = Path(trainer.output_folder) / 'checkpoint_latest.pth'
    trainer.save_checkpoint(str(file))
    resumed = make_trainer(PDDDPMTrainer, labels, device, tmp_path)
    resumed.load_checkpoint(str(file))
    assert {of['step'].device.type for of in resumed.optimizer.state.values()} == {'cpu'}
    resumed.on_train_epoch_start()
    assert float(resumed.train_step(copy.deepcopy(batch))['loss']) < 1.5 * losses[1][0]
