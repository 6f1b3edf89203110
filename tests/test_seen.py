"""What a model was trained on is compared with the split in force: what the stock model left, and its own note."""
from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BRIEF, DATASET, DATASET_ID, PLANS, Workspace, make_trainer
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.commands.tune import main as tune
from nnunet_pdddpm.network.checkpoint import CheckpointError, load_checkpoint
from nnunet_pdddpm.network.seen import Seen, split_overlap, stored_seen
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers, from_numbers
from nnunet_pdddpm.training.held_out import held_out_cases
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.tuning.cases import ValidationCases, exclude_seen_cases
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.stored import store

ENDING = '.nii.gz'
VALIDATION = ['phantom_000', 'phantom_003', 'phantom_006']  # of fold 0


def write_log(fold: Path, day: str, cases: list[str], *, size: int | None = None, trained: bool = True,
              split: str = 'This split') -> None:
    """A log as nnU-Net writes it, of a training and the validation after it, or of a validation alone."""
    said = ['Epoch 0', 'train_loss 0.5', 'Training done.'] if trained else []
    said += [f'{split} has 6 training and {len(cases) if size is None else size} validation cases.']
    said += [line for case in cases for line in (f'predicting {case}', f'{case}, shape torch.Size([1, 20, 26, 22])')]
    fold.mkdir(parents=True, exist_ok=True)
    (fold / f'training_log_{day}_11_09_01.txt').write_text(''.join(f'2020-10-01 11:09:01.7366: {of} \n' for of in said))


def write_summary(fold: Path, cases: list[str], folder: str = '/there/') -> None:
    """validation/summary.json as nnU-Net writes it."""
    (fold / 'validation').mkdir(parents=True, exist_ok=True)
    rows = [{'metrics': {}, 'prediction_file': f'{folder}{case}{ENDING}'} for case in cases]
    (fold / 'validation' / 'summary.json').write_text(json.dumps({'metric_per_case': rows}))


# what the stock model left ------------------------------------------------------------------------------------------


def test_a_training_held_out_what_it_validated_on_at_its_end(tmp_path):
    assert held_out_cases(tmp_path, ENDING) is None
    write_log(tmp_path, '2026_9_30', ['a', 'b b'])
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b b'}
    write_log(tmp_path, '2026_10_1', ['c'])  # trained again, by another split; months have one digit or two
    assert held_out_cases(tmp_path, ENDING) == {'c'}


def test_a_later_validation_by_another_split_does_not_change_what_was_held_out(tmp_path):
    write_log(tmp_path, '2026_10_1', ['a', 'b'])
    write_log(tmp_path, '2026_10_2', ['c', 'd'], trained=False)
    write_summary(tmp_path, ['a', 'b', 'c', 'd'])
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}


def test_without_a_log_the_summary_of_the_validation_tells_it(tmp_path):
    write_summary(tmp_path, ['a', 'b'])
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}
    write_log(tmp_path, '2026_10_1', ['a'], size=2)  # several GPUs: the log is of one of them
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}


def test_a_summary_that_was_written_on_windows_is_read(tmp_path):
    write_summary(tmp_path, ['a', 'b'], 'C:\\nnUNet_results\\validation\\')
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}


@pytest.mark.parametrize('split', ['This split', 'This random 80:20 split'])
def test_a_part_of_a_validation_is_not_taken_for_all_of_it(tmp_path, split):
    write_log(tmp_path, '2020_10_1', ['a'], size=2, split=split)  # several GPUs, or cut off
    assert held_out_cases(tmp_path, ENDING) is None
    write_summary(tmp_path, ['a', 'b'])
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}
    write_summary(tmp_path, ['b', 'c'])  # of another split
    assert held_out_cases(tmp_path, ENDING) is None


def test_a_log_that_does_not_say_how_many_cases_a_split_has_is_not_complete(tmp_path):
    write_log(tmp_path, '2020_10_1', ['a'], split='The split of my own trainer')
    assert held_out_cases(tmp_path, ENDING) is None
    write_summary(tmp_path, ['a', 'b'])
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}


