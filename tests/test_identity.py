"""A model is its weights, a row of the summary is of one mask and one image: what only bears their names is told."""
from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, DATASET_ID, PLANS, REFINED, Workspace

from nnunet_pdddpm.commands.predict import main, main_modelfolder
from nnunet_pdddpm.inference import summary as summary_module
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.summary import write_failure, write_summary
from nnunet_pdddpm.network.checkpoint import PRESEGMENTER, checksum
from nnunet_pdddpm.network.state import CALIBRATION

A, B = 'phantom_009', 'phantom_010'
MODEL = f'{REFINED}__{PLANS}__3d_fullres'
QUICK = ('-device', 'cpu', '--disable_progress_bar', '--disable_tta', '-step_size', '1', '-samples', '2', '-npp', '0',
         '-nps', '0')


def predict(source: Path, output: Path, *flags: str) -> Path:
    """The command in this process, as fast as it goes."""
    main(['-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres', '-tr', REFINED, '-p', PLANS,
          '-f', '0', *QUICK, *flags])
    return output


def go_on(source: Path, output: Path, *flags: str) -> Path:
    return predict(source, output, '--continue_prediction', *flags)


def refusal(call: Callable[..., object], *args: object) -> str:
    """What is said when a call ends with exit status 1: one line."""
    with pytest.raises(SystemExit) as refused:
        call(*args)
    assert isinstance(refused.value.code, str) and refused.value.code.startswith('Error: ')
    assert '\n' not in refused.value.code
    return refused.value.code


def summary(output: Path) -> dict:
    return json.loads((output / 'pdddpm_summary.json').read_text())


def cases(output: Path) -> list[str]:
    """The summary's cases: json and csv agree."""
    names = [row['case'] for row in summary(output)['cases']]
    lines = csv.DictReader((output / 'pdddpm_summary.csv').open(newline=''))
    assert sorted({line['case'] for line in lines if not line.get('error')}) == names
    return names


def failed(output: Path) -> list[str]:
    return [row['case'] for row in summary(output).get('failed', [])]


def content(output: Path) -> dict[str, bytes]:
    """Everything but what nnU-Net notes about the call."""
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob('*')
            if file.is_file() and file.name != 'predict_from_raw_data_args.json'}


def correct(mask: Path) -> bytes:
    """Correct a mask by hand: one voxel; its new content."""
    image = sitk.ReadImage(str(mask))
    image[0, 0, 0] = 1 - min(1, image[0, 0, 0])
    sitk.WriteImage(image, str(mask))
    return mask.read_bytes()


@pytest.fixture(scope='module')
def images(refined: Workspace, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('images')
    for case in (A, B):
        shutil.copy(refined.raw / 'imagesTs' / f'{case}_0000.nii.gz', folder)
    return folder


@pytest.fixture(scope='module')
def predicted(images: Path, tmp_path_factory) -> Path:
    return predict(images, tmp_path_factory.mktemp('predicted') / 'out')


@pytest.fixture
def source(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / 'images'))


@pytest.fixture
def out(predicted: Path, tmp_path: Path) -> Path:
    """A finished prediction of both cases."""
    return Path(shutil.copytree(predicted, tmp_path / 'out'))


@pytest.fixture
def model(refined: Workspace, tmp_path: Path, monkeypatch) -> Path:
    """An own copy of the model, where the commands look for it."""
    folder = tmp_path / 'results' / DATASET / MODEL
    shutil.copytree(refined.model(REFINED) / 'fold_0', folder / 'fold_0')
    for name in ('plans.json', 'dataset.json'):
        shutil.copy(refined.model(REFINED) / name, folder)
    monkeypatch.setenv('nnUNet_results', str(folder.parents[1]))
    monkeypatch.setattr('nnunetv2.utilities.file_path_utilities.nnUNet_results', str(folder.parents[1]))
    return folder


def change_weights(model: Path, which: str) -> None:
    """Train a part of a model again, at the same path."""
    file = model / 'fold_0' / 'checkpoint_final.pth'
    checkpoint = torch.load(file, weights_only=False)
    weights = checkpoint['network_weights']
    name = next(name for name in weights if name.startswith(which))
    weights[name].reshape(-1)[0] += 0.5
    if which == PRESEGMENTER:
        weights._metadata['']['presegmenter_checksum'] = checksum(weights, PRESEGMENTER)
    torch.save(checkpoint, file)


