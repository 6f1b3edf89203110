"""`benchmarks/gpu.py`, whose first real run is on a machine that is lent for minutes: dry on a CPU, every stage."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import in_this_process, succeed_in_process

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
WAYS = ('stock', 'plain', 'samples', 'of_samples')
ROWS = ('stock', 'longer', 'second', 'blind', 'samples')


@pytest.fixture(scope='module')
def gpu():
    """The benchmark's module; the path and the environment are put back afterwards."""
    before = list(sys.path)
    with patch.dict(os.environ):
        os.environ.pop('BENCHMARK_DEVICE', None)
        sys.path.insert(0, str(BENCHMARKS))
        import gpu
        yield gpu
    sys.path[:] = before


@pytest.fixture(scope='module')
def dry_run(gpu, tmp_path_factory):
    """Called twice, first without time for a second epoch: results, work folder, arguments, what the first one left."""
    root = tmp_path_factory.mktemp('gpu')
    arguments = ['-o', str(root / 'results'), '-work', str(root / 'work'), '-device', 'cpu', '-scale', 'tiny',
                 '-minutes', '60', '-commit', 'abc1234', '--stages']

    def in_process(work, *command, **variables):
        with patch.dict(os.environ, nnUNet_n_proc_DA='1'):  # the planner takes it for its number of threads
            succeed_in_process(*command)
    with in_this_process():
        gpu.main([*arguments, 'page', 'tests'])  # the others import nnU-Net's folders
        import gpu_stages
        import hippocampus
        make_trainer = gpu_stages.make_trainer

        def hurried(*args):
            trainer = make_trainer(*args)
            trainer.deadline = time.monotonic()
            return trainer
        with patch.object(hippocampus, 'call', in_process):
            with patch.object(gpu_stages, 'make_trainer', hurried):
                gpu.main([*arguments, 'hippocampus'])
            left = (sorted(file.name for file in (root / 'results').iterdir()),
                    [file.name for file in fold(root / 'work').glob('*.pth')], time.time())
            gpu.main([*arguments, *gpu.STAGES])
    return root / 'results', root / 'work', arguments, left


def fold(work):
    """Folder of the stock model that is trained."""
    return work / 'nnUNet_results/Dataset004_Hippocampus/nnUNetTrainerGPU__nnUNetPlansReduced__3d_fullres/fold_0'


def cells(results):
    return {file.stem: json.loads(file.read_text()) for file in results.glob('*.json')}


def test_every_cell_is_measured_into_a_small_file_of_its_own(dry_run):
    results, *_ = dry_run
    found = cells(results)
    assert not {name: cell['error'] for name, cell in found.items() if 'error' in cell}
    training, = {name.split('_')[1] for name in found if name.startswith('hippocampus')}
    modes = [(2, 'eager'), (3, 'eager'), (2, 'compiled'), (3, 'compiled')]
    assert found.keys() == {
        'tests', *(f'hippocampus_{training}_{row}' for row in ROWS),
        *(f'speed_{classes:03d}_{mode}_{way}' for classes, mode in modes[:3] for way in WAYS),
        *(f'iterations_{classes:03d}_{mode}_{name}' for classes, mode in modes for name in ('stock', 'PDDDPM'))}
    assert all(file.stat().st_size < 8000 for file in results.iterdir())
    assert all('commit abc1234' in cell['on'] for cell in found.values())


def test_cells_hold_what_the_page_is_made_of(dry_run):
    found = cells(dry_run[0])
    if not torch.cuda.is_available():
        assert found['tests']['skipped'] and not found['tests']['passed'] and not found['tests']['failed']
    speed = [cell for name, cell in found.items() if name.startswith('speed')]
    assert all(min(cell['seconds']) > 0 and cell['launches'] > 100 and len(cell['top']) == 10 for cell in speed)
    assert all(1 > cell['top'][0][1] >= cell['top'][9][1] > 0 for cell in speed)
    rows = {name.split('_')[2]: cell for name, cell in found.items() if name.startswith('hippocampus')}
    assert all(len(cell['dice']) == len(cell['nll']) == 2 for cell in rows.values())  # test cases of the dry run
    assert len({rows[row]['iterations'] for row in ROWS[1:]}) == 1
    assert rows['second']['nll'] != rows['blind']['nll'] != rows['samples']['nll']