def test_the_summary_of_an_earlier_training_is_not_taken_for_the_last_ones(tmp_path):
    write_summary(tmp_path, ['a', 'b'])
    write_log(tmp_path, '2020_10_1', [], size=2)  # killed before it validated
    summary, ended = tmp_path / 'validation' / 'summary.json', datetime(2020, 10, 1, 11, 9, 1).timestamp()
    os.utime(summary, (ended - 5, ended - 5))
    assert held_out_cases(tmp_path, ENDING) is None
    os.utime(summary, (ended + 5, ended + 5))
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}


def test_a_log_of_another_time_zone_does_not_hide_the_summary_of_its_validation(tmp_path):
    """Trained in Tokyo, read in New York: the log's clock is 13 hours ahead."""
    write_summary(tmp_path, ['a', 'b'])
    write_log(tmp_path, '2020_10_1', ['a'], size=2)
    summary, checkpoint = tmp_path / 'validation' / 'summary.json', tmp_path / 'checkpoint_final.pth'
    checkpoint.touch()
    ended = datetime(2020, 10, 1, 11, 9, 1).timestamp() - 13 * 3600
    os.utime(checkpoint, (ended, ended))
    os.utime(summary, (ended + 60, ended + 60))
    assert held_out_cases(tmp_path, ENDING) == {'a', 'b'}
    os.utime(summary, (ended - 60, ended - 60))
    assert held_out_cases(tmp_path, ENDING) is None


@pytest.mark.parametrize('summary', ['{', '{}', '[]', '{"metric_per_case": [{}]}', '{"metric_per_case": []}'])
def test_what_tells_nothing_is_not_known(tmp_path, summary):
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation' / 'summary.json').write_text(summary)
    assert held_out_cases(tmp_path, ENDING) is None
    write_summary(tmp_path, ['a', 'b', 'c'])
    write_log(tmp_path, '2026_10_1', ['a'], size=2)  # the folder holds masks of an earlier split, too
    assert held_out_cases(tmp_path, ENDING) is None


def test_cases_that_were_trained_on_are_counted_and_named():
    seen = Seen.from_names(['a', 'b'], ['x', 'y', 'z'])
    assert seen.leaks(['x', 'y']) == '' and seen.unknown() == ''
    assert Seen.from_names(['a', 'b'], ['a', 'x']).leaks(['x', 'a']) == (
        'the model was trained on 1 of 2 validation cases (a)')
    assert '4 of 5 validation cases (l, m, n, …) are not among' in seen.leaks(['m', 'x', 'l', 'n', 'o'])
    assert 'trained on 1 of' in seen.with_training_cases(['x']).leaks(['x', 'y'])
    of_both = '1 of 2 validation cases (a)'
    assert seen.leaks(['a', 'x']).startswith(f'the model was trained on {of_both}, and {of_both} are not among')
    assert Seen().leaks(['a']) == '' and '-pretrained_weights' in Seen().unknown()
    assert 'no complete validation' in Seen.from_names(['a'], None).unknown()
    assert 'patient' not in str(Seen.from_names(['patient'], ['patient']))  # no name leaves with a model


def test_what_a_split_trains_and_validates_on_alike_is_on_purpose():
    seen = Seen.from_names(['a', 'b', 'c'], ['a', 'b', 'x'])
    assert seen.leaks(['a', 'b', 'x'], ['a', 'b', 'c']) == ''
    assert 'trained on 1 of 2 validation cases (a)' in seen.leaks(['a', 'x'], ['b', 'c'])
    assert 'stock model' in seen.leaks(['c', 'x'], ['c'])
    assert split_overlap(['a', 'x'], ['b']) == ''
    assert split_overlap(['a', 'x'], ['b', 'a']) == (
        'by splits_final.json 1 of 2 validation cases (a) are training cases as well')


