"""What holds for every shape, spacing, number of labels and setting, and for every damage to a file."""
from __future__ import annotations

import gzip
import io
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REFINED, Workspace
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_refiner import SETTINGS, make_refiner
from torch import nn

from nnunet_pdddpm.diffusion.coding import MaskCoding, harden, logits_to_probabilities, one_hot, regions_to_channels
from nnunet_pdddpm.diffusion.drawing import draw_shifts, hard_mask
from nnunet_pdddpm.diffusion.levels import even_table
from nnunet_pdddpm.diffusion.process import Ancestral
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise
from nnunet_pdddpm.evaluation.folders import Folders
from nnunet_pdddpm.image_files import damage, sample_files
from nnunet_pdddpm.inference import chunks as chunks_module
from nnunet_pdddpm.inference import volume
from nnunet_pdddpm.inference.export import CaseExport, Outputs, probability_maps
from nnunet_pdddpm.inference.preprocess import CasePreprocessor, FailedCase
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume import VolumePrediction
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import fuse_tiles, volume_noise
from nnunet_pdddpm.network import refiner as refiner_module
from nnunet_pdddpm.network.checkpoint import CheckpointError, load_checkpoint
from nnunet_pdddpm.network.refiner import DiffusionDesign, Refiner
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers, from_numbers

# the same examples in every run, however busy the machine
fixed = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30,
                 database=None)
few = settings(fixed, max_examples=12)
shapes = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)
CODING = MaskCoding()


@st.composite
def samplings(draw) -> SamplingSettings:
    """Any settings that are in range."""
    stock, blind = draw(st.sampled_from([(0, 0), (0, 1), (1, 0), (0.5, 0), (0, 0.5), (0.25, 0.75), (0.25, 0.5)]))
    settings = SamplingSettings(
        start=draw(st.sampled_from([0, 1]) | st.floats(0, 1)), steps=draw(st.integers(1, 5)),
        samples=draw(st.integers(1, 3)), samples_from=draw(st.sampled_from(['chain', 'stock', 'blind'])),
        start_mask=draw(st.sampled_from(['drawn', 'hard'])), redraw=draw(st.integers(0, 1)),
        dependence=draw(st.sampled_from([0.0, 0.3, 1.0])), temperature=draw(st.sampled_from([0.1, 1.0, 1.5, 10.0])),
        blind_temperature=draw(st.sampled_from([0.1, 1.0, 10.0])), mask_stock=stock, mask_blind=blind,
        mask_samples=draw(st.integers(1, 3)), seed=draw(st.integers(0, 2 ** 31 - 1)))
    return from_numbers(as_numbers(settings.check()))  # as a model holds them


class Pointwise(nn.Module):
    """Stands in for a U-Net where the denoiser's inside does not matter: logits of an image for any shape."""

    def __init__(self, classes: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.linspace(-1, 1, classes))

    def forward(self, image):
        return image[:, :1] * self.weight.reshape(1, -1, *[1] * (image.ndim - 2))


class PointwiseDenoiser(Pointwise):
    def forward(self, image, mask, log_snr):
        shown = 0 if mask is None else mask * torch.cos(log_snr).reshape(-1, *[1] * (image.ndim - 1))
        return super().forward(image) + shown


def pointwise_refiner(classes: int, scale: float, regions: bool, sampling: SamplingSettings) -> Refiner:
    refiner = make_refiner(design=DiffusionDesign())
    refiner.num_channels = classes
    refiner.presegmenter, refiner.denoiser = Pointwise(classes, scale), PointwiseDenoiser(classes, scale)
    refiner.configure(sampling, regions)
    return refiner.eval()


@fixed
@given(shapes, st.integers(1, 7), st.booleans(), samplings(), st.sampled_from([0.0, 1.0, 100.0, 3e4]))
def test_probabilities_are_finite_and_sum_to_one_or_lie_in_0_to_1(shape, channels, regions, sampling, scale):
    assume(regions or channels > 1)
    refiner = pointwise_refiner(channels, scale, regions, sampling)
    image = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(sampling.seed))
    with torch.no_grad():
        logits = refiner(image)
        stock, blind = refiner.presegmenter(image), refiner.blind_logits(image, sampling.blind_temperature)
    assert logits.shape == (2, channels, *shape) and torch.isfinite(logits).all()
    if sampling.is_stock:
        assert torch.equal(logits, stock)
        return
    if sampling.mask_blind == 1:
        assert torch.equal(logits, blind)
        return
    assert logits.abs().max() < 13.9 and torch.isfinite(10 * logits.half()).all()
    p = torch.sigmoid(logits) if regions else logits.exp()
    assert 0 <= p.min() and p.max() <= 1
    if not regions:
        torch.testing.assert_close(p.sum(1), torch.ones(2, *shape), rtol=1e-4, atol=1e-4)


