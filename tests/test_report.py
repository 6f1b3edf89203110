"""The report: what it says, and that it stands alone."""
from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from PIL import Image
from report_data import (
    COMMAND,
    HOT,
    NASTY,
    ORDER,
    QUALITY,
    SETTINGS,
    SHAPE,
    describe,
    entry,
    report_of_phantoms,
    sample_of,
    uncertainty_map,
)
from skimage import io as image_io
from skimage.color import deltaE_ciede2000, rgb2lab

from nnunet_pdddpm.demo.phantom import make_case, write_image
from nnunet_pdddpm.labels import boxes_of
from nnunet_pdddpm.report import NothingToShow, write_report
from nnunet_pdddpm.report.components import components_of
from nnunet_pdddpm.report.drawing import (
    COLOURS,
    UNCERTAINTY_COLOUR,
    UNCERTAINTY_LEVELS,
    grey_values,
    label_colours,
    levels,
)
from nnunet_pdddpm.report.page import REPORT
from nnunet_pdddpm.report.summary import histogram, runs_of, volume_bar
from nnunet_pdddpm.report.views import (
    box_around,
    intensity_window,
    make_view,
    most_uncertain_place,
    reduced,
    reduced_labels,
    reduction,
)
from nnunet_pdddpm.report.volumes import CaseVolumes, DisplayAxes


@pytest.fixture(scope='module')
def prediction(tmp_path_factory) -> tuple[Path, dict[str, list[Path]]]:
    return report_of_phantoms(tmp_path_factory.mktemp('prediction') / 'out')


@pytest.fixture(scope='module')
def page(prediction) -> str:
    return (prediction[0] / REPORT).read_text(encoding='utf-8')


def text_of(markup: str) -> str:
    return re.sub(r'\s+', ' ', html.unescape(re.sub(r'<[^>]*>', ' ', markup)))


def cases_of(markup: str) -> list[str]:
    return [html.unescape(name) for name in re.findall(r'<h2[^>]*>(.*?)</h2>', markup)]


def volumes_of(markup: str) -> list[dict[str, Any]]:
    return [json.loads(data) for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', markup)]


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).convert('L'))


def grey_of(volumes: dict[str, Any]) -> np.ndarray:
    """The image (z, y, x) that the page's script takes out of the picture."""
    depth, rows, columns = volumes['shape']
    sheet = decoded(volumes['image']).reshape(-1, rows, volumes['columns'], columns).swapaxes(1, 2)
    return sheet.reshape(-1, rows, columns)[:depth]


