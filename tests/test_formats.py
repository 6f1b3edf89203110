"""Every format that nnU-Net reads goes through every command, with a good image and with a damaged one beside it."""
from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import in_this_process, make_trainer, train_in_process
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from skimage import io
from tiny_model import DATASET, plans, write_model, write_stock_model

from nnunet_pdddpm.commands import check, evaluate, tune
from nnunet_pdddpm.commands import predict as command
from nnunet_pdddpm.evaluation.folders import EvaluationError
from nnunet_pdddpm.image_files import damage
from nnunet_pdddpm.inference.intervals import FIELDS
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.network.checkpoint import load_checkpoint
from nnunet_pdddpm.network.state import CALIBRATION
from nnunet_pdddpm.tuning import report as sweep_report
from nnunet_pdddpm.tuning import sweep
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.fold import FoldData

LABELS = {'background': 0, 'cell': 1, 'nucleus': 2}
REGIONS = {'labels': {'background': 0, 'whole': [1, 2], 'nucleus': [2]}, 'regions_class_order': [1, 2]}


@dataclass(frozen=True)
class Format:
    """A kind of image files.

    Attributes:
        ending: of the files.
        shape: of an image (z, y, x), or (y, x) for a picture.
        channels: of an image.
        together: whether one file holds all channels.
        regions: whether the model segments regions.
        beside: whether a file beside gives a tif its voxel size.
    """
    ending: str
    shape: tuple[int, ...] = (6, 18, 20)
    channels: int = 1
    together: bool = False
    regions: bool = False
    beside: bool = False

    def description(self) -> dict:
        return {'channel_names': {str(i): name for i, name in enumerate('RGB'[:self.channels])}, 'labels': LABELS,
                'numTraining': 1, 'file_ending': self.ending, **(REGIONS if self.regions else {})}

    def files(self, folder: Path, case: str) -> list[Path]:
        return [folder / f'{case}_{i:04d}{self.ending}' for i in range(1 if self.together else self.channels)]


PICTURE = (18, 20)
FORMATS = {
    'grey png': Format('.png', PICTURE), 'colour png': Format('.png', PICTURE, 3, together=True),
    'grey png, regions': Format('.png', PICTURE, regions=True),
    'colour png, regions': Format('.png', PICTURE, 3, together=True, regions=True),
    'channels of a png': Format('.png', PICTURE, 3), 'colour bmp': Format('.bmp', PICTURE, 3, together=True),
    '2D tif': Format('.tif', PICTURE), '2D colour tif': Format('.tif', PICTURE, 3, together=True),
    '3D tif': Format('.tif', beside=True), '3D tif without voxel size': Format('.tif'),
    '3D tiff, regions': Format('.tiff', channels=2, regions=True, beside=True), 'nii': Format('.nii'),
    'nii.gz': Format('.nii.gz'), 'nii.gz, regions': Format('.nii.gz', channels=2, regions=True),
    'nrrd': Format('.nrrd'), 'mha': Format('.mha'), 'gipl': Format('.gipl')}


def save(array: np.ndarray, file: Path, kind: Format, case: str) -> None:
    """Write (z, y, x), (y, x), or in colour (y, x, 3); the spacing beside a tif."""
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.shape[-1] == 3), str(file))
    if kind.beside:
        (file.parent / f'{case}.json').write_text(json.dumps({'spacing': [2.0, 1.0, 1.0]}))


def read(file: Path) -> np.ndarray:
    return io.imread(file) if file.suffix in ('.png', '.bmp') else sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def write_image(folder: Path, case: str, kind: Format, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (kind.channels, *kind.shape)).astype(np.uint8)
    files = kind.files(folder, case)
    if kind.together:
        save(np.moveaxis(noise, 0, -1), files[0], kind, case)
    else:
        for channel, file in zip(noise, files, strict=True):
            save(channel, file, kind, case)