@few
@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), samplings(), st.booleans())
def test_so_they_are_with_a_real_network(size, sampling, regions):
    refiner = make_refiner(settings=SETTINGS, regions=regions)
    image = torch.randn(1, 2, 4 * size[0] + 4, 4 * size[1] + 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = refiner.sample(image, sampling)
        stock, blind = refiner.presegmenter(image), refiner.blind_logits(image, sampling.blind_temperature)
    assert torch.isfinite(logits).all()
    if sampling.is_stock:
        assert torch.equal(logits, stock)
    elif sampling.mask_blind == 1:
        assert torch.equal(logits, blind)
    elif not regions:
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(1, *image.shape[2:]), rtol=1e-4, atol=1e-4)


@fixed
@given(shapes, st.permutations(range(4)), samplings())
def test_relabelling_the_classes_relabels_the_result(shape, permutation, sampling):
    generator, order = torch.Generator().manual_seed(sampling.seed), torch.tensor(permutation)
    logits = torch.randn(1, 4, *shape, generator=generator)
    labels = torch.randint(0, 4, (1, 1, *shape), generator=generator)
    assert torch.equal(one_hot(order.argsort()[labels], 4), one_hot(labels, 4)[:, order])
    assert torch.equal(harden(logits[:, order], False), harden(logits, False)[:, order])

    def sample(order):
        noise = seeded_noise(logits.shape, sampling.seed, 0, logits.device)
        mask = CODING.encode(harden(logits, False))[:, order]
        return refine(lambda x, level: torch.tanh(3 * x), Ancestral(), mask,
                      even_table(-14, 41).chain(sampling.start, sampling.steps), lambda: noise()[:, order])
    torch.testing.assert_close(sample(order), sample(torch.arange(4))[:, order])


# whole volumes: any tile, any number of samples, stock's sliding window and the denoiser's

volumes = st.tuples(*[st.integers(1, 7)] * 3)
patches = st.lists(st.integers(3, 6), min_size=2, max_size=3)


def volume_predictor(refiner: Refiner, patch: list[int], sampling: SamplingSettings,
                     mirrored: bool) -> VolumePredictor:
    """As from a trained model's folder."""
    predictor = VolumePredictor(device=torch.device('cpu'), allow_tqdm=False, use_mirroring=mirrored)
    predictor.network, predictor.list_of_parameters = refiner, [refiner.state_dict()]
    predictor.configuration_manager = SimpleNamespace(patch_size=patch)
    number, regions = refiner.num_channels, refiner.regions
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=number, has_regions=regions,
                                              all_labels=list(range(number)),
                                              regions_class_order=list(range(1, number + 1)))
    names = {f'label {i}': i for i in range(1, number + regions)}
    predictor.dataset_json = {'labels': {'background': 0, **names}}
    predictor.allowed_mirroring_axes = tuple(range(len(patch)))
    predictor.fold_settings, predictor.num_samples = [sampling], sampling.samples
    predictor.bfloat16 = False
    return predictor


@few
@given(volumes, patches, st.integers(1, 5), st.booleans(), samplings(), st.booleans(),
       st.sampled_from([0.0, 1.0, 100.0]))
