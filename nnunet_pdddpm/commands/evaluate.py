"""nnUNetv2_pdddpm_evaluate: how good are the masks, probabilities and samples in a folder."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.configuration import default_num_processes

from nnunet_pdddpm.evaluation.evaluate import evaluate_cases, summarise
from nnunet_pdddpm.evaluation.folders import EvaluationError, open_folders
from nnunet_pdddpm.evaluation.report import format_tables, write_files


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write the files; exit with 1 and one sentence if the input does not allow it, of all cases
    (then nothing is written) or of some."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.nsd_tolerance < float('inf'):
        parser.error(f'-nsd_tolerance must be a distance in mm, got {args.nsd_tolerance}')
    if args.np < 1:
        parser.error(f'-np must be at least 1, got {args.np}')
    try:
        folders = open_folders(args.pred, args.ref, args.raters, args.djfile, args.pfile, args.chill)
        results, failed = evaluate_cases(folders, args.nsd_tolerance, args.np, not args.disable_progress_bar)
        summary = summarise(folders, results, args.nsd_tolerance, failed)
        files = write_files(summary, args.o or args.pred)
    except (EvaluationError, OSError) as error:
        sys.exit(f'Error: {error}')
    print(format_tables(summary))
    print('Written: ' + ', '.join(map(str, files)))
    if failed:
        reasons = '; '.join(f'{case} ({why.removesuffix(".")})' for case, why in failed.items())
        sys.exit(f'Error: {len(failed)} of {len(folders.cases)} cases could not be evaluated, the '
                 f'others are done: {reasons}')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Measure accuracy and calibration and, with samples or several raters, how well the samples are '
                    'distributed. The output of nnUNetv2_predict is enough; metrics whose input is missing are '
                    'listed.')
    parser.add_argument('-pred', type=Path, required=True,
                        help='output folder of nnUNetv2_pdddpm_predict or nnUNetv2_predict')
    parser.add_argument('-ref', type=Path, required=True, help='folder with the reference masks')
    parser.add_argument('-raters', type=Path,
                        help="folder with several raters' masks, CASE__RATER with the data set's file ending "
                             '(default: none)')
    parser.add_argument('-djfile', type=Path, help='dataset.json (default: the one in -pred)')
    parser.add_argument('-pfile', type=Path, help='plans.json (default: the one in -pred)')
    parser.add_argument('-o', type=Path, help='folder for the results (default: -pred)')
    parser.add_argument('-nsd_tolerance', type=float, default=1.0,
                        help='tolerance of the surface Dice in mm, from 0 (default: %(default)s)')
    parser.add_argument('-np', type=int, default=default_num_processes,
                        help='number of processes, from 1 (default: %(default)s)')
    parser.add_argument('--chill', action='store_true',
                        help='evaluate the existing predictions although some references have none (default: refuse)')
    parser.add_argument('--disable_progress_bar', action='store_true', help='default: shown')
    return parser


if __name__ == '__main__':
    main()
