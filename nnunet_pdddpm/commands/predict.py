"""nnUNetv2_pdddpm_predict and nnUNetv2_pdddpm_predict_from_modelfolder: nnU-Net's commands, and what samples add."""
from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from nnunet_pdddpm.commands.arguments import PLANS, TRAINER, model_folder, parse_fold, prepare_device
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.image_files import IMAGE_ENDINGS, images_in
from nnunet_pdddpm.inference.continuing import cases_with_other_settings, refresh_summary
from nnunet_pdddpm.inference.errors import CasesFailed, PredictionError
from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor, failure_message, list_reasons
from nnunet_pdddpm.inference.preprocess import files_per_case, num_channels
from nnunet_pdddpm.inference.summary import write_failure
from nnunet_pdddpm.logs import log_to_console
from nnunet_pdddpm.memory import MEMORY_ERRORS, lacks_memory
from nnunet_pdddpm.network.settings import CHOICES, ENVIRONMENT_PREFIX, KINDS, RANGES, Value
from nnunet_pdddpm.report import NothingToShow, write_report
from nnunet_pdddpm.report.page import REPORT

logger = logging.getLogger(__name__)

SETTINGS = {
    'samples': 'number of samples',
    'start': "share of the uncertainty that remains where a chain starts: 1 is pure noise, 0 the stock model's result "
             'itself',
    'steps': 'denoising steps; each decides the same share of the uncertainty',
    'samples_from': "chain: samples by denoising; stock or blind: thresholds of the probabilities of the stock model, "
                    "or of the blind mask (the denoiser's result without a noisy mask)",
    'dependence': 'coupling of the randomness of different objects: 1 all share it, 0 independent',
    'mask_stock': "weight of the stock model's probabilities in the mask",
    'mask_blind': "weight of the blind mask's probabilities in the mask; the mean of the samples has the rest",
    'seed': 'seed of noise and random masks'}
"""Sampling settings that have a flag of the same name: what each is."""
NO_FLAG = ('temperature', 'blind_temperature', 'start_mask', 'redraw', 'mask_samples')
"""Those without: tuning fits the temperatures, `start_mask` and `redraw` are for comparisons with the published method,
and `mask_samples` is for plain `nnUNetv2_predict`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """`nnUNetv2_pdddpm_predict`."""
    parser = argparse.ArgumentParser(
        description='Predict masks, samples, volumes and uncertainty maps with a PDDDPM model.')
    add_input_and_output(parser)
    parser.add_argument('-d', required=True, help='data set, by id or name')
    parser.add_argument('-c', required=True, help='configuration, such as 3d_fullres')
    parser.add_argument('-tr', default=TRAINER, help='trainer of the model (default: %(default)s)')
    parser.add_argument('-p', default=PLANS, help='plans of the model (default: %(default)s)')
    parser.add_argument('-num_parts', type=int, default=1,
                        help='number of parallel calls that share the cases, from 1 (default: %(default)s)')
    parser.add_argument('-part_id', type=int, default=0,
                        help='number of this call, 0 to num_parts - 1 (default: %(default)s)')
    add_flags(parser)
    run(parser, arguments)


def main_modelfolder(arguments: Sequence[str] | None = None) -> None:
    """`nnUNetv2_pdddpm_predict_from_modelfolder`."""
    parser = argparse.ArgumentParser(
        description='The same as nnUNetv2_pdddpm_predict, but the model is given by its folder.')
    add_input_and_output(parser)
    parser.add_argument('-m', required=True, help='folder of the model, which contains fold_0 and so on')
    add_flags(parser)
    parser.set_defaults(num_parts=1, part_id=0)
    run(parser, arguments)


def add_input_and_output(parser: argparse.ArgumentParser) -> None:
    """-i and -o."""
    parser.add_argument('-i', required=True, help='folder with the images, named as in nnU-Net (CASE_0000 …)')
    parser.add_argument('-o', required=True, help='folder for the results; created if missing')


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both commands."""
    add_stock_flags(parser)
    add_sampling_flags(parser)
    add_output_flags(parser)


