"""`benchmarks/gpu.py`, whose real runs are rare: dry on a CPU, every stage."""
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
from nnunetv2.utilities import find_objects

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
METHODS = ('stock', 'plain', 'samples', 'of_samples')
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
    """Results and arguments of a run of every stage."""
    root = tmp_path_factory.mktemp('gpu')
    arguments = ['-o', str(root / 'gpu.json'), '-work', str(root / 'work'), '-device', 'cpu', '-scale', 'tiny',
                 '-minutes', '60', '-commit', 'abc1234', '--stages']

    def in_process(dataset, work, *command, **variables):
        with patch.dict(os.environ, nnUNet_n_proc_DA='1'):  # the planner takes it for its number of threads
            succeed_in_process(*command)
    with in_this_process():
        from nnunet import Dataset
        one = f'{gpu.TESTS}::test_nnunets_own_predictor_gives_the_blind_mask_as_on_a_cpu'
        with patch.object(Dataset, 'call', in_process), patch.object(gpu, 'TESTS', one):
            gpu.main([*arguments, *gpu.STAGES])
    return root / 'gpu.json', arguments


def test_every_cell_is_measured_into_one_small_file(dry_run):
    results, _ = dry_run
    found = json.loads(results.read_text())
    assert not {name: cell['error'] for name, cell in found.items() if 'error' in cell}
    modes = [(2, 'eager'), (3, 'eager'), (2, 'compiled'), (3, 'compiled')]
    assert found.keys() == {
        'tests', 'plan_stock', 'plan_further', *(f'hippocampus_{row}' for row in ROWS),
        *(f'speed_{classes:03d}_{mode}_{method}' for classes, mode in modes[:3] for method in METHODS),
        *(f'iterations_{classes:03d}_{mode}_{name}' for classes, mode in modes for name in ('stock', 'PDDDPM'))}
    assert results.stat().st_size < 100_000
    assert all('commit abc1234' in cell['on'] for cell in found.values())


def test_cells_hold_what_the_page_is_made_of(dry_run):
    found = json.loads(dry_run[0].read_text())
    assert found['tests']['passed'] and not found['tests']['failed']
    if not torch.cuda.is_available():
        assert found['tests']['skipped']
    speed = [cell for name, cell in found.items() if name.startswith('speed')]
    assert all(min(cell['seconds']) > 0 and cell['launches'] > 100 and len(cell['top']) == 10 for cell in speed)
    assert all(1 > cell['top'][0][1] >= cell['top'][9][1] > 0 for cell in speed)
    rows = {row: found[f'hippocampus_{row}'] for row in ROWS}
    assert all(len(cell['dice']) == len(cell['nll']) == 2 for cell in rows.values())  # test cases of the dry run
    assert len({rows[row]['iterations'] for row in ROWS[1:]}) == 1
    assert rows['second']['nll'] != rows['blind']['nll'] != rows['samples']['nll']


def test_the_page_has_every_stage_and_says_that_it_is_of_a_dry_run(dry_run, gpu, tmp_path):
    results, _ = dry_run
    page = results.with_suffix('.md').read_text()
    assert 'A dry run' in page and 'commit abc1234' in page and f'torch {torch.__version__}' in page
    assert page.count('| 2 | eager |') == page.count('| 2 | compiled |') == len(METHODS) + 2
    assert all(word in page for word in ('skipped', 'control: stock trained longer', 'PDDDPM, mean of 8 samples'))
    assert 'What failed' not in page and 'Not ' not in page
    elsewhere = tmp_path / 'brought.json'
    elsewhere.write_text(results.read_text())
    gpu.main(['-o', str(elsewhere), '--stages', 'page'])  # without a GPU
    assert (tmp_path / 'brought.md').read_text() == page


def test_what_is_measured_is_not_measured_again(dry_run, gpu):
    results, arguments = dry_run
    before = results.stat().st_mtime_ns
    with patch.object(gpu.Run, 'attempt', side_effect=AssertionError):
        gpu.main([*arguments, *gpu.STAGES])
    assert results.stat().st_mtime_ns == before


