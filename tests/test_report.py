"""The report: what it says, that it stands alone, and that it works in a browser."""
from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from skimage import io as image_io

from nnunet_pdddpm.demo.phantom import LABELS, make_case, write_image
from nnunet_pdddpm.files import identity
from nnunet_pdddpm.report import NothingToShow, write_report
from nnunet_pdddpm.report.drawing import MAX_ALPHA, grey_layer, outline, uncertainty_layer
from nnunet_pdddpm.report.page import REPORT
from nnunet_pdddpm.report.summary import histogram
from nnunet_pdddpm.report.views import intensity_window, make_view, most_uncertain_place
from nnunet_pdddpm.report.volumes import CaseVolumes, DisplayAxes

NASTY = 'fünf <script>document.title="taken"</script> & "quoted"'.replace('/', '∕')  # no slash in a file name
QUALITY = {'good': 0.97, 'poor': 0.61, 'fair 10': 0.8, NASTY: 0.9, 'unknown': None}
ORDER = ['unknown', 'poor', 'fair 10', NASTY, 'good']
VOLUMES = {'good': 8.0, 'poor': 12.3, 'fair 10': 30.0, NASTY: 0.5, 'unknown': 100.4}
SHAPE = (14, 40, 34)
HOT = (5, 12, 20)


def entry(case: str, quality: float | None, ml: float = 12.3) -> dict[str, Any]:
    """A case of pdddpm_summary.json; the organ's entry has only what must be there."""
    lesion = {'volume_ml': ml, 'volume_ml_mean': 1.01 * ml, 'volume_ml_sd': 0.05 * ml, 'volume_ml_low': 0.9 * ml,
              'volume_ml_high': 1.13 * ml, 'interval_level': 0.95, 'samples_low_ml': 0.8 * ml, 'samples_high_ml': ml,
              'volume_ml_stock': 0.98 * ml, 'components': 3, 'pairwise_dice': quality,
              'uncertain_share': 0.2}
    return {'case': case, 'estimated_dice': quality, 'uncertain_share': 0.08, 'seconds': 12.3,
            'network_calls': {'denoiser': 8}, 'labels': {'organ': {'volume_ml': 250.0}, 'lesion': lesion}}


