"""What only shows on large volumes and GPUs, shown on small ones without: memory, calls, devices, and no difference."""
from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_cuda
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage
from test_properties import pointwise_refiner, volume_predictor
from test_resampling import export_of
from test_tuning_scores import Labels
from tiny_refiner import EPS, X0, make_refiner, noisy_batch, patch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_logits, hard_mask
from nnunet_pdddpm.diffusion.process import log_likelihood_ratio, q_sample
from nnunet_pdddpm.inference import chunks as chunks_module
from nnunet_pdddpm.inference import volume_predictor as predictor_module
from nnunet_pdddpm.inference import volume_sampling as volume_sampling_module
from nnunet_pdddpm.inference.case import PendingCase
from nnunet_pdddpm.inference.chunks import chunks
from nnunet_pdddpm.inference.components import Parts
from nnunet_pdddpm.inference.counting import VoxelCounter, tally
from nnunet_pdddpm.inference.export import Outputs, places
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.ranking import NOT_MEASURED
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_memory import tile_bytes, volume_bytes
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import volume_noise
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.tuning import case_sweep as sweep_module
from nnunet_pdddpm.tuning.cases import Case
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.sweep import mask_candidates

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
CHAIN = SamplingSettings(samples=2, steps=2, dependence=0.5, mask_stock=0.25, mask_blind=0.25)
SLICE = 1  # bytes of a chunk: as few as can be


def predictor_of(channels, patch_size, sampling, regions=False, scale=4.0, step=0.5):
    predictor = volume_predictor(pointwise_refiner(channels, scale, regions, sampling), patch_size, sampling, False)
    predictor.tile_step_size = step
    return predictor


def image_of(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))


# chunks

def test_noise_of_many_classes_a_slice_at_a_time_is_drawn_by_all_threads(monkeypatch):
    """Where a chunk is one slice, the next slices are drawn ahead."""
    together = threading.Barrier(3)  # is passed only by three threads at a time
    drawn = volume_sampling_module._drawn

    def waiting(*args):
        together.wait(timeout=30)
        return drawn(*args)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    monkeypatch.setattr(volume_sampling_module, '_drawn', waiting)
    field = volume_noise((117, 6, 4, 4), 0, 0, CPU)()
    assert [field(1).shape for _ in range(6)] == [(117, 1, 4, 4)] * 6


def test_a_gpu_with_many_cores_beside_it_has_few_slices_of_noise_ahead(monkeypatch):
    drawn, futures = volume_sampling_module._drawn, []

    def submit(pool, function, *args):
        futures.append(args)
        return done
    done = Future()
    done.set_result(drawn((2, 4, 4), 0))
    monkeypatch.setattr(volume_sampling_module, 'available_cpus', lambda: 128)
    monkeypatch.setattr(volume_sampling_module.ThreadPoolExecutor, 'submit', submit)
    with fake_gpu():
        volume_noise((2, 200, 4, 4), 0, 0, CUDA)()(1)
    assert len(futures) == 1 + volume_sampling_module.MOST_THREADS