def test_what_cannot_be_measured_is_said_before_anything_is(gpu, tmp_path, monkeypatch):
    arguments = ['-o', str(tmp_path / 'gpu.json'), '-work', str(tmp_path / 'work'), '-device', 'cpu', '-scale', 'tiny']
    with pytest.raises(SystemExit, match='holds no prepared Dataset004_Hippocampus: .* add the stage prepare'):
        gpu.main([*arguments, '--stages', 'tests', 'hippocampus'])

    def fails(name):
        raise ImportError("cannot import name 'a' from 'timm.layers'")
    monkeypatch.setattr(find_objects, 'recursive_find_trainer_class_by_name', fails)
    with pytest.raises(SystemExit, match="cannot be imported .*cannot import name 'a' from 'timm.layers'"):
        gpu.main([*arguments, '--stages', 'tests'])
    assert not list(tmp_path.iterdir())


def make_run(gpu, folder, left=60.0):
    return gpu.Run(folder / 'gpu.json', folder, None, torch.device('cpu'), True, 'a machine', time.monotonic() + left)


def test_a_cell_that_fails_or_hangs_is_on_the_page_and_the_next_one_goes_on(gpu, tmp_path):
    run = make_run(gpu, tmp_path)

    def broken():
        assert 'the process ended in it' in (tmp_path / 'gpu.json').read_text()  # if it were killed
        raise RuntimeError('CUDA error:\nno kernel image')

    def leaves():
        sys.exit('Say where the data are.')
    run.cell('speed_002_eager_stock', 10, broken)
    run.cell('speed_002_eager_plain', 10, leaves)
    run.cell('speed_002_eager_samples', 0.2, lambda: time.sleep(20))
    run.cell('speed_025_eager_stock', 10, lambda: {'seconds': [0.5, 1.5], 'first': 2.0, 'GiB': 3.0, 'launches': 7})
    run.cell('speed_025_eager_plain', 10, lambda: {'seconds': [2.0], 'first': 2.0, 'GiB': 6.0, 'error': 'no profile'})
    run.cell('speed_002_eager_stock', 10, lambda: pytest.fail('it is there'))
    gpu.main(['-o', str(tmp_path / 'gpu.json'), '--stages', 'page'])
    page = (tmp_path / 'gpu.md').read_text()
    for line in ('speed_002_eager_stock: RuntimeError: CUDA error: no kernel image',
                 'speed_002_eager_plain: SystemExit: Say where the data are.',
                 'speed_002_eager_samples: TimeoutError: not done within 0 s', 'speed_025_eager_plain: no profile'):
        assert f'- {line}\n' in page
    assert '| 1.0000 (0.5000 to 1.5000) | 1.00 | 3.00 | 1.00 | 2.0 | 7 |' in page
    assert '| 2.0000 (2.0000 to 2.0000) | 2.00 | 6.00 | 2.00 | 2.0 |  |' in page


def test_a_cell_is_begun_while_there_is_time_for_most_of_it(gpu, tmp_path):
    make_run(gpu, tmp_path, left=15).cell('later', 10, lambda: pytest.fail('there is no time'))
    assert not list(tmp_path.iterdir())
    run = make_run(gpu, tmp_path, left=25)
    run.cell('last', 90, lambda: {'seconds': [1.0]})
    assert run.cells['last']['seconds'] == [1.0]


def test_tests_that_are_interrupted_have_counted_until_then(gpu, tmp_path, monkeypatch):
    file = tmp_path / 'test_slow.py'
    file.write_text('import os, signal\n\ndef test_first():\n    pass\n\n'
                    'def test_second():\n    os.kill(os.getpid(), signal.SIGINT)\n')
    monkeypatch.setattr(gpu, 'TESTS', file)
    run = make_run(gpu, tmp_path)
    gpu.suite(run)
    assert run.cells['tests']['passed'] == ['test_slow::test_first']
    assert 'pytest ended with 2' in run.cells['tests']['error']
    gpu.main(['-o', str(run.file), '--stages', 'page'])
    assert '1 passed, 0 failed, 0 skipped.' in (tmp_path / 'gpu.md').read_text()


def test_without_a_gpu_it_says_how_to_run_dry(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='-device cpu -scale tiny'):
        gpu.main(['-o', str(tmp_path / 'gpu.json')])
    with pytest.raises(SystemExit, match='gpu.json is not there'):
        gpu.main(['-o', str(tmp_path / 'gpu.json'), '--stages', 'page'])
    assert not list(tmp_path.iterdir())