def test_volumes_are_finite_and_sum_to_one_whatever_the_patch(shape, patch, channels, regions, sampling, mirrored,
                                                              scale):
    assume(regions or channels > 1)
    predictor = volume_predictor(pointwise_refiner(channels, scale, regions, sampling), patch, sampling, mirrored)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(sampling.seed))
    samples = {}
    prediction = predictor.predict_volume(image, samples.__setitem__)
    with predictor.using_stock_network():
        stock = predictor.predict_sliding_window_return_logits(image)
    with predictor.using_blind_network(sampling.blind_temperature):
        blind = predictor.predict_sliding_window_return_logits(image)
    assert torch.equal(prediction.presegmentation, stock)
    assert prediction.logits.shape == (channels, *shape) and torch.isfinite(prediction.logits).all()
    if sampling.is_stock:
        assert torch.equal(prediction.logits, stock)
    elif sampling.mask_blind == 1:
        assert torch.equal(prediction.logits, blind)
    elif not regions:
        torch.testing.assert_close(prediction.logits.exp().sum(0), torch.ones(shape), rtol=1e-4, atol=1e-4)
    mean = prediction.spread.mean
    assert mean.shape == (channels, *shape) and mean.min() >= 0 and mean.max() <= 1 + 1e-5
    if not regions:
        torch.testing.assert_close(mean.sum(0), torch.ones(shape), rtol=1e-4, atol=1e-4)
    without = blind if sampling.samples_from == 'blind' else \
        stock / sampling.temperature if sampling.samples_from == 'stock' or sampling.start == 0 else None
    if without is not None:  # no chain: the samples are drawn from one and the same
        expected = logits_to_probabilities(without[None].float(), regions)[0]
        torch.testing.assert_close(mean, expected, rtol=0.1 if sampling.temperature == 0.1 else 1e-2, atol=1e-2)
    assert samples.keys() == set(range(sampling.samples))
    for number, sizes in enumerate(prediction.counts.sample_sizes().tolist()):
        first, second = samples[number].topk(2, 0).values if channels > 1 else (samples[number], -math.inf)
        alike = int((first == second).sum())  # in half precision
        drawn = samples[number].argmax(0)
        for label, size in enumerate([] if regions else sizes, 1):
            assert abs(size - int((drawn == label).sum())) <= alike
    assert all(logits.shape == (channels, *shape) and torch.isfinite(logits).all() for logits in samples.values())


@few
@given(volumes, patches, samplings(), st.booleans())
def test_logits_of_an_array_are_those_of_its_mask_and_samples_that_are_not_in_it_are_not_drawn(shape, patch, sampling,
                                                                                               mirrored):
    predictor = volume_predictor(pointwise_refiner(3, 3.0, False, sampling), patch, sampling, mirrored)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(sampling.seed))
    expected, drawn = predictor.predict_volume(image, stock=False).logits, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw = VolumePredictor._draw
        monkeypatch.setattr(VolumePredictor, '_draw', lambda *args: drawn.append(args[3]) or draw(*args))
        assert torch.equal(predictor.predict_logits_from_preprocessed_data(image), expected)
    assert drawn == (list(range(sampling.samples)) if sampling.needs_samples else [])
    assert predictor.num_samples == sampling.samples


@few
@given(volumes, patches, st.permutations(range(4)), samplings())
def test_relabelling_the_classes_relabels_the_volume(shape, patch, permutation, sampling):
    assume(sampling.dependence == 1 or permutation[0] == 0)  # objects are what is not background
    order = torch.tensor(permutation)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(sampling.seed))

    def predict(order: torch.Tensor) -> VolumePrediction:
        refiner = pointwise_refiner(4, 3.0, False, sampling)
        for network in (refiner.presegmenter, refiner.denoiser):
            network.weight.data = network.weight.data[order]

        def noise(*args):
            start = volume_noise(*args)

            def relabelled():
                field = start()
                return lambda count: field(count)[order]
            return relabelled
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(volume, 'volume_noise', noise)
            monkeypatch.setattr(refiner_module, 'draw_shifts', lambda *args: draw_shifts(*args)[order])
            return volume_predictor(refiner, patch, sampling, True).predict_volume(image)
    relabelled, prediction = predict(order), predict(torch.arange(4))
    first, second = prediction.presegmentation.float().topk(2, 0).values
    clear = first - second > 1e-2  # of labels that are alike in half precision the first is taken, as nnU-Net does
    for one, other in ((relabelled.logits, prediction.logits), (relabelled.spread.mean, prediction.spread.mean)):
        torch.testing.assert_close(one[:, clear], other[order][:, clear], rtol=1e-4, atol=1e-4)


@fixed
@given(shapes, st.lists(st.sets(st.integers(1, 5), min_size=1).map(lambda region: tuple(sorted(region))), min_size=1,
                        max_size=4))
def test_regions_are_the_unions_of_their_labels(shape, regions):
    labels = torch.randint(0, 6, (1, 1, *shape), generator=torch.Generator().manual_seed(len(regions)))
    channels = regions_to_channels(labels, regions)
    for channel, region in zip(channels[0], regions, strict=True):
        np.testing.assert_array_equal(channel.numpy(), np.isin(labels[0, 0].numpy(), region))