# the model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('which', ['denoiser.', PRESEGMENTER, CALIBRATION])
def test_a_model_trained_again_at_the_same_path_does_not_go_on_in_the_old_folder(source, out, model, which):
    (out / f'{B}.nii.gz').unlink()
    before = content(out)
    change_weights(model, which)
    said = refusal(go_on, source, out)
    assert f'{out} holds {A} predicted with another model: its weights are not those of' in said
    assert 'without --continue_prediction' in said
    assert content(out) == before


def test_the_same_model_at_another_path_goes_on(source, predicted, out, model):
    elsewhere = model.rename(model.parents[2] / 'of_somebody_else')
    (out / f'{B}.nii.gz').unlink()
    main_modelfolder(['-i', str(source), '-o', str(out), '-m', str(elsewhere), '-f', '0', *QUICK,
                      '--continue_prediction'])
    assert (out / f'{B}.nii.gz').read_bytes() == (predicted / f'{B}.nii.gz').read_bytes()
    assert cases(out) == [A, B]


def test_masks_of_another_model_that_stay_in_the_folder_are_told(source, out, model, capsys):
    (source / f'{B}_0000.nii.gz').unlink()
    change_weights(model, 'denoiser.')
    predict(source, out)
    assert f'also holds masks of another model or of other settings, which stay: {B}.' in capsys.readouterr().err
    weights = [row['settings'][0]['weights'] for row in summary(out)['cases']]
    assert len(set(weights)) == 2


# the mask and the image -----------------------------------------------------------------------------------------------


def by_hand(output: Path) -> None:
    correct(output / f'{A}.nii.gz')


def exchanged(output: Path) -> None:
    one, other = ((output / f'{case}.nii.gz').read_bytes() for case in (A, B))
    (output / f'{A}.nii.gz').write_bytes(other)
    (output / f'{B}.nii.gz').write_bytes(one)


def by_stock_nnunet(output: Path) -> None:
    """Its command knows nothing of the rows."""
    (output / 'pdddpm_cases' / f'{A}.json').unlink()


@pytest.mark.parametrize(('change', 'why'), [
    (by_hand, 'was changed or replaced after'), (exchanged, 'was changed or replaced after'),
    (by_stock_nnunet, 'was not written by nnUNetv2_pdddpm_predict')])
def test_another_mask_is_neither_taken_for_done_nor_overwritten_by_continuing(source, predicted, out, change, why,
                                                                              capsys):
    change(out)
    mine = (out / f'{A}.nii.gz').read_bytes()
    others = [A, B] if change is exchanged else [A]
    if B not in others:
        (out / f'{B}.nii.gz').unlink()
    go_on(source, out)
    line, = [line for line in capsys.readouterr().err.splitlines() if 'masks stay as they are' in line]
    assert line.startswith(f'{len(others)} masks') and why in line
    assert all(f'{out / case}.nii.gz ' in line for case in others)
    assert (out / f'{A}.nii.gz').read_bytes() == mine
    assert cases(out) == [case for case in (A, B) if case not in others]
    if B not in others:  # no other case waits for it
        assert (out / f'{B}.nii.gz').read_bytes() == (predicted / f'{B}.nii.gz').read_bytes()


def test_without_continuing_another_mask_is_overwritten_and_that_is_said_beforehand(source, predicted, out, capsys,
                                                                                    caplog):
    correct(out / f'{A}.nii.gz')
    predict(source, out)
    said = capsys.readouterr()
    assert f'{out / A}.nii.gz was changed or replaced' in said.err and f'Predicting {A}' in said.out
    assert caplog.text.index(f'{out / A}.nii.gz was changed or replaced') < caplog.text.index(f'Predicting {A}')
    assert (out / f'{A}.nii.gz').read_bytes() == (predicted / f'{A}.nii.gz').read_bytes()
    predict(source, out)
    assert 'will be overwritten' not in capsys.readouterr().err


