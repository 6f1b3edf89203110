"""Synthetic plans, and the part of `speed.py` that needs no model: the export of a volume of 25 classes to files."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.inference.export import CaseExport, Outputs

CLASSES, GRID, IMAGE = 25, (160, 128, 128), (240, 192, 192)
"""Of the volume that is exported: a CT scaled down, resampled from 1.5 to 1 mm."""


def synthetic_plans(classes: int = CLASSES, patch: tuple[int, ...] = (64,) * 3, features: tuple[int, ...] = (32, 64),
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
