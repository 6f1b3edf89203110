"""Arguments that several commands have: what they mean."""
from __future__ import annotations

import argparse
import os

import torch
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_pdddpm.inference.errors import PredictionError

TRAINER, PLANS = 'PDDDPMTrainer', 'nnUNetPlans'
"""What is meant where no other is named."""


def parse_fold(text: str) -> int | str:
    """A fold's number, or `all`."""
    return text if text == 'all' else int(text)


def model_folder(args: argparse.Namespace, dataset: str = '-d') -> str:
    """Folder of the model that -d, -c, -tr and -p name; `dataset`: what the first of them is called."""
    if 'nnUNet_results' not in os.environ:
        raise PredictionError('The variable nnUNet_results is not set: it names the folder of the trained models.')
    try:
        return str(get_output_folder(args.d, args.tr, args.p, args.c))
    except RuntimeError as error:
        named = [str(name) for name in find_candidate_datasets(int(args.d))]
        what = f'{len(named)} data sets have the id {args.d} ({", ".join(named)}): name one of them in {dataset}, or' \
            if named else f'There is no data set with the id {args.d}: correct {dataset}, or'
        raise PredictionError(f'{what} the variables nnUNet_results, nnUNet_raw and nnUNet_preprocessed.') from error


def prepare_device(name: str) -> torch.device:
    """The device, with the number of threads that nnU-Net's commands use on it."""
    if name == 'cuda' and not torch.cuda.is_available() or name == 'mps' and not torch.backends.mps.is_available():
        raise PredictionError(f'There is no {name} device here: name another with -device, such as -device cpu.')
    if name == 'cpu':
        torch.set_num_threads(os.cpu_count() or 1)
    elif name == 'cuda':
        torch.set_num_threads(1)
    return torch.device(name)
