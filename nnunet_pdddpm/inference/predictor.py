"""PDDDPMPredictor: nnU-Net's predictor with whole-volume samples, from files to files."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.helpers import empty_cache
from tqdm import tqdm

from nnunet_pdddpm.file_names import BEST_CHECKPOINT, FINAL_CHECKPOINT
from nnunet_pdddpm.files import image_identity
from nnunet_pdddpm.inference.case import ExportQueue, OutputInUse, PendingCase, clear_leftover
from nnunet_pdddpm.inference.continuing import check_same_settings, foreign_mask_reason, refresh_summary
from nnunet_pdddpm.inference.errors import NNUNET_INF_ERROR, CasesFailed, PredictionError, UnusableLogits
from nnunet_pdddpm.inference.export import CaseExport, Outputs, as_numpy
from nnunet_pdddpm.inference.intervals import FIELDS, ByMask, calibrate_by_mask
from nnunet_pdddpm.inference.preprocess import CasePreprocessor, FailedCase, preprocessed
from nnunet_pdddpm.inference.ranking import FOLDS, NOT_MEASURED, UNMEASURED, Ranking, ranking_of
from nnunet_pdddpm.inference.summary import has_failed, read_row, write_failure
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.labels import label_channels
from nnunet_pdddpm.memory import MEMORY_ERRORS, lacks_memory
from nnunet_pdddpm.network.checkpoint import checksum
from nnunet_pdddpm.network.seen import stored_seen
from nnunet_pdddpm.network.state import CALIBRATION, QUALITY, stored_settings

logger = logging.getLogger(__name__)

CASE_ERRORS: tuple[type[Exception], ...] = (UnusableLogits, *MEMORY_ERRORS)
"""Types of the errors at which a case may fail alone."""


TUNING_DEFAULTS = {'use_mirroring': True, 'tile_step_size': 0.5, 'use_gaussian': True}
"""Attributes of a predictor and their defaults: models are tuned with these."""


class PDDDPMPredictor(VolumePredictor):
    """As nnUNetPredictor; beside the masks it writes what several samples of each case say.

    Use it as nnU-Net's: `initialize_from_trained_model_folder`, then `predict_from_files` (mask, further outputs and
    summary as files), `predict_single_npy_array` and the others (the mask), or `predict_volume` (everything,
    in the network's grid).
    """

    def __init__(self, *args: Any, outputs: Outputs = Outputs(), **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: of `VolumePredictor`.
            outputs: what is written beside the mask.
        """
        super().__init__(*args, **kwargs)
        self.outputs = outputs
        self._num_cases: int | None = None
        self.failed: dict[str, str] = {}  # case -> why it could not be predicted, in the last prediction
        self.calibrated: dict[str, ByMask] = {}
        """Label -> what the intervals of its volumes are made of, or why there are none."""
        self.ranking = NOT_MEASURED
        """What cases are sorted by."""
        self._calibrated_for: tuple[bool, bool] | None = None
        self.weights: list[str] = []
        """Identity of each model: checksum of all that it holds, both networks, levels, calibration and settings."""
        self._files: dict[Path, tuple[list[str], str | None]] = {}
        """Path of a mask without its ending -> image files of the case, and mask of its previous stage."""

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """As VolumePredictor's; says which volumes have no calibrated interval, and why."""
        super().initialize_from_trained_model_folder(*args, **kwargs)
        self.weights = [f'{checksum(parameters):08x}' for parameters in self.list_of_parameters]
        self._take_calibration()

    def _take_calibration(self) -> None:
        """Intervals and order that hold for masks and samples as they are made now."""
        self._calibrated_for = self._as_in_validation()
        self.calibrated, self.ranking = self._calibrated(), self._ranking()
        missing = {name: label.with_label for name, label in self.calibrated.items()
                   if isinstance(label.with_label, str)}
        for reason in dict.fromkeys(missing.values()):
            names = [name for name, why in missing.items() if why == reason]
            which = 'Volumes have' if len(names) == len(self.calibrated) else f'Volumes of {", ".join(names)} have'
            logger.warning('%s no calibrated interval: %s.', which, reason)
        logger.info('%s', self.ranking.describe())

    def _calibrated(self) -> dict[str, ByMask]:
        """Label -> what its intervals are made of, or why there are none."""
        channels = label_channels(self.dataset_json, self.plans_manager)
        scores = [parameters[CALIBRATION].numpy() for parameters in self.list_of_parameters]
        if not any(rows[..., FIELDS.index('known')].any() for rows in scores):
            reason = f'the model is not calibrated ({self._how_to_calibrate()})'
            return dict.fromkeys(channels, ByMask(reason, reason))
        if not self._as_in_validation()[0]:
            reason = 'the calibrated one holds only for masks made as in validation'
            return dict.fromkeys(channels, ByMask(reason, reason))
        known = [cases for parameters in self.list_of_parameters
                 if (cases := stored_seen(parameters).calibrated_on) is not None]
        if len(frozenset().union(*known)) < sum(map(len, known)):
            reason = ('the folds share validation cases, so their errors are not independent: predict with one fold, '
                      'or train folds with validation cases of their own')
            return dict.fromkeys(channels, ByMask(reason, reason))
        return {name: calibrate_by_mask([rows[:, channel] for rows in scores]) for name, channel in channels.items()}

    def _how_to_calibrate(self) -> str:
        """What measures the validation cases of a model that holds none, or why nothing does: a clause."""
        if 'all' in self.folds:
            return 'fold all holds no case out'
        if self.model.endswith(FINAL_CHECKPOINT):
            return 'nnUNetv2_pdddpm_tune does it, or nnUNetv2_train --val'
        if self.model.endswith(BEST_CHECKPOINT):
            return f'nnUNetv2_train --val --val_best does it for {BEST_CHECKPOINT}'
        return f'only {FINAL_CHECKPOINT} and {BEST_CHECKPOINT} can be'

    def _as_in_validation(self) -> tuple[bool, bool]:
        """Whether masks are made, and samples drawn, as on the validation cases."""
        stored = [stored_settings(parameters) for parameters in self.list_of_parameters]
        here = all(getattr(self, name) == value for name, value in TUNING_DEFAULTS.items())
        draws_alike = here and all(
            now.sample_settings == then.sample_settings and self.num_samples // len(stored) == then.samples
            for now, then in zip(self.fold_settings, stored, strict=True))
        mask_alike = here and all(now.mask_settings == then.mask_settings and (draws_alike or not now.needs_samples)
                                  for now, then in zip(self.fold_settings, stored, strict=True))
        return mask_alike, draws_alike

    def _ranking(self) -> Ranking:
        """What cases are sorted by."""
        if len(self.list_of_parameters) > 1:
            return Ranking(FOLDS)
        weights, = self.list_of_parameters
        channels = label_channels(self.dataset_json, self.plans_manager)
        found = ranking_of(weights[QUALITY].numpy(), channels, weights[CALIBRATION].numpy())
        if found is NOT_MEASURED:
            return replace(found, reason=f'{found.reason} ({self._how_to_calibrate()})')
        if found.scores is not None and not all(self._as_in_validation()):
            return Ranking(UNMEASURED, 'masks and samples are not made as in validation')
        return found

    def settings_for_summary(self) -> list[dict[str, Any]]:
        """What each model is sampled with."""
        common = {'step_size': self.tile_step_size, 'mirroring': self.use_mirroring, 'precision': self.precision}
        return [{'model': self.model, 'fold': fold, 'weights': weights, **asdict(settings), **common}
                for fold, weights, settings in zip(self.folds, self.weights, self.fold_settings, strict=True)]

    def _manage_input_and_output_lists(self, list_of_lists_or_source_folder: Any,
                                       output_folder_or_list_of_truncated_output_files: Any,
                                       folder_with_segs_from_prev_stage: str | None = None, overwrite: bool = True,
                                       part_id: int = 0, num_parts: int = 1,
                                       save_probabilities: bool = False) -> tuple[list, list | None, list]:
        """As nnUNetPredictor's; a case is left out only if all of its files are there.

        A case whose mask was not written by this package is left out, too, and named.

        Raises:
            PredictionError: if finished cases were predicted with another model or settings.
        """
        self.failed = {}
        inputs, outputs, previous = super()._manage_input_and_output_lists(
            list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files,
            folder_with_segs_from_prev_stage, True, part_id, num_parts, save_probabilities)
        self._files = {Path(file): (files, mask) for file, files, mask in
                       zip(outputs or [], inputs, previous, strict=False)}
        others = {file: how for file in self._files if (how := foreign_mask_reason(self._mask(file), file.name))}
        if overwrite:
            for file, how in others.items():
                logger.warning('%s %s. It will be overwritten.', self._mask(file), how)
        elif outputs:
            if others:
                logger.warning('%d masks stay as they are, and the summary leaves them out (move one elsewhere and its '
                               'case is predicted): %s.', len(others),
                               '; '.join(f'{self._mask(file)} {how}' for file, how in others.items()))
            todo = [i for i, file in enumerate(outputs)
                    if Path(file) not in others and not self._is_done(Path(file), save_probabilities)]
            logger.info('%d cases are done, %d are left.', len(outputs) - len(others) - len(todo), len(todo))
            if not todo:
                refresh_summary(Path(outputs[0]).parent)  # a run killed after its last mask has not done so
            inputs, outputs, previous = ([values[i] for i in todo] for values in (inputs, outputs, previous))
        self._num_cases = len(inputs)
        return inputs, outputs, previous

    def check_same_settings(self, truncated: Path) -> None:
        """Raise PredictionError if a finished case was predicted with another model or other settings.

        Args:
            truncated: path of the mask without its ending.
        """
        check_same_settings(truncated.parent, truncated.name, self.settings_for_summary())

    def _mask(self, truncated: Path) -> Path:
        return Path(str(truncated) + self.dataset_json['file_ending'])

    def _is_done(self, truncated: Path, save_probabilities: bool) -> bool:
        self.check_same_settings(truncated)
        row = read_row(truncated.parent, truncated.name)
        export = self._export(truncated, {}, save_probabilities)
        done = row is not None and not has_failed(truncated.parent, truncated.name) and all(
            (truncated.parent / file).is_file() for file in export.files(self.num_samples))
        if done and row is not None and row['image'] not in (None, image_identity(*self._files[truncated])):
            logger.warning('The image of %s is not the one that was predicted: it is predicted again.', truncated.name)
            done = False
        if done:
            clear_leftover(export.folder)
        return done

    def _export(self, truncated: Path, properties: dict[str, Any], save_probabilities: bool) -> CaseExport:
        return CaseExport(self.plans_manager, self.configuration_manager, self.dataset_json, properties,
                          truncated.with_name(f'.{truncated.name}.partial'), truncated.name,
                          replace(self.outputs, probabilities=save_probabilities or self.outputs.probabilities))

    def _internal_get_data_iterator_from_lists_of_filenames(
            self, input_list_of_lists: list[list[str]], seg_from_prev_stage_files: list | None,
            output_filenames_truncated: list | None, num_processes: int) -> Iterator[dict[str, Any] | FailedCase]:
        """As nnUNetPredictor's; a case that cannot be read comes as a `FailedCase`. With 0 processes in this one."""
        preprocessor = self.configuration_manager.preprocessor_class
        if preprocessor.run_case is not DefaultPreprocessor.run_case:
            raise PredictionError(f'{preprocessor.__name__} reads images in a way of its own (run_case), of which this '
                                  f'command knows nothing: predict with nnUNetv2_predict.')
        nothing = [None] * len(input_list_of_lists)
        preprocess = CasePreprocessor(self.plans_manager, self.configuration_manager, self.dataset_json,
                                      self.verbose_preprocessing)
        return preprocessed(preprocess, list(zip(input_list_of_lists, seg_from_prev_stage_files or nothing,
                                                 output_filenames_truncated or nothing, strict=True)), num_processes)

    def predict_from_files_sequential(self, *args: Any, **kwargs: Any) -> Any:
        """As nnUNetPredictor's: everything in this process."""
        arguments = signature(nnUNetPredictor.predict_from_files_sequential).bind(self, *args, **kwargs).arguments
        arguments.pop('self')
        return self.predict_from_files(**arguments, num_processes_preprocessing=0, num_processes_segmentation_export=0)

    def predict_from_data_iterator(self, data_iterator: Any, save_probabilities: bool = False,
                                   num_processes_segmentation_export: int = default_num_processes) -> list[Any]:
        """As nnUNetPredictor's: files are written for items with an `ofile`, masks returned for those without.

        Raises:
            CasesFailed: at the end, if cases could not be predicted; they are in `failed`, the others are done.
            PredictionError: if the run ended before all others were done; what had failed until then is in `failed`.
            OSError: if files cannot be written; cases finished before are there.
        """
        results: list[Any] = []
        outputs: set[Path] = set()
        self.failed = {}
        if self._calibrated_for is not None and self._calibrated_for != self._as_in_validation():  # set since
            self._take_calibration()
        try:
            with ExportQueue(num_processes_segmentation_export) as queue:
                self._predict_all(data_iterator, save_probabilities, queue, outputs, results)
            results = [result.result() if isinstance(result, Future) else result for result in results]
        except BrokenProcessPool:
            raise PredictionError('A background process was killed, probably for lack of memory: use fewer with -npp '
                                  'and -nps. Finished cases are there; continue with --continue_prediction.') from None
        except OutputInUse as error:
            raise PredictionError(str(error)) from None
        finally:
            for output in outputs:
                if output.is_dir():
                    refresh_summary(output)
            compute_gaussian.cache_clear()
            empty_cache(self.device)
        if self.failed:
            raise CasesFailed(failure_message(self.failed, len(results)))
        return results

    def _predict_all(self, data_iterator: Any, save_probabilities: bool, queue: ExportQueue, outputs: set[Path],
                     results: list[Any]) -> None:
        """Predict item by item, into `results`; the folders in which files are written are added to `outputs`."""
        under_way: list[PendingCase] = []
        finished: list[Path] = []
        for item in tqdm(data_iterator, 'Cases', self._num_cases, disable=not self.allow_tqdm):
            if isinstance(item, FailedCase):
                results.append(None)
                self._record_failure(item, outputs)
                continue
            data, properties, file = item['data'], item['data_properties'], item['ofile']
            if isinstance(data, str):  # as nnU-Net's: a temporary file
                file_of_data, data = Path(data), torch.from_numpy(np.load(data))
                file_of_data.unlink()
            if file is None:
                results.append(queue.submit(
                    convert_predicted_logits_to_segmentation_with_correct_shape,
                    as_numpy(self.predict_logits_from_preprocessed_data(data)), self.plans_manager,
                    self.configuration_manager, self.label_manager, properties, save_probabilities))
                continue
            results.append(None)
            outputs.add(Path(file).parent)
            logger.info('\nPredicting %s:', Path(file).name)
            for remark in item.get('remarks', ()):
                logger.warning('Look at %s: %s.', Path(file).name, remark)
            case = PendingCase(self._export(Path(file), properties, save_probabilities), Path(file).parent,
                               self.num_samples, len(self.fold_settings), self.settings_for_summary(),
                               self.calibrated, self.ranking, queue, item.get('image'), item.get('remarks', ()))
            with self._isolate_failure(case, outputs):
                self._predict_case(case, data)
                under_way.append(case)
            for case in [case for case in under_way if case.done()]:
                under_way.remove(case)
                self._finish(case, outputs, finished)
        for case in under_way:
            self._finish(case, outputs, finished)
        for mask in finished:
            if not mask.is_file():
                raise PredictionError(f'{mask} was written and is not there any more, nor may others be: something '
                                      f'else deletes files in {mask.parent}. Predict again with --continue_prediction.')

    def _predict_case(self, case: PendingCase, data: torch.Tensor) -> None:
        """Predict a case and hand it over; nothing of it, as large as a volume, is there afterwards."""
        prediction = self.predict_volume(data, case.add_sample if self.outputs.samples else None, case.export.case,
                                         self.outputs.presegmentation)
        with self.threads_for(prediction.spread.mean.device):
            prediction.require_finite()
            case.add_prediction(prediction)

    def _finish(self, case: PendingCase, outputs: set[Path], finished: list[Path]) -> None:
        with self._isolate_failure(case, outputs):
            case.move_to_output()
            finished.append(case.output / (case.export.case + self.dataset_json['file_ending']))

    @contextmanager
    def _isolate_failure(self, case: PendingCase, outputs: set[Path]) -> Iterator[None]:
        """Within it a case fails alone if memory is not enough for it, or if the networks give no numbers for it."""
        try:
            yield
        except CASE_ERRORS as error:
            words = str(error).splitlines()[0] if str(error) else 'no more'
            if isinstance(error, UnusableLogits) or NNUNET_INF_ERROR in words:
                reason = f'the networks give NaN or infinite values for it ({words}): look at its intensities'
            elif lacks_memory(error):
                reason = (f'not enough memory for it ({words}): use fewer processes (-npp, -nps), --not_on_device, or '
                          f'a machine with more')
            else:
                raise
            case.discard()
            empty_cache(self.device)
            self._record_failure(FailedCase(str(case.output / case.export.case), reason), outputs)

    def _record_failure(self, failed: FailedCase, outputs: set[Path]) -> None:
        """Note that a case cannot be predicted. Where no files are written this ends the prediction."""
        if failed.output is None:
            raise PredictionError(failed.reason)
        output = Path(failed.output)
        outputs.add(output.parent)
        logger.error('\n%s is not predicted: %s', output.name, failed.reason)
        self.failed[output.name] = failed.reason
        files = self._files.get(output)
        write_failure(output.parent, output.name, failed.reason, None if files is None else files[0])


def failure_message(failed: Mapping[str, str], cases: int) -> str:
    """What is said at the end of a prediction in which some cases failed; `cases`: their number in all."""
    return f'{len(failed)} of {cases} cases could not be predicted, the others are done: {list_reasons(failed)}'


def list_reasons(failed: Mapping[str, str]) -> str:
    """Failed cases, each with its reason, for a sentence."""
    return '; '.join(f'{case} ({reason})' for case, reason in failed.items())
