"""Whole-volume sampling: one coherent segmentation per sample, and what several of them say together."""
