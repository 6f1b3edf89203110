"""Sampling settings found on the validation cases of a fold: measured, chosen, reported, stored in the model."""
