"""Names of files and folders that one package writes and others read."""
from __future__ import annotations

FINAL_CHECKPOINT, BEST_CHECKPOINT = 'checkpoint_final.pth', 'checkpoint_best.pth'
"""nnU-Net's names; both are in the folder of a fold."""
SUMMARY = 'pdddpm_summary.json'
SUMMARY_TABLE = 'pdddpm_summary.csv'
"""In the output folder of a prediction: what its cases say in numbers."""
UNCERTAINTY, PRESEGMENTATION, SAMPLES = 'uncertainty', 'presegmentation', 'samples'
"""Folders there: of maps (UNCERTAINTY is the name of that of the entropy, too), of stock masks, of samples."""