def add_stock_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of nnU-Net's own commands, with the same meaning."""
    stock = parser.add_argument_group('as in nnUNetv2_predict')
    stock.add_argument('-f', nargs='+', type=parse_fold, default=[0, 1, 2, 3, 4],
                       help='folds: numbers from 0, or all (default: 0 1 2 3 4)')
    stock.add_argument('-chk', default=FINAL_CHECKPOINT, help='checkpoint (default: %(default)s)')
    stock.add_argument('-step_size', type=float, default=0.5,
                       help='step of the sliding window as a share of the tile size; above 0, at most 1 '
                            '(default: %(default)s)')
    stock.add_argument('--disable_tta', action='store_true',
                       help='predict without mirroring (default: mirroring as in training)')
    stock.add_argument('--save_probabilities', action='store_true',
                       help='write CASE.npz and CASE.pkl, for nnUNetv2_ensemble (default: no)')
    stock.add_argument('--continue_prediction', '--c', action='store_true',
                       help='skip cases that are complete (default: predict all)')
    for flag, variable, what in (('-npp', 'nnUNet_npp', 'preprocessing'), ('-nps', 'nnUNet_nps', 'export')):
        if not (text := os.environ.get(variable) or '3').isdecimal():
            parser.error(f'the environment variable {variable} must be a whole number from 0 on, got "{text}"')
        stock.add_argument(flag, type=int, default=os.environ.get(variable) or 3,
                           help=f'processes for {what}; 0: no extra process (default: the variable {variable}, else 3)')
    stock.add_argument('-prev_stage_predictions',
                       help='folder with the masks of the previous stage; required for a cascade (default: none)')
    stock.add_argument('-device', default='cuda', choices=('cpu', 'cuda', 'mps'), help='default: %(default)s')
    stock.add_argument('--not_on_device', action='store_true',
                       help='keep volumes in main memory, for a GPU with little memory (default: on the device)')
    stock.add_argument('--disable_progress_bar', action='store_true', help='default: shown')
    stock.add_argument('--verbose', action='store_true', help='print more (default: no)')


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Settings of the samples and of the mask."""
    sampling = parser.add_argument_group(
        'sampling', f'The default is the value stored in the model. An environment variable {ENVIRONMENT_PREFIX}NAME '
                    f'overrides the model, a flag overrides both. These settings have a variable but no flag: '
                    f'{", ".join(NO_FLAG)}.')
    for name, what in SETTINGS.items():
        if name in CHOICES:
            sampling.add_argument(f'-{name}', choices=CHOICES[name], help=f"{what} (default: the model's)")
        else:
            low, high = RANGES[name]
            sampling.add_argument(f'-{name}', type=KINDS[name],
                                  help=f"{what}; {low:g} to {high:.10g} (default: the model's)")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """What is written beside the masks."""
    outputs = parser.add_argument_group('further outputs')
    outputs.add_argument('--uncertainty', nargs='?', choices=('entropy', 'all'), const='entropy', default='none',
                         help='entropy: write uncertainty/CASE_uncertainty, the entropy from 0 to 1; all: also mutual '
                              'information, variance and a probability map per label (default: none; the flag alone '
                              'means entropy)')
    outputs.add_argument('--save_samples', action='store_true', help='write samples/CASE_s00 and so on (default: no)')
    outputs.add_argument('--save_presegmentation', action='store_true',
                         help="write the stock model's mask, presegmentation/CASE (default: no)")
    outputs.add_argument('--report', action='store_true',
                         help='write report.html, cases to review first on top; includes --uncertainty and '
                              '--save_presegmentation (default: no)')


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Predict; what cannot be done is said in one sentence, with exit status 1."""
    args = parser.parse_args(arguments)
    args.command = shlex.join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    log_to_console()
    if not 0 <= args.part_id < args.num_parts:
        parser.error(f'-part_id is {args.part_id}: with -num_parts {args.num_parts} it must lie in 0 to '
                     f'{args.num_parts - 1}')
    for flag in ('npp', 'nps'):
        if getattr(args, flag) < 0:
            parser.error(f'-{flag} is {getattr(args, flag)}: it must be 0 or more')
    if not 0 < args.step_size <= 1:
        parser.error(f'-step_size is {args.step_size}: it must be above 0 and not above 1')
    overrides = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    try:
        predictor, images, unusable = prepare(args, overrides)
        failed, no_report = predict_and_report(args, predictor, images, unusable)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f'Error: {error}')
    except MEMORY_ERRORS as error:
        if not lacks_memory(error):
            raise
        sys.exit('Error: There is not enough memory, not even for the model. Cases finished before are there; with '
                 'more memory, or fewer processes (-npp, -nps), continue with --continue_prediction.')
    except OSError as error:
        place = f' ({error.filename})' if error.filename else ''
        sys.exit(f'Error: {error.strerror or error}{place}. Cases finished before are there; when that is put right, '
                 f'continue with --continue_prediction.')
    if failed or no_report:
        num_cases = len(images[args.part_id::args.num_parts]) + len(unusable)
        sentences = [f'{failure_message(failed, num_cases)}.'] if failed else []
        sys.exit('Error: ' + ' '.join([*sentences, *filter(None, [no_report])]))


