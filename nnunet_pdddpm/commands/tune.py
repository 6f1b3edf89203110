"""nnUNetv2_pdddpm_tune: find the sampling settings of a trained fold, and calibrate its intervals of volumes."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_pdddpm.commands.arguments import PLANS, TRAINER, model_folder, parse_fold, prepare_device
from nnunet_pdddpm.evaluation.folders import EvaluationError
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.logs import log_to_console
from nnunet_pdddpm.memory import MEMORY_ERRORS, lacks_memory
from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.fold import FoldData
from nnunet_pdddpm.tuning.tune import calibrate_fold, open_model, tune


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, and say what was chosen; exit with 1 and one sentence if that cannot be done."""
    log_to_console()
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.budget is not None and not args.budget > 0:
        parser.error(f'-budget must be a number of minutes above 0, got {args.budget}')
    try:
        run(args)
    except MEMORY_ERRORS as error:
        if not lacks_memory(error):
            raise
        sys.exit('Error: There is not enough memory to tune the sampling settings: run it again where there is more.')


def run(args: argparse.Namespace) -> None:
    """As `main`; memory may not be enough."""
    try:
        device = prepare_device(args.device)
        folder = Path(model_folder(args, 'DATASET'))
        if not (file := folder / f'fold_{args.f}' / FINAL_CHECKPOINT).is_file():
            raise TuningError(f'{file} does not exist: train this fold with nnUNetv2_train -tr {args.tr}, or correct '
                              f'DATASET, CONFIG, FOLD, -tr and -p.')
        predictor = open_model(folder, args.f, device)
        trainer = make_trainer(args, device)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f'Error: {error}')
    try:
        data = FoldData.from_trainer(trainer)
        tune(data, predictor, None if args.budget is None else 60 * args.budget, args.raters,
             not args.disable_progress_bar)
        calibrate_fold(data, device)
    except (TuningError, EvaluationError, CheckpointError, FileNotFoundError) as error:
        sys.exit(f'Error: {error}')
    except OSError as error:
        sys.exit(f'Error: the results cannot be written ({error}).')


def make_trainer(args: argparse.Namespace, device: torch.device) -> PDDDPMTrainer:
    """The trainer of the model, which knows its validation cases; nothing is built.

    Raises:
        TuningError: if the data set is not preprocessed with its plans, or nnUNet_preprocessed is not set.
    """
    if 'nnUNet_preprocessed' not in os.environ:
        raise TuningError('The variable nnUNet_preprocessed is not set: it names the folder of the preprocessed cases.')
    dataset = Path(model_folder(args, 'DATASET')).parent.name
    folder = Path(os.environ['nnUNet_preprocessed'], dataset)
    for file in (folder / f'{args.p}.json', folder / 'dataset.json'):
        if not file.is_file():
            raise TuningError(f'{file} is missing: the validation cases have to be preprocessed with these plans '
                              f'(nnUNetv2_plan_and_preprocess).')
    os.environ['nnUNet_wandb_enabled'] = '0'  # nnU-Net would take it for a new training, and delete the run of the old
    return get_trainer_from_args(dataset, args.c, args.f, args.tr, args.p, device=device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Tune the sampling settings of a trained PDDDPM fold on its validation cases and store them in its '
                    'checkpoints. Then calibrate its volume intervals on at most 256 of these cases and store that in '
                    'checkpoint_final.pth. Training does this at its end; this command repeats it, with more time or '
                    'with masks of several raters.')
    parser.add_argument('d', metavar='DATASET', help='id or name')
    parser.add_argument('c', metavar='CONFIG', help='configuration, such as 3d_fullres')
    parser.add_argument('f', metavar='FOLD', type=parse_fold, help='fold, a number from 0')
    parser.add_argument('-tr', default=TRAINER, help='trainer of the model (default: %(default)s)')
    parser.add_argument('-p', default=PLANS, help='plans of the model (default: %(default)s)')
    parser.add_argument('-device', default='cuda', choices=('cpu', 'cuda', 'mps'), help='default: %(default)s')
    parser.add_argument('-budget', type=float, metavar='MINUTES',
                        help='time for tuning, above 0 (default: no limit); to keep it, cases and chains of three and '
                             'five steps are left out; calibration takes additional time')
    parser.add_argument('-raters', type=Path,
                        help="folder with masks of several raters, CASE__RATER with the data set's file ending: the "
                             'sampling settings are chosen by the distance of the samples to these masks (default: '
                             'to the truth)')
    parser.add_argument('--disable_progress_bar', action='store_true', help='default: shown')
    return parser


if __name__ == '__main__':
    main()
