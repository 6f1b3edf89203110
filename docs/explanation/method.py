"""Draws docs/explanation/method.png: the method on a mask that is one of three shapes, with an exact denoiser.

Everything but the networks is the package's own: levels, noise, draws, steps. In the place of the networks stands what
they are to learn, which is known here: the probabilities of the three shapes, given a noisy mask, by Bayes' rule.
"""
from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import MaskCoding
from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_mask
from nnunet_pdddpm.diffusion.levels import HIGHEST, LevelTable, lowest_log_snr
from nnunet_pdddpm.diffusion.process import Redrawing, noise_scale, q_sample, signal
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402

PICTURE = Path(__file__).resolve().with_suffix('.png')
SIZE, START, STEPS, SAMPLES = 32, 0.8, 2, 3
PRIOR = torch.tensor([0.4, 0.3, 0.3])
CODING = MaskCoding()


def shapes() -> Tensor:
    """(3, C, Y, X) one-hot masks: a core, the core with its rim, the core with a lobe."""
    y, x = np.mgrid[:SIZE, :SIZE]
    core, rim = np.hypot(y - 16, x - 13) < 5.5, np.hypot(y - 16, x - 13) < 8.5
    lobe = core | (np.hypot(y - 13, x - 22) < 5.0)
    masks = torch.tensor(np.stack([core, rim, lobe]))
    return torch.stack([~masks, masks], 1).float()


SHAPES = shapes()


def of_shapes(x: Tensor, level: float) -> Tensor:
    """(B, C, Y, X) noisy coded masks -> probabilities (B, 3) of the shapes."""
    distance = (x[:, None] - signal(level) * CODING.encode(SHAPES)[None]) ** 2
    return torch.softmax(PRIOR.log() - distance.sum((2, 3, 4)) / (2 * noise_scale(level) ** 2), 1).float()


def denoise(x: Tensor, level: float) -> Tensor:
    """(B, C, Y, X) noisy coded masks -> probabilities (B, C, Y, X) of the clean one, as the denoiser is to give."""
    return torch.einsum('bk,kcyx->bcyx', of_shapes(x, level), SHAPES)


def table() -> LevelTable:
    """Log SNR -> share of the uncertainty that it leaves, from 200 noisy masks a level."""
    log_snr = np.linspace(lowest_log_snr(SIZE * SIZE, 2), HIGHEST, 41)
    generator = torch.Generator().manual_seed(0)
    truth = SHAPES[torch.multinomial(PRIOR, 200, True, generator=generator)]
    noise = torch.randn(truth.shape, generator=generator)
    left = np.array([-float((denoise(q_sample(CODING.encode(truth), level, noise), level).clamp(1e-6)
                             .log() * truth).sum()) for level in log_snr])
    share = np.minimum.accumulate((left - left[-1]) / (left[0] - left[-1]))
    share = 0.99 * share + 0.01 * np.linspace(1, 0, 41)  # strictly falling
    return LevelTable(tuple(log_snr), tuple([1.0, *share[1:-1], 0.0]))


def chain(sample: int, levels: list[float]) -> list[Tensor]:
    """What one sample passes through: the drawn start, then noisy mask and estimate of every step, and its mask."""
    def draw(p: Tensor, stage: int) -> Tensor:
        return drawn_mask(p[0], False, draw_shifts(2, False, sample, SAMPLES, 4, stage))[None]
    first = draw(torch.einsum('k,kcyx->cyx', PRIOR, SHAPES)[None], 1)
    seen = [first]
    last = refine(lambda x, level: CODING.encode(denoise(x, level)),
                  Redrawing(lambda x0, lower: CODING.encode(draw(CODING.decode(x0), 2))), CODING.encode(first), levels,
                  seeded_noise(first.shape, 4, sample, torch.device('cpu')),
                  lambda level, x, x0: seen.extend([x, CODING.decode(x0)]))
    return [*seen, draw(CODING.decode(last), 0)]


def main() -> None:
    levels = table().chain(START, STEPS)
    rows = [chain(sample, levels) for sample in range(SAMPLES)]
    titles = ['three masks\nare possible', 'stock model:\nprobabilities', 'a mask drawn\nfrom them',
              f'noised until {START:.0%}\nis left open', 'denoiser:\nprobabilities',
              f'drawn again, noised\nuntil {START / STEPS:.0%} is left', 'denoiser:\nprobabilities',
              'drawn:\nthe sample']
    figure, axes = plt.subplots(SAMPLES, len(titles), figsize=(13, 5.4))
    for row, (line, of) in enumerate(zip(axes, rows, strict=True)):
        images = [SHAPES[row, 1], torch.einsum('k,kyx->yx', PRIOR, SHAPES[:, 1]), *(image[0, 1] for image in of)]
        for column, (axis, image) in enumerate(zip(line, images, strict=True)):
            noisy = column in (3, 5)
            axis.imshow(image, cmap='gray' if noisy else 'Blues', vmin=-3 if noisy else 0, vmax=3 if noisy else 1)
            axis.set(xticks=[], yticks=[])
        line[1].set_visible(row == 1)
        line[0].set_xlabel(f'true in {PRIOR[row]:.0%}', fontsize=8)
        line[2].set_ylabel(f'sample {row + 1}', fontsize=9)
    for axis, title in zip([axes[0, 0], axes[1, 1], *axes[0, 2:]], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90)
    print(PICTURE)


if __name__ == '__main__':
    main()