def test_a_training_that_finds_no_time_goes_on_from_its_checkpoint(dry_run):
    _, work, _, (files, checkpoints, then) = dry_run
    assert files == ['gpu.md', 'tests.json'] and checkpoints == ['checkpoint_latest.pth']
    final, = fold(work).glob('*.pth')
    assert final.name == 'checkpoint_final.pth'
    first, second = torch.load(final, weights_only=False)['logging']['epoch_end_timestamps']
    assert first < then < second


def test_the_page_has_every_stage_and_says_that_it_is_of_a_dry_run(dry_run, gpu, tmp_path):
    results, *_ = dry_run
    page = (results / 'gpu.md').read_text()
    assert 'A dry run' in page and 'commit abc1234' in page and f'torch {torch.__version__}' in page
    assert page.count('| 2 | eager |') == page.count('| 2 | compiled |') == len(WAYS) + 2
    assert all(word in page for word in ('skipped', 'control: stock trained longer', 'PDDDPM, mean of 8 samples'))
    assert 'What failed' not in page and 'Not ' not in page
    gpu.main(['-o', str(results), '-table', str(tmp_path / 'deep' / 'page.md'), '--stages', 'page'])  # without a GPU
    assert (tmp_path / 'deep' / 'page.md').read_text() == page


def test_what_is_measured_is_not_measured_again(dry_run, gpu):
    results, _, arguments, _ = dry_run
    before = {file: file.stat().st_mtime_ns for file in results.glob('*.json')}
    with patch.object(gpu.Run, 'attempt', side_effect=AssertionError):
        gpu.main([*arguments, *gpu.STAGES])
    assert {file: file.stat().st_mtime_ns for file in results.glob('*.json')} == before


def make_run(gpu, folder, left=60.0):
    return gpu.Run(folder, folder, None, torch.device('cpu'), True, 'a machine', time.monotonic() + left)


def test_a_cell_that_fails_or_hangs_is_on_the_page_and_the_next_one_goes_on(gpu, tmp_path):
    run = make_run(gpu, tmp_path)

    def broken():
        assert 'the process ended in it' in (tmp_path / 'speed_002_eager_stock.json').read_text()  # if it were killed
        raise RuntimeError('CUDA error:\nno kernel image')

    def leaves():
        sys.exit('Say where the data are.')
    run.cell('speed_002_eager_stock', 10, broken)
    run.cell('speed_002_eager_plain', 10, leaves)
    run.cell('speed_002_eager_samples', 0.2, lambda: time.sleep(20))
    run.cell('speed_025_eager_stock', 10, lambda: {'seconds': [0.5, 1.5], 'first': 2.0, 'GiB': 3.0, 'launches': 7})
    run.cell('speed_025_eager_plain', 10, lambda: {'seconds': [2.0], 'first': 2.0, 'GiB': 6.0, 'error': 'no profile'})
    run.cell('speed_002_eager_stock', 10, lambda: pytest.fail('it is there'))
    gpu.main(['-o', str(tmp_path), '-scale', 'tiny', '--stages', 'page'])
    page = (tmp_path / 'gpu.md').read_text()
    for line in ('speed_002_eager_stock: RuntimeError: CUDA error: no kernel image',
                 'speed_002_eager_plain: SystemExit: Say where the data are.',
                 'speed_002_eager_samples: TimeoutError: not done within 0 s', 'speed_025_eager_plain: no profile'):
        assert f'- {line}\n' in page
    assert '| 1.0000 (0.5000 to 1.5000) | 1.00 | 3.00 | 1.00 | 2.0 | 7 |' in page
    assert '| 2.0000 (2.0000 to 2.0000) | 2.00 | 6.00 | 2.00 | 2.0 |  |' in page


def test_a_cell_is_not_begun_where_its_limit_does_not_fit(gpu, tmp_path):
    run = make_run(gpu, tmp_path, left=5)
    run.cell('later', 10, lambda: pytest.fail('there is no time'))
    run.cell('stopped', 10, lambda: None, resumed=True)
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_how_to_run_dry(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='-device cpu -scale tiny'):
        gpu.main(['-o', str(tmp_path / 'results')])
    with pytest.raises(SystemExit, match='holds no results'):
        gpu.main(['-o', str(tmp_path), '--stages', 'page'])
    assert not list(tmp_path.iterdir())
