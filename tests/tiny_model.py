"""A model without training, for what does not ask how good it is: tiny networks with random weights."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.network.refiner import Refiner
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.presegmenters import TrainingContext
from nnunet_pdddpm.training.trainer import PDDDPMTrainer

DATASET = 'Dataset730_Formats'
NORMALISATION = 'ZScoreNormalization'


def architecture(dims: int) -> dict[str, Any]:
    """A U-Net of three stages, the fewest that nnU-Net trains, as plans describe it."""
    return {'network_class_name': 'dynamic_network_architectures.architectures.unet.PlainConvUNet',
            '_kw_requires_import': ['conv_op', 'norm_op', 'dropout_op', 'nonlin'],
            'arch_kwargs': {'n_stages': 3, 'features_per_stage': [4] * 3, 'conv_op': f'torch.nn.Conv{dims}d',
                            'kernel_sizes': [[3] * dims] * 3, 'strides': [[1] * dims, [2] * dims, [2] * dims],
                            'n_conv_per_stage': [1] * 3, 'n_conv_per_stage_decoder': [1] * 2, 'conv_bias': True,
                            'norm_op': None, 'norm_op_kwargs': None, 'dropout_op': None, 'dropout_op_kwargs': None,
                            'nonlin': 'torch.nn.LeakyReLU', 'nonlin_kwargs': None}}


def plans(reader: str, dims: int, channels: int, normalisation: str = NORMALISATION,
          intensities: dict[str, float] | None = None) -> dict[str, Any]:
    """As nnU-Net's planner writes them, for images of a voxel size of 1 mm.

    Args:
        reader: name of nnU-Net's reader.
        dims: 2 or 3, of the patches.
        channels: of the images.
        normalisation: scheme of all channels.
        intensities: of the training cases' foreground, in all channels.
    """
    of_all = {'mean': 100.0, 'median': 100.0, 'std': 40.0, 'min': 0.0, 'max': 300.0, 'percentile_00_5': 20.0,
              'percentile_99_5': 220.0}
    resampling = {f'resampling_fn_{of}{kwargs}': value for of, order in (('data', 3), ('seg', 1), ('probabilities', 1))
                  for kwargs, value in (('', 'resample_data_or_seg_to_shape'),
                                        ('_kwargs', {'is_seg': of == 'seg', 'order': order, 'order_z': 0,
                                                     'force_separate_z': None}))}
    configuration = {'data_identifier': 'plain', 'preprocessor_name': 'DefaultPreprocessor', 'batch_size': 2,
                     'patch_size': [16] * dims, 'median_image_size_in_voxels': [16] * dims, 'spacing': [1.0] * dims,
                     'normalization_schemes': [normalisation] * channels, 'use_mask_for_norm': [False] * channels,
                     'architecture': architecture(dims), 'batch_dice': True, **resampling}
    return {'dataset_name': DATASET, 'plans_name': 'nnUNetPlans', 'image_reader_writer': reader,
            'original_median_spacing_after_transp': [1.0] * 3, 'original_median_shape_after_transp': [16] * 3,
            'transpose_forward': [0, 1, 2], 'transpose_backward': [0, 1, 2], 'label_manager': 'LabelManager',
            'experiment_planner_used': 'ExperimentPlanner',
            'foreground_intensity_properties_per_channel': {
                str(channel): intensities or of_all for channel in range(channels)},
            'configurations': {'2d' if dims == 2 else '3d_fullres': configuration}}


def write_model(folder: Path, plans_: dict[str, Any], dataset_json: dict[str, Any]) -> Path:
    """The folder of a trained model with fold 0: two samples of two steps, the mask is the blind one."""
    manager, configuration = PlansManager(plans_), next(iter(plans_['configurations']))
    labels = manager.get_label_manager(dataset_json)
    torch.manual_seed(0)
    network = PDDDPMTrainer.build_network_architecture(
        manager, manager.get_configuration(configuration), len(dataset_json['channel_names']),
        labels.num_segmentation_heads, False)
    assert isinstance(network, Refiner)
    network.configure(SamplingSettings(samples=2), labels.has_regions)
    return _write(folder, 'PDDDPMTrainer', network.state_dict(), plans_, dataset_json)


def write_stock_model(folder: Path, plans_: dict[str, Any], dataset_json: dict[str, Any]) -> Path:
    """The folder of a trained stock model with fold 0."""
    torch.manual_seed(0)
    network = TrainingContext(plans_, next(iter(plans_['configurations'])), dataset_json).planned_network()
    return _write(folder, 'nnUNetTrainer', network.state_dict(), plans_, dataset_json)


def _write(folder: Path, trainer: str, weights: dict[str, Any], plans_: dict[str, Any], dataset_json: dict[str, Any]
           ) -> Path:
    """A checkpoint as nnU-Net writes it, and what it writes beside the fold."""
    file = folder / 'fold_0' / 'checkpoint_final.pth'
    file.parent.mkdir(parents=True)
    torch.save({'network_weights': weights, 'trainer_name': trainer, 'inference_allowed_mirroring_axes': (0, 1),
                'init_args': {'plans': plans_, 'configuration': next(iter(plans_['configurations'])), 'fold': 0,
                              'dataset_json': dataset_json}}, file)
    (folder / 'plans.json').write_text(json.dumps(plans_))
    (folder / 'dataset.json').write_text(json.dumps(dataset_json))
    return folder