def describe(folder: Path, entries: list[dict[str, Any]], reader: str = 'SimpleITKIO', ending: str = '.nii.gz',
             labels: dict[str, Any] = LABELS) -> None:
    """The JSON files of an output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = {'labels': labels, 'channel_names': {'0': 'phantom'}, 'file_ending': ending}
    plans = {'image_reader_writer': reader, 'dataset_name': 'Dataset701_Phantom'}
    summary = {'cases': [{'versions': {'nnunet-pdddpm': '0.1'}, 'mask': identity(folder / f'{entry["case"]}{ending}'),
                          **entry} for entry in entries]}
    for name, content in (('dataset', dataset), ('plans', plans), ('pdddpm_summary', summary)):
        (folder / f'{name}.json').write_text(json.dumps(content))


def uncertainty_map(labels: np.ndarray) -> np.ndarray:
    """Certain but for a blob at HOT, and a single voxel that is still less certain."""
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(labels.shape), HOT, strict=True)))
    uncertainty = np.clip(0.9 - distance / 4, 0, 1).astype(np.float32)
    uncertainty[1, 1, 1] = 1
    return uncertainty


def write_prediction(folder: Path, cases: list[str]) -> dict[str, list[Path]]:
    """Masks, stock masks and maps of phantoms; returns their images."""
    images = {}
    for seed, case in enumerate(cases):
        image, labels = make_case(SHAPE, seed)
        images[case] = [folder.parent / 'images' / f'{case}_0000.nii.gz']
        write_image(image, images[case][0])
        write_image(labels, folder / f'{case}.nii.gz')
        write_image(np.roll(labels, 2, 2), folder / 'presegmentation' / f'{case}.nii.gz')
        write_image(uncertainty_map(labels), folder / 'uncertainty' / f'{case}_uncertainty.nii.gz')
    return images


@pytest.fixture(scope='module')
def prediction(tmp_path_factory) -> tuple[Path, dict[str, list[Path]]]:
    folder = tmp_path_factory.mktemp('prediction') / 'out'
    images = write_prediction(folder, list(QUALITY))
    describe(folder, [entry(case, quality, VOLUMES[case]) for case, quality in QUALITY.items()])
    write_report(folder, images)
    return folder, images


@pytest.fixture(scope='module')
def page(prediction) -> str:
    return (prediction[0] / REPORT).read_text(encoding='utf-8')


def text_of(markup: str) -> str:
    return re.sub(r'\s+', ' ', html.unescape(re.sub(r'<[^>]*>', ' ', markup)))


def cases_of(markup: str) -> list[str]:
    return [html.unescape(name) for name in re.findall(r'<h2[^>]*>(.*?)</h2>', markup)]


def slices_of(markup: str) -> list[list[dict[str, Any]]]:
    return [json.loads(data) for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', markup)]


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).convert('RGBA'))


def test_the_worst_case_is_first_and_one_without_an_estimate_before_it(page):
    assert cases_of(page) == ORDER
    assert [html.unescape(name) for name in re.findall(r'<th scope="row" data-value="([^"]*)"', page)] == ORDER


def test_volumes_come_with_their_interval_and_stock_beside(page):
    text = text_of(page)
    assert '12.3 ml (95 %: 11.1 to 13.9) stock 12.1' in text
    assert '0.50 ml (95 %: 0.45 to 0.56) stock 0.49' in text
    assert '250 ml stock –' in text
    assert 'not estimated' in text and '0.61' in text and '8.0 %' in text
    assert 'For research only. This is not a medical device' in text
    assert 'Made by nnunet-pdddpm 0.1.' in text
    assert 'left out' not in text


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
    assert references and all(re.match(r'#|data:image/(png|webp);base64,', r) for r in references)
    assert not re.search(r'url\(|@import|<link|<iframe|<object', page)
    assert "default-src 'none'" in page


def test_a_case_name_stays_a_name(page):
    assert page.count('<script>') == 1  # the report's own
    assert 'fünf &lt;script&gt;' in page


def test_the_same_prediction_gives_the_same_bytes_and_leaves_nothing_beside(prediction, page):
    folder, images = prediction
    assert write_report(folder, images).read_text(encoding='utf-8') == page
    assert [p.name for p in folder.glob('*report*')] == ['report.html'] and not list(folder.glob('.*'))


def test_slices_go_through_the_most_uncertain_place_and_show_image_masks_and_uncertainty(prediction, page):
    folder, images = prediction
    slices = slices_of(page)[ORDER.index('poor')]
    first = int(re.findall(r'data-most-uncertain="(\d+)"', page)[ORDER.index('poor')])
    assert slices[first]['number'] == HOT[0] + 1
    assert [s['number'] for s in slices] == list(range(1, SHAPE[0] + 1))  # everything lies within the margin
    image, labels = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (images['poor'][0],
                                                                             folder / 'poor.nii.gz'))
    shown = decoded(slices[first]['image'])
    assert shown.shape[:2] == SHAPE[1:]
    assert np.corrcoef(shown[..., 0].ravel(), image[HOT[0]].ravel())[0, 1] > 0.95
    layer = decoded(slices[first]['uncertainty'])[..., 3] / (255 * MAX_ALPHA)
    np.testing.assert_allclose(layer, uncertainty_map(labels)[HOT[0]], atol=0.05)
    for label, value in enumerate(v for v in LABELS.values() if v):
        assert filled(slices[first]['consensus'][label], SHAPE[1:]) == pytest.approx(labels[HOT[0]] == value)
        assert filled(slices[first]['stock'][label], SHAPE[1:]) == pytest.approx(
            np.roll(labels, 2, 2)[HOT[0]] == value)


def filled(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The mask whose outline this is: pixel centres inside by the even-odd rule."""
    inside = np.zeros(shape, bool)
    y, x = np.indices(shape) * 2 + 1
    for part in filter(None, path.split('M')):
        start, steps = part.rstrip('z').split('l')
        points = [np.array([int(n) for n in re.findall(r'-?\d+', start)])]
        numbers = [int(n) for n in re.findall(r'-?\d+', steps)]
        for step in zip(numbers[::2], numbers[1::2], strict=True):
            points.append(points[-1] + step)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) / (by - ay if by != ay else 1) * (bx - ax))
    return inside


@pytest.mark.parametrize('seed', range(4))
def test_an_outline_encloses_exactly_its_mask(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 13)) < 0.5
    np.testing.assert_array_equal(filled(outline(mask), mask.shape), mask)
    assert outline(np.zeros((3, 3), bool)) == ''
    assert outline(np.ones((2, 3), bool)).count('z') == 1