@fixed
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([1, 1000, 10 ** 6]))
def test_tiles_of_any_size_cover_any_volume_in_chunks_of_any_size(shape, tile, chunk):
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
    shape = tuple(map(max, shape, tile))
    steps = compute_steps_for_sliding_window(shape, tile, 0.5)
    tiles = [(slice(None), *(slice(s, s + n) for s, n in zip(start, tile, strict=True)))
             for start in np.stack(np.meshgrid(*steps, indexing='ij'), -1).reshape(-1, 3)]
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(chunks_module, 'CHUNK_BYTES', chunk)
        weight = torch.rand(tile) + 0.1
        finished = [(z, values.clone())
                    for z, values in fuse_tiles(((t, volume[t]) for t in tiles), volume.shape, weight, volume.device)]
    assert [n for z, _ in finished for n in range(z.start, z.stop)] == list(range(shape[0]))
    torch.testing.assert_close(torch.cat([values for _, values in finished], 1), volume, rtol=1e-4, atol=1e-5)


@fixed
@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(2, 4), st.integers(1, 4), st.booleans())
def test_maps_lie_in_0_to_1_whatever_the_samples(shape, channels, samples, regions):
    spread = Spread((channels, *shape), samples, 1, regions, torch.device('cpu'))
    generator = torch.Generator().manual_seed(samples)
    for number in range(samples):
        sharp = 30 * torch.randn(channels, *shape, generator=generator)
        p = torch.sigmoid(sharp) if regions else torch.softmax(sharp, 0)
        spread.add(number, slice(0, shape[0]), p, hard_mask(sharp, regions))
    spread.finish_fold(samples)
    spread.crop(tuple(slice(None) for _ in shape))
    for name, values in spread.maps().items():
        assert torch.isfinite(values).all(), name
        assert -1e-6 <= values.min() and values.max() <= 1 + 1e-6, name


# files

@few
@given(shape=st.tuples(*[st.integers(1, 10)] * 3), spacing=st.tuples(*[st.floats(0.3, 2)] * 3),
       origin=st.tuples(*[st.floats(-500, 500)] * 3), seed=st.integers(0, 99))
def test_a_mask_has_the_geometry_of_its_image_unless_that_is_too_thin(refined: Workspace, shape, spacing, origin, seed):
    plans, description = (json.loads((refined.model(REFINED) / name).read_text())
                          for name in ('plans.json', 'dataset.json'))
    manager = PlansManager(plans)
    configuration = manager.get_configuration('3d_fullres')
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    assume(values.size > 1)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'case_0000.nii.gz')
        sitk.WriteImage(image, str(file))
        item = CasePreprocessor(manager, configuration, description, False)([str(file)], None, f'{folder}/case')
        if isinstance(item, FailedCase):
            assert any(n * mm < 0.6 * of_model for n, mm, of_model in zip(shape, spacing[::-1], configuration.spacing,
                                                                          strict=True))
            assert 'is thinner than half a voxel of the model' in item.reason
            return
        export = CaseExport(manager, configuration, description, item['data_properties'], Path(folder), 'case',
                            Outputs(uncertainty='entropy'))
        logits = np.random.default_rng(seed).normal(size=(3, *item['data'].shape[1:])).astype(np.float32)
        export.write_prediction(logits, logits, {'uncertainty': np.full(item['data'].shape[1:], 0.5, np.float32)})
        read = sitk.ReadImage(str(file))
        for name in ('case.nii.gz', 'uncertainty/case_uncertainty.nii.gz'):
            written = sitk.ReadImage(f'{folder}/{name}')
            assert written.GetSize() == read.GetSize()
            assert written.GetSpacing() == pytest.approx(read.GetSpacing(), rel=1e-5)
            assert written.GetOrigin() == pytest.approx(read.GetOrigin(), abs=1e-3)
            assert np.isfinite(sitk.GetArrayFromImage(written)).all()