@dataclass(frozen=True)
class Setting:
    """A model, images and references."""
    kind: Format
    root: Path

    @property
    def images(self) -> Path:
        return self.root / 'images'

    @property
    def references(self) -> Path:
        return self.root / 'references'

    def predict(self, name: str, *flags: str) -> Path:
        """`nnUNetv2_pdddpm_predict_from_modelfolder` in this process."""
        command.main_modelfolder(['-m', str(self.model()), '-i', str(self.images), '-o', str(self.root / name),
                                  *COMMON, *flags])
        return self.root / name

    def model(self, trainer: str = 'PDDDPMTrainer') -> Path:
        return next((self.root / 'results').glob(f'*/{trainer}__*'))

    def preprocess(self) -> str:
        """Case a to train on, b to validate on, as nnU-Net leaves them, and a stock model; the configuration."""
        plans_, description = (json.loads((self.model() / f'{name}.json').read_text()) for name in ('plans', 'dataset'))
        raw, preprocessed = (self.root / name / DATASET for name in ('raw', 'preprocessed'))
        shutil.copytree(self.images, raw / 'imagesTr')
        shutil.copytree(self.references, raw / 'labelsTr')
        preprocessed.mkdir(parents=True)
        for folder in (raw, preprocessed):
            (folder / 'dataset.json').write_text(json.dumps({**description, 'numTraining': 2}))
        for name, content in (('nnUNetPlans', plans_), ('dataset_fingerprint', {}),
                              ('splits_final', [{'train': ['a'], 'val': ['b']}])):
            (preprocessed / f'{name}.json').write_text(json.dumps(content))
        configuration, = plans_['configurations']
        with in_this_process():
            preprocess([730], 'nnUNetPlans', [configuration], [1], show_progress_bar=False)
        write_stock_model(self.model().with_name(f'nnUNetTrainer__nnUNetPlans__{configuration}'), plans_,
                          {**description, 'numTraining': 2})
        return configuration


COMMON = ('-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar', '--disable_tta')


@pytest.fixture(params=FORMATS)
def setting(request, tmp_path, monkeypatch) -> Setting:
    """Two good images and their references."""
    kind = FORMATS[request.param]
    for folder in ('images', 'references', 'results'):
        (tmp_path / folder).mkdir()
    for i, case in enumerate('ab'):
        write_image(tmp_path / 'images', case, kind, i)
        truth = np.zeros(kind.shape, np.uint8)
        truth[..., 4:14, 5:12], truth[..., 6:9, 6:9] = 1, 2
        save(truth, tmp_path / 'references' / f'{case}{kind.ending}', kind, case)
    example = kind.files(tmp_path / 'images', 'a')[0]
    reader = determine_reader_writer_from_file_ending(kind.ending, str(example), verbose=False)
    dims = len(kind.shape)
    configuration = '2d' if dims == 2 else '3d_fullres'
    for name in ('raw', 'preprocessed', 'results'):
        monkeypatch.setenv(f'nnUNet_{name}', str(tmp_path / name))
    write_model(tmp_path / 'results' / DATASET / f'PDDDPMTrainer__nnUNetPlans__{configuration}',
                plans(reader.__name__, dims, kind.channels), kind.description())
    return Setting(kind, tmp_path)


def test_every_format_goes_through_every_command(setting, capsys):
    ending = setting.kind.ending
    out = setting.predict('out', '--report', '--save_samples', '--uncertainty', 'all')
    command.main(['-d', DATASET, '-c', setting.model().name.rpartition('__')[2], '-i', str(setting.images),
                  '-o', str(setting.root / 'named'), *COMMON])
    masks = {}
    for case in 'ab':
        masks[case] = read(out / f'{case}{ending}')
        assert masks[case].shape == setting.kind.shape and masks[case].max() <= 2
        assert (out / f'{case}{ending}').read_bytes() == (setting.root / 'named' / f'{case}{ending}').read_bytes()
        assert len(list((out / 'samples').glob(f'{case}_s0?{ending}'))) == 2
    page = (out / 'report.html').read_text()
    assert all(f'>{case}</h2>' in page for case in 'ab')

    evaluate.main(['-pred', str(out), '-ref', str(setting.references), '-np', '1', '--disable_progress_bar'])
    values = json.loads((out / 'evaluation.json').read_text())
    for row in values['cases']:
        mask = masks[row['case']]
        truth = read(setting.references / f'{row["case"]}{ending}')
        overlap = 2 * ((mask == 2) & (truth == 2)).sum() / ((mask == 2).sum() + (truth == 2).sum())
        assert row['labels']['nucleus']['dice'] == pytest.approx(overlap)
        assert row['labels']['nucleus']['volume_ml'] == pytest.approx(
            (mask == 2).sum() * (2 if setting.kind.beside else 1) / 1000)
    assert 'Traceback' not in capsys.readouterr().out


@pytest.fixture
def brief(monkeypatch) -> None:
    """Training and tuning that do everything, and as little of it as goes."""
    monkeypatch.setenv('nnUNet_extTrainer', str(Path(__file__).parent / 'trainers'))
    monkeypatch.setenv('nnUNet_n_proc_DA', '0')
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', 'nnUNetTrainer')
    for name, values in (('STARTS', (0.8,)), ('FIRST_STEPS', (1,)), ('MORE_STEPS', ()), ('DRAWS', 1), ('BLENDS', ()),
                         ('DEPENDENCES', (1.0,))):
        monkeypatch.setattr(sweep, name, values)
    monkeypatch.setattr(check, 'find_trainer', lambda trainer: '')  # a search takes longer than the training
    for module in (run_training, predict_from_raw_data):
        monkeypatch.setattr(module, 'recursive_find_trainer_class_by_name', found_trainer)
    monkeypatch.setattr(LocalLogger, 'plot_progress_png', lambda self, folder: None)
    monkeypatch.setattr(sweep_report, '_picture', lambda sweep_: b'')