def labels_of(volumes: dict[str, Any], text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(volumes['shape'])


def test_the_worst_case_is_first_and_one_without_an_estimate_before_it(page):
    assert cases_of(page) == ORDER
    assert [html.unescape(name) for name in re.findall(r'<th scope="row" data-value="([^"]*)"', page)] == ORDER


def with_orders(prediction: tuple[Path, dict[str, list[Path]]], folder: Path, of: dict[str, dict[str, Any]]) -> str:
    """The page of a copy of the prediction whose cases have these further fields in the summary."""
    shutil.copytree(prediction[0], folder)
    describe(folder, [{**entry(case, QUALITY[case]), **fields} for case, fields in of.items()])
    return write_report(folder, {case: prediction[1][case] for case in of}).read_text(encoding='utf-8')


def order_by(key: str | None, value: float | None = None, **more: Any) -> dict[str, Any]:
    return {'order': {'by': key, 'statement': ''}, **({key: value} if key else {}), **more}


@pytest.mark.parametrize(('key', 'ordered', 'marked'), [
    ('estimated_dice', ['poor', 'good'], 'Estimated quality'), (None, ['good', 'poor'], 'Case'),
    ('estimated_dice_low', ['good', 'poor'], None), ('folds_dice', ['good', 'poor'], None)])
def test_a_column_is_marked_as_sorted_if_the_rows_are_sorted_by_it(prediction, tmp_path, key, ordered, marked):
    values = {'good': 0.3, 'poor': 0.5} if key != 'estimated_dice' else QUALITY
    markup = with_orders(prediction, tmp_path / 'out', {case: order_by(key, values[case]) for case in ('poor', 'good')})
    assert cases_of(markup) == ordered
    found = re.findall(r'aria-sort="(?:as|des)cending"[^>]*><button[^>]*>([^<]*)<', markup)
    assert found == ([marked] if marked else [])


def test_cases_of_several_runs_are_sorted_within_what_ranks_them(prediction, tmp_path):
    orders = {'good': order_by('estimated_dice_low', 0.2), NASTY: order_by('estimated_dice_low', 0.1),
              'fair 10': order_by('folds_dice', 0.7), 'unknown': order_by('folds_dice'), 'poor': order_by(None)}
    markup = with_orders(prediction, tmp_path / 'out', orders)
    assert cases_of(markup) == ['unknown', 'poor', 'fair 10', NASTY, 'good']
    assert 'aria-sort="ascending"' not in markup


def test_volumes_come_with_their_interval_and_stock_beside(page):
    text = text_of(page)
    assert '12.3 ml calibrated, 95 %: 11.1 to 13.9 stock 12.1' in text
    assert '0.50 ml calibrated, 95 %: 0.45 to 0.56 stock 0.49' in text
    assert '250 ml range of 2 samples: 240 to 260 stock –' in text
    assert 'not estimated' in text and '0.61' in text and '8.0 %' in text
    assert 'For research only. This is not a medical device' in text
    assert 'to keep this' not in text


def test_an_interval_is_drawn_from_zero_to_the_largest_number(page):
    label = {'volume_ml': 10.0, 'volume_ml_stock': 20.0, 'volume_ml_low': 8.0, 'volume_ml_high': 12.0,
             'samples_low_ml': 9.0, 'samples_high_ml': 11.0}
    found = volume_bar(label)
    assert found.interval is None  # without a level it is none
    found = volume_bar({**label, 'interval_level': 0.95})
    assert (found.mask, found.stock) == (50, 100) and found.interval == (40, 60) and found.samples == (45, 55)
    assert found.end == '20.0'
    assert volume_bar({'volume_ml': 0.0}) is None and volume_bar({}) is None
    assert '0 13.9 ml' in text_of(page) and '0 260 ml' in text_of(page)


def test_the_page_opens_with_what_was_run(page):
    text = text_of(page)
    for fact in ('Model Dataset701_Phantom', 'Trainer PDDDPMTrainer', 'Plans nnUNetPlans', 'Configuration 3d_fullres',
                 'Folds 3, 4', 'Checksum 7d5ca183, 11aa22bb', 'Samples 2', 'Seed 17', 'Versions nnunet-pdddpm 0.1',
                 'Report written 2026-11-29 18:02', 'steps 2, 1', f'Command {COMMAND}'):
        assert fact in text, fact
    title, run, command, cases, notice, histogram = (text.index(part) for part in (
        ' Dataset701_Phantom ', 'Model', f'Command {COMMAND}', '5 cases, those to review first',
        'For research only', 'Cases by'))
    assert title < run < command < cases < notice < histogram < text.index('12.3 ml')
    assert 'predict with --save_samples' not in text


def test_cases_of_several_runs_are_told_apart():
    one, other = entry('one', 0.5), entry('other', 0.5)
    other['settings'] = [{**SETTINGS, 'seed': 18}]
    first, second = runs_of([one, other, {**one, 'case': 'third'}])
    assert first.cases == ['one', 'third'] and second.cases == ['other']
    assert first.facts['Seed'] == '17' and second.facts['Seed'] == '18'
    assert runs_of([{'case': 'of an earlier version'}])[0].facts == {}


def test_links_lead_to_the_files(prediction, page):
    folder, images = prediction
    targets = [html.unescape(href) for href in re.findall(r'href="(\./[^"]*|\.\./[^"]*)"', page)]
    files = [folder / unquote(target) for target in targets]
    assert all(file.is_file() for file in files)
    named = {file.resolve() for file in files}
    assert {(folder / 'poor.nii.gz').resolve(), (folder / 'samples' / 'poor_s01.nii.gz').resolve(),
            (folder / 'uncertainty' / f'{NASTY}_uncertainty.nii.gz').resolve(), images['poor'][0].resolve()} <= named


def test_labels_have_colours_of_their_own():
    for number in (1, 8, 117):
        assert len(set(label_colours(number))) == number
    colours = [[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS]
    assert min(sum(rgb) / 3 for rgb in colours) > 120
    crosshair, image = (255, 255, 255), (128, 128, 128)
    every = rgb2lab(np.array([*colours, UNCERTAINTY_COLOUR, crosshair, image]) / 255)
    distances = deltaE_ciede2000(every[:, None], every[None])
    assert distances[np.triu_indices(len(every), 1)].min() > 15  # of 100 between black and white


def test_the_histogram_counts_every_case_with_an_estimate(page):
    assert 'Cases by estimated quality (1 without an estimate)' in text_of(page)
    assert 'aria-label="Histogram of estimated quality: 1 from 0.60 to 0.65, 1 from 0.80 to 0.85, ' \
           '1 from 0.90 to 0.95, 1 from 0.95 to 1.00"' in page
    bins = histogram([0.93, 0.935, 1.0])
    assert [(b.low, b.count) for b in bins if b.count] == [(0.93, 2), (0.99, 1)]
    assert sum(b.count for b in histogram(np.linspace(0, 1, 57))) == 57
    assert histogram([]) == []


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(r'https?://', page)
    references = re.findall(r'\b(?:src|href|xlink:href|action|data)\s*=\s*"([^"]*)"', page)
    assert references and all(re.match(r'#|\./|pdddpm_summary', r) for r in references)
    assert all(re.match('data:image/(png|webp);base64,', volumes['image']) for volumes in volumes_of(page))
    assert not re.search(r'url\(|@import|<link|<iframe|<object', page)
    assert "default-src 'none'" in page


def test_a_case_name_stays_a_name(page):
    assert page.count('<script>') == 1  # the report's own
    assert 'fünf &lt;script&gt;' in page


def test_the_same_prediction_gives_the_same_bytes_and_leaves_nothing_beside(prediction, page):
    folder, images = prediction
    assert write_report(folder, images, COMMAND, '2026-11-29 18:02').read_text(encoding='utf-8') == page
    assert [p.name for p in folder.glob('*report*')] == ['report.html'] and not list(folder.glob('.*'))


def test_the_page_holds_image_masks_samples_and_uncertainty(prediction, page):
    folder, images = prediction
    volumes = volumes_of(page)[ORDER.index('poor')]
    image, labels = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (images['poor'][0],
                                                                             folder / 'poor.nii.gz'))
    assert tuple(volumes['shape']) == SHAPE  # everything lies within the margin
    assert np.corrcoef(grey_of(volumes).ravel(), image.ravel())[0, 1] > 0.95
    np.testing.assert_array_equal(labels_of(volumes, volumes['consensus']), labels)
    np.testing.assert_array_equal(labels_of(volumes, volumes['stock']), np.roll(labels, 2, 2))
    for i, sample in enumerate(volumes['samples']):
        np.testing.assert_array_equal(labels_of(volumes, sample) ^ labels, sample_of(labels, i))
    np.testing.assert_allclose(labels_of(volumes, volumes['uncertainty']) / (UNCERTAINTY_LEVELS - 1),
                               uncertainty_map(labels), atol=0.04)
    assert len(volumes['samples']) == 2 and volumes_of(page)[ORDER.index('good')]['samples'] == []
    places = volumes['places']
    assert tuple(places['uncertain']) == HOT
    assert places['largest'][0] == np.argmax((labels > 0).sum((1, 2)))
    assert places['label-1'][2] == np.argmax((labels == 2).sum((0, 1)))


def test_components_have_their_volume_and_the_samples_that_have_them(page):
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[1:4, 1:4, 1:4] = 2
    labels[6:8, 6:8, 6:8] = 2
    labels[9, 11, 13] = labels[8, 10, 12] = 2  # they touch at a corner
    sample = labels.copy()
    sample[1:4, 1:4, 1:4] = 1
    around, = boxes_of(labels, [(2, 5)])
    found = components_of(labels, [sample, labels], (2, 5), around, (2.0, 1.0, 1.0))
    assert [of.ml for of in found.largest] == pytest.approx([0.054, 0.016, 0.004])
    assert found.largest[0].place == (2, 2, 2) and [of.samples for of in found.largest] == [1, 2, 2]
    assert components_of(labels, [], (1,), *boxes_of(labels, [(1,)]), (2.0, 1.0, 1.0)).largest == []
    speckle = np.zeros((40, 4, 4), np.uint8)
    speckle[::2, 0, 0] = 1
    found = components_of(speckle, [], (1,), *boxes_of(speckle, [(1,)]), (1.0, 1.0, 1.0))
    assert len(found.largest) == 10 and found.others == 10 and found.others_ml == pytest.approx(0.01)
    assert re.search(r'aria-label="Component 1 of lesion, [\d.]+ ml">[\d.]+ ml <small>in [12] of 2</small>', page)


def test_large_volumes_are_reduced_and_nothing_small_vanishes():
    assert reduction((10, 20, 30), (1.0, 1.0, 1.0), 6000) == (1, 1, 1)
    assert reduction((60, 400, 400), (5.0, 0.5, 0.5), 3_000_000) == (1, 2, 2)  # thick slices stay as they are
    assert reduction((1, 3000, 600), (999.0, 1.0, 1.0), 4_000_000) == (1, 6, 2)
    labels = np.zeros((9, 12, 12), np.uint8)
    labels[2:8, 2:10, 2:10] = 1
    labels[5, 5, 5] = 2  # a lesion of one voxel in the organ, between the centres
    labels[0, 11, 0] = 2
    small = reduced_labels(labels, (2, 2, 2))
    assert small.shape == (5, 6, 6) and (small == 2).sum() == 2 and small[0, 5, 0] == 2
    assert (reduced_labels(labels, (1, 1, 1)) == labels).all()
    for factors in ((2, 1, 1), (4, 5, 7), (8, 8, 8)):  # the last blocks are not full
        assert (reduced_labels(np.ones((9, 12, 12), np.uint8), factors) == 1).all()
    assert reduced(np.arange(8.0).reshape(2, 2, 2), (2, 2, 2)).tolist() == [[[3.5]]]
    assert reduced(np.ones((3, 3, 3)), (2, 2, 2)).tolist() == np.ones((2, 2, 2)).tolist()


def test_the_box_is_around_what_there_is_to_see():
    shown = np.zeros((50, 200, 200), bool)
    shown[20:30, 100:180, 50] = True
    assert box_around(shown, (5.0, 1.0, 1.0)) == (slice(16, 34), slice(80, 200), slice(30, 71))
    assert box_around(np.zeros((2, 3, 4), bool), (1.0, 1.0, 1.0)) == (slice(0, 2), slice(0, 3), slice(0, 4))


def test_the_most_uncertain_place_is_shown_however_far_from_the_masks():
    image, mask = np.zeros((4, 90, 90), np.float32), np.zeros((4, 90, 90), np.uint16)
    mask[1:3, 10:14, 10:14] = 1
    uncertainty = np.zeros(image.shape, np.float32)
    uncertainty[:, 78:83, 68:73] = 0.2
    uncertainty[2, 80, 70] = 0.24

    def view_of(mask: np.ndarray) -> dict[str, Any]:
        case = CaseVolumes(image, mask, mask, uncertainty, (), (1.0, 1.0, 1.0), DisplayAxes())
        return make_view(case, [(1,)], 10 ** 6).volumes
    volumes = view_of(mask)
    place = tuple(volumes['places']['uncertain'])
    assert [i + first for i, first in zip(place, volumes['first'], strict=True)] == [3, 81, 71]  # from 1, in the file
    assert labels_of(volumes, volumes['uncertainty'])[place] == round(0.24 * (UNCERTAINTY_LEVELS - 1))
    assert view_of(np.zeros_like(mask))['shape'] == [4, 90, 90]  # without a mask and anything this uncertain: the whole


def test_grey_and_uncertainty_keep_their_meaning():
    ramp = np.linspace(0, 10, 11)
    assert grey_values(ramp, (2.0, 8.0)).tolist() == [0, 0, 0, 42, 85, 127, 170, 212, 255, 255, 255]
    assert levels(np.array([0, 0.5, 1])).tolist() == [0, 8, UNCERTAINTY_LEVELS - 1]


def test_the_most_uncertain_place_is_a_region_and_no_lone_voxel():
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:8, 10:20, 5:9] = 1
    assert most_uncertain_place(uncertainty_map(labels), labels > 0, (1.4, 1.1, 0.9)) == HOT
    assert most_uncertain_place(np.zeros(SHAPE), labels > 0, (1.4, 1.1, 0.9))[0] == 5
    assert most_uncertain_place(np.zeros(SHAPE), np.zeros(SHAPE, bool), (1, 1, 1)) == tuple(n // 2 for n in SHAPE)


def test_the_grey_window_is_that_of_the_segmented_tissue():
    image = np.full((20, 60, 60), -1000.0)
    image[:, 10:50, 10:50] = np.random.default_rng(0).normal(60, 10, (20, 40, 40))
    image[0, 0, 0] = 1e6
    region = np.zeros(image.shape, bool)
    region[8:12, 25:35, 25:35] = True
    low, high = intensity_window(image, region)
    assert -20 < low < 40 and 80 < high < 140
    low, high = intensity_window(np.zeros((2, 3, 3)), np.zeros((2, 3, 3), bool))
    assert low < 0 < high


@pytest.mark.parametrize('orientation', ['LPS', 'RAS', 'PIR', 'ASL'])
def test_every_orientation_is_shown_as_radiologists_look_at_it(orientation):
    anatomical = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)  # to superior, posterior, left
    image = sitk.GetImageFromArray(anatomical)  # identity direction is LPS
    image.SetSpacing((1.0, 2.0, 3.0))
    turned = sitk.DICOMOrient(image, orientation)
    stored = sitk.GetArrayFromImage(turned)
    axes = DisplayAxes.from_properties({'sitk_stuff': {'direction': turned.GetDirection()}})
    np.testing.assert_array_equal(axes.reorient(stored), anatomical)
    assert [turned.GetSpacing()[::-1][a] for a in axes.order] == [3.0, 2.0, 1.0]
    to_ras = np.diag([-1.0, -1, 1, 1])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(turned.GetDirection(), (3, 3)) * turned.GetSpacing()
    by_nibabel = DisplayAxes.from_properties({'nibabel_stuff': {'original_affine': to_ras @ affine}})
    assert by_nibabel == axes
    zeros = np.zeros((4, 5, 6), np.uint8)
    case = CaseVolumes(axes.reorient(stored), zeros, zeros, np.zeros((4, 5, 6), np.float32), (), (3.0, 2.0, 1.0), axes)
    view = make_view(case, [(1,)], 10 ** 6)
    axial, coronal, sagittal = view.planes
    assert (axial.size, coronal.size, sagittal.size) == ((6.0, 10.0), (6.0, 12.0), (10.0, 12.0))
    assert (axial.thickness, sagittal.thickness) == (3.0, 1.0)
    assert axial.edges == ('R', 'L', 'A', 'P') and sagittal.edges == ('A', 'P', 'S', 'I')
    assert axial.scale == 2.0 and sagittal.scale == 2.0
    assert np.corrcoef(grey_of(view.volumes).ravel(), anatomical.ravel())[0, 1] > 0.99
    for axis, (first, step) in enumerate(zip(view.volumes['first'], view.volumes['step'], strict=True)):
        number = first + step * 1  # the second slice shown is, in the file, the one of this number
        there = np.moveaxis(stored, axes.order[axis], 0)[number - 1]
        np.testing.assert_array_equal(np.sort(there.ravel()), np.sort(np.moveaxis(anatomical, axis, 0)[1].ravel()))