def test_layers_are_reduced_and_keep_their_meaning():
    ramp = np.tile(np.linspace(0, 10, 900, dtype=np.float32), (300, 1))
    grey = decoded(grey_layer(ramp, (2.0, 8.0)))[..., 0]
    assert grey.shape == (133, 400)
    assert grey[:, :70].max() < 8 and grey[:, -70:].min() > 247 and abs(int(grey[60, 200]) - 127) < 5
    layer = decoded(uncertainty_layer(np.array([[0, 0.5, 1]])))
    assert layer[0, 0, 3] == 0 and layer[0, 2, 3] == int(255 * MAX_ALPHA)


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
    axes = DisplayAxes.of({'sitk_stuff': {'direction': turned.GetDirection()}})
    np.testing.assert_array_equal(axes.turn(stored), anatomical)
    assert [turned.GetSpacing()[::-1][a] for a in axes.order] == [3.0, 2.0, 1.0]
    to_ras = np.diag([-1.0, -1, 1, 1])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(turned.GetDirection(), (3, 3)) * turned.GetSpacing()
    by_nibabel = DisplayAxes.of({'nibabel_stuff': {'original_affine': to_ras @ affine}})
    assert by_nibabel == axes
    zeros = np.zeros((4, 5, 6), np.uint8)
    case = CaseVolumes(axes.turn(stored), zeros, zeros, np.zeros((4, 5, 6), np.float32), (3.0, 2.0, 1.0), axes)
    axial, coronal, sagittal = make_view(case, [(1,)], 10 ** 6).planes
    assert (axial.columns * axial.spacing[1], axial.rows * axial.spacing[0]) == (6.0, 10.0)
    assert (coronal.columns * coronal.spacing[1], coronal.rows * coronal.spacing[0]) == (6.0, 12.0)
    assert (sagittal.columns * sagittal.spacing[1], sagittal.rows * sagittal.spacing[0]) == (10.0, 12.0)
    assert axial.edges == ('R', 'L', 'A', 'P') and sagittal.edges == ('A', 'P', 'S', 'I')
    shown = decoded(coronal.layers.image)[..., 0].astype(float)
    assert np.corrcoef(shown.ravel(), anatomical[::-1, 2].ravel())[0, 1] > 0.99


def test_slices_beyond_the_budget_are_left_out_evenly_and_the_page_says_so(prediction, tmp_path, monkeypatch):
    folder, images = prediction
    shutil.copytree(folder, tmp_path / 'out')
    monkeypatch.setattr('nnunet_pdddpm.report.page.SLICE_BYTES', 5 * 12_000)
    page = write_report(tmp_path / 'out', images).read_text(encoding='utf-8')
    slices = slices_of(page)[1]
    numbers = [s['number'] for s in slices]
    assert 1 < len(numbers) < SHAPE[0] and HOT[0] + 1 in numbers
    assert len(set(np.diff(numbers))) == 1 and np.diff(numbers)[0] > 1
    assert sum(len(json.dumps(s)) for s in slices) < 15_000
    assert f'{len(numbers)} of {numbers[-1] - numbers[0] + 1} slices are in this file' in text_of(page)
    assert 'Of 5 cases axial slices were left out' in text_of(page)


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
    describe(folder, [{'case': 'im', 'estimated_dice': None}], 'NaturalImage2DIO', '.png', labels)
    page = write_report(folder, {'im': [folder / 'im_0000.png']}).read_text(encoding='utf-8')
    assert 'type="range"' not in page and page.count('class="frame"') == 1
    assert 'where the planes cut' not in page and 'class="volumes"' not in page
    paths = re.findall(r'<path d="(M[^"]*z)"><title>([^<]*)', page)
    assert [title for _, title in paths] == [
        f'{label}, {kind}' for kind in ('consensus', 'stock') for label in ('cell', '&lt;/svg&gt;&lt;b&gt;nucleus')]
    np.testing.assert_array_equal(filled(paths[0][0], mask.shape), mask > 0)
    np.testing.assert_array_equal(filled(paths[1][0], mask.shape), mask == 2)
    layer = decoded(re.search(r'class="uncertainty"[^>]*href="([^"]*)"', page)[1])[..., 3]
    np.testing.assert_array_equal(layer > 0, uncertainty > 0)


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
    assert slices_of(page)[0][HOT[0]]['number'] == HOT[0] + 1


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


