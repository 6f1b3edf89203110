"""The report in a headless Chromium."""
from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from report_data import HOT, NASTY, ORDER, SHAPE, VOLUMES, describe, entry, report_of_phantoms, sample_of

from nnunet_pdddpm.demo.phantom import oblique_direction
from nnunet_pdddpm.files import identity
from nnunet_pdddpm.report import write_report
from nnunet_pdddpm.report.page import REPORT
from nnunet_pdddpm.report.views import make_view
from nnunet_pdddpm.report.volumes import CaseVolumes, DisplayAxes


@pytest.fixture(scope='module')
def prediction(tmp_path_factory) -> tuple[Path, dict[str, list[Path]]]:
    return report_of_phantoms(tmp_path_factory.mktemp('prediction') / 'out')


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
    assert complaints == [] and not tab.locator('#trouble').is_visible()
    assert {url for url in requests if not url.startswith(('data:', 'blob:'))} == {(prediction[0] / REPORT).as_uri()}
    tab.close()


def rows(tab: Any) -> list[str]:
    return [name for name in tab.locator('#overview tbody th a').all_inner_texts() if name]


def article_of(tab: Any, case: str) -> Any:
    """The article of a case, in sight and drawn."""
    article = tab.locator('article').nth(tab.locator('article h2').all_text_contents().index(case))
    article.scroll_into_view_if_needed()
    tab.wait_for_function('article => article.classList.contains("drawn")', arg=article.element_handle())
    return article


def shown(article: Any) -> list[int]:
    """Indices (z, y, x), from 0, of the slices shown of a phantom, whose axes are flipped from the file's but for z."""
    return [int(text) for text in article.locator('output').all_inner_texts()]


def path_of(article: Any, axis: int, kind: str, label: int) -> str:
    return article.locator(f'figure[data-axis="{axis}"] .{kind} .label-{label}').get_attribute('d') or ''


