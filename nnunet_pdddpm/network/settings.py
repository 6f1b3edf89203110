"""How to sample: the settings that travel in a trained model, and what overrides them."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Union

ENVIRONMENT_PREFIX = 'nnUNet_pdddpm_'
Value = Union[float, int, str]


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn, and what the mask is made of. Checked by `check`."""
    start: float = 0.6
    """Share of the mask's uncertainty that is left where a chain starts: 1 is pure noise, 0 the stock model itself."""
    steps: int = 1
    """Reverse steps k; each decides the same share."""
    samples: int = 8
    """Number n of samples."""
    samples_from: str = 'chain'
    """'chain'; or no chain: draws from the probabilities of the 'stock' model or of the 'blind' mask."""
    start_mask: str = 'drawn'
    """What is noised at the start: 'drawn' from the stock model's probabilities, or its 'hard' mask."""
    redraw: int = 1
    """1: every step but the last draws a mask and noises it, see `Redrawing`; 0: steps of DDPM."""
    dependence: float = 1.0
    """How far draws in different components go together, see `draw_shifts`: 1 as one, 0 independently."""
    temperature: float = 1.5
    """What the stock model's logits are divided by before a draw from them (Guo et al. 2017, arXiv 1706.04599)."""
    blind_temperature: float = 1.0
    """The same for the blind mask's, also where it is the mask: its probabilities change, not their order."""
    mask_stock: float = 0.0
    """Weight of the stock model's probabilities in the mask's; 1 is the stock prediction itself."""
    mask_blind: float = 1.0
    """Weight of the denoiser's, shown no mask at all; the rest of the weight is the samples' mean."""
    mask_samples: int = 1
    """Samples in that mean in plain `nnUNetv2_predict`; `nnUNetv2_pdddpm_predict` has those that it draws."""
    seed: int = 0
    """Seed of the noise and the draws."""

    def check(self, source: str = 'the sampling settings') -> SamplingSettings:
        """Return self if every value is in range.

        Raises:
            ValueError: with a sentence that names the setting, its value and its range.
        """
        for name, value in asdict(self).items():
            if wrong := out_of_range(name, value):
                raise ValueError(f'{name}={value} in {source} {wrong}.')
        if self.mask_stock + self.mask_blind > 1 + 1e-6:
            raise ValueError(f'mask_stock={self.mask_stock:g} and mask_blind={self.mask_blind:g} in {source} are '
                             f'weights of which the sum cannot be above 1: lower one of them.')
        return self

    @property
    def mask_chain(self) -> float:
        """Weight of the samples' mean in the mask."""
        return max(0.0, round(1 - self.mask_stock - self.mask_blind, 6))

    @property
    def is_stock(self) -> bool:
        """True if the mask is the stock model's own prediction."""
        return self.start == 0 or self.mask_stock == 1

    def for_case(self, case: str) -> SamplingSettings:
        """The settings with a seed made of this one and the case's name: no two cases share noise and draws."""
        digest = hashlib.blake2s(f'{self.seed} {case}'.encode(), digest_size=4).digest()
        return replace(self, seed=int.from_bytes(digest, 'big') >> 1)

    @property
    def needs_samples(self) -> bool:
        """True if the samples' mean is part of the mask."""
        return not self.is_stock and self.mask_chain > 0

    @property
    def needs_stock(self) -> bool:
        """True if the mask or the samples are made of the stock model's own result, which is more than a start."""
        return self.is_stock or self.mask_stock > 0 or self.samples_from == 'stock'

    @property
    def sample_settings(self) -> dict[str, Value]:
        """What a sample is drawn by, but for its noise."""
        names = ('start', 'steps', 'samples_from', 'start_mask', 'redraw', 'dependence', 'temperature',
                 'blind_temperature')
        return {name: getattr(self, name) for name in names}

    @property
    def mask_settings(self) -> dict[str, Value]:
        """What the mask depends on, but for the noise."""
        if self.is_stock:
            return {'mask_stock': 1.0}
        if self.mask_blind == 1:
            return {'mask_blind': 1.0}
        temperatures = {'temperature': self.temperature, 'blind_temperature': self.blind_temperature}
        sampled = self.sample_settings if self.needs_samples else {}
        return {'mask_stock': self.mask_stock, 'mask_blind': self.mask_blind, **temperatures, **sampled}


RANGES: dict[str, tuple[float, float]] = {
    'start': (0, 1), 'steps': (1, 1000), 'samples': (1, 10_000), 'redraw': (0, 1), 'dependence': (0, 1),
    'temperature': (0.1, 10), 'blind_temperature': (0.1, 10), 'mask_stock': (0, 1), 'mask_blind': (0, 1),
    'mask_samples': (1, 10_000), 'seed': (0, 2 ** 31 - 1)}
