"""Kills, full and read-only disks, too little memory, at any moment of training, tuning, prediction and report.

What is then there under a final name is whole, and is what was there before or what an uninterrupted run writes. Gone
on with, a run ends as the uninterrupted one does.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import pytest
from jobs import Job, Prediction, Report, Training, Tuning
from processes import Run, limited, memory, own_disk

from nnunet_pdddpm.inference.predictor import PDDDPMPredictor

pytestmark = pytest.mark.slow

MOMENTS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Shares of what an uninterrupted run takes of time, disk or memory."""


@pytest.fixture(scope='module', params=[Training, Tuning, Prediction, Report], ids=lambda job: job.__name__.lower())
def job(request, refined, tmp_path_factory) -> Job:
    return request.param(refined, tmp_path_factory.mktemp('job'))


@pytest.fixture(scope='module')
def prediction(refined, tmp_path_factory) -> Prediction:
    return Prediction(refined, tmp_path_factory.mktemp('prediction'))


def assert_nothing_lost(job: Job) -> None:
    """Neither by the fault nor when the run is gone on with."""
    for name, content in job.contents().items():
        assert content in (job.before.get(name), job.expected[name]), name
    job.start(*job.flags_to_go_on).succeed()
    found = job.contents()
    assert found.keys() == job.expected.keys()
    assert [name for name in found if found[name] != job.expected[name]] == []
    assert not [left for left in job.folder.glob('.*') if left.is_dir()]


def assert_told(job: Job, run: Run) -> None:
    """In one sentence, which for nnU-Net's own command is at the end of a traceback."""
    assert run.end() > 0, run.said[-4000:]
    assert run.said.strip().splitlines()[-1].startswith('Error: ') or isinstance(job, Training), run.said[-4000:]


def kill(run: Run, how: str, when: Callable[[], bool], after: float = 0) -> None:
    """By the name of a process's method, some seconds after something is so."""
    while run.is_alive() and not when():
        time.sleep(0.002)
    time.sleep(after)
    getattr(run, how)()
    run.end()


@pytest.mark.parametrize(('share', 'how'), [(share, ('kill', 'terminate')[i % 2]) for i, share in enumerate(MOMENTS)])
def test_killed_at_any_moment(job, share, how):
    job.prepare()
    moment = time.monotonic() + share * job.seconds
    kill(job.start(), how, lambda: time.monotonic() > moment)
    assert_nothing_lost(job)


@pytest.mark.parametrize(('seconds', 'how'), [(0, 'kill'), (0.01, 'terminate'), (0.05, 'kill')])
def test_killed_while_it_writes(job, seconds, how):
    job.prepare()
    kill(job.start(), how, lambda: any(job.folder.rglob('*.partial')), seconds)
    assert_nothing_lost(job)


@pytest.mark.parametrize('share', MOMENTS)
def test_a_disk_that_fills_up(job, share):
    with own_disk(job.folder) as remount:
        job.prepare()
        remount(f'size={int(shutil.disk_usage(job.folder).used + share * job.bytes)}')
        assert_told(job, job.start())
        remount('size=1g')
        assert_nothing_lost(job)


def test_a_read_only_disk_keeps_what_is_there(job):
    with own_disk(job.folder) as remount:
        job.prepare()
        job.start().succeed()
        remount('ro')
        assert_told(job, job.start())
        assert job.contents() == job.expected


@pytest.mark.parametrize('share', MOMENTS)
def test_an_address_space_that_ends(job, share):
    job.prepare()
    Run(limited(job.run, int(share * job.memory)), job.log).end()
    assert_nothing_lost(job)


@pytest.mark.parametrize('share', MOMENTS)
def test_two_predictions_into_one_folder(prediction, share):
    prediction.prepare()
    first = prediction.start()
    time.sleep(share * prediction.seconds)
    Run(prediction.run, prediction.log.with_name('second.txt')).end()
    first.end()
    assert_nothing_lost(prediction)


def test_two_hundred_cases_take_no_more_memory_than_fifty(prediction, tmp_path, monkeypatch):
    images, predict_volume = sorted(prediction.images.iterdir()), PDDDPMPredictor.predict_volume
    for i in range(200):
        (tmp_path / f'case{i:03d}_0000.nii.gz').symlink_to(images[i % len(images)])

    def measured(*args):
        with (tmp_path / 'memory.txt').open('a') as file:
            file.write(f'{memory("VmRSS")}\n')
        return predict_volume(*args)
    monkeypatch.setattr(PDDDPMPredictor, 'predict_volume', measured)
    monkeypatch.setattr(prediction, 'images', tmp_path)
    prediction.prepare()
    prediction.start().succeed()
    assert len(list(prediction.folder.glob('*.nii.gz'))) == 200
    in_use = [int(line) for line in (tmp_path / 'memory.txt').read_text().split()]
    assert in_use[-1] < 1.05 * in_use[49]