def measured_on(names: list[str], training: list[str], seen: Seen) -> tuple[list[str], list[str]]:
    """The cases that are left to measure on, and what is said of the others."""
    cases, said = object.__new__(ValidationCases), []  # of which nothing else is read
    cases.names, cases.training, cases.raters = list(names), training, None
    weights: OrderedDict[str, torch.Tensor] = OrderedDict()
    weights._metadata = {'': {key: None if of is None else sorted(of) for key, of in (
        ('trained_on', seen.trained_on), ('stock_held_out', seen.stock_held_out))}}
    exclude_seen_cases(cases, weights, said.append)
    return cases.names, said


MANY = ['f', 'e', 'd', 'c', 'b', 'a', 'new']


@pytest.mark.parametrize(('seen', 'training', 'clause'), [
    (Seen.from_names(['x'], 'abcdef'), ['x'],
     'By the present splits_final.json 1 of 7 validation cases (new) are not among the cases that its stock model'),
    (Seen.from_names(['x', 'new'], [*'abcdef', 'new']), ['x'],
     'By the present splits_final.json the model was trained on 1 of 7 validation cases (new)'),
    (Seen.from_names(['x', 'new'], [*'abcdef', 'new']), ['x', 'new'],
     'By splits_final.json 1 of 7 validation cases (new) are training cases as well')])
def test_cases_that_a_model_may_have_seen_are_told_and_left_out_while_enough_remain(seen, training, clause):
    left, said = measured_on(MANY, training, seen)
    assert left == MANY[:6]
    line, = said
    assert line.startswith(f'WARNING: {clause}') and line.endswith(
        'Nothing is measured on them here, but on the 6 others.')
    assert measured_on(MANY[:6], ['x'], seen) == (MANY[:6], [])


@pytest.mark.parametrize(('held_out', 'names', 'left'), [
    ('abcd', MANY, 4), ('', MANY, 0), ('abcdef', ['a', 'b', 'new'], 2), ('abcdef', ['new'], 0)])
def test_where_too_few_cases_remain_nothing_is_measured(held_out, names, left):
    with pytest.raises(TuningError, match=f'nothing can be measured on them, and {left} others are too few') as refused:
        measured_on(names, ['x'], Seen.from_names(['x'], held_out))
    assert f'{len(names) - left} of {len(names)} validation cases' in str(refused.value)
    assert 'Put back the splits_final.json' in str(refused.value)


def test_what_is_not_known_is_told_and_leaves_out_nothing():
    assert measured_on(MANY, ['x'], Seen())[0] == MANY
    left, said = measured_on(MANY, ['x'], Seen.from_names(['x'], None))
    assert left == MANY and 'It is not known which cases the stock model was trained on' in said[0]


# training, validation and tuning ------------------------------------------------------------------------------------


@pytest.fixture
def fold(scratch_results: Path) -> Path:
    """Folder of fold 0 of the model that is to be trained; the stock models are there."""
    return scratch_results / DATASET / f'{BRIEF}__{PLANS}__3d_fullres' / 'fold_0'


@pytest.fixture
def stock_fold(stock: Workspace, scratch_results: Path) -> Path:
    """Folder of fold 0 of the stock model, with what its validation leaves."""
    folder, = scratch_results.glob(f'{DATASET}/nnUNetTrainer*/fold_0')
    write_summary(folder, VALIDATION)
    return folder


@pytest.fixture
def split(stock: Workspace, tmp_path: Path) -> Iterator[Path]:
    """The file of the split, put back afterwards."""
    file = stock.preprocessed / 'splits_final.json'
    shutil.copy(file, tmp_path / 'split')
    yield file
    shutil.copy(tmp_path / 'split', file)


def exchange_folds(split: Path) -> None:
    """What was fold 1 is fold 0 now."""
    folds = json.loads(split.read_text())
    split.write_text(json.dumps([folds[1], folds[0], folds[2]]))


def log_of(fold: Path) -> str:
    return ''.join(file.read_text() for file in sorted(fold.glob('training_log*')))