def predict_and_report(args: argparse.Namespace, predictor: PDDDPMPredictor, images: list[list[str]],
                       unusable: dict[str, str]) -> tuple[dict[str, str], str]:
    """Predict all cases that can be, and report on them; the others, case -> why not; and why there is no report."""
    output = Path(args.o)
    for case, reason in unusable.items():
        write_failure(output, case, reason, files_of_case(args.i, case))
    try:
        predictor.predict_from_files(
            images, args.o, save_probabilities=args.save_probabilities, overwrite=not args.continue_prediction,
            num_processes_preprocessing=args.npp, num_processes_segmentation_export=args.nps,
            folder_with_segs_from_prev_stage=args.prev_stage_predictions, num_parts=args.num_parts,
            part_id=args.part_id)
    except CasesFailed:
        pass  # told at the end, with those that are no case
    except PredictionError as error:
        if not (failed := {**unusable, **predictor.failed}):
            raise
        raise PredictionError(f'{error} Besides, these cases could not be predicted: {list_reasons(failed)}.'
                              ) from error
    if not images[args.part_id::args.num_parts]:  # a part without cases
        refresh_summary(output)
    no_report = ''
    report, ending = output / REPORT, predictor.dataset_json['file_ending']
    if not args.report and report.is_file() and any(
            mask.is_file() and mask.stat().st_mtime_ns > report.stat().st_mtime_ns
            for mask in (output / f'{case_name(files, predictor)}{ending}' for files in images)):
        logger.warning('%s is of an earlier prediction: add --report to write it again.', report)
    if args.report:
        cases = {case_name(files, predictor): [Path(file) for file in files] for files in images}
        try:
            date = datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')
            print(f'Report: {write_report(output, cases, args.command, date)}')
        except NothingToShow as error:  # other parts may still be at work
            logger.warning('No report is written: %s', error)
        except (ValueError, OSError) as error:  # it shall not hide what has failed before
            no_report = f'The report was not written: {error}'
    return {**unusable, **predictor.failed}, no_report


def files_of_case(folder: str, case: str) -> list[str]:
    """The files in a folder that are named as those of an image of a case, with or without a channel number."""
    named = re.compile(re.escape(case) + r'(_\d{4})?(\.[a-zA-Z.]+)')
    return [str(file) for file in sorted(Path(folder).iterdir()) if named.fullmatch(file.name)]


