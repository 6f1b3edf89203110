"""Cascades: whose predictions of the previous stage a model is trained on, its own trainer's or the stock model's."""
from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.paths import nnUNet_results

from nnunet_pdddpm.training.presegmenters import TrainingContext


@dataclass(frozen=True)
class PreviousStage:
    """The predictions that nnU-Net's validation of the previous stage leaves for a cascade."""
    name: str
    """The previous stage's configuration, such as `3d_lowres`."""
    context: TrainingContext
    """Data set, plans and configuration of the cascade."""
    trainer: str
    """Name of the class that trains the cascade."""

    @property
    def folders(self) -> dict[str, Path]:
        """Trainer -> its predictions, one file a case: the own one, as nnU-Net has it, then the stock one."""
        stock_model = self.context.model_folder
        results = {self.trainer: Path(str(nnUNet_results)) / self.context.plans['dataset_name'],
                   stock_model.name.partition('__')[0]: stock_model.parent}
        return {trainer: folder / f"{trainer}__{self.context.plans['plans_name']}__{self.name}" / 'predicted_next_stage'
                / self.context.configuration for trainer, folder in results.items()}

    def missing(self, cases: Collection[str], listed: Callable[[str], list[str]]) -> dict[str, int]:
        """For each trainer, how many of the cases it has no prediction of.

        Args:
            cases: identifiers.
            listed: gives the identifiers of the cases in an existing folder.
        """
        return {trainer: len(set(cases) - set(listed(str(folder)) if folder.is_dir() else ()))
                for trainer, folder in self.folders.items()}

    def complete_folder(self, cases: Collection[str], listed: Callable[[str], list[str]]) -> Path:
        """The first folder with a prediction of every case; arguments as those of `missing`.

        Raises:
            FileNotFoundError: naming the folders, how much is missing, and the command that makes it.
        """
        missing = self.missing(cases, listed)
        complete = [folder for trainer, folder in self.folders.items() if not missing[trainer]]
        if not complete:
            raise FileNotFoundError(self.missing_message(missing, len(cases)))
        return complete[0]

    def missing_message(self, missing: dict[str, int], num_cases: int) -> str:
        """The sentence that says what is missing where no folder of the previous stage is complete."""
        found = ' and '.join(f'{missing[trainer]} are missing in {folder}' for trainer, folder in self.folders.items())
        return (f'{self.context.configuration} needs the predictions of {self.name} for its {num_cases} training and '
                f'validation cases, and {found}. The validation of {self.name} writes them, for every fold: '
                f"nnUNetv2_train {self.context.plans['dataset_name']} {self.name} FOLD -tr {list(self.folders)[-1]} "
                f"-p {self.context.plans['plans_name']} (with --val if it is trained already).")