@lru_cache
def found_trainer(name: str) -> type:
    return recursive_find_trainer_class_by_name(name)


def test_every_format_is_checked_trained_validated_and_tuned(setting, brief, capsys):
    configuration = setting.preprocess()
    check.main([DATASET, '-c', configuration])
    said = capsys.readouterr().out
    assert 'Ready.' in said and said.count('trained folds: 0') == 2 and 'Problem' not in said
    train_in_process(730, configuration, 0, 'PDDDPMTrainerBrief', plans='nnUNetPlans')
    fold, truth = setting.model('PDDDPMTrainerBrief') / 'fold_0', read(
        setting.references / f'b{setting.kind.ending}')
    assert read(fold / 'validation' / f'b{setting.kind.ending}').shape == setting.kind.shape
    voxel_ml = (2 if setting.kind.beside else 1) / 1000
    volumes = {'cell': (truth == 1).sum(), 'whole': (truth > 0).sum(), 'nucleus': (truth == 2).sum()}
    names = list(foreground_labels(setting.kind.description()))

    def calibrated() -> list[float]:
        """True volumes of case b, as the checkpoint holds them."""
        scores = load_checkpoint(fold / 'checkpoint_final.pth')['network_weights'][CALIBRATION]
        return scores[0, 0 if setting.kind.regions else 1:, FIELDS.index('true')].tolist()
    expected = pytest.approx([volumes[name] * voxel_ml for name in names])
    assert calibrated() == expected
    tune.main([DATASET, configuration, '0', '-tr', 'PDDDPMTrainerBrief', '-device', 'cpu', '--disable_progress_bar'])
    assert json.loads((fold / 'sampling_sweep.json').read_text())['cases'] == ['b']
    assert calibrated() == expected


@pytest.mark.parametrize('setting', [name for name, kind in FORMATS.items() if '3D' in name], indirect=True)
def test_raters_masks_of_a_tif_have_the_voxel_size_of_the_image_which_nnunet_does_not_copy_to_the_truth(setting, brief):
    configuration, raters, ending = setting.preprocess(), setting.root / 'raters', setting.kind.ending
    raters.mkdir()
    save(read(setting.references / f'b{ending}'), raters / f'b__me{ending}', setting.kind, 'b__me')
    trainer = make_trainer('PDDDPMTrainer', 0, configuration, 730, 'nnUNetPlans')
    cases = ValidationCases(FoldData.from_trainer(trainer), raters)
    assert not list(cases.data.truth.glob('*.json'))
    case = cases.load('b')
    assert (case.labels == 2).any()
    np.testing.assert_array_equal(case.raters[0], case.labels.clip(0))
    (raters / 'b__me.json').write_text('{"spacing": [5.0, 1.0, 1.0]}')
    with pytest.raises(EvaluationError, match='b__me.* differ in spacing'):
        cases.load('b')