@pytest.mark.parametrize('correlation', [0.0, 0.9])
def test_noise_is_the_same_in_chunks_of_any_size_and_with_any_number_of_threads(correlation):
    shape, fields = (2, 7, 3, 5), []
    for threads, sizes in ((1, [7]), (1, [1] * 7), (3, [7]), (2, [4, 3]), (3, [1] * 7)):
        torch.set_num_threads(threads)
        start = volume_noise(shape, 3, 1, CPU, correlation)
        fields.append([torch.cat([field(n) for n in sizes], 1) for field in (start(), start())])
    for first, second in fields[1:]:
        assert torch.equal(first, fields[0][0]) and torch.equal(second, fields[0][1])


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize(('patch_size', 'redraw'), [([4, 6, 6], 1), ([4, 6, 6], 0), ([6, 6], 1)])
def test_a_prediction_is_the_same_in_chunks_of_any_size(monkeypatch, patch_size, redraw, regions):
    sampling = SamplingSettings(samples=2, steps=3, dependence=0.5, redraw=redraw, mask_stock=0.25, mask_blind=0.25)
    found = []
    for chunk in (chunks_module.CHUNK_BYTES, 4 * 3 * 8 * 10 * 2, SLICE):
        monkeypatch.setattr(chunks_module, 'CHUNK_BYTES', chunk)
        samples = {}
        prediction = predictor_of(3, patch_size, sampling, regions).predict_volume(image_of(11, 8, 10),
                                                                                   samples.__setitem__)
        found.append((prediction, samples))
    (whole, of_whole), *others = found
    for prediction, samples in others:
        for number, logits in of_whole.items():
            torch.testing.assert_close(samples[number], logits, rtol=2e-3, atol=2e-3)
            assert torch.equal(hard_mask(samples[number], regions), hard_mask(logits, regions))
        torch.testing.assert_close(prediction.logits, whole.logits, rtol=1e-6, atol=1e-6)
        assert (prediction.counts.sample_sizes() == whole.counts.sample_sizes()).all()
        assert (prediction.counts.consensus == whole.counts.consensus).all()
        for name, values in whole.spread.maps().items():
            torch.testing.assert_close(prediction.spread.maps()[name], values, rtol=1e-6, atol=1e-6)
        for channel in range(3):
            assert prediction.spread.pairwise_dice(channel) == whole.spread.pairwise_dice(channel)
        assert prediction.spread.estimated_dice(whole.logits) == pytest.approx(
            whole.spread.estimated_dice(whole.logits), abs=1e-6)


# memory

class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are made within it."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key, nbytes):
        self.known.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize('channels', [3, 25, 117])
def test_the_peak_of_memory_is_what_the_formula_says(monkeypatch, channels):
    """With samples for export, which are in main memory, too: 2 C bytes a voxel; and with all maps."""
    monkeypatch.setattr(chunks_module, 'CHUNK_BYTES', SLICE)
    slices, voxels = 240, 240 * 12 * 12
    predictor = predictor_of(channels, [4, 12, 12], CHAIN, step=1.0)
    expected = volume_bytes(1, (channels, slices, 12, 12), 4, 2, 1, False) + 2 * channels * voxels
    data = image_of(slices, 12, 12)
    with LiveBytes() as memory:
        memory._see(data.untyped_storage())
        prediction = predictor.predict_volume(data, lambda number, logits: None)
        prediction.spread.maps()
    assert memory.peak == pytest.approx(expected, rel=0.1)
    documented = 12 * channels + 2 + 4 + 16  # docs/explanation/limits.md, of two samples, one image channel
    assert memory.peak / voxels == pytest.approx(documented, rel=0.15)


@pytest.mark.parametrize('channels', [3, 25])
def test_a_case_takes_no_more_memory_to_tune_than_is_asked_for(monkeypatch, channels):
    monkeypatch.setattr(chunks_module, 'CHUNK_BYTES', SLICE)
    predictor, image = predictor_of(channels, [4, 12, 12], CHAIN, step=1.0), image_of(60, 12, 12)
    predictor.label_manager.ignore_label = None
    asked = predictor.bytes_needed(image.shape) + sweep_module.MORE_BYTES * channels * image.numel()
    labels = torch.randint(0, channels, (60, 12, 12), generator=torch.Generator().manual_seed(1)).numpy()
    chains = [replace(CHAIN, start=0.8, steps=steps) for steps in (1, 2)]
    with torch.inference_mode(), LiveBytes() as memory:
        opened = sweep_module.CaseSweep(predictor, Case(image, labels.astype(np.uint8), [], {}, 'case'))
        opened.energies(chains, range(4))
        of_samples, memory.peak = memory.peak, memory.now
        opened.masks(mask_candidates(chains[1], 8))
    assert 0.8 * asked < max(of_samples, memory.peak) <= asked


# calls

