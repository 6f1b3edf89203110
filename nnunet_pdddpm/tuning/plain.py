"""The mask of plain `nnUNetv2_predict`, which makes it tile by tile, on validation cases."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.scores import Truth


@torch.inference_mode()
def plain_dice(predictor: VolumePredictor, cases: ValidationCases, names: Sequence[str], settings: SamplingSettings
               ) -> np.ndarray:
    """Dice of each case, as `Truth.score` gives it, nan where there is none.

    Args:
        predictor: of one model.
        cases: of its fold.
        names: of those that are predicted.
        settings: of the mask.
    """
    refiner, dice = predictor.refiner.to(predictor.device).eval(), []
    before, refiner.settings = refiner.settings, settings
    try:
        for name in names:
            case = cases.load(name)
            truth = Truth(case.labels, predictor.label_manager, torch.device('cpu'))
            logits = predictor.predict_sliding_window_return_logits(case.image).float().cpu()
            dice.append(truth.score(logits_to_probabilities(logits[None], refiner.regions)[0])[0])
    finally:
        refiner.settings = before
    return np.array(dice)
