"""Faults on purpose: kills, a full disk, folders that go away, too little memory; and what is lost by them.

Phantoms by default, real data with -data. A killed or stopped run must leave no torn file under a final name, going on
(`--c`, `--continue_prediction`, tuning once more) must finish, and what is there in the end must equal the
uninterrupted run's. Needs Linux; the full and the read-only disk are small tmpfs mounts, for which one has to be root.
Ends with an error if any file was torn or differs, or a run could not be gone on with.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faults_runs as runs
from faults_runs import Workspace

KILLS = (signal.SIGKILL, signal.SIGTERM)
MIB = 2 ** 20


@dataclass
class Outcome:
    """What came of one kind of fault."""
    injected: int = 0
    finished: int = 0
    """Runs that finished when they were gone on with."""
    compared: int = 0
    """Files, or weights of a network, compared with the uninterrupted run's."""
    differences: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    """How the runs ended at the fault."""
    note: str = ''
    words: list[str] = field(default_factory=list)
    """The last of what the runs said that the fault ended."""

    def count(self, end: str, ended: runs.Ended | None = None) -> None:
        """A fault was injected, and its run ended in this way."""
        self.injected += 1
        self.ends[end] += 1
        if ended is not None and ended.status:
            self.words.append(ended.said[-3000:])

    @property
    def good(self) -> bool:
        """Whether nothing was lost."""
        return not (self.differences or self.torn) and self.finished == self.injected


def end_of(ended: runs.Ended) -> str:
    """In a word how a run ended."""
    if ended.status < 0:
        return f'signal {-ended.status}'
    if ended.status == 0:
        return 'finished'
    if not ended.last:
        return 'without words'
    return 'one sentence' if ended.last.startswith('Error: ') else f'{ended.last.split(":")[0][-40:]}'


