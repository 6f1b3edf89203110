"""PDDDPMTrainer: trains the denoiser that refines the user's own stock nnU-Net, within nnU-Net's hooks."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nnunet_pdddpm.diffusion.coding import harden, one_hot
from nnunet_pdddpm.diffusion.levels import lowest_log_snr
from nnunet_pdddpm.diffusion.measuring import LevelMeter, kronecker_sequence, training_levels
from nnunet_pdddpm.diffusion.process import q_sample
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.files import writing
from nnunet_pdddpm.image_files import images_in
from nnunet_pdddpm.labels import label_channels
from nnunet_pdddpm.logs import log_forwarded_to
from nnunet_pdddpm.memory import MEMORY_ERRORS, lacks_memory
from nnunet_pdddpm.network.checkpoint import PRESEGMENTER, CheckpointError, check_weights, checksum, load_checkpoint
from nnunet_pdddpm.network.refiner import DiffusionDesign, NoisyBatch, Refiner
from nnunet_pdddpm.network.seen import Seen, stored_seen
from nnunet_pdddpm.network.settings import (
    PRESEGMENTER_VARIABLE,
    SamplingSettings,
    environment_ignored,
    environment_overrides,
)
from nnunet_pdddpm.network.state import LEVELS, check_version, stored_settings
from nnunet_pdddpm.texts import abbreviated
from nnunet_pdddpm.training.averaging import average_weights, swap_parameters
from nnunet_pdddpm.training.finite import LossWatch
from nnunet_pdddpm.training.held_out import held_out_cases
from nnunet_pdddpm.training.losses import DenoisingLoss
from nnunet_pdddpm.training.presegmenters import TrainingContext, checkpoint_file, load_network
from nnunet_pdddpm.training.previous_stage import PreviousStage
from nnunet_pdddpm.training.split import check_split
from nnunet_pdddpm.training.warm_up import WarmUpPolyLRScheduler
from nnunet_pdddpm.tuning.calibration import Measured, cases_to_calibrate, measure, open_for_calibration, store_measured
from nnunet_pdddpm.tuning.cases import ValidationCases, exclude_seen_cases
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.fold import FoldData
from nnunet_pdddpm.tuning.report import SWEEP
from nnunet_pdddpm.tuning.tune import open_model, tune
from nnunet_pdddpm.versions import require_nnunet


class PDDDPMTrainer(nnUNetTrainer):
    """nnU-Net trainer of the denoiser; everything not written here is nnU-Net's own."""

    design = DiffusionDesign()
    epochs: int | None = None
    """Number of them, if not nnU-Net's."""
    network: nn.Module
    loss: nn.Module
    enable_deep_supervision: bool

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        require_nnunet()
        environment_overrides()  # a wrong value is refused before anything is written
        super().__init__(plans, configuration, fold, dataset_json, device)
        ### Some hyperparameters for you to fiddle with
        self.initial_lr = 1e-3
        self.weight_decay = 1e-2
        if self.epochs is not None:
            self.num_epochs = self.epochs
        # share of the patches that show the denoiser no mask at all; the others show the noised truth
        self.blind_share = 0.5
        # sampling settings that go into the model until they are tuned
        self.sampling = SamplingSettings()
        # start from the stock model's weights, or from nnU-Net's initialisation
        self.warm_start = True
        # the denoiser's weights are averaged with this decay for validation, saving and prediction
        self.averaging_decay = 0.999
        self.noise_seed = 12345
        # sampling settings are tuned on the validation cases after training, for at most this share of its time
        self.tuning_share = 0.1

        self.meter = LevelMeter(lowest_log_snr(math.prod(self.configuration_manager.patch_size),
                                               self.label_manager.num_segmentation_heads))
        self.level_generator, self.noise_generator = torch.Generator(), torch.Generator(self.device)
        self.loss_watch = LossWatch(Path(self.output_folder), self.print_to_log_file)
        self._stock_checkpoint: Any = None
        self._group: Any = None  # see `_make_patient_group`
        self._restored = self._pretrained = False
        self._previous_stage_logged = False
        self._average_in_network = False
        self._checkpoint = FINAL_CHECKPOINT  # whose weights are in the network when training has ended

    # building -------------------------------------------------------------------------------------------------------

    @classmethod
    def build_network_architecture(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        """The refiner around two networks of the plans. Called by nnU-Net in training and in prediction."""
        require_nnunet()
        stock, unet = (nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, deep_supervision)
            for deep_supervision in (False, enable_deep_supervision))
        if not enable_deep_supervision:  # DDP asks for a gradient of every parameter that requires one
            unet.decoder.seg_layers[:-1].requires_grad_(False)
        return Refiner(stock, unet, num_output_channels, cls.design)

    def initialize(self) -> None:
        """Find and check the stock model first, then initialise as nnU-Net does and put the stock weights in."""
        if not self._restored:
            self._stock_checkpoint = self.context().stock_checkpoint(self.fold)
        super().initialize()
        if not self._restored:
            self._embed_stock_model()
            if self.warm_start:
                self.refiner.denoiser.warm_start(self._stock_checkpoint['network_weights'])
        if isinstance(self.network, DistributedDataParallel):
            # The buffers are settings, alike on all ranks. DDP would broadcast them at the first tile, and wait for
            # ever where a rank has none: --val with fewer cases than GPUs.
            self.network.broadcast_buffers = False
        self.averaged = AveragedModel(self.refiner.denoiser, multi_avg_fn=average_weights(self.averaging_decay))
        self.optimizer.register_state_dict_post_hook(self._add_weights_before_averaging)
        self.optimizer.register_load_state_dict_pre_hook(self._take_weights_before_averaging)

    def _embed_stock_model(self) -> None:
        file = checkpoint_file(self.context().model_folder, self.fold)
        load_network(self.refiner.presegmenter, self._stock_checkpoint['network_weights'], file)
        self.refiner.configure(self.sampling, self.label_manager.has_regions)
        self.store_levels()
        self.refiner.presegmenter_checksum = checksum(self.refiner.state_dict(), PRESEGMENTER)
        self.mirror_axes = self._stock_checkpoint.get('inference_allowed_mirroring_axes')
        self.print_to_log_file(f'Pre-segmenter: {file} (another stock model is named by {PRESEGMENTER_VARIABLE}; '
                               f'-pretrained_weights is for the denoiser and takes a PDDDPM model with as many labels)')

    @property
    def refiner(self) -> Refiner:
        """The network without the wrappers of DDP and torch.compile."""
        network: Any = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        network = network._orig_mod if isinstance(network, OptimizedModule) else network
        return cast(Refiner, network)

    def context(self) -> TrainingContext:
        """What a stock model has to fit."""
        return TrainingContext(self.plans_manager.plans, self.configuration_name, self.dataset_json)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmUpPolyLRScheduler]:
        """AdamW, and nnU-Net's polynomial learning rate with a gentle first epoch."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, WarmUpPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        """The cross-entropy part of nnU-Net's loss for logits of the clean mask, and for validation; the mean squared
        error for predicted noise."""
        loss = super()._build_loss()
        full_resolution = loss.loss if self.enable_deep_supervision else loss
        self.denoising_loss, self.validation_loss = DenoisingLoss(full_resolution), DenoisingLoss(full_resolution)
        if self.design.parameterisation == 'eps':
            return nn.MSELoss()
        if not self.enable_deep_supervision:
            return self.denoising_loss
        loss.loss = self.denoising_loss
        return loss

    # data and training ----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """As nnU-Net's. `-pretrained_weights` are for the denoiser: the pre-segmenter is put back."""
        if not self.was_initialized:
            self.initialize()
        elif not self._restored:
            self._pretrained = True
            self._embed_stock_model()
        self._stock_checkpoint = None
        self._note_cases()
        if self.current_epoch == 0 and (earlier := Path(self.output_folder, FINAL_CHECKPOINT)).is_file():
            self.print_to_log_file(f'{earlier} is of an earlier training: until this one ends, predictions are made '
                                   f'with it, and --c takes it for the end of this one.')
        self._first_epoch = self.current_epoch
        self._make_patient_group()  # now: where it cannot be made, training ends before it has begun
        super().on_train_start()

    def _make_patient_group(self) -> None:
        """With DDP, once: ranks may wait for each other in it for hours, which NCCL does not allow; gloo does."""
        if self.is_ddp and self._group is None:
            self._group = dist.new_group(backend='gloo', timeout=timedelta(days=30))

    def _note_cases(self) -> None:
        """Note what the model is trained on; refuse, or log, validation cases that it has seen: `check_split`."""
        training, validation = self.do_split()
        if not self._restored:
            stock_fold = checkpoint_file(self.context().model_folder, self.fold).parent
            self.refiner.seen = Seen.from_names(None if self._pretrained else [],
                                                held_out_cases(stock_fold, self.dataset_json['file_ending']))
        if self.fold != 'all':
            for line in check_split(self.refiner.seen, training, validation):
                self.print_to_log_file(line)
        self.refiner.seen = self.refiner.seen.with_training_cases(training)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """As nnU-Net's, but mirroring as the stock model was trained: it sees the same patches."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = self.mirror_axes
        return rotation, dummy_2d, initial_patch_size, self.mirror_axes

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net's; the cases say which predictions of the previous stage a cascade can use."""
        training, validation = super().do_split()
        if self.is_cascaded:
            stage = PreviousStage(self.configuration_manager.previous_stage_name, self.context(), type(self).__name__)
            folder = stage.complete_folder({*training, *validation}, self.dataset_class.get_identifiers)
            self.folder_with_segs_from_previous_stage = str(folder)
            if not self._previous_stage_logged:
                self.print_to_log_file(f'Previous stage: {folder}')
            self._previous_stage_logged = True
        return training, validation

    def on_train_epoch_start(self) -> None:
        """As nnU-Net's; the noise starts at the same place in this epoch whether training was interrupted or not."""
        super().on_train_epoch_start()
        for measured in (self.refiner.calibration, self.refiner.quality):  # of weights that change now
            measured.zero_()
        seed = (self.noise_seed * 100_003 + self.current_epoch) * 1_009 + self.local_rank
        self.level_generator.manual_seed(seed)
        self.noise_generator.manual_seed(seed + 500)
        self.level_offset, self.blind_offset = torch.rand(2, generator=self.level_generator).tolist()
        self.iteration = self.patches = self.noisy_patches = 0  # of this epoch

    def train_step(self, batch: dict) -> dict:
        """Noise the batch, nnU-Net's step on it, and note how much its noise levels left undecided."""
        target = batch['target']
        full_resolution = (target[0] if isinstance(target, list) else target).to(self.device, non_blocking=True)
        noisy, noise = self.make_noisy_batch(batch['data'].to(self.device, non_blocking=True), full_resolution)
        if self.design.parameterisation == 'eps':
            target = noise
        del noise  # as large as the mask: with a hundred classes gigabytes
        losses = super().train_step({**batch, 'data': noisy, 'target': target})
        self.loss_watch.check(losses['loss'], self.iteration, self.current_epoch, batch['keys'],
                              None if self.grad_scaler is None else self.network.parameters())
        self.measure_levels(noisy.log_snr)
        self.iteration += 1
        self.averaged.update_parameters(self.refiner.denoiser)
        return losses

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As nnU-Net's, without the losses that are no numbers."""
        super().on_train_epoch_end([output for output in train_outputs if np.isfinite(output['loss'])] or train_outputs)

    @torch.no_grad()
    def make_noisy_batch(self, image: Tensor, target: Tensor) -> tuple[NoisyBatch, Tensor]:
        """A training batch for the denoiser: noise on the truth, or no mask at all.

        Args:
            image: (B, image channels, ...) augmented patches.
            target: (B, 1, ...) label maps, or (B, regions (+ 1 for the ignore label), ...) region masks.

        Returns:
            The batch, and the noise (B, C, ...) in it.
        """
        blind = self.draw_blind(len(image))
        log_snr = torch.full((len(image),), self.refiner.blind_level)
        log_snr[~blind] = self.draw_levels(int((~blind).sum()))
        x0 = self._coded_target(image, target)
        noise = torch.randn(x0.shape, generator=self.noise_generator, device=self.device)
        x = q_sample(x0, log_snr, noise)
        x[blind.to(x.device)] = 0
        self.denoising_loss.set_noisy(~blind)
        return NoisyBatch(image, x, log_snr.to(self.device)), noise

    def draw_blind(self, number: int) -> Tensor:
        """(number,) bool, which patches of a batch show no mask: as many as the share asks for over the batches."""
        before = math.floor(self.patches * self.blind_share + self.blind_offset)
        self.patches += number
        due = math.floor(self.patches * self.blind_share + self.blind_offset)
        blind = torch.zeros(number, dtype=torch.bool)
        # at random places: nnU-Net's last ones of a batch are patches that hold foreground
        blind[torch.randperm(number, generator=self.level_generator)[:due - before]] = True
        return blind

    def draw_levels(self, number: int) -> Tensor:
        """(number,) log SNRs of noisy patches, even in the share of uncertainty that they leave: `training_levels`."""
        first, self.noisy_patches = self.noisy_patches, self.noisy_patches + number
        return training_levels(self.meter.table(), kronecker_sequence(first, number, self.level_offset))

    def measure_levels(self, log_snr: Tensor) -> None:
        """Note the cross-entropy at the levels (B,) of the last batch, over all ranks."""
        measured, noisy = self.denoising_loss.measured, self.denoising_loss.noisy
        sums = torch.zeros(2, len(self.meter.log_snr))
        if measured is not None and noisy is not None:
            sums = self.meter.sums(log_snr.cpu()[noisy], measured.float().cpu())
        if self.is_ddp:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        self.meter.update(sums.cpu())

    def store_levels(self) -> None:
        """Put the table of levels, as measured so far, into the network."""
        if not self.design.paper_levels:
            self.refiner.store_levels(self.meter.table(), self.meter.cross_entropy, self.meter.count)

    def _coded_target(self, image: Tensor, target: Tensor) -> Tensor:
        """The truth as coded channels; where it is to be ignored, the stock model's mask stands in."""
        ignore, channels = self.label_manager.ignore_label, self.label_manager.num_segmentation_heads
        if self.label_manager.has_regions:
            masks = target[:, :channels].float()
            ignored = target[:, -1:].bool() if ignore is not None else None
        else:
            ignored = target == ignore if ignore is not None else None
            masks = one_hot(target if ignored is None else target.masked_fill(ignored, 0), channels)
        if ignored is not None and bool(ignored.any()):
            with torch.autocast('cuda', enabled=self.device.type == 'cuda'):
                stock = harden(self.refiner.presegmenter(image).float(), self.label_manager.has_regions)
            masks = torch.where(ignored, stock, masks)
        return self.design.coding.encode(masks)

    # the end of training --------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """As nnU-Net's; then the sampling settings are tuned, with which nnU-Net goes on to validate."""
        super().on_train_end()
        self._checkpoint = FINAL_CHECKPOINT
        choice = [self.tune_sampling() if self.local_rank == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(choice, 0, self._group)
        if choice[0] is not None:
            self.refiner.configure(choice[0], self.label_manager.has_regions)

    def tune_sampling(self) -> SamplingSettings | None:
        """Tune the sampling settings of the saved model; None, with a line in the log, if they stay as they are."""
        starts, ends = (self.logger.get_value(f'epoch_{event}_timestamps', step=None) for event in ('start', 'end'))
        seconds = self.tuning_share * sum(end - start for start, end in zip(starts, ends, strict=False))
        stay = 'The sampling settings stay as they are: '
        if self.tuning_share == 0:
            self.print_to_log_file(f'{stay}tuning_share is 0.')
        elif self.disable_checkpointing:
            self.print_to_log_file(f'{stay}there is no checkpoint to tune.')
        elif self.current_epoch == self._first_epoch and self._is_tuned():
            self.print_to_log_file(f'{stay}they were tuned when training ended.')
        else:
            for ending in ('json', 'csv', 'png'):  # of an earlier training: they would be taken for this one's
                Path(self.output_folder, f'{SWEEP}.{ending}').unlink(missing_ok=True)
            try:
                with log_forwarded_to(self.print_to_log_file):
                    predictor = open_model(Path(self.output_folder_base), self.fold, self.device)
                    return tune(FoldData.from_trainer(self), predictor, seconds)
            except (TuningError, CheckpointError) as error:
                self.print_to_log_file(f'{stay}{error}')
            except OSError as error:  # perhaps after the settings were stored, before its files were
                self.print_to_log_file(f'Tuning ended with an error ({error}). The sampling settings are those that '
                                       f'{self._checkpoint} holds now.')
                checkpoint = load_checkpoint(Path(self.output_folder, self._checkpoint), 'PDDDPM model')
                return stored_settings(checkpoint['network_weights'])
            except MEMORY_ERRORS as error:
                if not lacks_memory(error):
                    raise
                self.print_to_log_file(f'{stay}there is not enough memory to tune them ({error}). With more of it '
                                       f'nnUNetv2_pdddpm_tune does so.')
        return None

    def _is_tuned(self) -> bool:
        """Whether the settings in the model are those that the sweep in its folder chose: it may be of another one."""
        try:
            chosen = json.loads(Path(self.output_folder, f'{SWEEP}.json').read_text())['chosen']
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return chosen == asdict(self.refiner.settings)

    # validation -----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net's, with the averaged weights in the network until the epoch's end."""
        super().on_validation_epoch_start()
        self._swap_average()
        self.store_levels()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on the refined output, and once more on the stock output of the same patches; the loss is the
        cross-entropy part of nnU-Net's, whatever the loss of training."""
        with self._full_resolution():
            target = batch['target'][0] if isinstance(batch['target'], list) else batch['target']
            stock_batch = {**batch, 'target': target.clone()}  # nnU-Net's step writes into its target
            refined = super().validation_step({**batch, 'target': target})
            refined_network, self.network = self.network, self.refiner.presegmenter
            try:
                stock = super().validation_step(stock_batch)
            finally:
                self.network = refined_network
        return {**refined, **{f'stock_{k}': v for k, v in stock.items()}}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net's, and the stock Dice on the same patches in the log."""
        self._swap_average()
        super().on_validation_epoch_end(val_outputs)
        collated = collate_outputs(val_outputs)
        counts = np.stack([collated[f'stock_{k}_hard'].sum(0) for k in ('tp', 'fp', 'fn')])
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, counts)
            counts = np.sum(gathered, 0)
        tp, fp, fn = counts
        with np.errstate(invalid='ignore'):
            dice = 2 * tp / (2 * tp + fp + fn)
        self.print_to_log_file('Stock pseudo dice on the same patches', [np.round(d, 4) for d in dice])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net's, with the averaged weights; then the intervals of volumes are calibrated on the same cases."""
        if self.fold != 'all' and (leak := self.refiner.seen.leaks(self.do_split()[1])):
            self.print_to_log_file(f'WARNING: by the present splits_final.json {leak}. The Dice of this validation is '
                                   f'not of held-out cases alone.')
        foreign = self._foreign_masks()
        if foreign:
            self.print_to_log_file(f'WARNING: {Path(self.output_folder, "validation")} holds {len(foreign)} masks of '
                                   f'cases that this split does not validate on ({abbreviated(foreign)}): they are of '
                                   f'an earlier training, and summary.json there counts them. Take them away and '
                                   f'validate again (--val).')
        self._make_patient_group()
        self._swap_average()
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._swap_average()
        self.calibrate_volumes()

    def _foreign_masks(self) -> list[str]:
        """Names of masks in the folder of the validation that this one does not write."""
        folder, ending = Path(self.output_folder, 'validation'), self.dataset_json['file_ending']
        mine = {f'{case}{ending}' for case in self.do_split()[1]}
        return [file.name for file in images_in(folder, ending) if file.name not in mine] if folder.is_dir() else []

    def calibrate_volumes(self) -> None:
        """Predict the validation cases as `nnUNetv2_pdddpm_predict` does, and keep in the checkpoint how their volumes
        compare with the true ones, and by what their masks can be sorted."""
        file = Path(self.output_folder, self._checkpoint)
        if self.disable_checkpointing or not file.is_file():
            return self.print_to_log_file('The intervals of volumes are not calibrated: there is no checkpoint of this '
                                          'training.')
        scores: list[Any] = [self._measure_own_share(file)]
        if self._group is not None:
            mine, scores = scores[0], [None] * dist.get_world_size()
            dist.all_gather_object(scores, mine, self._group)
        if any(isinstance(score, str) for score in scores):
            reason = next(score for score in scores if isinstance(score, str))
            return self.print_to_log_file(f'The intervals of volumes are not calibrated: {reason}')
        if self.local_rank == 0:
            volumes, quality, names = zip(*scores, strict=True)
            store_measured(file, Measured(torch.cat(volumes), torch.cat(quality), sum(names, [])),
                           label_channels(self.dataset_json, self.plans_manager), self.print_to_log_file)

    def _measure_own_share(self, file: Path) -> Measured | str:
        """Scores of this process's share of the validation cases; or why there are none."""
        try:
            cases = ValidationCases(FoldData.from_trainer(self))
            predictor = open_for_calibration(file.parents[1], self.fold, self.device, file.name)
            exclude_seen_cases(cases, predictor.list_of_parameters[0], self.print_to_log_file)
            names = cases_to_calibrate(cases.names)
            share = (self.local_rank, dist.get_world_size()) if self.is_ddp else (0, 1)
            with log_forwarded_to(self.print_to_log_file):
                return measure(predictor, cases, names, *share)
        except (TuningError, CheckpointError) as error:
            return str(error)
        except MEMORY_ERRORS as error:
            if not lacks_memory(error):
                raise
            return f'there is not enough memory ({error}). With more of it nnUNetv2_pdddpm_tune calibrates them.'

    @contextmanager
    def _full_resolution(self) -> Iterator[None]:
        """Within it nnU-Net's code sees a trainer without deep supervision: sampling has no coarser outputs."""
        before = self.enable_deep_supervision, self.loss, self.refiner.decoder.deep_supervision
        self.enable_deep_supervision, self.loss = False, self.validation_loss
        self.refiner.decoder.deep_supervision = False
        try:
            yield
        finally:
            self.enable_deep_supervision, self.loss, self.refiner.decoder.deep_supervision = before

    # checkpoints ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the averaged weights in it, under its name only once it is whole."""
        partial = Path(filename + '.partial')
        self.store_levels()
        self._swap_average()
        try:
            check_weights(self.refiner.state_dict(), 'The network in training', self.refiner.presegmenter_checksum)
            with writing(partial.parent):
                super().save_checkpoint(str(partial))
        except OSError:
            partial.unlink(missing_ok=True)  # it would only keep the disk full
            raise
        finally:
            self._swap_average()
        if self.local_rank == 0 and not self.disable_checkpointing:
            os.replace(partial, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As nnU-Net's. The pre-segmenter comes from the checkpoint: no stock model need be there."""
        self._restored = True
        stored, seen = None, Seen()
        if isinstance(filename_or_checkpoint, str):
            self._checkpoint = Path(filename_or_checkpoint).name
            weights = load_checkpoint(Path(filename_or_checkpoint), 'checkpoint')['network_weights']
            check_version(weights, f'The checkpoint {filename_or_checkpoint}')
            stored = check_weights(weights, f'The checkpoint {filename_or_checkpoint}')
            seen = stored_seen(weights)
            del weights
        with environment_ignored():
            super().load_checkpoint(filename_or_checkpoint)
        self.refiner.presegmenter_checksum, self.refiner.seen = stored, seen  # nnU-Net's loading drops them
        if not self.design.paper_levels:
            self.meter.restore(*(getattr(self.refiner, name) for name in LEVELS[2:]))
        self.mirror_axes = self.inference_allowed_mirroring_axes

    def _swap_average(self) -> None:
        swap_parameters(self.refiner.denoiser, self.averaged.module)
        self._average_in_network = not self._average_in_network

    def _add_weights_before_averaging(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """The optimizer's state holds the weights it moves; the checkpoint's network weights are their average."""
        moved = self.averaged.module if self._average_in_network else self.refiner.denoiser
        state['denoiser_before_averaging'] = moved.state_dict()
        state['averaged_updates'] = self.averaged.n_averaged.clone()

    def _take_weights_before_averaging(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        for of_parameter in state['state'].values():  # nnU-Net loads to the GPU; AdamW would wait for each count there
            of_parameter['step'] = of_parameter['step'].cpu()
        self.averaged.module.load_state_dict(self.refiner.denoiser.state_dict())
        self.averaged.n_averaged.copy_(state.pop('averaged_updates'))
        self.refiner.denoiser.load_state_dict(state.pop('denoiser_before_averaging'))