def damaged(setting: Setting) -> dict[str, str]:
    """Damaged images beside the good ones: case -> what is said of it, which is one of these."""
    kind, bad = setting.kind, {}

    def write(case: str, content: bytes, said: str) -> None:
        write_image(setting.images, case, kind, 9)
        kind.files(setting.images, case)[-1].write_bytes(content)
        bad[case] = said
    content = kind.files(setting.images, 'a')[-1].read_bytes()
    name = kind.files(Path(), 'bad')[-1].name[3:]
    write('cut', content[:len(content) // 3], f'cut{name}')
    write('short', content[:2 * len(content) // 3], f'short{name}')
    write('empty', b'', f'empty{name}')
    write('text', b'no image', f'text{name}')
    if kind.together and kind.ending == '.png':  # a picture with another number of channels than the model
        for case, channels in (('grey', 1), ('transparent', 4)):
            image = np.random.default_rng(0).integers(0, 255, (*kind.shape, channels)).astype(np.uint8)
            io.imsave(kind.files(setting.images, case)[0], image.squeeze(), check_contrast=False)
            bad[case] = f'{channels} channels'
    for case, beside, said in (('no_json', '', 'is empty'), ('torn_json', '{"spac', 'cannot be read'),
                               ('without', '{}', 'needs "spacing"'), ('list', '[1]', 'needs "spacing"'),
                               ('words', '{"spacing": ["1 mm", 1, 1]}', 'and has ["1 mm", 1, 1]'),
                               ('zero', '{"spacing": [0, 1, 1]}', 'three numbers above 0')) if kind.beside else ():
        write_image(setting.images, case, kind, 9)
        (setting.images / f'{case}.json').write_text(beside)
        bad[case] = f'{case}.json, which gives the voxel size of {case}_0000{kind.ending}, {said}' if case in (
            'no_json', 'torn_json') else said
    return bad


def test_damaged_files_of_every_format_are_named_and_the_good_ones_are_done(setting):
    bad = damaged(setting)
    (setting.images / f'._a_0000{setting.kind.ending}').write_bytes(bytes([0, 5, 22, 7, 0, 2, 0, 0]) + b'Mac OS X')
    with pytest.raises(SystemExit) as ended:
        setting.predict('out')
    assert str(ended.value.code).startswith(f'Error: {len(bad)} of {len(bad) + 2} cases could not be predicted, ')
    summary = json.loads((setting.root / 'out' / 'pdddpm_summary.json').read_text())
    reasons = {row['case']: row['error'] for row in summary['failed']}
    assert reasons.keys() == bad.keys() and all(said in reasons[case] for case, said in bad.items()), reasons
    assert [row['case'] for row in summary['cases']] == ['a', 'b']


@pytest.mark.parametrize('setting', [name for name, kind in FORMATS.items() if '3D' in name], indirect=True)
def test_no_voxel_size_of_an_earlier_tif_is_left_alone(setting):
    setting.predict('out', '--save_samples', '--uncertainty', 'all', '-samples', '3')
    out = setting.predict('out', '--save_samples', '-samples', '2')
    beside = {file.with_suffix('') for file in out.rglob('*.json') if file.stem[:2] in ('a', 'b', 'a_', 'b_')
              and file.parent.name != 'pdddpm_cases'}
    assert beside == {file.with_suffix('') for file in out.rglob(f'*{setting.kind.ending}')} and len(beside) == 2 + 4


@pytest.mark.parametrize('setting', ['colour png'], indirect=True)
@pytest.mark.parametrize('grey', [5, 7])
def test_however_many_grey_pictures_come_first_the_colour_ones_are_done(setting, grey):
    noise = np.random.default_rng(0).integers(0, 255, setting.kind.shape).astype(np.uint8)
    bad = [f'Grey_{i}' for i in range(grey)]
    for case in bad:
        io.imsave(setting.kind.files(setting.images, case)[0], noise, check_contrast=False)
    with pytest.raises(SystemExit):
        setting.predict('out')
    summary = json.loads((setting.root / 'out' / 'pdddpm_summary.json').read_text())
    assert [row['case'] for row in summary['cases']] == ['a', 'b']
    assert {row['case']: row['error'] for row in summary['failed']} == {
        case: f'{case}_0000.png: 1 channels (grey), the model needs 3' for case in bad}


@pytest.mark.parametrize('setting', ['colour png'], indirect=True)
def test_pictures_that_are_all_grey_are_refused_at_the_start_and_a_damaged_one_is_called_so(setting):
    noise = np.random.default_rng(0).integers(0, 255, setting.kind.shape).astype(np.uint8)
    for case in 'ab':
        io.imsave(setting.kind.files(setting.images, case)[0], noise, check_contrast=False)
    with pytest.raises(SystemExit, match='a in .* has 1 channel files, the model needs 3'):
        setting.predict('out')
    assert not (setting.root / 'out').exists()
    for case in 'ab':
        setting.kind.files(setting.images, case)[0].write_bytes(b'')
    with pytest.raises(SystemExit, match=r'2 of 2 cases could not be predicted, .*a_0000.png cannot be read'):
        setting.predict('out')


@pytest.mark.parametrize('bigtiff', [False, True])
def test_a_tif_whose_pages_lead_back_to_an_earlier_one_is_damaged_and_does_not_go_round_for_ever(tmp_path, bigtiff):
    file = tmp_path / 'a_0000.tif'
    with tifffile.TiffWriter(file, bigtiff=bigtiff) as writer:
        for _ in range(3):
            writer.write(np.zeros((4, 5), np.uint8), contiguous=False)
    assert damage(file) == ''
    with tifffile.TiffFile(file) as pages:
        first, last = pages.pages[0].offset, pages.pages[2].offset
    number, entry, link = ('<Q', 20, '<Q') if bigtiff else ('<H', 12, '<I')
    content = bytearray(file.read_bytes())
    entries, = struct.unpack_from(number, content, last)
    struct.pack_into(link, content, last + struct.calcsize(number) + entry * entries, first)
    file.write_bytes(content)
    assert damage(file) == 'is truncated or damaged'