def operators(do):
    """How many operators torch calls for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        do()
    return sum(of.count for of in profile.key_averages() if of.key.startswith('aten::'))


def test_the_number_of_operators_depends_on_chunks_and_not_on_slices(monkeypatch):
    monkeypatch.setattr('nnunet_pdddpm.inference.volume.volume_noise',  # a CPU draws it slice by slice
                        lambda shape, *args: lambda: lambda count: torch.zeros(shape[0], count, *shape[2:]))

    def count(slices, steps):
        sampling = SamplingSettings(samples=2, steps=steps, mask_blind=0)
        predictor, data = predictor_of(3, [slices, 6, 6], sampling), image_of(slices, 6, 6)
        draw_shifts.cache_clear()
        return operators(lambda: predictor.predict_volume(data, lambda number, logits: None))
    few, many = count(6, 2), count(48, 2)
    assert abs(many - few) <= 0.02 * few
    of_a_step = (count(48, 3) - many) / 2  # of one of two samples
    assert 0 < of_a_step < 250  # with the denoiser's and the tile's
    monkeypatch.setattr(chunks_module, 'CHUNK_BYTES', 4 * 3 * 6 * 6 * 6)  # six slices
    assert count(48, 3) - count(48, 2) < 2 * (of_a_step + 8 * 120)


# export

@pytest.mark.parametrize('uncertainty', ['none', 'entropy', 'all'])
def test_for_export_only_what_is_written_is_handed_over(monkeypatch, tmp_path, uncertainty):
    predictor, handed_over = predictor_of(3, [4, 6, 6], CHAIN), []
    export = export_of(3, (11, 8, 10), (11, 8, 10), (1.0,) * 3)
    export = replace(export, folder=tmp_path / 'case', outputs=Outputs(uncertainty=uncertainty))
    queue = SimpleNamespace(submit=lambda function, *args: handed_over.append((function, args)), locks=[])
    case = PendingCase(export, tmp_path, 2, 1, [], {}, NOT_MEASURED, queue)
    on_sample = case.add_sample if export.outputs.samples else None
    case.add_prediction(predictor.predict_volume(image_of(11, 8, 10), on_sample))
    (function, (logits, stock, maps)), = handed_over
    assert function == export.write_prediction and logits.shape == (3, 11, 8, 10) and stock is None
    assert set(maps) == {'none': set(), 'entropy': {'uncertainty'},
                         'all': {'uncertainty', 'variance', 'mutual_information'}}[uncertainty]
    assert case.counts.sample_sizes().shape == (2, 2)  # of the samples, which are counted where they are drawn


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_labels_are_counted_in_the_boxes_around_them(regions):
    """By numbers of any type, as nnU-Net's readers give them; label 4 is not there."""
    values = {f'label {i}': tuple(range(i, 5)) if regions else (i,) for i in range(1, 5)}
    mask = np.zeros((6, 9, 8), np.float32)
    mask[1:3, 2:4, 1:3], mask[4, 7, 3:8], mask[4, 7, 5] = 1, 2, 3
    looked_at = {}
    for name, there in places(mask, values):
        expected = np.isin(mask, values[name])
        assert there.sum() == expected.sum() and ndimage.label(there)[1] == ndimage.label(expected)[1]
        looked_at[name] = there.size
    assert looked_at == ({'label 1': 4 * 6 * 7, 'label 2': 5, 'label 3': 1, 'label 4': 0} if regions
                         else {'label 1': 8, 'label 2': 5, 'label 3': 1, 'label 4': 0})


# the choice of a device

@pytest.fixture
def on_gpu(monkeypatch):
    """A predictor whose device is a GPU with so many free bytes; where it predicts, and with how many threads."""
    def made(free):
        predictor, where = predictor_of(3, [4, 6, 6], CHAIN), []
        predictor.device, predictor.perform_everything_on_device = CUDA, True
        monkeypatch.setattr(predictor_module, 'free_bytes', lambda device: free)
        monkeypatch.setattr(predictor_module, 'available_cpus', lambda: 3)
        monkeypatch.setattr(predictor, '_predict_volume', lambda data, device, *args: where.append(
            (device.type, torch.get_num_threads(), predictor.perform_everything_on_device)))
        return predictor, where
    return made


