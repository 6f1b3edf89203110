"""Masks of several people: nuclei, cells and lung nodules, `images/*.png` and `raters/IMAGE__RATER.png` of 0 and 1."""
from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunet import NUM_FOLDS, Dataset, find_data
from skimage import io

from datasets.images import Image, description, write_cases

SPLIT_SEED = 2210
NETWORKS = ('stock', 'longer', 'denoiser', 'second', 'ssn')


@dataclass(frozen=True)
class RaterSet:
    """One of the sets."""
    title: str
    folder: str
    label: str
    source: str
    """What the images are of, and which of them depend on each other."""
    shrink: int
    """Pixels of the images, side by side, that become one."""
    dataset: Dataset
    samples: int = 8
    kind: str = 'raters'
    networks: tuple[str, ...] = NETWORKS
    whole: bool = True
    most: int | None = None
    """Images that are tested and, of a fold, fitted on: so many at even distances, instead of all."""

    def groups(self, data: str | None) -> dict[str, str]:
        """Image -> what must not be divided (the patient), or is to be spread evenly (the group of nuclei)."""
        folder = find_data(data, self.folder, 'raters')
        images = sorted(file.stem for file in (folder / 'images').glob('*.png'))
        if self.label == 'nodule':
            return {image: image.split('_')[0] for image in images}
        if self.label == 'nucleus':
            return {row['image']: row['group'] for row in csv.DictReader((folder / 'images.csv').open())
                    if row['image'] in images}
        return dict.fromkeys(images, '')

    def split(self, data: str | None) -> tuple[list[str], list[list[str]]]:
        """Test images, and the validation images of each fold.

        Of nuclei one image of each group is tested; of the others, by image or patient, as many as one fold validates.
        """
        groups, rng = self.groups(data), np.random.default_rng(SPLIT_SEED)
        if self.label == 'nodule':
            units = [[image for image in groups if groups[image] == one] for one in sorted(set(groups.values()))]
        else:
            units = [[image] for image in groups]
        units = [units[i] for i in rng.permutation(len(units))]
        if self.label == 'nucleus':
            units.sort(key=lambda unit: groups[unit[0]])  # stable: three of each group in random order
            test, rest = units[::3], [unit for i, unit in enumerate(units) if i % 3]
            rest = [*rest[::2], *np.roll(np.array(rest[1::2]), 1, 0).tolist()]  # those of a group in different folds
        else:
            number = len(units) // (NUM_FOLDS + 1)
            test, rest = units[:number], units[number:]
        return sorted(sum(test, [])), [sorted(sum(rest[fold::NUM_FOLDS], [])) for fold in range(NUM_FOLDS)]

    def masks(self, folder: Path, image: str) -> dict[str, np.ndarray]:
        """Name of the file -> (Y, X) bool, shrunk: at least half of the pixels."""
        files = sorted((folder / 'raters').glob(f'{image}__*.png'))
        return {file.stem: shrunk(io.imread(file).astype(float), self.shrink) >= 0.5 for file in files}

    def pixels(self, folder: Path, image: str) -> np.ndarray:
        """(Y, X) float, shrunk."""
        return shrunk(io.imread(folder / 'images' / f'{image}.png').astype(float), self.shrink)

    def images(self, folder: Path, names: Sequence[str] | None = None) -> Sequence[Image]:
        """Of a folder with `images` and `raters`: all, or some, with all raters' masks."""
        names = sorted(file.stem for file in (folder / 'images').glob('*.png')) if names is None else names
        masks = {name: list(self.masks(folder, name).values()) for name in names}
        if not names or not all(masks.values()):
            lacking = next((name for name in names if not masks[name]), 'IMAGE')
            sys.exit(f'{folder} lacks images/{lacking}.png or raters/{lacking}__RATER.png.')
        return [Image(name, self.pixels(folder, name), np.stack(masks[name])) for name in names]

    def validation(self, work: Path, fold: int) -> Sequence[Image]:
        """Of a fold, from nnU-Net's raw data."""
        raw, cases = self.dataset.raw(work), self.dataset.splits(work)[fold]['val']
        of_images: dict[str, list[str]] = {}
        for case in cases:
            of_images.setdefault(image_of(case), []).append(case)
        of_images = {name: of_images[name] for name in self.some(list(of_images))}
        return [Image(name, io.imread(raw / 'imagesTr' / f'{of[0]}_0000.png').astype(float),
                      np.stack([io.imread(raw / 'labelsTr' / f'{case}.png') > 0 for case in of]))
                for name, of in of_images.items()]

    def tests(self, data: str | None) -> Mapping[str, Sequence[Image]]:
        """One set."""
        return {self.label: self.images(find_data(data, self.folder, 'raters'), self.some(self.split(data)[0]))}

    def some(self, names: list[str]) -> list[str]:
        """At most `most` of them."""
        return names[::-(-len(names) // self.most)] if self.most else names

    def raters_of_cases(self, work: Path) -> Path:
        """Folder in which every case, an image with one rater's mask, has the masks of all."""
        return work / f'raters_{self.label}'

    def prepare(self, work: Path, data: str | None) -> None:
        """A raw data set with one case an image and rater; folds by image."""
        if self.dataset.is_prepared(work):
            return
        folds, raw, every = self.split(data)[1], self.dataset.raw(work), self.raters_of_cases(work)
        folder = find_data(data, self.folder, 'raters')
        every.mkdir(parents=True, exist_ok=True)
        cases: dict[str, list[str]] = {}

        def cases_of_raters() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
            for image in sum(folds, []):
                pixels, masks = np.round(self.pixels(folder, image)), self.masks(folder, image)
                cases[image] = [name.replace('__', '-') for name in masks]
                for case, mask in zip(cases[image], masks.values(), strict=True):
                    yield case, pixels, mask
                    for other in masks:
                        (every / f'{case}__{other.split("__")[1]}.png').symlink_to(
                            raw / 'labelsTr' / f'{other.replace("__", "-")}.png')
        number = len(write_cases(raw, cases_of_raters()))
        self.dataset.plan(work, description(self.label, number), [
            ([case for image in cases if image not in fold for case in cases[image]],
             [case for image in fold for case in cases[image]]) for fold in folds])

    def tune(self, work: Path, fold: int) -> None:
        """With all raters of the validation images."""
        self.dataset.tune(work, fold, '-raters', str(self.raters_of_cases(work)))


def image_of(case: str) -> str:
    """Of a case, which is an image with the mask of one rater."""
    return case.rsplit('-', 1)[0]


def shrunk(image: np.ndarray, by: int) -> np.ndarray:
    """Means of squares of pixels."""
    height, width = (n // by * by for n in image.shape)
    return image[:height, :width].reshape(height // by, by, width // by, by).mean((1, 3))


def _dataset(number: int, name: str, features: tuple[int, ...], batch_size: int, patch: int, epochs: int, stock: int,
             others: int, minutes: int = 6) -> Dataset:
    """For so many epochs of so many iterations, and minutes of tuning. The first epoch of PDDDPM is its warm-up."""
    return Dataset(number, name, '2d', 'Raters', features, (('batch_size', batch_size), ('patch_size', [patch] * 2)),
                   (epochs, epochs), (stock, others), tuning_minutes=minutes)


RATER_SETS = {
    'nuclei': RaterSet('Nuclei in brain sections, five experts an image', 'cfos_nuclei', 'nucleus',
                      'Fluorescence images of one laboratory (Segebarth et al. 2020, eLife 9:e59780), at half of their '
                      'resolution. Of each group of three one is tested and the others are in the folds: images of one '
                      'animal may be on both sides.', 2,
                       _dataset(772, 'Nucleus', (16, 32, 64, 128, 128, 128), 2, 256, 6, 160, 100, 25)),
    'cells': RaterSet('Cells, ten masks an image', 'bubil_cells', 'cell',
                      'Phase contrast (Gurari et al. 2015, BU-BIL); five people, two tools each.', 1,
                      _dataset(773, 'Cell', (16, 32, 64, 128), 4, 128, 6, 250, 250)),
    'nodules': RaterSet('Lung nodules, four radiologists an image', 'lidc_nodules_2d', 'nodule',
                        'LIDC-IDRI (Armato et al. 2011), one slice of each nodule, divided by patient; the split is '
                        'not that of the literature. Of the 527 images of the test split every sixth is tested; the '
                        'other 439 are in no fold. Temperatures and the copula are fitted on every sixth validation '
                        'image, 85 to 91 a fold.', 1,
                        _dataset(774, 'Nodule', (16, 32, 64, 128), 4, 128, 6, 250, 250), most=100)}