def numbers_in(stored: np.ndarray, section: np.ndarray) -> list[int]:
    """From 1, those of the slices with the same values, along any axis."""
    return [number for axis in range(3) for number, other in enumerate(np.moveaxis(stored, axis, 0), 1)
            if set(other.ravel()) == set(section.ravel())]


@pytest.mark.parametrize('orientation', ['LPS', 'RAS', 'PIR', 'ASL', 'ILA'])
@pytest.mark.parametrize('reader', ['SimpleITKIO', 'SimpleITKIOWithReorient', 'NibabelIO', 'NibabelIOWithReorient'])
def test_slices_have_their_numbers_in_the_file_however_a_reader_turns_it(reader, orientation, tmp_path):
    anatomical = np.random.default_rng(0).permutation(4 * 5 * 6).reshape(4, 5, 6).astype(np.float32)
    write_image(anatomical, file := tmp_path / 'a.nii.gz')
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), orientation), str(file))
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    array, properties = recursive_find_reader_writer_by_name(reader)().read_images((str(file),))
    axes, zeros = DisplayAxes.from_properties(properties), np.zeros((4, 5, 6), np.uint8)
    np.testing.assert_array_equal(shown := axes.reorient(array[0]), anatomical)
    case = CaseVolumes(shown, zeros, zeros, np.zeros((4, 5, 6), np.float32), (), (1.0, 1.0, 1.0), axes)
    volumes = make_view(case, [(1,)], 10 ** 6).volumes
    for axis, (first, step) in enumerate(zip(volumes['first'], volumes['step'], strict=True)):
        for i, section in enumerate(np.moveaxis(shown, axis, 0)):
            assert numbers_in(stored, section) == [first + i * step]