class Faults:
    """One workspace, its uninterrupted runs, and the faults."""

    def __init__(self, space: Workspace, repeats: int, seed: int) -> None:
        self.space, self.repeats, self.random = space, repeats, random.Random(seed)
        self.log = space.root / 'run.log'
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.model, self.tuned = space.results('reference'), space.root / 'runs' / 'tuned'
        self.output = space.root / 'runs' / 'predicted'
        shutil.rmtree(self.output, ignore_errors=True)
        self.measure('training', space.train(self.model))
        self.measure('prediction', self.predict(self.output))
        self.files, self.rows = runs.files(self.output), runs.rows(self.output)

    def measure(self, what: str, action: Callable[[], None]) -> None:
        """A run without a fault: the time and the address space that it takes."""
        file = self.log.with_name('bytes.txt')
        ended = runs.run(self.log, runs.growing(file, action))
        self.must(ended)
        self.seconds[what], self.bytes[what] = ended.seconds, int(file.read_text())

    def kill(self, what: str, action: Callable[[], None], number: int) -> runs.Ended:
        """Kill a run at any moment. One that has ended by itself shows how long runs are by now."""
        ended = runs.killed(self.log, action, self.random.uniform(0, self.seconds[what]), KILLS[number % 2])
        if ended.status == 0:
            self.seconds[what] = min(self.seconds[what], ended.seconds)
        return ended

    def limit(self, what: str, action: Callable[[], None]) -> runs.Ended:
        """Run with an address space of any size below what it takes."""
        return runs.run(self.log, limited(action, int(self.random.uniform(0, self.bytes[what]))))

    def must(self, ended: runs.Ended) -> None:
        """End the benchmark where a run without a fault fails."""
        if ended.status:
            sys.exit(f'A run without a fault ended with {ended.status}: {ended.said[-2000:]}')

    def predict(self, output: Path, *flags: str) -> Callable[[], None]:
        """The prediction that everything is compared with."""
        return self.space.predict(self.model, output, *flags)

    def compare(self, outcome: Outcome, output: Path, ended: runs.Ended) -> None:
        """A prediction that was gone on with, with the uninterrupted one."""
        outcome.finished += ended.status == 0
        found = runs.files(output)
        outcome.compared += len(self.files)
        outcome.differences += runs.differing(found, self.files) + runs.differing(runs.rows(output), self.rows)
        outcome.differences += [folder.name for folder in output.glob('.*') if folder.is_dir()]
        if ended.status:
            outcome.note = ended.last

    def go_on(self, outcome: Outcome, output: Path) -> None:
        """Go on with a prediction, and compare."""
        self.compare(outcome, output, runs.run(self.log, self.predict(output, '--continue_prediction')))

    def check_what_is_there(self, outcome: Outcome, output: Path) -> None:
        """What a fault has left under final names has to be whole and that of the uninterrupted run."""
        outcome.torn += runs.torn(output)
        outcome.differences += [name for name, content in runs.files(output).items()
                                if not name.endswith('.html') and content != self.files.get(name)]

    def fresh(self, name: str = 'output') -> Path:
        """A folder that does not exist."""
        folder = self.space.root / 'runs' / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    # faults

    def kill_training(self) -> Outcome:
        """Kill at any moment of a training, then --c."""
        outcome, expected = Outcome(), runs.weights(self.space.fold(self.model))
        for i in range(self.repeats):
            results = self.space.results('killed')
            fold = self.space.fold(results)
            outcome.count(end_of(self.kill('training', self.space.train(results), i)))
            outcome.torn += runs.torn_checkpoints(fold)
            ended = runs.run(self.log, self.space.train(results))
            outcome.finished += ended.status == 0
            if ended.status:
                outcome.note = ended.last
                continue
            outcome.compared += len(expected)
            outcome.differences += runs.differing(runs.weights(fold), expected)
        return outcome

    def kill_tuning(self) -> Outcome:
        """Kill a tuning, every second time while it writes; then tune again."""
        outcome, action, writing = Outcome(), *self.tuning()
        fold = self.space.fold(self.tuned)
        for i in range(self.repeats):
            self.space.trained(self.model, 'tuned')
            if i % 2:
                ended = runs.killed(self.log, action, self.random.uniform(0, writing), KILLS[i // 2 % 2],
                                    lambda: any(fold.glob('.*.partial')))
            else:
                ended = self.kill('tuning', action, i // 2)
            outcome.count(end_of(ended))
            self.tune_again(outcome, action)
        return outcome

    def tuning(self) -> tuple[Callable[[], None], float]:
        """A tuning of the trained model, measured, with what comes of it; and the seconds for which it writes."""
        action, fold = self.space.tune(self.tuned), self.space.fold(self.tuned)
        self.space.trained(self.model, 'tuned')
        self.untuned = runs.tuned(fold)
        self.measure('tuning', action)
        self.expected = runs.tuned(fold)
        first, last = ((fold / name).stat().st_mtime for name in (runs.CHECKPOINTS[0], runs.SWEEP[0]))
        return action, last - first

    def tune_again(self, outcome: Outcome, action: Callable[[], None]) -> None:
        """What a fault has left is the old or the new; tune again, and compare."""
        fold = self.space.fold(self.tuned)
        outcome.torn += runs.torn_checkpoints(fold)
        outcome.differences += [name for name, content in runs.tuned(fold).items()
                                if content not in (self.expected[name], self.untuned.get(name))]
        ended = runs.run(self.log, action)
        outcome.finished += ended.status == 0
        outcome.compared += len(self.expected)
        outcome.differences += runs.differing(runs.tuned(fold), self.expected)
        if ended.status:
            outcome.note = ended.last

    def kill_prediction(self) -> Outcome:
        """Kill at any moment of a prediction with everything that it writes, then --continue_prediction."""
        outcome = Outcome()
        for i in range(self.repeats):
            output = self.fresh()
            outcome.count(end_of(self.kill('prediction', self.predict(output), i)))
            self.check_what_is_there(outcome, output)
            self.go_on(outcome, output)
        return outcome

    def kill_report(self) -> Outcome:
        """Kill while a report replaces an earlier one, which stays, or the new one is there; then write it again."""
        outcome, output = Outcome(), self.fresh()
        shutil.copytree(self.output, output)
        page, earlier = output / 'report.html', '<html>earlier</html>'
        images = {file.name[:-len('_0000.nii.gz')]: [file] for file in self.space.images.glob('*_0000.nii.gz')}
        from nnunet_pdddpm.report import write_report
        self.measure('report', lambda: write_report(output, images))
        expected = page.read_text()
        for i in range(self.repeats):
            page.write_text(earlier)
            outcome.count(end_of(self.kill('report', lambda: write_report(output, images), i)))
            if page.read_text() not in (earlier, expected):
                outcome.torn.append(page.name)
            outcome.finished += runs.run(self.log, lambda: write_report(output, images)).status == 0
            outcome.compared += 1
            outcome.differences += [] if page.read_text() == expected else [page.name]
        return outcome

    def full_disk_prediction(self) -> Outcome:
        """Predict onto a disk that fills up at any moment; make room, then --continue_prediction."""
        outcome, needed = Outcome(), sum(file.stat().st_size for file in self.output.rglob('*') if file.is_file())
        for _ in range(self.repeats):
            with small_disk(self.space.root / 'disk', int(self.random.uniform(0.02, 1) * needed)) as disk:
                output = disk.folder / 'output'
                ended = runs.run(self.log, self.predict(output))
                outcome.count(end_of(ended))
                self.check_what_is_there(outcome, output)
                disk.resize(10 * needed)
                self.go_on(outcome, output)
        return outcome

    def full_disk_training(self) -> Outcome:
        """Train onto a disk that fills up at any moment; make room, then --c."""
        outcome, expected = Outcome(), runs.weights(self.space.fold(self.model))
        needed = sum(file.stat().st_size for file in self.model.rglob('*') if file.is_file())
        stock = sum(file.stat().st_size for file in self.space.results('full').rglob('*') if file.is_file())
        for _ in range(self.repeats):
            with small_disk(self.space.root / 'disk', int(self.random.uniform(1.1 * stock, needed))) as disk:
                results = disk.folder / 'results'
                shutil.copytree(self.space.results('full'), results)
                ended = runs.run(self.log, self.space.train(results))
                outcome.count(end_of(ended))
                outcome.torn += runs.torn_checkpoints(self.space.fold(results))
                disk.resize(10 * needed)
                ended = runs.run(self.log, self.space.train(results))
                outcome.finished += ended.status == 0
                if ended.status:
                    outcome.note = ended.last
                    continue
                outcome.compared += len(expected)
                outcome.differences += runs.differing(runs.weights(self.space.fold(results)), expected)
        return outcome

    def full_disk_tuning(self) -> Outcome:
        """Tune on a disk that fills up while it writes; make room, then tune again."""
        outcome, (action, _) = Outcome(), self.tuning()
        new, checkpoint = (sum(file.stat().st_size for file in self.space.fold(self.tuned).glob(names))
                           for names in ('sampling_sweep.*', runs.CHECKPOINTS[0]))
        for _ in range(self.repeats):
            self.space.trained(self.model, 'tuned')
            needed = sum(file.stat().st_size for file in self.tuned.rglob('*') if file.is_file())
            with small_disk(self.tuned, 20 * needed) as disk:
                shutil.copytree(self.model, self.tuned, dirs_exist_ok=True)
                used = shutil.disk_usage(self.tuned).used
                disk.resize(used + int(self.random.uniform(0.02, 1) * (new + checkpoint)))
                ended = runs.run(self.log, action)
                outcome.count(end_of(ended), ended)
                disk.resize(20 * needed)
                self.tune_again(outcome, action)
        return outcome

    def read_only_disk(self) -> Outcome:
        """Predict, train and tune onto a disk that cannot be written: earlier results stay."""
        outcome, needed = Outcome(), 4 * sum(f.stat().st_size for f in self.model.rglob('*') if f.is_file())
        with small_disk(self.space.root / 'disk', needed + 20 * MIB) as disk:
            output, results = disk.folder / 'output', disk.folder / 'results'
            shutil.copytree(self.output, output)
            shutil.copytree(self.model, results)
            disk.remount('ro')
            for action in (self.predict(output, '-seed', '1'), self.space.train(results), self.space.tune(results)):
                ended = runs.run(self.log, action)
                outcome.count(end_of(ended))
                outcome.finished += ended.status != 0
            outcome.compared = len(self.files)
            outcome.differences = runs.differing(runs.files(output), self.files)
            outcome.torn = runs.torn_checkpoints(self.space.fold(results))
            disk.remount('rw')
        return outcome

    def deleted_output(self) -> Outcome:
        """Delete the output folder at any moment of a prediction: it is told, or all masks are there."""
        outcome = Outcome()
        for _ in range(self.repeats):
            output = self.fresh()
            child, end = runs.start(self.log, self.predict(output)), \
                time.monotonic() + self.random.uniform(0, self.seconds['prediction'])
            while child.running() and time.monotonic() < end:
                time.sleep(0.002)
            before_its_end = child.running()
            shutil.rmtree(output, ignore_errors=True)
            ended = child.wait()
            outcome.count(end_of(ended))
            if ended.status == 0 and before_its_end and not runs.files(output).keys() >= self.files.keys():
                outcome.differences.append('masks missing at exit status 0')
            self.go_on(outcome, output)
        return outcome

    def two_runs(self) -> Outcome:
        """Two predictions into the same folder, the second starting at any moment of the first."""
        outcome = Outcome()
        for _ in range(self.repeats):
            output = self.fresh()
            first = runs.start(self.log, self.predict(output))
            time.sleep(self.random.uniform(0, self.seconds['prediction']))
            second = runs.run(self.log.with_name('second.log'), self.predict(output))
            ended = first.wait()
            outcome.count(f'{end_of(ended)} and {end_of(second)}')
            self.check_what_is_there(outcome, output)
            self.go_on(outcome, output)
        return outcome

    def little_memory_prediction(self) -> Outcome:
        """A limit on the address space that holds at some stage of a prediction; then --continue_prediction."""
        outcome = Outcome()
        for _ in range(self.repeats):
            output = self.fresh()
            ended = self.limit('prediction', self.predict(output))
            outcome.count(end_of(ended), ended)
            self.check_what_is_there(outcome, output)
            self.go_on(outcome, output)
        return outcome

    def little_memory_training(self) -> Outcome:
        """The same in a training; then --c."""
        outcome, expected = Outcome(), runs.weights(self.space.fold(self.model))
        for _ in range(self.repeats):
            results = self.space.results('limited')
            ended = self.limit('training', self.space.train(results))
            outcome.count(end_of(ended), ended)
            outcome.torn += runs.torn_checkpoints(self.space.fold(results))
            ended = runs.run(self.log, self.space.train(results))
            outcome.finished += ended.status == 0
            if ended.status == 0:
                outcome.compared += len(expected)
                outcome.differences += runs.differing(runs.weights(self.space.fold(results)), expected)
        return outcome

    def little_memory_tuning(self) -> Outcome:
        """The same in a tuning; then once more."""
        outcome, (action, _) = Outcome(), self.tuning()
        for _ in range(self.repeats):
            self.space.trained(self.model, 'tuned')
            ended = self.limit('tuning', action)
            outcome.count(end_of(ended), ended)
            self.tune_again(outcome, action)
        return outcome

    def many_cases(self) -> Outcome:
        """200 cases in one process: resident memory after 50 of them and after all."""
        images, output = self.fresh('many'), self.fresh()
        images.mkdir(parents=True)
        files = sorted(self.space.images.glob('*.nii.gz'))
        cases = sorted({file.name[:-len('_0000.nii.gz')] for file in files})
        for i in range(200):
            for file in files:
                if file.name.startswith(cases[i % len(cases)] + '_'):
                    (images / f'case{i:03d}{file.name[-len("_0000.nii.gz"):]}').symlink_to(file)
        memory = self.space.root / 'memory.txt'
        memory.unlink(missing_ok=True)

        def action() -> None:
            from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
            original = PDDDPMPredictor.predict_volume

            def measured(*args: object) -> object:
                with memory.open('a') as file:
                    pages = int(Path('/proc/self/statm').read_text().split()[1])
                    file.write(f'{pages * resource.getpagesize() / MIB}\n')
                return original(*args)
            PDDDPMPredictor.predict_volume = measured
            self.space.predict(self.model, output, images=images)()
        ended = runs.run(self.log, action)
        values = [float(line) for line in memory.read_text().split()]
        masks = len(list(output.glob('*.nii.gz')))
        outcome = Outcome(1, int(ended.status == 0 and masks == 200), masks, [], [], Counter({end_of(ended): 1}))
        outcome.note = f'resident memory after 50 cases {values[49]:.0f} MiB, after {len(values)} {values[-1]:.0f} MiB'
        if values[-1] > 1.05 * values[49]:
            outcome.differences.append('memory grows')
        return outcome


def limited(action: Callable[[], None], more: int) -> Callable[[], None]:
    """The action with an address space of so many bytes more than the process has at its start."""
    def within_limit() -> None:
        now = runs.address_space()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
        action()
    return within_limit


class small_disk:
    """A tmpfs of a size in bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> small_disk:
        self.folder.mkdir(exist_ok=True)
        subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={self.size}', 'tmpfs', str(self.folder)], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(['umount', str(self.folder)], check=True)

    def resize(self, size: int) -> None:
        """Make it larger."""
        self.remount(f'size={size}')

    def remount(self, options: str) -> None:
        """Mount it again with other options."""
        subprocess.run(['mount', '-o', f'remount,{options}', str(self.folder)], check=True)


NAMES = [name for name in vars(Faults) if name.startswith((
    'kill_', 'full_disk_', 'read_only_', 'deleted_', 'two_', 'little_memory_', 'many_'))]
ON_A_SMALL_DISK = ('full_disk_prediction', 'full_disk_training', 'full_disk_tuning', 'read_only_disk')


def row(name: str, outcome: Outcome) -> str:
    """One line of the table."""
    ends = ', '.join(f'{count} {end}' for end, count in outcome.ends.most_common())
    return (f'| {name.replace("_", " ")} | {outcome.injected} | {ends} | {len(outcome.torn)} | {outcome.finished} | '
            f'{outcome.compared} | {len(outcome.differences)} | {outcome.note} |')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', required=True, help='work folder')
    parser.add_argument('-data', help='folder that contains the data set of -d (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-d', help='a data set such as Dataset004_Hippocampus (default: phantoms)')
    parser.add_argument('-repeats', type=int, default=13, help='of each fault (default: %(default)s, so 52 kills)')
    parser.add_argument('-faults', nargs='+', choices=NAMES, default=NAMES)
    parser.add_argument('-seed', type=int, default=0, help='of the moments (default: %(default)s)')
    args = parser.parse_args()
    work = Path(args.o).resolve()
    work.mkdir(parents=True, exist_ok=True)
    faults = Faults(runs.prepare(work, args.data, args.d), args.repeats, args.seed)
    print('| fault | injected | ended then | torn files | finished when gone on with | compared | differences | |\n'
          '|---|---|---|---|---|---|---|---|', flush=True)
    bad = []
    for name in args.faults:
        if name in ON_A_SMALL_DISK and os.geteuid():
            print(f'| {name.replace("_", " ")} | skipped: mounting a tmpfs needs root | | | | | | |', flush=True)
            continue
        outcome = getattr(faults, name)()
        print(row(name, outcome), flush=True)
        with (work / 'outcomes.jsonl').open('a') as file:
            file.write(json.dumps({'fault': name, **{k: v for k, v in vars(outcome).items()}}) + '\n')
        bad += [] if outcome.good else [name]
    if bad:
        sys.exit(f'Something was lost: {", ".join(bad)}')


if __name__ == '__main__':
    main()
