"""The phantom of known ambiguity as a data set: images of two objects to train on, of 2, 8 and 20 to test on."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet import NUM_FOLDS, Dataset

from datasets.images import Image, description, write_cases
from datasets.phantom_drawing import Phantom, phantom

GRIDS = {2: (1, 2), 8: (2, 4), 20: (4, 5)}
"""Number of objects -> rows and columns of cells in a test image."""
NUM_TEST = {2: 30, 8: 8, 20: 3}
TEST_SEED, VALIDATION_SEED = 20_000, 900_000
"""Of the first image; those for training start at 0."""
NUM_VALIDATION = 40
SMALLEST, CONFIRMATION = 'phantom_2', 'phantom_2_fresh'
"""Names of sets of test images: rows are compared on the first, and a few of them, chosen there, on the second."""
NUM_FRESH, FRESH_SEED, FRESH_DRAWS = 100, 40_000, 128
"""Images of the second, the seed of the first of them, and draws that the mean of a chain is of."""


def as_image(name: object, drawn: Phantom) -> Image:
    """With one draw of the truth."""
    return Image(str(name), drawn.image, drawn.truth[None], drawn)


@dataclass(frozen=True)
class PhantomSet:
    """See the module's docstring."""
    dataset: Dataset = Dataset(771, 'Phantom', '2d', 'Phantom', (16, 32, 64), (('batch_size', 4),), (3, 3), (700, 2000))
    title: str = 'A phantom whose distribution of masks is known'
    samples: int = 16
    kind: str = 'phantom'
    whole: bool = False
    networks: tuple[str, ...] = ('stock', 'denoiser', 'second', 'paper')
    number: int = 1800
    """Images for training, each with one draw of the truth; two thirds of them for each fold."""

    def prepare(self, work: Path, data: str | None = None) -> None:
        """Draw the images for training."""
        if not self.dataset.is_prepared(work):
            drawn = ((f'phantom_{seed:05d}', phantom(seed)) for seed in range(self.number))
            names = write_cases(self.dataset.raw(work), ((name, of.image, of.truth) for name, of in drawn))
            folds = [names[fold::NUM_FOLDS] for fold in range(NUM_FOLDS)]
            self.dataset.plan(work, description('object', self.number), [
                ([name for i, name in enumerate(names) if i % NUM_FOLDS != fold], of) for fold, of in enumerate(folds)])

    def validation(self, work: Path, fold: int) -> Sequence[Image]:
        """The same of every training."""
        return [as_image(i, phantom(VALIDATION_SEED + i)) for i in range(NUM_VALIDATION)]

    def tests(self, data: str | None = None) -> Mapping[str, Sequence[Image]]:
        """`phantom_2`, `phantom_8`, `phantom_20`, and fresh images of two objects."""
        fresh = [as_image(i, phantom(FRESH_SEED + i, *GRIDS[2])) for i in range(NUM_FRESH)]
        return {f'phantom_{objects}': [as_image(i, phantom(TEST_SEED + i, *grid)) for i in range(NUM_TEST[objects])]
                for objects, grid in GRIDS.items()} | {CONFIRMATION: fresh}

    def tune(self, work: Path, fold: int) -> None:
        """No row is tuned: the truth is known too well."""


PHANTOM = PhantomSet()