def of_an_earlier_version(folder: Path) -> None:
    summary = json.loads((folder / 'pdddpm_summary.json').read_text())
    for row in summary['cases']:
        if row['case'] == 'poor':
            del row['mask']
    (folder / 'pdddpm_summary.json').write_text(json.dumps(summary))


@pytest.mark.parametrize('spoil, why', [
    (lambda folder: (folder / 'uncertainty' / 'poor_uncertainty.nii.gz').unlink(), 'poor_uncertainty.nii.gz, which is'),
    (lambda folder: (folder / 'presegmentation' / 'poor.nii.gz').unlink(), 'poor.nii.gz, which is not there'),
    (lambda folder: (folder / 'poor.nii.gz').unlink(), 'poor.nii.gz is not there'),
    (lambda folder: (folder.parent / 'images' / 'poor_0000.nii.gz').write_bytes(b''), 'poor_0000.nii.gz'),
    (lambda folder: damaged(folder, 'uncertainty/poor_uncertainty.nii.gz'), 'holds values outside [0, 1]'),
    (lambda folder: write_image(np.zeros((3, 3, 3), np.uint8), folder / 'presegmentation' / 'poor.nii.gz'),
     'the stock mask has shape'),
    (lambda folder: cut(folder / 'presegmentation' / 'poor.nii.gz'), 'poor.nii.gz is truncated'),
    (corrected, 'poor.nii.gz is not the mask that pdddpm_summary.json was made of'),
    (lambda folder: describe(folder, [entry(case, 0.5) for case in QUALITY if case != 'poor']),
     'poor.nii.gz is not the mask that pdddpm_summary.json was made of'),
    (of_an_earlier_version, 'poor.nii.gz cannot be told from another one: it is of a version of'),
], ids=['map', 'stock', 'mask', 'image', 'values', 'shape', 'cut', 'corrected', 'foreign', 'earlier version'])
def test_a_case_that_cannot_be_shown_is_named_and_the_others_are_shown(prediction, tmp_path, capsys, spoil, why):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0].parent, tmp_path, dirs_exist_ok=True)
    images = {case: [tmp_path / 'images' / files[0].name] for case, files in prediction[1].items()}
    spoil(folder)
    page = write_report(folder, images).read_text(encoding='utf-8')
    assert sorted(cases_of(page)) == sorted(case for case in ORDER if case != 'poor')
    assert 'Not shown: poor (' in text_of(page) and why in text_of(page)
    said = capsys.readouterr().out
    assert 'Not in the report: poor (' in said and why in said


@pytest.mark.parametrize('content', [b'', b'{"cases": [', b'\xff\xfe'])
@pytest.mark.parametrize('name', ['pdddpm_summary.json', 'dataset.json', 'plans.json'])
def test_a_file_that_is_empty_or_torn_after_a_loss_of_power_is_named(prediction, tmp_path, name, content):
    folder = tmp_path / 'out'
    shutil.copytree(prediction[0], folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match='is empty or damaged; predict again') as error:
        write_report(folder, prediction[1])
    assert str(folder / name) in str(error.value) and 'Expecting' not in str(error.value)


def test_cases_that_are_not_there_yet_or_failed_are_named_once(prediction, tmp_path, capsys):
    folder, images = tmp_path / 'out', prediction[1]
    shutil.copytree(prediction[0], folder)
    summary = json.loads((folder / 'pdddpm_summary.json').read_text())
    summary['cases'] = [of for of in summary['cases'] if of['case'] != 'good']
    summary['failed'] = [{'case': 'good', 'error': 'is empty'}]
    (folder / 'pdddpm_summary.json').write_text(json.dumps(summary))
    page = text_of(write_report(folder, {**images, 'other': images['poor']}).read_text(encoding='utf-8'))
    assert 'Not predicted: good (is empty)' in page and 'Not shown: other (it is not predicted yet)' in page
    assert capsys.readouterr().out == 'Not in the report: other (it is not predicted yet)\n'


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


# ------------------------------------------------------------------------------------------------- in a browser

def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    executable = find_chromium()
    if executable is None:
        pytest.skip('no Chromium on this machine')
    with playwright.sync_playwright() as driver:  # a new, empty profile each launch
        chromium = driver.chromium.launch(executable_path=executable, args=[
            '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
            '--disable-component-update', '--disable-sync'])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, prediction) -> Iterator[Any]:
    """The report in a tab; at the end there must have been no complaint and no request but for the file itself."""
    tab = browser.new_page(viewport={'width': 1200, 'height': 900})
    complaints, requests = [], []
    tab.on('console', lambda message: complaints.append(message.text))
    tab.on('pageerror', lambda error: complaints.append(str(error)))
    tab.on('request', lambda request: requests.append(request.url))
    tab.goto((prediction[0] / REPORT).as_uri())
    yield tab
    assert complaints == []
    assert [url for url in requests if not url.startswith('data:')] == [(prediction[0] / REPORT).as_uri()]
    tab.close()