def nifti() -> bytes:
    """A small .nii.gz."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'image.nii.gz')
        values = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(file), True)
        return file.read_bytes()


NIFTI = nifti()


def told(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'image.nii.gz')
        file.write_bytes(content)
        return damage(file)


@settings(fixed, max_examples=100)
@given(st.integers(0, len(NIFTI) - 1))
def test_an_image_cut_off_anywhere_is_told(length):
    assert told(NIFTI) == ''
    assert told(NIFTI[:length])


@settings(fixed, max_examples=100)
@given(st.integers(0, 8 * len(NIFTI) - 1))
def test_an_image_with_any_bit_flipped_is_told_or_is_the_same_image(bit):
    content = bytearray(NIFTI)
    content[bit // 8] ^= 1 << bit % 8
    if not told(bytes(content)):
        with gzip.open(io.BytesIO(content)) as flipped, gzip.open(io.BytesIO(NIFTI)) as good:
            assert flipped.read() == good.read()


@settings(fixed, max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_model_with_any_bit_flipped_is_refused_or_is_the_same_model(refined: Workspace, where, bit):
    file = refined.model(REFINED) / 'fold_0' / 'checkpoint_final.pth'
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        flipped = Path(folder, 'checkpoint.pth')
        flipped.write_bytes(content)
        try:
            weights = load_checkpoint(flipped)['network_weights']
        except CheckpointError:
            return
    for name, value in load_checkpoint(file)['network_weights'].items():
        assert torch.equal(weights[name], value), name


def small_checkpoint() -> bytes:
    stream = io.BytesIO()
    torch.save({'network_weights': {'a': torch.arange(3.0), 'b': torch.ones(4)}, 'init_args': {}, 'trainer_name': 'x'},
               stream)
    return stream.getvalue()


SMALL = small_checkpoint()
DIRECTORY = SMALL.index(b'PK\x01\x02')  # names, sizes and places of the tensors, behind all of them
OF_TENSOR = SMALL.rindex(b'PK\x01\x02', 0, SMALL.index(b'/data/0', DIRECTORY))


@settings(fixed, max_examples=200)
@given(st.integers(8 * DIRECTORY, 8 * len(SMALL) - 1))
@example(8 * (OF_TENSOR + 38) + 4)  # says that the tensor is a folder
def test_so_is_one_with_any_bit_flipped_in_its_list_of_tensors(bit):
    content = bytearray(SMALL)
    content[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        file, flipped = Path(folder, 'checkpoint.pth'), Path(folder, 'flipped.pth')
        file.write_bytes(SMALL)
        flipped.write_bytes(content)
        try:
            weights = load_checkpoint(flipped)['network_weights']
        except CheckpointError:
            return
        for name, value in load_checkpoint(file)['network_weights'].items():
            assert torch.equal(weights[name], value), name


NAMES = st.text('ab_', min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(cases=st.sets(NAMES, min_size=1, max_size=5), raters=st.sets(NAMES, min_size=1, max_size=3))
@example(cases={'A', 'A__b'}, raters={'r1'})
def test_a_raters_mask_counts_for_one_case_the_longest_that_its_name_fits(cases, raters):
    with tempfile.TemporaryDirectory() as folder:
        references, masks = Path(folder, 'references'), Path(folder, 'raters')
        references.mkdir()
        masks.mkdir()
        for case in cases:
            (references / f'{case}.nii.gz').touch()
            for rater in raters:
                (masks / f'{case}__{rater}.nii.gz').touch()
        folders = object.__new__(Folders)  # of which nothing else is read
        folders.__dict__.update(references=references, raters=masks, ending='.nii.gz')
        found = {case: folders.rater_files(case) for case in cases}
        for file in masks.iterdir():
            stem = file.name.removesuffix('.nii.gz')
            fitting = [case for case in cases if stem.startswith(f'{case}__') and stem != f'{case}__']
            owner = max(fitting, key=len)
            for case in cases:
                assert (file in found[case].values()) == (case == owner), (file.name, case)
        for case, of in found.items():
            assert all(file.name == f'{case}__{rater}.nii.gz' for rater, file in of.items())


@settings(max_examples=60, deadline=None)
@given(cases=st.sets(st.text('as_0', min_size=1, max_size=5), min_size=1, max_size=5), other=st.text('ml', max_size=4))
@example(cases={'a', 'a_s0'}, other='ml')
def test_a_sample_counts_for_the_case_that_it_is_named_for(cases, other):
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder, 'samples')
        samples.mkdir()
        named = {f'{case}_s{i:02d}.nii.gz': case for case in cases for i in (0, 100)}
        named |= {f'{case}_s{other}.nii.gz': '' for case in cases}  # no sample: such as a small organ's
        for name in named:
            (samples / name).touch()
        folders = object.__new__(Folders)  # of which nothing else is read
        folders.__dict__.update(predictions=Path(folder), ending='.nii.gz')
        for case in cases:
            assert {file.name for file in sample_files(folders.predictions, case, folders.ending)} == {
                name for name, of in named.items() if of == case}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text('aB_1 é病>µ', min_size=1, max_size=4), min_size=1, max_size=8, unique=True))
@example(['病例', '器官', '_'])
@example(['>3 µm', '<3 µm', '_3_m', '_3_m_1'])
@example(['Liver', 'liver', 'LIVER'])
def test_probability_maps_have_names_that_every_file_system_tells_apart(labels):
    named = probability_maps(labels)
    assert list(named) == labels
    assert len({name.casefold() for name in named.values()}) == len(labels)
    assert all(name.isascii() and not set(name) & set('<>:"/\\|?* ') for name in named.values())
    assert probability_maps(['left-1.5', 'right']) == {of: f'probability_{of}' for of in ('left-1.5', 'right')}