CHOICES = {'samples_from': ('chain', 'stock', 'blind'), 'start_mask': ('drawn', 'hard')}
KINDS: dict[str, type] = {field.name: {'int': int, 'float': float, 'str': str}[str(field.type)]
                          for field in fields(SamplingSettings)}
PRESEGMENTER_VARIABLE = f'{ENVIRONMENT_PREFIX}presegmenter'
_environment_ignored = ContextVar('environment_ignored', default=False)


def out_of_range(name: str, value: Value) -> str:
    """What is wrong with a setting's value, with the values that it may have; empty if nothing."""
    if name in CHOICES:
        return '' if value in CHOICES[name] else f'is unknown: it must be one of {", ".join(CHOICES[name])}'
    low, high = RANGES[name]
    return '' if low <= float(value) <= high else f'is out of range: it must lie in {low} to {high}'


def as_numbers(settings: SamplingSettings) -> dict[str, Union[float, int]]:
    """The settings as a model's buffers hold them: a choice by its position in `CHOICES`."""
    return {name: CHOICES[name].index(value) if name in CHOICES else value for name, value in asdict(settings).items()}


def from_numbers(numbers: Mapping[str, Any]) -> SamplingSettings:
    """The inverse of `as_numbers`; float32 is rounded to six decimals. Raises ValueError for an unknown choice."""
    for name, choices in CHOICES.items():
        if not 0 <= numbers[name] < len(choices):
            raise ValueError(f"{name}={numbers[name]} in the model's sampling settings is unknown: use the version of "
                             f"nnunet-pdddpm that it was trained with.")
    values: dict[str, Any] = {
        name: CHOICES[name][int(number)] if name in CHOICES else round(float(number), 6) if KINDS[name] is float
        else int(number) for name, number in numbers.items()}
    return SamplingSettings(**values)


def package_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables of this package -> what follows the prefix, in lower case.

    They are compared without case, since Windows gives names in upper case. NNUNET_PDDDPM_DATA is the benchmarks'.
    """
    names = {variable: variable.lower().removeprefix(ENVIRONMENT_PREFIX.lower()) for variable in environment}
    return {variable: name for variable, name in names.items() if name not in (variable.lower(), 'data')}


@contextmanager
def environment_ignored() -> Iterator[None]:
    """Within it the environment overrides no settings: training, tuning and calibration use those of the model."""
    token = _environment_ignored.set(True)
    try:
        yield
    finally:
        _environment_ignored.reset(token)


def environment_overrides(environment: Mapping[str, str] = os.environ) -> dict[str, Value]:
    """Sampling settings given by environment variables: `nnUNet_pdddpm_start` and so on, one for each setting; none
    within `environment_ignored`.

    Raises:
        ValueError: if a value is no number of the right kind or out of range, or a variable with the prefix is none of
            the known. The message names the variable.
    """
    overrides: dict[str, Value] = {}
    if _environment_ignored.get():
        return overrides
    for variable, name in package_variables(environment).items():
        text = environment[variable]
        if name == 'presegmenter' or not text:
            continue
        if name not in KINDS:
            known = ', '.join([*(ENVIRONMENT_PREFIX + n for n in KINDS), PRESEGMENTER_VARIABLE])
            raise ValueError(f'The environment variable {variable} is unknown; the known ones are {known}. Unset it.')
        kind = KINDS[name]
        try:
            overrides[name] = kind(text)
        except ValueError:
            what = 'a whole number' if kind is int else 'a number'
            raise ValueError(f'The environment variable {variable} must be {what}, got "{text}".') from None
        if wrong := out_of_range(name, overrides[name]):
            raise ValueError(f'{variable}={overrides[name]} in the environment variables {wrong}.')
    return overrides


def override(stored: SamplingSettings, overrides: Mapping[str, Value], source: str) -> SamplingSettings:
    """The stored settings with some values replaced, checked.

    Whoever names a start or steps wants a chain, also where the model's samples are drawn without one.

    Args:
        stored: the model's settings.
        overrides: name of a setting -> value.
        source: where the overrides come from, for the message.

    Raises:
        ValueError: if a value is out of range.
    """
    if not overrides:
        return stored.check("the model's sampling settings")
    chain = {'samples_from': 'chain'} if {'start', 'steps'} & overrides.keys() else {}
    changes: dict[str, Any] = {**chain, **overrides}
    return replace(stored, **changes).check(source)


def effective_settings(stored: SamplingSettings) -> SamplingSettings:
    """The stored settings with the environment's overrides, checked: see `override`."""
    return override(stored, environment_overrides(), f'the environment variables ({ENVIRONMENT_PREFIX}*)')