def prepare(args: argparse.Namespace, overrides: dict[str, Value]
            ) -> tuple[PDDDPMPredictor, list[list[str]], dict[str, str]]:
    """Load the model and check the input; the predictor, the image files of every case, and what is no case and why.

    Raises:
        ValueError: with a sentence that says what is wrong and what to do.
    """
    predictor = PDDDPMPredictor(
        tile_step_size=args.step_size, use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device, device=prepare_device(args.device),
        verbose=args.verbose, verbose_preprocessing=args.verbose, allow_tqdm=not args.disable_progress_bar,
        overrides=overrides,
        outputs=Outputs(uncertainty='entropy' if args.report and args.uncertainty == 'none' else args.uncertainty,
                        samples=args.save_samples, presegmentation=args.save_presegmentation or args.report))
    folder = args.m if hasattr(args, 'm') else model_folder(args)
    predictor.initialize_from_trained_model_folder(folder, args.f, args.chk)
    images, unusable = find_images(args.i, predictor)
    if previous := predictor.configuration_manager.previous_stage_name:
        if args.prev_stage_predictions is None:
            raise PredictionError(f'This is a cascade: name the folder with the predictions of {previous} with '
                                  f'-prev_stage_predictions.')
        for files in images:
            file = Path(args.prev_stage_predictions,
                        case_name(files, predictor) + predictor.dataset_json['file_ending'])
            if not file.is_file():
                raise PredictionError(f'The prediction of {previous} {file} is missing: predict it first, or correct '
                                      f'-prev_stage_predictions.')
    elif args.prev_stage_predictions is not None:
        raise PredictionError('This model is no cascade: leave out -prev_stage_predictions.')
    cases = [case_name(files, predictor) for files in images]
    if args.continue_prediction:
        for case in cases[args.part_id::args.num_parts]:  # no other part is at work on these
            predictor.check_same_settings(Path(args.o, case))
    if others := cases_with_other_settings(Path(args.o), cases, predictor.settings_for_summary()):
        logger.warning('%s also holds masks of another model or of other settings, which stay: %s.', args.o,
                       ', '.join(others))
    return predictor, images, unusable if args.part_id == 0 else {}


def case_name(files: Sequence[str], predictor: PDDDPMPredictor) -> str:
    """Name of the case with these channel files."""
    return Path(files[0]).name[:-len('_0000' + predictor.dataset_json['file_ending'])]


def find_images(folder: str, predictor: PDDDPMPredictor) -> tuple[list[list[str]], dict[str, str]]:
    """The image files of every case, by channel; and of what looks like a case and is none: name -> why.

    Raises:
        PredictionError: if there is no case, or none has as many channels as the model.
    """
    ending = predictor.dataset_json['file_ending']
    if not Path(folder).is_dir():
        wrong = 'is a file: name the folder that it lies in' if Path(folder).exists() else 'does not exist'
        raise PredictionError(f'The input folder {folder} {wrong}.')
    named = re.compile(r'(.+)_\d{4}' + re.escape(ending))
    names = [file.name for file in images_in(Path(folder), '')]
    channels: dict[str, list[str]] = {}
    unusable: dict[str, str] = {}
    for name in names:
        if match := named.fullmatch(name):
            channels.setdefault(match[1], []).append(str(Path(folder, name)))
        elif name.endswith(ending):
            unusable[name[:-len(ending)]] = f'{name} has no channel number, as in CASE_0000{ending}'
        elif match := re.fullmatch(r'(.+)_\d{4}(\.[a-zA-Z.]+)', name):
            if match[2].lower() in IMAGE_ENDINGS:
                unusable[match[1]] = f'{name} ends in {match[2]}, this model reads {ending}'
    if not channels:
        raise PredictionError(f'{folder} holds no images named CASE_0000{ending}, which this model reads.')
    needed = num_channels(predictor.dataset_json)
    right = [f'_{channel:04d}{ending}' for channel in range(needed)]
    numbers = files_per_case(channels.values(), needed, predictor.plans_manager.image_reader_writer_class())
    images = []
    for case, files in sorted(channels.items()):
        if len(files) in numbers and [Path(file).name[len(case):] for file in files] == right[:len(files)]:
            images.append(files)
            unusable.pop(case, None)
        else:
            unusable[case] = (f'{case} in {folder} has {len(files)} channel files, the model needs {needed} '
                              f'({case}{right[0]} to {case}{right[-1]})')
    if not images:
        raise PredictionError(f'{next(reason for case, reason in unusable.items() if case in channels)}.')
    return images, unusable


if __name__ == '__main__':
    main()