def test_cases_beyond_the_budget_are_shown_coarser_and_the_page_says_so(prediction, tmp_path, monkeypatch):
    folder, images = prediction
    shutil.copytree(folder, tmp_path / 'out')
    monkeypatch.setattr('nnunet_pdddpm.report.page.VOLUME_BYTES', 5 * 8_000)
    page = write_report(tmp_path / 'out', images).read_text(encoding='utf-8')
    for volumes in volumes_of(page):
        assert len(json.dumps(volumes)) < 9_500 and np.prod(volumes['shape']) < np.prod(SHAPE)
        assert grey_of(volumes).shape == tuple(volumes['shape'])
        assert all(0 <= i < n for place in volumes['places'].values()
                   for i, n in zip(place, volumes['shape'], strict=True))
    assert '5 cases are shown coarser than their files' in text_of(page) and 'voxels are drawn as one' in text_of(page)


def test_regions_and_two_dimensional_images_with_colours(tmp_path):
    folder = tmp_path / 'out'
    labels = {'background': 0, 'cell': [1, 2], '</svg><b>nucleus': 2, 'ignore': 3}
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 5:20] = 1
    mask[8:12, 8:12] = 2
    uncertainty = np.zeros((30, 40), np.uint16)
    uncertainty[18:22, 5:20] = 65535
    for name, array in (('im', mask), ('presegmentation/im', mask), ('uncertainty/im_uncertainty', uncertainty),
                        ('im_0000', np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image_io.imsave(folder / f'{name}.png', array, check_contrast=False)
    describe(folder, [{'case': 'im', 'estimated_dice': None, **order_by(None)}], 'NaturalImage2DIO', '.png', labels)
    page = write_report(folder, {'im': [folder / 'im_0000.png']}).read_text(encoding='utf-8')
    assert 'type="range"' not in page and page.count('class="frame"') == 1
    assert 'crosshair</label>' not in page and '<table class="volumes">' not in page and '10 px' in page
    assert 'const REGIONS = [[1, 2], [2]], NAMES = ["cell", "\\u003c/svg\\u003e\\u003cb\\u003enucleus"]' in page
    volumes, = volumes_of(page)
    np.testing.assert_array_equal(labels_of(volumes, volumes['consensus'])[0], mask)
    np.testing.assert_array_equal(labels_of(volumes, volumes['uncertainty'])[0] > 0, uncertainty > 0)
    assert 'No samples were kept: predict with --save_samples' in text_of(page)


def test_volumes_without_geometry_are_shown_as_stored(tmp_path):
    folder = tmp_path / 'out'
    image, labels = make_case(SHAPE, 0)
    for name, array in (('vol', labels), ('presegmentation/vol', labels), ('vol_0000', image),
                        ('uncertainty/vol_uncertainty', (uncertainty_map(labels) * 65535).astype(np.uint16))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f'{name}.tif', array)
        (folder / f'{name}.json').write_text('{"spacing": [2.0, 1.0, 1.0]}')
    describe(folder, [entry('vol', 0.5)], 'Tiff3DIO', '.tif')
    page = write_report(folder, {'vol': [folder / 'vol_0000.tif']}).read_text(encoding='utf-8')
    assert 'Section along x' in page and 'Axial' not in page and 'class="edge' not in page
    assert 'viewBox="0 0 34 28"' in page  # the slices are twice as thick as a pixel is wide
    volumes, = volumes_of(page)
    assert not volumes['flipped'] and (volumes['first'], volumes['step']) == ([1, 1, 1], [1, 1, 1])


def damaged(folder: Path, name: str) -> None:
    file = folder / name
    if name.endswith('.json'):
        file.write_text('{')
    else:
        image = sitk.ReadImage(str(file))
        write_image(sitk.GetArrayFromImage(image) + np.float32(1), file)


@pytest.mark.parametrize('name, message', [
    ('pdddpm_summary.json', 'pdddpm_summary.json, which is not there'),
    ('dataset.json', 'dataset.json, which is not there'),
])
def test_without_what_every_case_needs_an_earlier_report_stays(prediction, tmp_path, name, message):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0], folder)
    (folder / name).unlink()
    (folder / REPORT).write_text('earlier')
    with pytest.raises(ValueError, match=message):
        write_report(folder, prediction[1])
    assert (folder / REPORT).read_text() == 'earlier' and not list(folder.glob('.*'))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def corrected(folder: Path) -> None:
    write_image(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / 'poor.nii.gz'))) * 0, folder / 'poor.nii.gz')