def filled(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The mask whose outline this is: pixel centres inside by the even-odd rule."""
    inside = np.zeros(shape, bool)
    y, x = np.indices(shape) * 2 + 1
    for part in filter(None, path.split('M')):
        points = [tuple(map(int, point.split())) for point in part.rstrip('Z').split('L')]
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) / (by - ay if by != ay else 1) * (bx - ax))
    return inside


def test_it_loads_with_every_picture_and_no_complaint(opened):
    assert opened.title() == 'Dataset701_Phantom: 5 cases to review'
    assert rows(opened) == ORDER
    for case in ORDER[:3]:
        article = article_of(opened, case)
        spread = article.evaluate('''article => [...article.querySelectorAll('canvas.grey')].map(canvas => {
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const grey = data.filter((value, i) => i % 4 === 0);
            return Math.max(...grey) - Math.min(...grey);
        })''')
        assert len(spread) == 3 and min(spread) > 100


def test_an_outline_encloses_exactly_its_mask(opened):
    rng = np.random.default_rng(0)
    masks = [np.zeros((3, 3), int), np.ones((2, 3), int), *(rng.integers(0, 3, (9, 13)) for _ in range(5))]
    for mask in masks:
        paths = opened.evaluate('''([values, rows, columns]) => {
            const slice = { values: Uint8Array.from(values), rows, columns };
            return [outline(slice, boxes(slice), [1]), outline(slice, boxes(slice), [1, 2])];
        }''', [mask.ravel().tolist(), *mask.shape])
        np.testing.assert_array_equal(filled(paths[0], mask.shape), mask == 1)
        np.testing.assert_array_equal(filled(paths[1], mask.shape), mask > 0)
    assert opened.evaluate('outline({ values: new Uint8Array(9), rows: 3, columns: 3 }, new Map(), [1])') == ''


def test_the_planes_show_the_masks_of_the_slices_that_they_name(opened, prediction):
    folder = prediction[0]
    axes = DisplayAxes.from_properties({'sitk_stuff': {'direction': oblique_direction()}})
    assert not any(axes.flipped) and axes.order == (0, 1, 2)  # so what is shown is as in the file
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / 'poor.nii.gz')))
    article = article_of(opened, 'poor')
    assert shown(article) == [n + 1 for n in HOT]
    for axis in range(3):
        section = np.moveaxis(labels, axis, 0)[HOT[axis]]
        stock, samples = (np.moveaxis(of, axis, 0)[HOT[axis]] for of in (np.roll(labels, 2, 2), sample_of(labels, 0)))
        for value in (1, 2):
            for kind, mask in (('consensus', section), ('stock', stock), *[('samples', samples)] * (value == 2)):
                upright = mask if axis == 0 else mask[::-1]  # superior on top
                np.testing.assert_array_equal(filled(path_of(article, axis, kind, value - 1), mask.shape),
                                              upright == value, err_msg=f'{kind} {axis}')


@pytest.mark.parametrize('back', [False, True])
def test_slices_of_a_coarser_volume_have_numbers_that_are_in_the_file(browser, tmp_path, back):
    folder, size = tmp_path / 'out', 641  # two become one, and one is left
    mask = np.ones((2, size, 2), np.uint8)
    for name, array in (('a', mask), ('presegmentation/a', mask), ('uncertainty/a_uncertainty', mask * np.float32(0.5)),
                        ('a_0000', mask)):
        image = sitk.GetImageFromArray(array)
        image.SetDirection(np.diag([1.0, -1.0 if back else 1.0, 1.0]).ravel())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(folder / f'{name}.nii.gz'))
    describe(folder, [entry('a', 0.5)])
    tab = browser.new_page()
    tab.goto(write_report(folder, {'a': [folder / 'a_0000.nii.gz']}).as_uri())
    article = article_of(tab, 'a')
    for key, number, row in (('End', 1 if back else size, 320), ('Home', size - 1 if back else 2, 0)):
        slider = article.get_by_role('slider', name='Coronal slice of a')
        slider.press(key)
        assert (slider.input_value(), article.locator('figure[data-axis="1"] output').inner_text()) == (
            str(row), str(number))
        assert filled(path_of(article, 1, 'consensus', 0), (2, 2)).all()
    tab.close()


def test_labels_above_255_are_the_same_in_the_browser(opened):
    consensus, other = np.random.default_rng(0).choice([0, 1, 300], (2, 4, 5, 6)).astype(np.uint16)
    samples, nothing = (consensus, other), np.zeros(consensus.shape, np.float32)
    case = CaseVolumes(nothing, consensus, consensus, nothing, samples, (1.0, 1.0, 1.0), DisplayAxes())
    volumes = make_view(case, [(1,), (300,)], 10 ** 6).volumes
    loaded = opened.evaluate('''async volumes => {
        const { consensus, samples } = await load(volumes);
        return [...consensus, ...samples].map(values => [...values]);
    }''', volumes)
    for values, expected in zip(loaded, (consensus, *samples), strict=True):
        np.testing.assert_array_equal(np.reshape(values, consensus.shape), expected)


def test_a_click_on_a_column_sorts_rows_and_cases(opened):
    volume = opened.get_by_role('button', name='lesion', exact=True)
    volume.click()
    largest_first = sorted(VOLUMES, key=VOLUMES.get, reverse=True)
    assert rows(opened) == largest_first
    assert opened.locator('article h2').all_inner_texts() == largest_first
    assert opened.locator('th[aria-sort=descending]').inner_text() == 'lesion'
    volume.click()
    assert rows(opened) == largest_first[::-1]
    opened.get_by_role('button', name='Case', exact=True).press('Enter')
    assert rows(opened) == ['fair 10', NASTY, 'good', 'poor', 'unknown']
    opened.get_by_role('button', name='Estimated quality').click()
    assert rows(opened) == ORDER


def test_sliders_leaf_through_all_three_planes_by_keyboard_too(opened):
    article = article_of(opened, 'poor')
    for axis, name in enumerate(('Axial', 'Coronal', 'Sagittal')):
        slider = article.get_by_role('slider', name=f'{name} slice of poor')
        figure = article.locator(f'figure[data-axis="{axis}"]')
        before = [figure.locator('.view').screenshot(), path_of(article, axis, 'stock', 0)]
        slider.press('ArrowRight')
        opened.wait_for_function('([output, text]) => output.value === text',
                                 arg=[figure.locator('output').element_handle(), str(HOT[axis] + 2)])
        assert slider.get_attribute('aria-valuetext') == f'slice {HOT[axis] + 2}'
        after = [figure.locator('.view').screenshot(), path_of(article, axis, 'stock', 0)]
        assert all(a != b for a, b in zip(before, after, strict=True))
        slider.press('End')
        opened.wait_for_function('([output, text]) => output.value === text',
                                 arg=[figure.locator('output').element_handle(), str(SHAPE[axis])])


def test_a_case_opens_at_the_place_that_was_chosen_and_buttons_and_clicks_lead_to_others(opened, prediction):
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(prediction[0] / 'poor.nii.gz')))
    largest, of_lesion = ([int(np.argmax(mask.sum(tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
                          for mask in (labels > 0, labels == 2))
    hot = [n + 1 for n in HOT]
    assert len({tuple(place) for place in (largest, of_lesion, hot)}) == 3
    article = article_of(opened, 'poor')

    def wait(place: list[int]) -> None:
        opened.wait_for_function(
            '([article, text]) => [...article.querySelectorAll("output")].map(o => o.value).join() === text',
            arg=[article.element_handle(), ','.join(map(str, place))])
    article.get_by_role('button', name='largest cross-section', exact=True).click()
    wait(largest)
    article.get_by_role('button', name='Largest cross-section of lesion in poor').click()
    wait(of_lesion)
    article.get_by_role('button', name='most uncertain place').click()
    wait(hot)
    box = article.locator('figure[data-axis="0"] .view').bounding_box()
    opened.mouse.click(box['x'] + box['width'] * 4.5 / SHAPE[2], box['y'] + box['height'] * 30.5 / SHAPE[1])
    wait([hot[0], 31, 5])
    article.locator('summary').click()
    article.get_by_role('button', name='Component 1 of lesion').click()
    z, y, x = (n - 1 for n in shown(article))
    assert labels[z, y, x] == 2
    opened.get_by_label('Open cases at').select_option('largest')
    wait(largest)
    opened.reload()
    article = article_of(opened, 'poor')
    wait(largest)


def test_layers_and_labels_can_be_hidden_and_planes_enlarged(opened):
    article = article_of(opened, 'poor')
    view = article.locator('.view').first
    pictures = [view.screenshot()]
    for kind in ('label-1', 'consensus', 'stock', 'samples', 'uncertainty', 'cross'):
        opened.locator(f'#layers input[value={kind}]').press('Space')
        assert not article.locator(f'.frame .{kind}').first.is_visible()
        pictures.append(view.screenshot())
    assert len(set(pictures)) == 7
    before, number = view.bounding_box()['width'], shown(article)[0]
    article.get_by_role('button', name='Enlarge').first.press('Enter')
    assert view.bounding_box()['width'] > 1.5 * before
    view.hover()
    opened.mouse.wheel(0, 100)
    opened.wait_for_function('([output, before]) => output.value != before',
                             arg=[article.locator('output').first.element_handle(), number])


def test_verdicts_stay_in_the_browser_and_are_exported(opened, prediction):
    article = article_of(opened, NASTY)
    article.get_by_role('button', name='look again').click()
    article.get_by_label('Comment on').fill('the "left" part, ünd =1+1')
    article.get_by_label('Comment on').press('Enter')
    opened.locator('#overview a', has_text='poor').click()
    opened.keyboard.press('r')
    assert article_of(opened, 'poor').locator('[aria-pressed=true][data-verdict]').inner_text() == 'reject'
    assert '5 of 5 shown, 2 reviewed' in opened.locator('#count').inner_text()
    opened.reload()
    assert opened.locator('#overview tr', has_text='fünf').locator('.verdict').inner_text().startswith('look again')
    with opened.expect_download() as download:
        opened.get_by_role('button', name='Export').click()
    assert download.value.suggested_filename == 'review_Dataset701_Phantom.csv'
    lines = list(csv.DictReader(download.value.path().read_text(encoding='utf-8-sig').splitlines()))
    found = {line['case']: (line['verdict'], line['comment']) for line in lines}
    assert found == {**dict.fromkeys(ORDER, ('', '')), 'poor': ('reject', ''),
                     NASTY: ('look again', 'the "left" part, ünd =1+1')}
    assert {line['mask_crc32'] for line in lines} == {
        identity(prediction[0] / f'{case}.nii.gz')['crc32'] for case in ORDER}
    opened.get_by_label('Show').select_option('reject')
    assert rows(opened) and opened.locator('article:visible h2').all_inner_texts() == ['poor']
    opened.get_by_label('Show').select_option('open')
    assert opened.locator('article:visible').count() == 3
    opened.get_by_label('Show').select_option('')
    opened.keyboard.press('Escape')
    article_of(opened, 'poor').get_by_role('button', name='reject').click()  # taken back
    assert '1 reviewed' in opened.locator('#count').inner_text()


def test_search_and_keys_lead_from_case_to_case(opened):
    def case_in_focus() -> str:
        return opened.evaluate('document.activeElement.closest("article")?.dataset.name ?? ""')
    for expected in ORDER[:3]:
        opened.keyboard.press('n')
        assert case_in_focus() == expected
    opened.keyboard.press('p')
    assert case_in_focus() == 'poor'
    opened.keyboard.press('/')
    opened.keyboard.type('FLAG lesion')  # letters are no keys here
    assert opened.locator('article:visible').count() == 0
    opened.get_by_label('Search').fill('components')
    assert opened.locator('article:visible h2').all_inner_texts() == ['poor']
    assert opened.locator('#count').inner_text().startswith('1 of 5 shown')
    opened.get_by_label('Search').fill('')
    opened.locator('.help summary').click()
    opened.get_by_label('keys are on').uncheck()
    opened.keyboard.press('n')
    assert case_in_focus() == ''


def test_it_fits_a_narrow_screen_and_the_case_stays_in_sight(opened):
    opened.set_viewport_size({'width': 390, 'height': 800})
    assert opened.evaluate('document.documentElement.scrollWidth') <= 390
    assert article_of(opened, 'poor').locator('.frame').first.bounding_box()['width'] > 300
    region = opened.get_by_role('region', name='Cases, sortable')
    region.evaluate('region => { region.scrollLeft = region.scrollWidth; }')
    assert region.evaluate('region => region.scrollLeft') > 100
    assert opened.locator('#overview tbody th').first.bounding_box()['x'] >= 0


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_has_a_contrast_of_at_least_4_5(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.evaluate('document.querySelectorAll("details").forEach(part => { part.open = true; })')
    article_of(opened, 'poor').get_by_role('button', name='reject').click()
    low = opened.evaluate('''() => {
        const channels = text => text.match(/[\\d.]+/g).map(Number);
        const light = colour => colour.slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = element => {
            const layers = [];
            for (let e = element; e; e = e.parentElement) {
                const [r, g, b, opaque = 1] = channels(getComputedStyle(e).backgroundColor);
                layers.push([r, g, b, opaque]);
                if (opaque === 1 || e.matches('.frame .scale, .frame .edge')) break;  // the image there may be white
            }
            return layers.reduceRight((below, [r, g, b, opaque]) =>
                [r, g, b].map((c, i) => opaque * c + (1 - opaque) * below[i]), [255, 255, 255]);
        };
        const found = [];
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const element = texts.currentNode.parentElement;
            const text = texts.currentNode.textContent.trim();
            if (!text || !element.checkVisibility() || element.closest('option')) continue;
            const { color, fill } = getComputedStyle(element);
            const pair = [light(channels(element.matches('text') ? fill : color)), light(ground(element))];
            const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            if (contrast < 4.5) found.push([text, contrast]);
        }
        return found;
    }''')
    assert low == []
    ground = opened.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (ground == 'rgb(255, 255, 255)') == (scheme == 'light')


def test_colours_of_labels_and_a_pressed_verdict_are_seen_where_the_system_forces_its_own(opened):
    swatch, frame = (opened.locator(kind).first for kind in ('.swatch', '.frame'))
    colour = 'element => getComputedStyle(element).backgroundColor'
    before = swatch.evaluate(colour)
    opened.emulate_media(forced_colors='active')
    assert opened.evaluate('matchMedia("(forced-colors: active)").matches')
    assert swatch.evaluate(colour) == before and frame.evaluate('e => getComputedStyle(e).forcedColorAdjust') == 'none'
    button = article_of(opened, 'poor').get_by_role('button', name='reject')
    button.click()
    assert button.evaluate('element => getComputedStyle(element).borderTopWidth') == '3px'


def test_printing_draws_all_cases_first_and_leaves_the_buttons_out(opened):
    opened.evaluate('window.print = () => { window.printed = document.querySelectorAll("article.drawn").length; }')
    opened.get_by_role('button', name='Print').click()
    opened.wait_for_function('() => window.printed === 5')
    opened.emulate_media(media='print')
    assert not opened.locator('#tools').is_visible() and not opened.locator('.places').first.is_visible()
    assert opened.locator('article canvas').first.is_visible()


def test_the_page_can_be_used_by_keyboard_and_ear(opened):
    opened.keyboard.press('Tab')
    assert opened.evaluate('document.activeElement.getAttribute("href")') == '#overview'
    unnamed = opened.evaluate('''() => {
        const parts = document.querySelectorAll('button, input, select, svg[role=img], [role=region]');
        const name = e => e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length;
        return [...parts].filter(part => !name(part)).map(part => part.outerHTML);
    }''')
    assert unnamed == []
    assert opened.locator('table').count() == opened.locator('table > caption').count() == 6


def test_a_nasty_name_does_nothing(opened):
    assert opened.title() != 'taken'
    opened.get_by_role('link', name='fünf').click()
    assert opened.locator('article:target h2').inner_text() == NASTY