def test_whether_a_volume_fits_is_decided_before_anything_is_predicted(on_gpu, caplog):
    data = image_of(11, 8, 10)
    needed = volume_bytes(1, (3, 11, 8, 10), 4, 2, 1, False) + tile_bytes(3, (4, 6, 6))
    predictor, where = on_gpu(needed)
    predictor.predict_volume(data)
    assert where == [('cuda', 1, True)] and not caplog.messages
    predictor, where = on_gpu(needed - 1)
    predictor.predict_volume(data)
    assert where == [('cpu', 3, False)] and torch.get_num_threads() == 1
    said, = caplog.messages
    assert 'its arrays are kept in main memory (it takes about 1.1 GB' in said
    assert predictor.perform_everything_on_device


def test_so_it_is_where_a_case_is_opened_to_tune(on_gpu, monkeypatch):
    monkeypatch.setattr(sweep_module.CaseSweep, '_with_memory_fallback', lambda self, do: None)
    case = SimpleNamespace(image=image_of(11, 8, 10))
    needed = volume_bytes(1, (3, 11, 8, 10), 4, 2, 1, False) + tile_bytes(3, (4, 6, 6)) \
        + sweep_module.MORE_BYTES * 3 * 11 * 8 * 10
    assert [sweep_module.CaseSweep(on_gpu(free)[0], case).device.type for free in (needed, needed - 1)] == [
        'cuda', 'cpu']


def test_what_is_kept_in_main_memory_is_made_by_all_threads_and_is_the_same(monkeypatch):
    """Where nnU-Net's commands have set one, on a CPU in the place of the GPU that the networks are on."""
    monkeypatch.setattr(predictor_module, 'available_cpus', lambda: 3)

    def predicted(networks_on):
        predictor, found, threads = predictor_of(3, [4, 6, 6], CHAIN), {}, []
        predictor.outputs = Outputs(samples=True)
        monkeypatch.setattr(predictor, 'threads_for', lambda device: VolumePredictor.threads_for(
            SimpleNamespace(device=networks_on), device))

        def add_sample(number, logits):
            found[number] = logits
            threads.append(torch.get_num_threads())

        def add_prediction(prediction):
            found.update(prediction.spread.maps(), mask=prediction.logits)
            threads.append(torch.get_num_threads())
        case = SimpleNamespace(add_sample=add_sample, add_prediction=add_prediction,
                               export=SimpleNamespace(case='case'))
        PDDDPMPredictor._predict_case(predictor, case, image_of(11, 8, 10))
        assert torch.get_num_threads() == 1
        return found, threads
    (expected, by_one), (found, by_all) = predicted(CPU), predicted(CUDA)
    assert by_one == [1, 1, 1] and by_all == [3, 3, 3]
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6)


# a GPU without one

class Noted(TorchDispatchMode):
    """Notes the operators of which a condition (operator, arguments, result) holds."""

    def __init__(self, condition):
        super().__init__()
        self.condition, self.seen = condition, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.condition(function, args, result):
            self.seen.append(str(function))
        return result


def copies_to_host(function, args, result):
    """From the GPU to main memory."""
    kinds = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    return isinstance(result, torch.Tensor) and result.device.type == 'cpu' and 'cuda' in kinds


def changes_device_and_type(function, args, result):
    """At once, which asks mps for float64."""
    return '_to_copy' in str(function) and args[0].device != result.device and args[0].dtype != result.dtype


@contextmanager
def fake_gpu():
    """Within it no tensor holds numbers, all operators check that devices agree, and `item` raises."""
    if torch.__version__ < '2.10' and not torch.cuda.is_available():
        pytest.skip('torch before 2.10 asks for a driver even where tensors hold no numbers')
    draw_shifts.cache_clear()  # which keeps tensors
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Noted(copies_to_host) as copies:
        yield copies
    draw_shifts.cache_clear()