@pytest.mark.parametrize('spoil, why', [
    (lambda folder: (folder / 'uncertainty' / 'poor_uncertainty.nii.gz').unlink(), 'poor_uncertainty.nii.gz, which is'),
    (lambda folder: (folder / 'presegmentation' / 'poor.nii.gz').unlink(), 'poor.nii.gz, which is not there'),
    (lambda folder: (folder / 'poor.nii.gz').unlink(), 'poor.nii.gz is not there'),
    (lambda folder: (folder.parent / 'images' / 'poor_0000.nii.gz').write_bytes(b''), 'poor_0000.nii.gz'),
    (lambda folder: damaged(folder, 'uncertainty/poor_uncertainty.nii.gz'), 'holds values outside [0, 1]'),
    (lambda folder: write_image(np.zeros((3, 3, 3), np.uint8), folder / 'presegmentation' / 'poor.nii.gz'),
     'the stock mask has shape'),
    (lambda folder: cut(folder / 'presegmentation' / 'poor.nii.gz'), 'poor.nii.gz is truncated'),
    (lambda folder: cut(folder / 'samples' / 'poor_s01.nii.gz'), 'poor_s01.nii.gz is truncated'),
    (corrected, 'poor.nii.gz is not the mask that pdddpm_summary.json was made of'),
    (lambda folder: describe(folder, [entry(case, 0.5) for case in QUALITY if case != 'poor']),
     'poor.nii.gz is not the mask that pdddpm_summary.json was made of'),
], ids=['map', 'stock', 'mask', 'image', 'values', 'shape', 'cut', 'sample', 'corrected', 'foreign'])
def test_a_case_that_cannot_be_shown_is_named_and_the_others_are_shown(prediction, tmp_path, caplog, spoil, why):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0].parent, tmp_path, dirs_exist_ok=True)
    images = {case: [tmp_path / 'images' / files[0].name] for case, files in prediction[1].items()}
    spoil(folder)
    page = write_report(folder, images).read_text(encoding='utf-8')
    assert sorted(cases_of(page)) == sorted(case for case in ORDER if case != 'poor')
    assert 'Not shown: poor (' in text_of(page) and why in text_of(page)
    assert 'Not in the report: poor (' in caplog.text and why in caplog.text


