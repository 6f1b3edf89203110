"""nnU-Net's predictor, sampling a preprocessed image as a whole: without files, see `predictor.PDDDPMPredictor`."""
from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunet_pdddpm.cpu import available_cpus, cpu_has_bfloat16, threads
from nnunet_pdddpm.diffusion.coding import LARGEST_LOGIT, probabilities_to_logits
from nnunet_pdddpm.diffusion.drawing import drawn_logits, hard_mask
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.inference.chunks import chunks, in_chunks, inside
from nnunet_pdddpm.inference.counting import VoxelCounter
from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.inference.model_folder import check_model_file, check_model_folder
from nnunet_pdddpm.inference.quality import QualityMeter
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume import Volume, VolumePrediction
from nnunet_pdddpm.inference.volume_memory import free_bytes, tile_bytes, volume_bytes
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.memory import lacks_memory
from nnunet_pdddpm.network.refiner import BlindNetwork, Refiner
from nnunet_pdddpm.network.settings import SamplingSettings, Value, environment_ignored, environment_overrides, override
from nnunet_pdddpm.network.state import stored_settings

logger = logging.getLogger(__name__)

OnSample = Callable[[int, Tensor], None]
"""Called with the number of a sample and its logits (C, Z, Y, X) float16 in main memory, once it is drawn.

Their argmax (regions: sign) is the sample's mask. The largest logit of classes is 0."""
NO_TRAINER = 'Could not find requested nnunet trainer '
"""How nnU-Net's words begin, before the name of the class."""
DOES_NOT_FIT = 'The volume does not fit on the device: its arrays are kept in main memory'