def to_fake_gpu(module):
    """Parameters and buffers of the module, replaced."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=CUDA), requires_grad=False)
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=CUDA)
    return module


SAMPLINGS = [SamplingSettings(), SamplingSettings(mask_stock=1),
             SamplingSettings(mask_blind=0.5, mask_stock=0.25, steps=3),
             SamplingSettings(mask_blind=0, steps=2, redraw=0, start_mask='hard', mask_samples=2)]


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize(('design', 'sampling'), [*((X0, sampling) for sampling in range(len(SAMPLINGS))), (EPS, 3)])
def test_a_patch_on_a_gpu_stays_there(design, sampling, regions):
    refiner = make_refiner(design=design, regions=regions)
    image, batch = patch(('PlainConvUNet', 2, True)), noisy_batch()
    with fake_gpu() as copies:
        to_fake_gpu(refiner)
        logits = refiner.sample(torch.empty_like(image, device=CUDA), SAMPLINGS[sampling])
        output = refiner(type(batch)(*(torch.empty_like(part, device=CUDA) for part in batch)))
        assert logits.device.type == output.device.type == 'cuda' and copies.seen == []


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize('sampling', [CHAIN, SamplingSettings(redraw=0, steps=2),
                                      SamplingSettings(samples_from='stock')], ids=['redraw', 'DDPM', 'stock'])
def test_a_volume_on_a_gpu_stays_there(monkeypatch, sampling, regions):
    predictor = predictor_of(3, [4, 6, 6], sampling, regions)
    monkeypatch.setattr(predictor_module, 'available_cpus', lambda: 1)
    monkeypatch.setattr('nnunet_pdddpm.inference.volume_sampling.available_cpus', lambda: 1)
    monkeypatch.setattr('nnunet_pdddpm.inference.volume.compute_gaussian',
                        lambda size, device, **kwargs: torch.ones(tuple(size), device=device))
    with fake_gpu() as copies:
        to_fake_gpu(predictor.refiner)
        # it is there, and torch refuses to move fake parameters that any weak reference is left of
        monkeypatch.setattr(predictor.refiner, 'to', lambda device: predictor.refiner)
        predictor.device = CUDA
        predictor.predict_sliding_window_return_logits = lambda image: torch.empty((3, 11, 8, 10), device=CUDA).half()
        volume = Volume(predictor, torch.empty(1, 11, 8, 10), CUDA)
        parts = Parts(torch.zeros((11, 8, 10), dtype=torch.int32, device=CUDA), 3)
        monkeypatch.setattr(volume, 'parts', lambda settings: parts)
        volume.start_fold()
        spread = Spread(volume.shape, 2, 1, regions, CUDA)
        counts = VoxelCounter(predictor.label_manager, foreground_labels(predictor.dataset_json),
                              tuple(slice(0, n) for n in volume.shape[1:]))
        at = volume.sample(sampling, 0, 2)
        shifts = predictor.refiner.end_shifts(sampling, 0, 2, parts.number)
        for z in chunks(volume.shape):
            p = at(z)
            logits = drawn_logits(p, regions, shifts, parts.at(z))
            mask = hard_mask(logits, regions)
            spread.add(0, z, p, mask)
            counts.add(0, z, mask)
        spread.finish_fold(1)
        assert counts.tables[0].device.type == 'cuda'
        assert {values.device.type for values in spread.maps().values()} == {'cuda'}
        assert copies.seen == []


def test_mps_is_not_asked_for_float64():
    with fake_gpu(), Noted(changes_device_and_type) as copies:
        x0, level = torch.ones(2, 3, 4, 4, device='mps'), torch.zeros(2, device='mps')
        x = q_sample(x0, level, torch.ones_like(x0))
        evidence = log_likelihood_ratio(x, level, -1, 1)
    assert {(of.device.type, of.dtype) for of in (x, evidence)} == {('mps', torch.float32)} and not copies.seen


def test_voxels_are_counted_as_by_bincount():
    values = torch.tensor([3, 0, 3, 1, 3])
    assert tally(values, 6).tolist() == torch.bincount(values, minlength=6).tolist() == [1, 1, 0, 3, 0, 0]
    assert tally(values, 4, torch.tensor([1, 0, 0, 1, 1])).tolist() == [0, 1, 0, 2]


@pytest.fixture
def waits(monkeypatch):
    """Within `fake_gpu`: how often the host asks a tensor on the GPU for a number, which it then makes up."""
    seen = []

    def told(make_up):
        return lambda tensor: (seen.append(tuple(tensor.shape)), make_up(tensor))[1]
    monkeypatch.setattr(torch.Tensor, '__float__', told(lambda tensor: 0.5))
    monkeypatch.setattr(torch.Tensor, 'numpy', told(lambda tensor: np.zeros(tensor.shape)))
    return seen


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_scores_of_a_case_on_a_gpu_are_made_there_and_asked_for_once(waits, regions):
    """Where labels are to be ignored, too, whatever the number of samples."""
    shape, samples = (4, 6, 5), 5
    labels = np.random.default_rng(0).integers(0, 4, shape)
    with fake_gpu() as copies:
        truth = Truth(labels, Labels([(1, 2), 2], 3, 2) if regions else Labels(ignore=3), CUDA, [labels])
        p = torch.empty((truth.num_classes, *shape), device=CUDA)
        parts, shifts = torch.zeros(shape, dtype=torch.int32, device=CUDA), torch.zeros((len(p), 2))
        assert waits == copies.seen == []
        truth.score(p)
        assert waits == [(), ()]  # Dice and likelihood
        truth.set_parts(p)
        del waits[:], copies.seen[:]
        truth.energy([truth.drawn(p, shifts, parts) for _ in range(samples)])
        assert len(copies.seen) == len(waits) == 2  # volumes, and distances of all pairs


@pytest.mark.parametrize('labels', test_cuda.LABELS)
def test_a_training_batch_and_its_loss_on_a_gpu_are_made_there(tmp_path, monkeypatch, labels):
    """Only whether anything is to be ignored is asked for."""
    for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', 'nnUNetTrainer')
    stock = test_cuda.make_trainer(nnUNetTrainer, labels, 'cpu', tmp_path)
    stock.save_checkpoint(str(Path(stock.output_folder) / 'checkpoint_final.pth'))
    trainer = test_cuda.make_trainer(PDDDPMTrainer, labels, 'cpu', tmp_path)
    trainer.on_train_epoch_start()
    batch, asked, levels = test_cuda.make_batch(trainer, labels), [], trainer.draw_levels(1)
    monkeypatch.setattr(trainer, 'draw_levels', lambda number: levels)  # in main memory, as it should be
    shown = torch.tensor([True, False])
    with fake_gpu() as copies:
        to_fake_gpu(trainer.refiner)
        trainer.device, trainer.noise_generator = CUDA, None
        for name, value in (('__bool__', True), ('__int__', 1)):  # fake tensors have none in main memory, either
            monkeypatch.setattr(torch.Tensor, name, lambda of, value=value: (asked.append(of.device.type), value)[1])
        image, *targets = (torch.empty_like(of, device=CUDA) for of in (batch['data'], *batch['target']))
        noisy, noise = trainer.make_noisy_batch(image, targets[0])
        assert {part.device.type for part in (*noisy, noise)} == {'cuda'} and copies.seen == []
        assert asked.count('cuda') == ('ignore' in labels)
        outputs = trainer.refiner(noisy)
        assert {output.device.type for output in outputs} == {'cuda'} and copies.seen == []
        del asked[:]
        trainer.denoising_loss.set_noisy(shown)
        loss = trainer.loss(outputs, targets)
        assert loss.device.type == trainer.denoising_loss.measured.device.type == 'cuda' and copies.seen == []
        # nnU-Net's loss of classes asks whether all is to be ignored, once for each item
        assert asked.count('cuda') == (2 if labels == 'ignore' else 0)