def test_a_mask_moved_away_is_predicted_again(source, predicted, out):
    correct(out / f'{A}.nii.gz')
    (out / f'{A}.nii.gz').rename(out.parent / 'mine.nii.gz')
    go_on(source, out)
    assert (out / f'{A}.nii.gz').read_bytes() == (predicted / f'{A}.nii.gz').read_bytes()


def test_a_case_whose_image_was_replaced_is_predicted_again(source, out, capsys):
    image = sitk.ReadImage(str(source / f'{A}_0000.nii.gz'))
    sitk.WriteImage(sitk.Flip(image, (True, False, False)), str(source / f'{A}_0000.nii.gz'))
    before = content(out)
    go_on(source, out)
    after = content(out)
    assert f'The image of {A} is not the one that was predicted' in capsys.readouterr().err
    assert after[f'{A}.nii.gz'] != before[f'{A}.nii.gz'] and after[f'{B}.nii.gz'] == before[f'{B}.nii.gz']
    go_on(source, out)
    assert content(out) == after


def test_the_summary_is_of_the_masks_that_are_there(source, out, capsys):
    mine = correct(out / f'{A}.nii.gz')
    (source / f'{A}_0000.nii.gz').unlink()
    predict(source, out)
    assert cases(out) == [B] and (out / f'{A}.nii.gz').read_bytes() == mine
    assert f'pdddpm_summary.json leaves out {A}: the mask that is there' in capsys.readouterr().err
    (out / f'{A}.nii.gz').unlink()
    go_on(source, out)
    assert cases(out) == [B] and 'leaves out' not in capsys.readouterr().err


# failed cases, parts, the report --------------------------------------------------------------------------------------


def test_a_failed_case_that_was_renamed_or_deleted_is_none_any_more(source, tmp_path):
    out = tmp_path / 'new'
    bad, unnumbered = source / 'bad_0000.nii.gz', source / 'unnumbered.nii.gz'
    bad.write_bytes(b'')
    unnumbered.write_bytes(b'')
    assert '2 of 4 cases' in refusal(predict, source, out, '--report')
    assert failed(out) == ['bad', 'unnumbered']
    bad.rename(source / 'worse_0000.nii.gz')
    assert '2 of 4 cases' in refusal(go_on, source, out, '--report')
    assert failed(out) == ['unnumbered', 'worse']
    (source / 'worse_0000.nii.gz').unlink()
    unnumbered.unlink()
    go_on(source, out, '--report')
    assert failed(out) == [] and cases(out) == [A, B]
    page = (out / 'report.html').read_text()
    assert 'Not predicted' not in page and A in page and B in page


def test_a_failure_of_another_input_folder_stays_as_long_as_its_image(source, images, tmp_path):
    out = tmp_path / 'new'
    bad = source / 'bad_0000.nii.gz'
    bad.symlink_to(tmp_path / 'nowhere')
    refusal(predict, source, out)
    go_on(images, out)
    assert failed(out) == ['bad']
    bad.unlink()
    go_on(images, out)
    assert failed(out) == []


def test_a_failure_whose_input_folder_is_not_here_stays_as_on_a_machine_with_other_mounts(tmp_path):
    there = tmp_path / 'images'
    there.mkdir()
    write_failure(tmp_path, 'elsewhere', 'is empty', ['/not/mounted/here/elsewhere_0000.nii.gz'])
    write_failure(tmp_path, 'deleted', 'is empty', [str(there / 'deleted_0000.nii.gz')])
    write_summary(tmp_path)
    assert failed(tmp_path) == ['elsewhere']


def test_a_row_that_another_process_replaces_while_the_summary_is_written_is_in_it(tmp_path, monkeypatch):
    write_failure(tmp_path, 'a', 'is empty', None)
    write, late = summary_module.write_atomically, ['is still empty']

    def interrupted(folder, contents):
        written = write(folder, contents)
        if folder == tmp_path and late:
            write_failure(tmp_path, 'a', late.pop(), None)
        return written
    monkeypatch.setattr(summary_module, 'write_atomically', interrupted)
    write_summary(tmp_path)
    assert [row['error'] for row in json.loads((tmp_path / 'pdddpm_summary.json').read_text())['failed']] == [
        'is still empty']


