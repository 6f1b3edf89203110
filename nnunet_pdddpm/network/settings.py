"""How to sample: the settings that travel in a trained model, and what overrides them."""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from nnunet_pdddpm.diffusion.schedule import NUM_TIMESTEPS

ENVIRONMENT_PREFIX = 'nnUNet_pdddpm_'


@dataclass(frozen=True)
class SamplingSettings:
    """How masks are drawn. A model holds two: for its consensus mask, and for the samples. Checked by `check`."""
    t_start: int = 700
    """Level at which the noised pre-segmentation enters the chain, 0 (no refinement) to the highest trained level."""
    steps: int = 1
    """Reverse steps k from t_start down to 0, up to t_start; 0: no chain, the denoiser is shown the pre-segmentation
    itself (level 0) and asked once for the best mask."""
    samples: int = 1
    """Noise draws n whose probabilities are averaged."""
    eta: float = 0.0
    """Stochasticity of the reverse steps: 0 DDIM, 1 ancestral DDPM."""
    redraw: bool = False
    """Whether every step but the last draws a mask and noises it, which leaves no part to eta: see `Redrawing`."""
    blend: float = 0.0
    """Weight of the stock model's probabilities in the result: 0 none, 1 the stock prediction itself."""
    seed: int = 0
    """Seed of the noise."""

    def check(self, t_max: int, source: str = 'the sampling settings') -> SamplingSettings:
        """Return self if every value is in range for a model trained on levels 1..t_max.

        Raises:
            ValueError: with a sentence that names the setting, its value and its range.
        """
        ranges = {'t_start': (0, t_max), 'steps': (0, self.t_start or NUM_TIMESTEPS), 'samples': (1, 10_000),
                  'eta': (0, 1), 'redraw': (0, 1), 'blend': (0, 1), 'seed': (0, 2 ** 31 - 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                why = {'t_start': f' (this model was trained on noise levels up to {t_max})',
                       'steps': f' (a chain from t_start={self.t_start} has at most that many)'}.get(name, '')
                raise ValueError(f'{name}={value} in {source} is out of range: it must lie in {low} to {high}{why}.')
        return self

    @property
    def way(self) -> tuple[float, bool]:
        """From step to step: eta and redraw."""
        return self.eta, self.redraw

    @property
    def chain(self) -> tuple[int, int, tuple[float, bool]]:
        """What a sample is drawn by, but for its noise."""
        return self.t_start, self.steps, self.way

    @property
    def is_stock(self) -> bool:
        """True if these settings ask for the stock model's own prediction."""
        return self.t_start == 0 or self.blend == 1


OVERRIDABLE = {'t_start': int, 'steps': int, 'samples': int, 'blend': float, 'seed': int}
PRESEGMENTER_VARIABLE = f'{ENVIRONMENT_PREFIX}presegmenter'


def environment_overrides(environment: Mapping[str, str] = os.environ) -> dict[str, int | float]:
    """Sampling settings given by `nnUNet_pdddpm_t_start`, `_steps`, `_samples`, `_blend` and `_seed`.

    Raises:
        ValueError: if a value is no number of the right kind, or a variable with the prefix is none of the known.
    """
    overrides: dict[str, int | float] = {}
    for variable, text in environment.items():
        # compared without case, since Windows gives names in upper case; NNUNET_PDDDPM_DATA is the benchmarks'
        name = variable.lower().removeprefix(ENVIRONMENT_PREFIX.lower())
        if name == variable.lower() or name in ('presegmenter', 'data') or not text:
            continue
        if name not in OVERRIDABLE:
            known = ', '.join([*(ENVIRONMENT_PREFIX + n for n in OVERRIDABLE), PRESEGMENTER_VARIABLE])
            raise ValueError(f'The environment variable {variable} is unknown; the known ones are {known}. Unset it.')
        kind = OVERRIDABLE[name]
        try:
            overrides[name] = kind(text)
        except ValueError:
            what = 'a whole number' if kind is int else 'a number'
            raise ValueError(f'The environment variable {variable} must be {what}, got "{text}".') from None
    return overrides


def override(stored: SamplingSettings, overrides: Mapping[str, int | float], t_max: int,
             source: str) -> SamplingSettings:
    """The stored settings with some values replaced, checked.

    A t_start below the stored number of steps lowers the steps with it, and one above 0 makes a chain of one step where
    none is stored, unless the steps are given too. An eta is for steps that do not redraw, unless that is given too.

    Args:
        stored: the model's settings.
        overrides: name of a setting -> value.
        t_max: highest level that the model was trained on.
        source: where the overrides come from, for the message.

    Raises:
        ValueError: if a value is out of range.
    """
    if not overrides:
        return stored.check(t_max, "the model's sampling settings")
    t_start = int(overrides.get('t_start', stored.t_start))
    steps = int(overrides.get('steps', max(1, min(stored.steps, t_start)) if 't_start' in overrides else stored.steps))
    redraw = bool(overrides.get('redraw', stored.redraw and 'eta' not in overrides))
    return replace(stored, **{**asdict(stored), **overrides, 'steps': steps, 'redraw': redraw}).check(t_max, source)


def effective_settings(stored: SamplingSettings, t_max: int) -> SamplingSettings:
    """The stored settings with the environment's overrides, checked: see `override`."""
    return override(stored, environment_overrides(), t_max, f'the environment variables ({ENVIRONMENT_PREFIX}*)')
