"""PDDDPMTrainer: trains the denoiser that refines the user's own stock nnU-Net, within nnU-Net's hooks."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nnunet_pdddpm.diffusion.coding import harden, logits_to_probabilities, one_hot
from nnunet_pdddpm.diffusion.schedule import NUM_TIMESTEPS
from nnunet_pdddpm.files import writing
from nnunet_pdddpm.memory import MEMORY_ERRORS, lacks_memory
from nnunet_pdddpm.network.checkpoint import PRESEGMENTER, CheckpointError, check_weights, checksum, load_checkpoint
from nnunet_pdddpm.network.refiner import DiffusionDesign, NoisyBatch, Refiner
from nnunet_pdddpm.network.settings import PRESEGMENTER_VARIABLE, SamplingSettings, environment_overrides
from nnunet_pdddpm.training.averaging import average_weights, swap_parameters
from nnunet_pdddpm.training.finite import require_finite_loss
from nnunet_pdddpm.training.losses import DenoisingLoss
from nnunet_pdddpm.training.presegmenters import TrainingContext, checkpoint_file, held_out_folds, load_network
from nnunet_pdddpm.training.previous_stage import PreviousStage
from nnunet_pdddpm.training.warm_up import WarmUpPolyLRScheduler
from nnunet_pdddpm.tuning.choice import TuningError
from nnunet_pdddpm.tuning.report import NAME as SWEEP
from nnunet_pdddpm.tuning.report import Choice
from nnunet_pdddpm.tuning.tune import open_model, tune
from nnunet_pdddpm.versions import require_nnunet


class PDDDPMTrainer(nnUNetTrainer):
    """nnU-Net trainer of the denoiser; everything not written here is nnU-Net's own."""

    design = DiffusionDesign()
    network: nn.Module
    loss: nn.Module
    enable_deep_supervision: bool

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        require_nnunet()
        environment_overrides()  # a wrong value is refused before anything is written
        super().__init__(plans, configuration, fold, dataset_json, device)
        ### Some hyperparameters for you to fiddle with
        self.initial_lr = 5e-4
        self.weight_decay = 1e-2
        # share of the patches that show the denoiser the pre-segmentation itself, which is level 0; the others show it
        # the noised truth. With 0 the masks suffer; with 1 it is a second stage without diffusion
        self.presegmentation_share = 0.5
        # noise levels 1..t_max are trained, with a density that grows as t to this power (0: uniform), since at low
        # levels x_t gives the truth away. Sampling may start at any of them
        self.t_max = NUM_TIMESTEPS
        self.level_power = 2
        # sampling settings that go into the model: of the mask, and of the samples of nnUNetv2_pdddpm_predict
        self.sampling = SamplingSettings()
        self.sampling_of_samples = SamplingSettings(samples=8)
        # start from the stock model's weights, or from nnU-Net's initialisation
        self.warm_start = True
        # pre-segment each training case, where that is needed, by the stock model of the fold that held it out
        self.out_of_fold = True
        # the denoiser's weights are averaged with this decay for validation, saving and prediction
        self.averaging_decay = 0.999
        self.noise_seed = 12345
        # sampling settings are tuned on the validation cases after training, for at most this share of its time
        self.tuning_share = 0.1

        self.out_of_fold_presegmenters = nn.ModuleDict()  # by fold, as a string
        self.held_out_in: dict[str, int] = {}  # training case -> stock fold that held it out
        self.level_generator, self.noise_generator = torch.Generator(), torch.Generator(self.device)
        self._stock_checkpoint: Any = None
        self._restored = False
        self._previous_stage_told = False
        self._average_in_network = False

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
        self.refiner.configure(self.sampling, self.sampling_of_samples, self.t_max, self.label_manager.has_regions)
        self.refiner.presegmenter_checksum = checksum(self.refiner.state_dict(), PRESEGMENTER)
        self.mirror_axes = self._stock_checkpoint.get('inference_allowed_mirroring_axes')
        self.print_to_log_file(f'Pre-segmenter: {file} (another stock model is named by {PRESEGMENTER_VARIABLE}; '
                               f'-pretrained_weights is for the denoiser and takes a PDDDPM model)')

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
        """AdamW with warm-up: not worse than nnU-Net's SGD in any measurement, see docs/design.md."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, WarmUpPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss for logits of the clean mask; the mean squared error for predicted noise."""
        loss = super()._build_loss()
        self.full_resolution_loss = loss.loss if self.enable_deep_supervision else loss
        self.denoising_loss = DenoisingLoss(self.full_resolution_loss)
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
            self._embed_stock_model()
        self._stock_checkpoint = None
        self._first_epoch = self.current_epoch
        super().on_train_start()

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
            if not self._previous_stage_told:
                self.print_to_log_file(f'Previous stage: {folder}')
            self._previous_stage_told = True
        return training, validation

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's data sets; the stock models of the other folds are loaded for the training cases they held out."""
        dataset_tr, dataset_val = super().get_tr_and_val_datasets()
        if not self.shows_presegmentation:
            self.print_to_log_file('Training adds noise to the truth and needs no pre-segmentations.')
        elif self.out_of_fold:
            self._load_out_of_fold_presegmenters(list(dataset_tr.identifiers))
        return dataset_tr, dataset_val

    @property
    def shows_presegmentation(self) -> bool:
        """Whether pre-segmentations have a part in training batches."""
        return self.presegmentation_share > 0 or self.presegments_every_patch

    @property
    def presegments_every_patch(self) -> bool:
        """Whether also in those with noise on the truth: as an input, or in the place of labels to be ignored."""
        return self.design.condition_on_presegmentation or self.label_manager.has_ignore_label

    def _load_out_of_fold_presegmenters(self, cases: Sequence[str]) -> None:
        splits_file = join(self.preprocessed_dataset_folder_base, 'splits_final.json')
        splits = load_json(splits_file) if isfile(splits_file) else []
        folder = self.context().model_folder
        trained = [fold for fold in range(len(splits)) if checkpoint_file(folder, fold).is_file()]
        self.held_out_in = held_out_folds(cases, splits, self.fold, trained)
        for fold in sorted(set(self.held_out_in.values())):
            self.out_of_fold_presegmenters[str(fold)] = self.context().stock_network(fold).to(self.device)
        in_fold = [case for case in cases if case not in self.held_out_in]
        folds = sorted(map(int, self.out_of_fold_presegmenters))
        self.print_to_log_file(f'{len(self.held_out_in)} of {len(cases)} training cases are pre-segmented by the '
                               f'stock model that held them out (folds {folds}).')
        if in_fold:
            missing = sorted(set(range(len(splits))) - set(trained))
            self.print_to_log_file(f'{len(in_fold)} training cases are pre-segmented by a stock model that was trained '
                                   f'on them, since no other does (stock folds not trained: {missing}): '
                                   f'{", ".join(in_fold)}')

    def on_train_epoch_start(self) -> None:
        """As nnU-Net's; the noise starts at the same place in this epoch whether training was interrupted or not."""
        super().on_train_epoch_start()
        self.refiner.interval_sd.zero_()  # of weights that change now
        seed = (self.noise_seed * 100_003 + self.current_epoch) * 1_009 + self.local_rank
        self.level_generator.manual_seed(seed)
        self.noise_generator.manual_seed(seed + 500)
        self.iteration = 0  # of this epoch

    def train_step(self, batch: dict) -> dict:
        """Pre-segment and noise the batch, then nnU-Net's step on it."""
        target = batch['target']
        full_resolution = (target[0] if isinstance(target, list) else target).to(self.device, non_blocking=True)
        noisy, noise = self.make_noisy_batch(batch['data'].to(self.device, non_blocking=True), full_resolution,
                                             batch['keys'])
        if self.design.parameterisation == 'eps':
            target = noise
        del noise  # as large as the mask: with a hundred classes gigabytes
        losses = super().train_step({**batch, 'data': noisy, 'target': target})
        require_finite_loss(losses['loss'], self.iteration, self.current_epoch, batch['keys'], Path(self.output_folder))
        self.iteration += 1
        self.averaged.update_parameters(self.refiner.denoiser)
        return losses

    @torch.no_grad()
    def make_noisy_batch(self, image: Tensor, target: Tensor, keys: Sequence[str]) -> tuple[NoisyBatch, Tensor]:
        """A training batch for the denoiser.

        Args:
            image: (B, image channels, ...) augmented patches.
            target: (B, 1, ...) label maps, or (B, regions (+ 1 for the ignore label), ...) region masks.
            keys: (B,) the cases they come from.

        Returns:
            The batch, and the noise (B, C, ...) in it.
        """
        coding, regions = self.design.coding, self.label_manager.has_regions
        t = self.draw_levels(len(image))
        shown = [i for i in range(len(image)) if self.presegments_every_patch or t[i] == 0]
        logits = torch.zeros((len(image), self.label_manager.num_segmentation_heads, *image.shape[2:]),
                             device=self.device)
        if shown:  # in the others the pre-segmentation plays no part
            logits[shown] = self.presegment(image[shown], [keys[i] for i in shown]).float()
        x_pre = coding.encode(harden(logits, regions))
        x0 = self._coded_target(target, x_pre)
        noise = torch.randn(x_pre.shape, generator=self.noise_generator, device=self.device)
        clean = torch.where((t > 0).to(self.device).reshape(-1, *[1] * (x0.ndim - 1)), x0, x_pre)
        del x0
        self.denoising_loss.noisy = t > 0
        x = self.refiner.process(0.0).marginal(clean, x_pre, t, noise)
        seen = logits if self.design.condition_on_presegmentation else logits[:, :0]
        return NoisyBatch(image, x, t.to(self.device), logits_to_probabilities(seen, regions)), noise

    def draw_levels(self, number: int) -> Tensor:
        """(number,) noise levels of training patches in 1..t_max, 0 where the pre-segmentation is shown."""
        u = torch.rand(number, generator=self.level_generator)
        t = (self.t_max * u ** (1 / (self.level_power + 1))).ceil().clamp(min=1).long()
        t[torch.rand(number, generator=self.level_generator) < self.presegmentation_share] = 0
        return t

    def presegment(self, image: Tensor, keys: Sequence[str]) -> Tensor:
        """Stock logits (B, C, ...) of patches, each by the stock model of the fold that held its case out."""
        folds = [self.held_out_in.get(str(key)) for key in keys]
        logits: Tensor | None = None
        with torch.autocast('cuda', enabled=self.device.type == 'cuda'):
            for fold in set(folds):
                network = self.refiner.presegmenter if fold is None else self.out_of_fold_presegmenters[str(fold)]
                index = [i for i, f in enumerate(folds) if f == fold]
                of_fold = network(image[index])
                if logits is None:
                    logits = of_fold.new_empty((len(folds), *of_fold.shape[1:]))
                logits[index] = of_fold
        assert logits is not None
        return logits

    def _coded_target(self, target: Tensor, x_pre: Tensor) -> Tensor:
        """The truth as coded channels; where it is to be ignored, the pre-segmentation stands in."""
        ignore = self.label_manager.ignore_label
        if self.label_manager.has_regions:
            masks = target[:, :x_pre.shape[1]].float()
            ignored = target[:, -1:].bool() if ignore is not None else None
        else:
            ignored = target == ignore if ignore is not None else None
            masks = one_hot(target if ignored is None else target.masked_fill(ignored, 0), x_pre.shape[1])
        x0 = self.design.coding.encode(masks)
        return x0 if ignored is None else torch.where(ignored, x_pre, x0)

    # the end of training --------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """As nnU-Net's; then the sampling settings are tuned, with which nnU-Net goes on to validate."""
        super().on_train_end()
        # The other ranks wait for hours, if need be, which NCCL does not allow; gloo does.
        group: Any = dist.new_group(backend='gloo', timeout=timedelta(days=30)) if self.is_ddp else None
        choice = [self.tune_sampling() if self.local_rank == 0 else None]
        if group is not None:
            dist.broadcast_object_list(choice, 0, group)
            dist.destroy_process_group(group)
        if choice[0] is not None:
            self.refiner.configure(choice[0].mask, choice[0].samples, int(self.refiner.t_max),
                                   self.label_manager.has_regions, choice[0].interval_sd)

    def tune_sampling(self) -> Choice | None:
        """Tune the sampling settings of the saved model; None, with a line in the log, if they stay as they are."""
        starts, ends = (self.logger.get_value(f'epoch_{of}_timestamps', step=None) for of in ('start', 'end'))
        seconds = self.tuning_share * sum(end - start for start, end in zip(starts, ends, strict=False))
        stay = 'The sampling settings stay as they are: '
        if self.tuning_share == 0:
            self.print_to_log_file(f'{stay}tuning_share is 0.')
        elif self.disable_checkpointing:
            self.print_to_log_file(f'{stay}there is no checkpoint to tune.')
        elif self.current_epoch == self._first_epoch and Path(self.output_folder, f'{SWEEP}.json').is_file():
            self.print_to_log_file(f'{stay}they were tuned when training ended.')
        else:
            # of an earlier training: --c would take it for this one's, if tuning is killed
            Path(self.output_folder, f'{SWEEP}.json').unlink(missing_ok=True)
            try:
                predictor = open_model(Path(self.output_folder_base), self.fold, self.device)
                return tune(self, predictor, seconds, log=self.print_to_log_file)
            except (TuningError, CheckpointError, OSError) as error:
                self.print_to_log_file(f'{stay}{error}')
            except MEMORY_ERRORS as error:
                if not lacks_memory(error):
                    raise
                self.print_to_log_file(f'{stay}there is not enough memory to tune them ({error}).')
        return None

    # validation -----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net's, with the averaged weights in the network until the epoch's end."""
        super().on_validation_epoch_start()
        self._swap_average()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on the refined output, and once more on the stock output of the same patches."""
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
        """As nnU-Net's, with the averaged weights."""
        self._swap_average()
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._swap_average()

    @contextmanager
    def _full_resolution(self) -> Iterator[None]:
        """Within it nnU-Net's code sees a trainer without deep supervision: sampling has no coarser outputs."""
        before = self.enable_deep_supervision, self.loss, self.refiner.decoder.deep_supervision
        self.enable_deep_supervision, self.loss = False, self.full_resolution_loss
        self.refiner.decoder.deep_supervision = False
        try:
            yield
        finally:
            self.enable_deep_supervision, self.loss, self.refiner.decoder.deep_supervision = before

    # checkpoints ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the averaged weights in it, under its name only once it is whole."""
        partial = Path(filename + '.partial')
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
        stored = None
        if isinstance(filename_or_checkpoint, str):
            weights = load_checkpoint(Path(filename_or_checkpoint), 'checkpoint')['network_weights']
            stored = check_weights(weights, f'The checkpoint {filename_or_checkpoint}')
            del weights
        super().load_checkpoint(filename_or_checkpoint)
        self.refiner.presegmenter_checksum = stored  # nnU-Net's loading drops it
        self.refiner.use_stored_settings()  # overrides are for prediction
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
        self.averaged.module.load_state_dict(self.refiner.denoiser.state_dict())
        self.averaged.n_averaged.copy_(state.pop('averaged_updates'))
        self.refiner.denoiser.load_state_dict(state.pop('denoiser_before_averaging'))