def test_a_report_where_an_image_is_bad_now_shows_the_others_and_hides_no_error(source, tmp_path):
    out = predict(source, tmp_path / 'new', '--report')
    mask = (out / f'{A}.nii.gz').read_bytes()
    (source / f'{A}_0000.nii.gz').write_bytes((source / f'{A}_0000.nii.gz').read_bytes()[:2000])
    said = refusal(predict, source, out, '--report')
    assert said.startswith(f'Error: 1 of 2 cases could not be predicted, the others are done: {A} (')
    page = (out / 'report.html').read_text()
    assert f'<strong>Not predicted:</strong> {A} (' in page and f'>{B}</h2>' in page and f'>{A}</h2>' not in page
    assert cases(out) == [B] and failed(out) == [A]
    assert (out / f'{A}.nii.gz').read_bytes() == mask
    said = refusal(go_on, source, out, '--report')  # its earlier mask does not make it done
    assert f'{A} (' in said and failed(out) == [A]


def test_a_report_that_cannot_be_written_does_not_hide_what_failed(source, out, monkeypatch):
    (source / 'bad_0000.nii.gz').write_bytes(b'')

    def full(*args):
        raise OSError('The disk is full')
    monkeypatch.setattr('nnunet_pdddpm.commands.predict.write_report', full)
    said = refusal(go_on, source, out, '--report')
    assert '1 of 3 cases' in said and 'bad (' in said and 'The report was not written: The disk is full' in said


def test_earlier_cases_without_what_a_report_needs_are_named_in_it(source, out, capsys):
    (source / f'{A}_0000.nii.gz').unlink()
    predict(source, out, '--report')
    shutil.copy(source / f'{B}_0000.nii.gz', source / f'{A}_0000.nii.gz')
    capsys.readouterr()
    predict(source, out, '--report', '-num_parts', '2', '-part_id', '1')  # part 0, which has A, comes later
    assert f'Not in the report: {A} (The report needs' in capsys.readouterr().err
    page = (out / 'report.html').read_text()
    assert f'Not shown:</strong> {A} (The report needs' in page and f'>{B}</h2>' in page


@pytest.mark.parametrize('first', [False, True])
def test_parts_without_cases_end_well_and_the_last_report_shows_all(source, tmp_path, first, capsys):
    out = tmp_path / 'new'
    order = (2, 3, 1, 0) if first else (0, 1, 2, 3)
    for part in order:
        predict(source, out, '--report', '-num_parts', '4', '-part_id', str(part))
        if first and part == 2:
            assert 'No report is written' in capsys.readouterr().err and cases(out) == []
    assert cases(out) == [A, B]
    page = (out / 'report.html').read_text()
    assert f'>{A}</h2>' in page and f'>{B}</h2>' in page and 'Not shown' not in page
    go_on(source, out, '--report', '-num_parts', '4', '-part_id', '3')


def test_a_bad_case_is_the_failure_of_one_part_only(source, tmp_path):
    out = tmp_path / 'new'
    (source / 'unnumbered.nii.gz').write_bytes(b'')
    said = refusal(predict, source, out, '-num_parts', '3', '-part_id', '0')
    assert '1 of 2 cases' in said and 'unnumbered' in said
    for part in (1, 2):
        predict(source, out, '-num_parts', '3', '-part_id', str(part))
    assert cases(out) == [A, B] and failed(out) == ['unnumbered']


def test_from_python_a_case_without_a_known_image_is_described_as_ever(refined, images, tmp_path):
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False, use_mirroring=False, tile_step_size=1,
                                overrides={'samples': 2})
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case([str(images / f'{A}_0000.nii.gz')], None, predictor.plans_manager,
                                                predictor.configuration_manager, predictor.dataset_json)
    item = {'data': torch.from_numpy(np.asarray(data)), 'data_properties': properties, 'ofile': str(tmp_path / A)}
    predictor.predict_from_data_iterator(iter([item]), num_processes_segmentation_export=0)
    row, = summary(tmp_path)['cases']
    assert row['image'] is None and row['mask']['bytes'] == os.path.getsize(tmp_path / f'{A}.nii.gz')