def rows(tab: Any) -> list[str]:
    return tab.locator('#overview tbody th').all_inner_texts()


def test_it_loads_with_every_picture_and_no_complaint(opened):
    assert opened.title() == 'Dataset701_Phantom: 5 cases to review'
    assert rows(opened) == ORDER
    assert opened.locator('article svg[role=img] image.grey').count() == 15
    broken = opened.evaluate('''async () => {
        const uris = [...document.querySelectorAll('image')].map(i => i.getAttribute('href'));
        const load = uri => new Promise(done => {
            const image = new Image();
            image.onload = () => done(0);
            image.onerror = () => done(1);
            image.src = uri;
        });
        return (await Promise.all(uris.map(load))).reduce((a, b) => a + b);
    }''')
    assert broken == 0


def test_a_click_on_a_column_sorts_rows_and_cases(opened):
    volume = opened.get_by_role('button', name='lesion', exact=True)
    volume.click()
    largest_first = sorted(VOLUMES, key=VOLUMES.get, reverse=True)
    assert rows(opened) == largest_first
    assert opened.locator('article h2').all_inner_texts() == largest_first
    assert opened.locator('th[aria-sort=descending]').inner_text() == 'lesion'
    volume.click()
    assert rows(opened) == largest_first[::-1]
    opened.get_by_role('button', name='Case').press('Enter')
    assert rows(opened) == ['fair 10', NASTY, 'good', 'poor', 'unknown']
    opened.get_by_role('button', name='Estimated quality').click()
    assert rows(opened) == ORDER


def test_the_slider_leafs_through_the_slices_by_keyboard_too(opened):
    article = opened.locator('article', has_text='poor').first
    slider, plane = article.locator('input[type=range]'), article.locator('svg[role=img]').first

    def state() -> tuple[Any, ...]:
        return (article.locator('output').inner_text(), plane.locator('.grey').get_attribute('href'),
                plane.locator('.uncertainty').get_attribute('href'), plane.screenshot(),
                plane.locator('.consensus path').first.get_attribute('d'),
                article.locator('path.level').first.get_attribute('d'))

    slider.scroll_into_view_if_needed()
    start = state()
    assert start[0] == str(HOT[0] + 1)
    slider.focus()
    slider.press('ArrowRight')
    following = state()
    assert following[0] == str(HOT[0] + 2)
    assert slider.get_attribute('aria-valuetext') == f'slice {HOT[0] + 2}'
    assert all(a != b for a, b in zip(start, following, strict=True))
    slider.press('Home')
    assert state()[0] == '1'
    slider.press('End')
    assert state()[0] == str(SHAPE[0])
    slider.fill('3')
    assert state()[0] == '4'
    article.get_by_role('button', name='most uncertain').click()
    again = state()
    assert again[:3] == start[:3] and again[4] == start[4]


def test_layers_can_be_hidden_and_planes_enlarged(opened):
    plane = opened.locator('article svg[role=img]').first
    plane.scroll_into_view_if_needed()
    pictures = [plane.screenshot()]
    for kind in ('consensus', 'stock', 'uncertainty', 'cross'):
        opened.locator(f'#layers input[value={kind}]').press('Space')
        assert not opened.locator(f'article .{kind}').first.is_visible()
        pictures.append(plane.screenshot())
    assert len(set(pictures)) == 5
    before = plane.bounding_box()['width']
    opened.get_by_role('button', name='Enlarge').first.press('Enter')
    assert plane.bounding_box()['width'] > 2 * before


def test_it_fits_a_narrow_screen(opened, tmp_path):
    opened.set_viewport_size({'width': 390, 'height': 800})
    assert opened.evaluate('document.documentElement.scrollWidth') <= 390
    assert opened.locator('article svg[role=img]').first.bounding_box()['width'] > 300


def test_a_nasty_name_does_nothing(opened):
    assert opened.title() != 'taken'
    opened.get_by_role('link', name='fünf').click()
    assert opened.locator('article:target h2').inner_text() == NASTY
