"""Stock models as pre-segmenters: find them, load them safely, check that they fit."""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.network.checkpoint import CheckpointError, check_weights, differences, load_checkpoint
from nnunet_pdddpm.network.settings import PRESEGMENTER_VARIABLE

DEFAULT_PRESEGMENTER = 'nnUNetTrainer'


class PresegmenterError(CheckpointError):
    """The stock model does not fit what is to be trained on it."""


def presegmenter_folder(dataset_name: str, plans_name: str, configuration: str) -> Path:
    """Folder of the stock model: its `fold_X` folders are below it.

    That is `nnUNetTrainer__PLANS__CONFIGURATION` in nnU-Net's results, unless the environment variable
    `nnUNet_pdddpm_presegmenter` names another trainer, or a model folder by its path.

    Raises:
        PresegmenterError: if the variable names a folder that does not exist.
    """
    named = os.environ.get(PRESEGMENTER_VARIABLE) or DEFAULT_PRESEGMENTER
    if os.sep in named or '/' in named:
        folder = Path(named)
        if not folder.is_dir():
            raise PresegmenterError(f'{PRESEGMENTER_VARIABLE} names the model folder {folder}, which does not exist.')
        return folder
    return Path(str(nnUNet_results)) / dataset_name / f'{named}__{plans_name}__{configuration}'


def checkpoint_file(model_folder: Path, fold: int | str) -> Path:
    """Path of a fold's final checkpoint, whether it exists or not."""
    return model_folder / f'fold_{fold}' / FINAL_CHECKPOINT


def check_fits(checkpoint: dict[str, Any], file: Path, plans: dict[str, Any], configuration: str, fold: int | str,
               dataset_json: dict[str, Any]) -> None:
    """Refuse a stock model that was trained on other labels, channels, plans, configuration or fold.

    Raises:
        PresegmenterError: naming the file, what differs, and both values.
    """
    theirs = checkpoint['init_args']
    if {'plans', 'configuration', 'fold', 'dataset_json'} - theirs.keys():
        raise PresegmenterError(f'The stock model {file} does not say what it was trained on; train it again.')
    stated = {'configuration': (theirs['configuration'], configuration), 'fold': (theirs['fold'], fold)}
    differing = differences(theirs, plans, configuration, dataset_json)
    for what, (trained, here) in {**stated, **differing}.items():
        if trained != here:
            raise _misfit(file, what, trained, here)


def load_network(network: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Load stock weights into the network that the plans describe.

    Raises:
        PresegmenterError: if they belong to another network, as those of a trainer with its own architecture do.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = sorted(expected.items() ^ found.items())[0][0]
        raise PresegmenterError(f'The stock model {file} has another network than the plans describe ({name}: '
                                f'{found.get(name)} instead of {expected.get(name)}); PDDDPM refines stock models '
                                f'whose trainer builds the planned network.')
    network.load_state_dict(weights)


def _misfit(file: Path, what: str, trained: Any, here: Any) -> PresegmenterError:
    return PresegmenterError(f'The stock model {file} does not fit: {what} was {trained} when it was trained and is '
                             f'{here} here. Train the stock model with these plans and this data set first.')


@dataclass(frozen=True)
class TrainingContext:
    """What a stock model has to fit: the arguments every nnU-Net trainer is made with."""
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """See `presegmenter_folder`."""
        return presegmenter_folder(self.plans['dataset_name'], self.plans['plans_name'], self.configuration)

    def stock_checkpoint(self, fold: int | str) -> dict[str, Any]:
        """Checkpoint of the stock model of a fold, checked to fit; raises `CheckpointError`."""
        file = checkpoint_file(self.model_folder, fold)
        checkpoint = load_checkpoint(file)
        check_fits(checkpoint, file, self.plans, self.configuration, fold, self.dataset_json)
        check_weights(checkpoint['network_weights'], f'The stock model {file}')
        return checkpoint

    def stock_network(self, fold: int | str) -> nn.Module:
        """The stock network of a fold, frozen and in eval mode, on the CPU; raises `CheckpointError`."""
        weights, network = self.stock_checkpoint(fold)['network_weights'], self.planned_network()
        load_network(network, weights, checkpoint_file(self.model_folder, fold))
        return network.requires_grad_(False).eval()

    def planned_network(self) -> nn.Module:
        """A new network as the plans describe it, without deep supervision."""
        plans = PlansManager(self.plans)
        configuration = plans.get_configuration(self.configuration)
        return nnUNetTrainer.build_network_architecture(
            plans, configuration, determine_num_input_channels(plans, configuration, self.dataset_json),
            plans.get_label_manager(self.dataset_json).num_segmentation_heads, False)