def refused(*flags: str) -> str:
    """What `nnUNetv2_pdddpm_tune` says when it refuses."""
    with pytest.raises(SystemExit) as exit_:
        tune([str(DATASET_ID), '3d_fullres', '0', '-tr', BRIEF, '-p', PLANS, '-device', 'cpu', *flags])
    assert str(exit_.value).startswith('Error: ') and '\n' not in str(exit_.value)
    return str(exit_.value)


def test_a_stock_model_that_was_trained_on_the_validation_cases_is_refused(stock_fold, fold, split):
    exchange_folds(split)
    with pytest.raises(CheckpointError, match=r'3 of 3 validation cases \(phantom_001, .* are not among') as error:
        make_trainer(BRIEF, 0).run_training()
    assert 'Put back' in str(error.value) and '\n' not in str(error.value)
    assert not list(fold.glob('checkpoint*'))


def test_a_stock_model_whose_validation_lacks_is_told_in_words(scratch_results, fold):
    make_trainer(BRIEF, 0).run_training()
    assert 'It is not known which cases the stock model was trained on' in log_of(fold)
    seen = stored_seen(load_checkpoint(fold / 'checkpoint_final.pth')['network_weights'])
    assert seen.stock_held_out is None and seen.leaks(['phantom_001']).startswith('the model was trained on')


def test_what_was_trained_on_is_noted_and_a_changed_split_refused_ever_after(stock_fold, fold, split, monkeypatch):
    make_trainer(BRIEF, 0).run_training()
    assert 'It is not known' not in log_of(fold)
    training = json.loads(split.read_text())[0]['train']
    final = fold / 'checkpoint_final.pth'
    seen = Seen.from_names(training, VALIDATION)
    assert stored_seen(load_checkpoint(final)['network_weights']) == seen
    store(fold, SamplingSettings(steps=2))  # tuned
    assert stored_seen(load_checkpoint(final)['network_weights']) == seen

    exchange_folds(split)
    before = final.read_bytes()
    said = refused()
    assert 'By the present splits_final.json the model was trained on 3 of 3 validation cases (phantom_001' in said
    assert 'Put back the splits_final.json' in said and final.read_bytes() == before

    trainer = make_trainer(BRIEF, 0)  # --c
    trainer.load_checkpoint(str(final))
    assert trainer.refiner.seen == seen
    with pytest.raises(CheckpointError, match='the model was trained on 3 of 3'):
        trainer.on_train_start()

    monkeypatch.setattr(nnUNetTrainer, 'perform_actual_validation', lambda self, save_probabilities=False: None)
    trainer.perform_actual_validation()  # --val
    said = log_of(fold)
    assert 'WARNING: by the present splits_final.json the model was trained on 3 of 3' in said
    assert 'The intervals of volumes are not calibrated: By the present splits_final.json the model' in said
    assert final.read_bytes() == before


def test_a_split_that_trains_on_its_validation_cases_is_told_gone_on_with_and_not_tuned(stock_fold, fold, split):
    folds = json.loads(split.read_text())
    folds[0]['train'] = sorted(folds[0]['train'] + folds[0]['val'])
    split.write_text(json.dumps(folds))
    make_trainer(BRIEF, 0).run_training()
    said = f'y splits_final.json 3 of 3 validation cases ({", ".join(VALIDATION)}) are training cases as well'
    assert f'WARNING: b{said}' in log_of(fold)
    trainer = make_trainer(BRIEF, 0)  # --c
    trainer.load_checkpoint(str(fold / 'checkpoint_final.pth'))
    trainer.run_training()
    assert refused().startswith(f'Error: B{said}: nothing can be measured on them, and 0 others are too few.')