class VolumePredictor(nnUNetPredictor):
    """nnUNetPredictor that samples a volume as a whole and hands out every sample.

    The mask is the blind mask, the stock model's, the mean of the samples, or weighted, as the model's settings say.
    Several models (folds) draw equally many of the samples. The mirrorings are spread over the samples of each.
    """

    network: Any
    perform_everything_on_device: bool
    use_mirroring: bool

    def __init__(self, *args: Any, overrides: Mapping[str, Value] | None = None, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: of nnUNetPredictor.
            overrides: sampling settings in the place of the model's, by name.
        """
        super().__init__(*args, **kwargs)
        self.tile_batch = 4 if self.device.type == 'cuda' else 1  # on a CPU more at a time are not faster
        self.overrides = dict(overrides or {})
        self.bfloat16 = cpu_has_bfloat16()
        self.model = ''
        self.folds: list[int | str] = []
        self.fold_settings: list[SamplingSettings] = []
        self.num_samples = 0

    def initialize_from_trained_model_folder(self, model_training_output_dir: str, use_folds: Any,
                                             checkpoint_name: str = FINAL_CHECKPOINT) -> None:
        """As nnUNetPredictor's.

        Raises:
            PredictionError: if the folder, a fold, the checkpoint or the trainer's class is missing, a fold is named
                twice, or it is no PDDDPM model.
            CheckpointError: if a checkpoint is damaged, or the plans beside it are not those it was trained with.
            ValueError: if a sampling setting is out of range for the model.
        """
        folder = Path(model_training_output_dir)
        check_model_folder(folder)
        use_folds = [use_folds] if isinstance(use_folds, (str, int)) else use_folds
        if use_folds is None:
            use_folds = self.auto_detect_available_folds(str(folder), checkpoint_name)
        if not use_folds:
            raise PredictionError(f'{folder} has no numbered fold with {checkpoint_name}: name a fold, such as "all".')
        names = [str(fold) for fold in use_folds]
        if repeated := next((fold for fold in names if names.count(fold) > 1), None):
            raise PredictionError(f'Fold {repeated} is named twice: name each fold once with -f.')
        for fold in names:  # before nnU-Net unpickles them
            check_model_file(folder / f'fold_{fold}' / checkpoint_name)
        with environment_ignored():  # it counts together with the overrides of this predictor
            try:
                super().initialize_from_trained_model_folder(str(folder), use_folds, checkpoint_name)
            except RuntimeError as error:
                if not str(error).startswith(NO_TRAINER):
                    raise
                trainer = str(error)[len(NO_TRAINER):].split()[0]
                raise PredictionError(f'nnU-Net does not find {trainer}, by which the model in {folder} was trained: '
                                      f'put the folder of its file into nnUNet_extTrainer, or see what '
                                      f'nnUNetv2_pdddpm_check says of PDDDPMTrainer.') from error
        if isinstance(self.network, OptimizedModule):
            self.network = self.network._orig_mod
            self.network.presegmenter.compile()
            self.network.denoiser.compile()
        if not isinstance(self.network, Refiner):
            raise PredictionError(f'The model in {folder} was trained by {self.trainer_name}, which is no PDDDPM '
                                  f'trainer: predict with nnUNetv2_predict, or name a PDDDPM model with -tr.')
        self.model = f'{folder.resolve().parent.name}/{folder.resolve().name}/{checkpoint_name}'
        self.folds = [fold if fold == 'all' else int(fold) for fold in use_folds]
        self.fold_settings = [self._settings_of(parameters) for parameters in self.list_of_parameters]
        if environment := environment_overrides():
            logger.warning('The environment overrides sampling settings of the model: %s.',
                           ', '.join(f'{name}={value}' for name, value in environment.items()))
        wanted, models = self.fold_settings[0].samples, len(self.list_of_parameters)
        self.num_samples = models * math.ceil(wanted / models)
        if self.num_samples > wanted:
            logger.info('%d samples instead of %d: %d of every fold.', self.num_samples, wanted,
                        self.num_samples // models)

    def _settings_of(self, parameters: dict[str, Any]) -> SamplingSettings:
        return override(stored_settings(parameters), {**environment_overrides(), **self.overrides},
                        'the command line and environment')

    @property
    def refiner(self) -> Refiner:
        """The network."""
        return cast(Refiner, self.network)

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: sampling settings come with a trained model."""
        raise NotImplementedError(f'{type(self).__name__} needs a trained model: use '
                                  f'initialize_from_trained_model_folder.')

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """(image channels, Z, Y, X) -> logits (C, Z, Y, X) of the mask, as nnUNetPredictor's.

        Samples are drawn only if the mask is made of them.
        """
        samples = self.num_samples
        if not any(settings.needs_samples for settings in self.fold_settings):
            self.num_samples = 0
        try:
            return self.predict_volume(data, stock=False).logits
        finally:
            self.num_samples = samples

    @torch.inference_mode()
    def predict_volume(self, data: Tensor, on_sample: OnSample | None = None, case: str = '', stock: bool = True
                       ) -> VolumePrediction:
        """Mask, uncertainty and samples of one preprocessed image.

        Args:
            data: (image channels, Z, Y, X) preprocessed, with the previous stage's channels for a cascade.
            on_sample: called with every sample when it is drawn; the samples are not kept.
            case: name, of which with the settings' seed the noise and the draws are made: cases of one name have the
                same.
            stock: whether the stock model's own result is wanted. If it is not, nor is anything made of it but the
                start of chains, it is predicted without mirroring.
        """
        stock = stock or self._needs_stock
        on_device = self.perform_everything_on_device
        try:
            if on_device and self.device.type == 'cuda' and self.fits(data.shape):
                try:
                    with self.threads_for(self.device):
                        return self._predict_volume(data, self.device, on_sample, case, stock)
                except RuntimeError as error:
                    if not lacks_memory(error):
                        raise
                    logger.warning('%s.', DOES_NOT_FIT)
                    torch.cuda.empty_cache()
            self.perform_everything_on_device = False
            main_memory = torch.device('cpu')
            with self.threads_for(main_memory):
                return self._predict_volume(data, main_memory, on_sample, case, stock)
        finally:
            self.perform_everything_on_device = on_device

    def threads_for(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it torch has the threads for a volume whose arrays are on this device: as many as nnU-Net takes, on
        which the stock result depends; all where they are in main memory and the networks are not, for which nnU-Net's
        commands set one."""
        fallen_back = device.type == 'cpu' != self.device.type
        return threads(available_cpus() if fallen_back else min(torch.get_num_threads(), default_num_processes))

    @property
    def _needs_stock(self) -> bool:
        """Whether mask or samples use the stock model's own result, not only as a start."""
        return any(settings.needs_stock for settings in self.fold_settings)

    def fits(self, shape: Sequence[int], more: int = 0) -> bool:
        """Whether the arrays of an image (image channels, Z, Y, X) and as many bytes `more` for each of its voxels and
        channels fit on the GPU beside the networks; says if not."""
        channels = self.label_manager.num_segmentation_heads
        networks = tile_bytes(channels, self.configuration_manager.patch_size)
        needed = self.bytes_needed(shape) + networks + more * channels * math.prod(shape[1:])
        free = free_bytes(self.device)
        if needed > free:
            logger.warning('%s (it takes about %.1f GB there, %.1f GB are free).', DOES_NOT_FIT, needed / 1e9,
                           free / 1e9)
        return needed <= free

    def bytes_needed(self, shape: Sequence[int]) -> int:
        """Bytes of the volume's arrays for an image (image channels, Z, Y, X), as docs/explanation/limits.md says."""
        patch = self.configuration_manager.patch_size
        _, *padded = (max(n, side) for n, side in zip(shape, [1] * (4 - len(patch)) + list(patch), strict=True))
        return volume_bytes(shape[0], (self.label_manager.num_segmentation_heads, *padded),
                            patch[0] if len(patch) == 3 else 1, self.num_samples, len(self.fold_settings),
                            self.label_manager.has_regions, self.use_mirroring and self._needs_stock)

    def _predict_volume(self, data: Tensor, device: torch.device, on_sample: OnSample | None, case: str,
                        mirrored_stock: bool) -> VolumePrediction:
        """`predict_volume` with the volume's arrays on `device`."""
        start = time.perf_counter()
        image, unpad = pad_nd_image(data, self.configuration_manager.patch_size, 'constant', {'value': 0}, True, None)
        unpad = (slice(None), *unpad[1:])
        folds = len(self.fold_settings)
        volume = Volume(self, image, device)
        del image
        spread = Spread(volume.shape, self.num_samples, folds, self.refiner.regions, device)
        counts = VoxelCounter(self.label_manager, foreground_labels(self.dataset_json), unpad[1:])
        quality = QualityMeter(counts, unpad[1:], folds > 1)
        stock, mask = _Sum(), _Sum()  # over the folds
        for fold, (parameters, stored) in enumerate(zip(self.list_of_parameters, self.fold_settings, strict=True)):
            settings = stored.for_case(case)
            with environment_ignored():
                self.refiner.load_state_dict(parameters)
            volume.start_fold(mirrored_stock)
            if mirrored_stock:
                stock.add(volume.stock_logits.cpu())
                if not settings.needs_stock:
                    volume.drop_mirrored()
            samples = range(fold, self.num_samples, folds)
            volume.plan_progress(settings, samples, self.num_samples)
            for sample in samples:
                self._draw(volume, settings, sample, spread, counts, on_sample)
            self._add_mask(volume, settings, spread, len(samples), counts, mask, quality)
            spread.finish_fold(len(samples))
        volume.progress.close()
        spread.crop(unpad[1:])
        if self._mask_source() == 'stock':
            mask = stock
        logits = mask.mean(folds)[unpad]
        if self._mask_source() == 'mixed':
            for z in chunks(logits.shape):
                logits[:, z] = probabilities_to_logits(logits[None, :, z], self.refiner.regions)[0]
        if folds > 1:
            counts.set_consensus(logits)
        presegmentation = None if not mirrored_stock else logits if mask is stock else stock.mean(folds)[unpad]
        qualities = quality.qualities(data.cpu().numpy(), logits, spread)
        seconds = time.perf_counter() - start
        return VolumePrediction(presegmentation, logits, spread, volume.network_calls, seconds, counts, qualities,
                                volume.stock_is_finite)

    def _draw(self, volume: Volume, settings: SamplingSettings, sample: int, spread: Spread, counts: VoxelCounter,
              on_sample: OnSample | None) -> None:
        """One sample: its mask is drawn once, and added to all that is made of the samples."""
        parts, regions = volume.parts(settings), self.refiner.regions
        shifts = self.refiner.end_shifts(settings, sample, self.num_samples, parts.number)
        probabilities, (box, y, x) = volume.sample(settings, sample, self.num_samples), counts.box
        sizes = [len(range(n)[unpadded]) for n, unpadded in zip(volume.shape[1:], counts.box, strict=True)]
        kept_logits = None if on_sample is None else torch.empty((volume.shape[0], *sizes), dtype=torch.half)
        for z in chunks(volume.shape):
            p = probabilities(z)
            logits = drawn_logits(p, regions, shifts, parts.at(z))
            mask = hard_mask(logits, regions)
            spread.add(sample, z, p, mask)
            counts.add(sample, z, mask)
            if kept_logits is not None:
                here, there = inside(z, box)
                box_logits = logits[:, here, y, x]
                if not regions:  # else half precision would make ties of what is nearly equal
                    box_logits = box_logits - box_logits.amax(0)
                kept_logits[:, there] = box_logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).half().cpu()
        if on_sample is not None and kept_logits is not None:
            del probabilities, p, logits, mask
            on_sample(sample, kept_logits)

    def _mask_source(self) -> str:
        """What the mask is made of: 'stock' logits alone; 'logits', in each model of the stock model or of the blind
        mask, averaged over the models as nnU-Net does; or a 'mixed' mean of probabilities."""
        if all(settings.is_stock for settings in self.fold_settings):
            return 'stock'
        single = all(settings.is_stock or settings.mask_blind == 1 for settings in self.fold_settings)
        return 'logits' if single else 'mixed'

    def _add_mask(self, volume: Volume, settings: SamplingSettings, spread: Spread, samples: int, counts: VoxelCounter,
                  mask: _Sum, quality: QualityMeter) -> None:
        """The mask of the model whose samples have been drawn: counted, compared with the others, and added to the sum
        (C, Z, Y, X) on the CPU of logits, or of mixed probabilities."""
        source = self._mask_source()
        blind = None
        if settings.mask_blind > 0 and not settings.is_stock:
            blind = volume.blind_logits(settings.blind_temperature)
        if source == 'stock':
            counts.add_mask(quality.record_fold_masks(in_chunks(volume.stock_logits)))
        elif source == 'logits':
            logits = volume.stock_logits.clone() if blind is None else blind  # those of stock may be summed, too
            mask.add(logits.cpu())
            counts.add_mask(quality.record_fold_masks(in_chunks(logits)))
        else:
            if not mask.started:
                mask.add(torch.zeros(volume.shape))
            mixed = self._mixed(volume, settings, blind, lambda z: spread.current_fold_mean(z, samples), mask.total)
            counts.add_mask(quality.record_fold_masks(mixed))
        if len(self.fold_settings) == 1 < self.num_samples:  # the quality of several models' masks is their agreement
            quality.set_stock(volume.start_logits)  # predicted for this alone, if no chain has started from it

    def _mixed(self, volume: Volume, settings: SamplingSettings, blind: Tensor | None,
               sample_mean: Callable[[slice], Tensor], total: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices, and logits (C, slices, Y, X) of the weighted mean of probabilities, which are added to `total`.

        `sample_mean`: slices -> their mean.
        """
        stock, chain = (1.0, 0.0) if settings.is_stock else (settings.mask_stock, settings.mask_chain)
        for z in chunks(volume.shape):
            p = torch.zeros_like(sample_mean(z))
            if chain > 0:
                p.add_(sample_mean(z), alpha=chain)
            if blind is not None:
                p.add_(volume.probabilities_at(blind, z), alpha=settings.mask_blind)
            if stock > 0:
                temperature = 1.0 if settings.is_stock else settings.temperature
                p.add_(volume.probabilities_at(volume.stock_logits, z, temperature), alpha=stock)
            total[:, z] += p.cpu()
            yield z, probabilities_to_logits(p[None], self.refiner.regions)[0]

    def autocast(self) -> AbstractContextManager[Any]:
        """For the denoiser: as nnU-Net's on CUDA; bfloat16 on a CPU with instructions for it, which halves the time."""
        if self.precision == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    @property
    def precision(self) -> str:
        """Of the chains, by its name in torch."""
        if self.device.type == 'cuda':
            return 'float16'
        return 'bfloat16' if self.device.type == 'cpu' and self.bfloat16 else 'float32'

    @contextmanager
    def using_stock_network(self, mirrored: bool = True) -> Iterator[None]:
        """Within it the stock network is the network: nnU-Net's code then predicts as for the stock model."""
        before, self.use_mirroring = self.use_mirroring, self.use_mirroring and mirrored
        try:
            with self._as_network(self.refiner.presegmenter):
                yield
        finally:
            self.use_mirroring = before

    @contextmanager
    def using_blind_network(self, temperature: float) -> Iterator[None]:
        """Within it the denoiser that is shown no mask is the network, its logits divided by a temperature."""
        with self._as_network(BlindNetwork(self.refiner, temperature)):
            yield

    @contextmanager
    def _as_network(self, network: Any) -> Iterator[None]:
        refiner, self.network = self.refiner, network
        try:
            yield
        finally:
            self.network = refiner


class _Sum:
    """A sum of tensors, kept in the first of them."""

    total: Tensor

    @property
    def started(self) -> bool:
        """Whether anything was added."""
        return hasattr(self, 'total')

    def add(self, values: Tensor) -> None:
        """Add a tensor."""
        self.total = self.total.add_(values) if self.started else values

    def mean(self, number: int) -> Tensor:
        """The sum over this number."""
        return self.total if number == 1 else self.total.div_(number)
