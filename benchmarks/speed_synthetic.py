"""Parts of `speed.py` that need no model, of synthetic volumes of 25 classes.

A prediction whose arrays are kept in main memory, and the export to files.
"""
from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from machine import DEVICE, FULL, timed
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_pdddpm.inference.export import CaseExport, Outputs
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import DiffusionDesign, Refiner
from nnunet_pdddpm.network.settings import SamplingSettings

CLASSES, GRID, IMAGE = 25, (160, 128, 128), (240, 192, 192)
"""Of the volume that is exported: a CT scaled down, resampled from 1.5 to 1 mm."""
TILE, VOLUME = (64, 64, 64), (96, 96, 96)
"""Of the volume whose arrays are kept in main memory."""


def synthetic_plans(classes: int = CLASSES, patch: tuple[int, ...] = TILE, features: tuple[int, ...] = (32, 64),
                    batch: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """nnU-Net's plans of isotropic images of one channel, and dataset.json."""
    stages = len(features)
    network = {'n_stages': stages, 'features_per_stage': features, 'kernel_sizes': [[3] * 3] * stages,
               'strides': [[1] * 3] + [[2] * 3] * (stages - 1), 'n_conv_per_stage': [2] * stages,
               'n_conv_per_stage_decoder': [2] * (stages - 1), 'conv_op': 'torch.nn.modules.conv.Conv3d',
               'conv_bias': True, 'norm_op': 'torch.nn.modules.instancenorm.InstanceNorm3d',
               'norm_op_kwargs': {'eps': 1e-5, 'affine': True}, 'dropout_op': None, 'dropout_op_kwargs': None,
               'nonlin': 'torch.nn.LeakyReLU', 'nonlin_kwargs': {'inplace': True}}
    resampling = {f'resampling_fn_{what}': 'resample_data_or_seg_to_shape' for what in ('data', 'seg', 'probabilities')}
    planned = {'data_identifier': 'synthetic', 'preprocessor_name': 'DefaultPreprocessor', 'batch_size': batch,
               'patch_size': list(patch), 'spacing': [1.5] * 3, 'batch_dice': False, 'use_mask_for_norm': [False],
               'normalization_schemes': ['ZScoreNormalization'], **resampling,
               **{f'{name}_kwargs': {'is_seg': False, 'order': 1, 'order_z': 0, 'force_separate_z': None}
                  for name in resampling},
               'architecture': {'network_class_name': 'dynamic_network_architectures.architectures.unet.PlainConvUNet',
                                'arch_kwargs': network,
                                '_kw_requires_import': ['conv_op', 'norm_op', 'dropout_op', 'nonlin']}}
    plans = {'dataset_name': f'Dataset{800 + classes}_Synthetic', 'plans_name': 'nnUNetPlans',
             'image_reader_writer': 'SimpleITKIO', 'label_manager': 'LabelManager', 'transpose_forward': [0, 1, 2],
             'transpose_backward': [0, 1, 2], 'foreground_intensity_properties_per_channel': {},
             'configurations': {'3d_fullres': planned}}
    labels = {'background': 0, **{f'label {i}': i for i in range(1, classes)}}
    return plans, {'channel_names': {'0': 'synthetic'}, 'labels': labels, 'numTraining': 1, 'file_ending': '.nii.gz'}


# main memory ---------------------------------------------------------------------------------------------------------

class Costless(nn.Module):
    """In the place of networks that are not measured: the same smooth logits for every patch."""

    def __init__(self) -> None:
        super().__init__()
        coarse = torch.randn((1, CLASSES, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        self.register_buffer('logits', nn.functional.interpolate(3 * coarse, TILE, mode='trilinear'), persistent=False)

    def forward(self, image: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """(B, image channels, ...) -> (B, C, ...), which nnU-Net changes in place."""
        return self.logits.repeat(len(image), 1, 1, 1, 1)


class FallenBack(VolumePredictor):
    """With the threads for a volume of a GPU's that is kept in main memory: without a GPU, too."""

    def threads_for(self, device: torch.device) -> AbstractContextManager[None]:
        networks_on, self.device = self.device, torch.device('cuda')
        try:
            return super().threads_for(device)
        finally:
            self.device = networks_on


def main_memory_seconds() -> dict[str, float]:
    """Of 8 samples of a step, with maps: on a CPU; and as the fall-back of a GPU, for which nnU-Net sets one thread."""
    plans, description = PlansManager(synthetic_plans()[0]), synthetic_plans()[1]
    refiner = Refiner(nn.Identity(), PlainConvUNet(1, 2, 2, nn.Conv3d, 3, (1, 2), 1, CLASSES, 1), CLASSES,
                      DiffusionDesign())
    refiner.presegmenter, refiner.denoiser = Costless(), Costless()
    image, seconds = torch.randn((1, *VOLUME), generator=torch.Generator().manual_seed(0)), {}
    for name, kind, device, threads in (('CPU', VolumePredictor, 'cpu', os.cpu_count() or 1),
                                        ('fall-back', FallenBack, DEVICE, 1)):
        predictor: Any = kind(device=torch.device(device), allow_tqdm=False, perform_everything_on_device=False)
        nnUNetPredictor.manual_initialization(predictor, refiner, plans, plans.get_configuration('3d_fullres'),
                                              [refiner.state_dict()], description, 'PDDDPMTrainer', (0, 1, 2))
        predictor.bfloat16, predictor.num_samples = False, 8
        predictor.fold_settings = [SamplingSettings(start=0.8, steps=1, samples=8, mask_blind=0)]
        torch.set_num_threads(threads)

        def predict(predictor: Any = predictor) -> None:
            predictor.predict_volume(image, stock=False).spread.maps()
        predict()  # is not counted
        seconds[name] = timed(torch.device(device), predict)
    return seconds


def main_memory_in_words(of: dict[str, float]) -> str:
    """What a volume takes whose arrays are kept in main memory."""
    copies = '' if FULL else ' Copies between GPU and main memory are not in it.'
    return (f'Arrays in main memory, with networks that cost nothing: {CLASSES} classes, {VOLUME} voxels, tiles of '
            f'{TILE}, 8 samples of one step, mirrored, all maps. On a CPU {of["CPU"]:.1f} s; as the fall-back of a GPU '
            f'that lacks memory, for which nnU-Net\'s commands have set one thread, {of["fall-back"]:.1f} s, '
            f'{of["fall-back"] / of["CPU"]:.2f} times as long.{copies}')


# export --------------------------------------------------------------------------------------------------------------

def synthetic_logits(generator: torch.Generator, common: torch.Tensor) -> np.ndarray:
    """Of a sample with 25 labels, (C, Z, Y, X) float16: smooth fields, most of them common to all samples."""
    own = torch.randn(common.shape, generator=generator)
    fields = torch.nn.functional.interpolate((8 * common + own)[None], GRID, mode='trilinear')[0]
    return (fields - fields.amax(0)).clamp_(-13.8).half().numpy()


def export_seconds() -> dict[str, float]:
    """CPU seconds of one thread: stock nnU-Net's export of a mask; here that of mask and entropy map; of 8 samples."""
    plans, description = PlansManager(synthetic_plans()[0]), synthetic_plans()[1]
    properties = {'spacing': [1.0] * 3, 'bbox_used_for_cropping': [[0, n] for n in IMAGE],
                  'shape_before_cropping': IMAGE, 'shape_after_cropping_and_before_resampling': IMAGE,
                  'sitk_stuff': {'spacing': [1.0] * 3, 'origin': [0.0] * 3, 'direction': np.eye(3).ravel().tolist()}}
    generator = torch.Generator().manual_seed(0)
    common = torch.randn((CLASSES, *(n // 32 for n in GRID)), generator=generator)
    mask, *samples = (synthetic_logits(generator, common) for _ in range(9))
    seconds = {}
    torch.set_num_threads(1)

    def measured(name: str, do: Callable[[], Any]) -> None:
        start = time.process_time()
        do()
        seconds[name] = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        export = CaseExport(plans, plans.get_configuration('3d_fullres'), description, properties, Path(folder), 'case',
                            Outputs(uncertainty='entropy', samples=True))
        measured('stock', lambda: export_prediction_from_logits(
            mask, properties, export.configuration_manager, plans, description, f'{folder}/stock', False, 1))
        measured('rest', lambda: export.write_prediction(mask, None, {'uncertainty': np.zeros(GRID, np.float16)}))
        measured('samples', lambda: [export.sample(of, number) for number, of in enumerate(samples)])
    return seconds


def export_in_words(of: dict[str, float]) -> str:
    """What the export of a synthetic volume takes."""
    return (f'Export of a synthetic volume of {CLASSES} classes, {GRID} voxels resampled to {IMAGE}, to files, on one '
            f'thread: mask and entropy map {of["rest"]:.1f} s, 8 samples {of["samples"]:.1f} s, together '
            f'{(of["rest"] + of["samples"]) / of["stock"]:.2f} times the {of["stock"]:.1f} s of stock nnU-Net\'s mask.')