def test_cases_that_were_added_since_the_stock_training_are_told_and_the_others_measured(stock_fold, fold, split):
    folds = json.loads(split.read_text())
    train, val = folds[0]['train'][3:], folds[0]['train'][:3] + folds[0]['val']
    split.write_text(json.dumps([{'train': train, 'val': val}, *folds[1:]]))
    new = val[0]
    write_summary(stock_fold, val[1:])
    make_trainer(BRIEF, 0).run_training()
    said = f'y the present splits_final.json 1 of 6 validation cases ({new}) are not among the cases that its stock'
    assert f'WARNING: b{said}' in log_of(fold)
    assert 'too short to tune' in refused('-budget', '0.0001')  # it is not refused
    assert f'WARNING: B{said}' in log_of(fold) and 'but on the 5 others.' in log_of(fold)
    write_summary(stock_fold, val[2:])  # one fewer is too few
    with pytest.raises(CheckpointError, match='2 of 6 validation cases'):
        make_trainer(BRIEF, 0).run_training()


def test_a_model_without_a_note_of_its_cases_is_tuned_and_what_is_not_known_is_told(stock_fold, fold):
    make_trainer(BRIEF, 0).run_training()
    final = fold / 'checkpoint_final.pth'
    checkpoint = torch.load(final, weights_only=False)
    for key in ('trained_on', 'stock_held_out'):
        del checkpoint['network_weights']._metadata[''][key]
    torch.save(checkpoint, final)
    assert 'too short to tune' in refused('-budget', '0.0001')
    assert 'It is not known which cases this model was trained on' in log_of(fold)


def test_a_model_that_began_with_other_weights_says_that_its_cases_are_not_known(stock_fold, fold):
    make_trainer(BRIEF, 1).run_training()
    trainer = make_trainer(BRIEF, 0)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(fold.parent / 'fold_1' / 'checkpoint_final.pth'))
    trainer.run_training()
    assert 'which cases this model was trained on: it began with -pretrained_weights' in log_of(fold)
    weights = torch.load(fold / 'checkpoint_final.pth', weights_only=False)['network_weights']
    assert stored_seen(weights).trained_on is None


def test_what_an_earlier_training_left_in_the_folder_is_told(stock_fold, fold, monkeypatch):
    said = 'checkpoint_final.pth is of an earlier training: until this one ends, predictions are made with it'
    make_trainer(BRIEF, 0).run_training()
    assert said not in log_of(fold)
    trainer = make_trainer(BRIEF, 0)  # --c of what is finished
    trainer.load_checkpoint(str(fold / 'checkpoint_final.pth'))
    trainer.run_training()
    assert said not in log_of(fold)
    make_trainer(BRIEF, 0).run_training()
    assert said in log_of(fold)

    monkeypatch.setattr(nnUNetTrainer, 'perform_actual_validation', lambda self, save_probabilities=False: None)
    (fold / 'validation').mkdir()
    masks = [fold / 'validation' / f'{case}{ENDING}' for case in (VALIDATION[0], 'phantom_001')]
    for mask in masks:
        mask.touch()
    trainer.perform_actual_validation()
    assert 'validation holds 1 masks of cases that this split does not validate on (phantom_001.nii.gz)' in log_of(fold)


@pytest.mark.parametrize(('content', 'tuned'), [
    (json.dumps({'chosen': asdict(SamplingSettings(steps=2, temperature=1.234))}), True),
    (json.dumps({'chosen': asdict(SamplingSettings(steps=3, temperature=1.234))}), False),
    ('{"chosen": {}}', False), ('{}', False), ('[]', False), ('', False), (None, False)])
def test_a_sweep_of_another_model_is_not_taken_for_this_ones(tmp_path, content, tuned):
    if content is not None:
        (tmp_path / 'sampling_sweep.json').write_text(content)
    stored = from_numbers({name: torch.tensor(value).item() for name, value in as_numbers(
        SamplingSettings(steps=2, temperature=1.234)).items()})
    trainer = SimpleNamespace(output_folder=str(tmp_path), refiner=SimpleNamespace(settings=stored))
    assert PDDDPMTrainer._is_tuned(trainer) == tuned
