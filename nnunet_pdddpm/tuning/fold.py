"""What tuning and calibration need to know of a fold and its data set."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_pdddpm.tuning.errors import TuningError


@dataclass(frozen=True)
class FoldData:
    """A fold of a model, its split, and the data set as it was preprocessed for it."""
    fold: int
    training: list[str]
    validation: list[str]
    dataset_class: Any
    """nnU-Net's class that reads the preprocessed cases."""
    preprocessed: Path
    """Folder of the preprocessed cases."""
    previous_stage: str | None
    """Folder of the previous stage's masks, for a cascade."""
    truth: Path
    """Folder of the original truth."""
    output: Path
    """Folder of the fold in the model."""
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    log: Callable[[str], None]

    @classmethod
    def from_trainer(cls, trainer: nnUNetTrainer) -> FoldData:
        """That of an nnU-Net trainer, which need not be initialised.

        Raises:
            TuningError: if there can be no validation cases, or nothing is preprocessed.
        """
        if trainer.fold == 'all':
            raise TuningError('fold all was trained on every case: the sampling settings can only be tuned in a fold '
                              'with validation cases.')
        folder = Path(trainer.preprocessed_dataset_folder)
        if not folder.is_dir():
            raise TuningError(f'The preprocessed data {folder} is missing: run nnUNetv2_preprocess with these plans '
                              f'and this configuration first.')
        training, validation = trainer.do_split()  # which also finds the data set's class and the previous stage
        return cls(trainer.fold, list(training), list(validation), trainer.dataset_class, folder,
                   trainer.folder_with_segs_from_previous_stage,
                   Path(trainer.preprocessed_dataset_folder_base, 'gt_segmentations'), Path(trainer.output_folder),
                   trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json,
                   trainer.print_to_log_file)
