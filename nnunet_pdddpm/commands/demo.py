"""`nnUNetv2_pdddpm_demo`: phantoms in, table and picture out, with nnU-Net's own commands in between."""
from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nnunet_pdddpm.demo.phantom import LABELS, write_dataset
from nnunet_pdddpm.demo.report import draw_figure, format_table, mean_dice, num_samples, volume_lines
from nnunet_pdddpm.logs import log_to_console
from nnunet_pdddpm.network.settings import ENVIRONMENT_PREFIX, PRESEGMENTER_VARIABLE
from nnunet_pdddpm.report.page import REPORT

logger = logging.getLogger('nnunet_pdddpm.commands.demo')  # not `__main__`, where it is run as a module

DATASET_ID = 701
DATASET = f'Dataset{DATASET_ID}_Phantom'
PLANS = 'nnUNetPlansDemo'
CONFIGURATION = '3d_fullres'
STOCK, PDDDPM = 'nnUNetTrainer_5epochs', 'PDDDPMTrainer_5epochs'
LONGER = 'nnUNetTrainer_10epochs'
"""The control: as many iterations as stock model and denoiser together."""
NUM_TRAINING, NUM_VALIDATION, NUM_TEST = 20, 20, 6


class Demo:
    """The demo's folder and the commands that fill it; finished training is kept when it is run again."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.raw = folder / 'nnUNet_raw' / DATASET
        self.preprocessed = folder / 'nnUNet_preprocessed' / DATASET
        self.results = folder / 'nnUNet_results' / DATASET
        (folder / 'logs').mkdir(parents=True, exist_ok=True)

    def call(self, log: str, *command: str, echo: tuple[str, ...] = ()) -> float:
        """Run an nnU-Net command with its output in logs/<log>; return its seconds.

        Lines that contain one of `echo` are shown. Exits with the end of the log if the command fails.
        """
        beside = Path(sys.executable).parent / command[0]
        executable = str(beside) if beside.exists() else shutil.which(command[0])
        if executable is None:
            sys.exit(f'{command[0]} is not installed beside this Python: pip install "nnunetv2>=2.8,<3".')
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
        environment = {**kept, PRESEGMENTER_VARIABLE: STOCK, 'nnUNet_n_proc_DA': '1',
                       'OMP_WAIT_POLICY': 'PASSIVE',  # on a CPU, training and data loading share the cores
                       **{name: str(self.folder / name)
                          for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results')}}
        file = self.folder / 'logs' / f'{log}.log'
        logger.info('$ %s    (log: %s)', ' '.join(command), file)
        start = time.monotonic()
        with open(file, 'w') as out, subprocess.Popen([executable, *command[1:]], env=environment, text=True,
                                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            for line in process.stdout or ():
                out.write(line)
                if any(word in line for word in echo):
                    logger.info('    %s', line.rstrip())
        if process.returncode != 0:
            sys.exit(f'{command[0]} failed; the end of {file}:\n' + ''.join(file.read_text().splitlines(True)[-15:]))
        return time.monotonic() - start

    def prepare(self) -> None:
        """Write the raw data, plan, make the plans small enough for a CPU, preprocess."""
        if not (self.preprocessed / f'{PLANS}.json').is_file():
            write_dataset(self.raw, NUM_TRAINING + NUM_VALIDATION, NUM_TEST)
            self.call('plan_and_preprocess', 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID),
                      '-c', CONFIGURATION, '-np', '2', '-npfp', '2', '--verify_dataset_integrity')
            plans = json.loads((self.preprocessed / 'nnUNetPlans.json').read_text())
            plans['plans_name'] = PLANS
            configuration = plans['configurations'][CONFIGURATION]
            configuration.update(batch_size=2, patch_size=[24, 32, 24])
            architecture = configuration['architecture']['arch_kwargs']
            architecture['features_per_stage'] = [f // 4 for f in architecture['features_per_stage']]
            for convolutions in ('n_conv_per_stage', 'n_conv_per_stage_decoder'):
                architecture[convolutions] = [1] * len(architecture[convolutions])
            # a split of its own: intervals of volumes are calibrated on validation cases, of which 95 % take 19
            cases = sorted(file.name[:-len('.nii.gz')] for file in (self.raw / 'labelsTr').iterdir())
            (self.preprocessed / 'splits_final.json').write_text(json.dumps(
                [{'train': cases[:NUM_TRAINING], 'val': cases[NUM_TRAINING:]}]))
            (self.preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))

    def train(self, trainer: str) -> None:
        """Train fold 0 unless it is trained, continuing where an earlier run was interrupted."""
        fold = self.results / f'{trainer}__{PLANS}__{CONFIGURATION}' / 'fold_0'
        if not (fold / 'validation' / 'summary.json').is_file():
            self.call(f'train_{trainer}', 'nnUNetv2_train', str(DATASET_ID), CONFIGURATION, '0', '-tr', trainer,
                      '-p', PLANS, '-device', self.device, '--c', echo=('Epoch ', 'seudo dice'))

    def predict(self, trainer: str, name: str, command: str = 'nnUNetv2_predict', *flags: str) -> float:
        """Predict the held-out cases into predictions/<name>; seconds per case."""
        seconds = self.call(f'predict_{name}', command, '-i', str(self.raw / 'imagesTs'),
                            '-o', str(self.folder / 'predictions' / name), '-d', str(DATASET_ID),
                            '-c', CONFIGURATION, '-p', PLANS, '-tr', trainer, '-f', '0', '-device', self.device,
                            '-npp', '1', '-nps', '1', *flags)
        return seconds / NUM_TEST


def main() -> None:
    """Entry point of `nnUNetv2_pdddpm_demo`."""
    parser = argparse.ArgumentParser(description='Train stock nnU-Net and PDDDPMTrainer on a phantom data set and '
                                                 'compare them. 15 to 25 minutes on two CPU cores, no download.')
    parser.add_argument('-o', default='demo', help='folder for everything that the demo writes (default: demo)')
    parser.add_argument('-device', default='cpu', choices=['cpu', 'cuda', 'mps'], help='default: %(default)s')
    parser.add_argument('--control', action='store_true',
                        help='also train stock nnU-Net for as many iterations as both together, as a control; this '
                             'takes twice as long as training the stock model (default: no)')
    args = parser.parse_args()
    log_to_console()
    demo = Demo(Path(args.o).resolve(), args.device)
    demo.prepare()
    for trainer in (STOCK, PDDDPM, *([LONGER] if args.control else [])):
        demo.train(trainer)
    seconds = {'stock': demo.predict(STOCK, 'stock'), 'pdddpm': demo.predict(PDDDPM, 'pdddpm'),
               'samples': demo.predict(PDDDPM, 'samples', 'nnUNetv2_pdddpm_predict', '--save_samples', '--report')}
    if args.control:
        seconds['longer'] = demo.predict(LONGER, 'longer')

    truth, predictions = demo.raw / 'labelsTs', demo.folder / 'predictions'
    foreground = {name: label for name, label in LABELS.items() if label > 0}
    dice = {name: mean_dice(truth, predictions / name, foreground) for name in seconds}
    summary = {'dice': dice, 'seconds_per_case': {k: round(v, 2) for k, v in seconds.items()}, 'cases': NUM_TEST}
    (demo.folder / 'summary.json').write_text(json.dumps(summary, indent=1))
    draw_figure(demo.raw, predictions, demo.folder / 'demo.png', foreground)
    print('\n' + format_table(summary, num_samples(predictions / 'samples')) + '\n')
    print('\n'.join(volume_lines(predictions / 'samples', truth, foreground)))
    print(f'\nTable: {demo.folder / "summary.json"}\nPicture: {demo.folder / "demo.png"}\n'
          f'Report, to open in a browser: {predictions / "samples" / REPORT}')


if __name__ == '__main__':
    main()