@pytest.mark.parametrize('content', [b'', b'{"cases": [', b'\xff\xfe'])
@pytest.mark.parametrize('name', ['pdddpm_summary.json', 'dataset.json', 'plans.json'])
def test_a_file_that_is_empty_or_torn_after_a_loss_of_power_is_named(prediction, tmp_path, name, content):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0], folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match='is empty or damaged; predict again') as error:
        write_report(folder, prediction[1])
    assert str(folder / name) in str(error.value) and 'Expecting' not in str(error.value)


def test_cases_that_are_not_there_yet_or_failed_are_named_once(prediction, tmp_path, caplog):
    folder, images = tmp_path / 'out', prediction[1]
    shutil.copytree(prediction[0], folder)
    summary = json.loads((folder / 'pdddpm_summary.json').read_text())
    summary['cases'] = [of for of in summary['cases'] if of['case'] != 'good']
    summary['failed'] = [{'case': 'good', 'error': 'is empty'}]
    (folder / 'pdddpm_summary.json').write_text(json.dumps(summary))
    page = text_of(write_report(folder, {**images, 'other': images['poor']}).read_text(encoding='utf-8'))
    assert 'Not predicted: good (is empty)' in page and 'Not shown: other (it is not predicted yet)' in page
    assert caplog.messages == ['Not in the report: other (it is not predicted yet)']


def test_with_nothing_to_show_or_a_summary_that_is_none_an_earlier_report_stays(prediction, tmp_path):
    folder, images = tmp_path / 'out', prediction[1]
    shutil.copytree(prediction[0], folder)
    earlier = (folder / REPORT).read_bytes()
    for given in ({}, {'other': images['poor']}):
        with pytest.raises(NothingToShow):
            write_report(folder, given)
    damaged(folder, 'pdddpm_summary.json')
    with pytest.raises(ValueError, match='pdddpm_summary.json is no valid JSON'):
        write_report(folder, images)
    (folder / 'pdddpm_summary.json').write_text('{"cases": [{"estimated_dice": 1}]}')
    with pytest.raises(ValueError, match='has no list "cases"'):
        write_report(folder, images)
    assert (folder / REPORT).read_bytes() == earlier


def test_cases_whose_images_are_not_given_are_counted(prediction, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0], folder)
    page = write_report(folder, {'poor': prediction[1]['poor']}).read_text(encoding='utf-8')
    assert cases_of(page) == ['poor']
    assert '4 further cases of pdddpm_summary.json are not shown' in text_of(page)
