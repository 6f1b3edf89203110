"""What bfloat16 costs in accuracy, on the test cases of `hippocampus.py`."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hippocampus import CONFIGURATION, DATASET, PDDDPM_TRAINER, PLANS, call


def scores(output: Path) -> dict[str, list[float]]:
    """Dice and NLL of each case of an evaluated folder."""
    cases = json.loads((output / 'evaluation.json').read_text())['cases']
    return {'Dice': [case['dice'] for case in cases], 'NLL': [case['voxelwise']['all']['nll'] for case in cases]}


def bfloat16(work: Path) -> dict[str, Any]:
    """Scores of the test cases with the denoiser in float32 and in bfloat16; empty where the CPU has none."""
    from speed_parts import opened

    from nnunet_pdddpm.inference.export import Outputs
    raw = work / 'nnUNet_raw' / DATASET
    rows: dict[str, Any] = {}
    for name, wanted in (('float32', False), ('bfloat16', True)):
        output = work / 'speed' / DATASET / name
        predictor = opened(work / 'nnUNet_results' / DATASET / f'{PDDDPM_TRAINER}__{PLANS}__{CONFIGURATION}', 'cpu',
                           outputs=Outputs(probabilities=True), overrides={'samples': 8})
        if wanted and not predictor.bfloat16:
            return {}
        predictor.bfloat16 = wanted
        if (output / 'evaluation.json').is_file():
            rows[name] = scores(output)
            continue
        shutil.rmtree(output, ignore_errors=True)
        predictor.predict_from_files(str(raw / 'imagesTs'), str(output), save_probabilities=True,
                                     num_processes_preprocessing=1, num_processes_segmentation_export=1)
        call(work, 'nnUNetv2_pdddpm_evaluate', '-pred', str(output), '-ref', str(raw / 'labelsTs'), '-np', '2',
             '--disable_progress_bar')
        rows[name] = scores(output)
    return rows


def paired(values: list[float], before: list[float]) -> str:
    """Mean difference with its 95 % bootstrap interval over cases (seed 0)."""
    difference = np.array(values) - before
    draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f'{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})'
