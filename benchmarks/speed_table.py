"""docs/results/speed.md and its figure, from what `speed.py` measured."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from compatibility import LESION
from hippocampus import DATASET
from speed import DIFF_UNET, SUBJECTS
from speed_accuracy import paired
from speed_parts import spread

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def command_rows(measured: dict[str, Any]) -> str:
    """The two commands on both data sets."""
    rows = []
    for subject in SUBJECTS:
        result = measured[f'commands {subject.dataset}']
        columns = {name: [[r[name][i] for r in result['runs']] for i in (0, 1)] for name in ('stock', 'PDDDPM')}
        ratios = [[r['PDDDPM'][i] / r['stock'][i] for r in result['runs']] for i in (0, 1)]
        calls = result['calls']
        rows.append(f'| {subject.dataset[11:]} ({subject.cases}) | {spread(columns["stock"][0])} '
                    f'| {spread(columns["PDDDPM"][0])} | **{spread(ratios[0])}** | {spread(columns["stock"][1])} '
                    f'| {spread(columns["PDDDPM"][1])} | **{spread(ratios[1])}** | {calls["stock"]:.0f} '
                    f'+ {calls["denoiser"]:.0f} |')
    return '\n'.join(rows)


def part_rows(measured: dict[str, Any]) -> str:
    """The network part of one image of each data set."""
    rows = []
    for subject in SUBJECTS:
        result = measured[f'network_part {subject.dataset}']
        over, call = result['overhead'], result['call']
        rows.append(f'| {subject.dataset[11:]}, {"x".join(map(str, result["shape"][1:]))} | {spread(call["stock"], 3)} '
                    f'| {spread(call["denoiser"], 3)} | {spread(call["denoiser in float32"], 3)} '
                    f'| {over["calls"]["stock"]} + {over["calls"]["denoiser"]} | {spread(over["seconds"])} '
                    f'| {spread(over["of calls"])} | **{spread(over["ratio"])}** |')
    return '\n'.join(rows)


def cost_rows(measured: dict[str, Any]) -> str:
    """Other numbers of samples and steps, other sizes, other methods."""
    cost, call = measured[f'cost {DATASET}']['cost'], measured[f'network_part {DATASET}']['call']
    stock = np.median(cost['stock'])
    rows = [f'| {name} | {spread(seconds)} | {np.median(seconds) / stock:.2f} |' for name, seconds in cost.items()]
    one = float(np.median(call['denoiser']))
    for name, calls in (('DDPM from noise, 1,000 steps, 5 samples: 5,000 calls x the seconds of one', 5000),
                        ("the paper's setting, 300 steps, 5 samples: 1,500 calls x the seconds of one", 1500)):
        rows.append(f'| {name} | {stock + calls * one:.0f} | {(stock + calls * one) / stock:.0f} |')
    return '\n'.join([*rows, f'| Diff-UNet, by its arithmetic against 8 calls of stock | | {DIFF_UNET:.1f} |'])


def way_rows(measured: dict[str, Any]) -> str:
    """Seconds a tile of the denoiser."""
    return '\n'.join(f'| {name} | {spread(seconds, 3)} |'
                     for name, seconds in measured[f'cost {DATASET}']['ways'].items())


def accuracy_rows(measured: dict[str, Any]) -> str:
    """The denoiser in bfloat16 against float32."""
    rows = measured[f'accuracy {DATASET}']
    return '\n'.join(f'| {name} | {np.mean(row["Dice"]):.4f} | {paired(row["Dice"], rows["float32"]["Dice"])} '
                     f'| {np.mean(row["NLL"]):.4f} | {paired(row["NLL"], rows["float32"]["NLL"])} |'
                     for name, row in rows.items())


def share_row(measured: dict[str, Any]) -> str:
    """Seconds with some of the tiles."""
    rows = measured[f'share {DATASET}']
    return f'{spread(rows["stock"])} s for stock alone; ' + ', '.join(
        f'{spread(seconds)} s with {float(name):.0%}' for name, seconds in rows.items() if name != 'stock')


def sure_rows(measured: dict[str, Any]) -> str:
    """Refinement around unsure voxels only."""
    rows = measured[f'sure {LESION}']
    return '\n'.join(f'| {sure} | {row["tiles"]:.0%} | {row["calls"]["denoiser"]} | {row["seconds"]:.0f} '
                     f'| {row["other labels"]} | {row["largest difference"]:.3f} |' for sure, row in rows.items())


def draw(measured: dict[str, Any], file: Path) -> None:
    """Seconds against samples, steps and size."""
    cost = {name: float(np.median(seconds)) for name, seconds in measured[f'cost {DATASET}']['cost'].items()}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    lines = (('samples n (k = 1)', {n: cost[f'n = {n}, k = 1'] for n in (1, 2, 4, 8, 16)}, None),
             ('steps k (n = 8)', {k: cost[f'n = 8, k = {k}'] for k in (1, 2, 3, 5, 10)}, None),
             ('times the voxels (n = 8, k = 1)',
              {1: cost['n = 8, k = 1'], **{t: cost[f'n = 8, k = 1, {t} x the voxels'] for t in (2, 4, 8)}},
              {1: cost['stock'], **{t: cost[f'stock, {t} x the voxels'] for t in (2, 4, 8)}}))
    for axis, (label, values, stock) in zip(axes, lines, strict=True):
        axis.plot(list(values), list(values.values()), 'o-', label='PDDDPM, network part')
        reference = stock or {x: cost['stock'] for x in values}
        axis.plot(list(reference), list(reference.values()), 's--', color='grey', label='stock with mirroring')
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel('seconds a case')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write_table(measured: dict[str, Any], machine: str, file: Path) -> None:
    """The document."""
    draw(measured, file.with_suffix('.png'))
    training = measured[f'training {DATASET}']
    ratio = [a / b for a, b in zip(training['PDDDPM'], training['stock'], strict=True)]
    settings = measured[f'commands {DATASET}']['settings']
    threads = measured[f'network_part {DATASET}']['call']['threads'][0]
    top = {subject.dataset[11:]: measured[f'network_part {subject.dataset}']['top'] for subject in SUBJECTS}
    costs = '\n'.join(f'| {i + 1} | ' + ' | '.join(f'{rows[i][0]} {rows[i][1]:.1%}' for rows in top.values()) + ' |'
                      for i in range(10))
    file.write_text(f"""# Speed: eight samples with uncertainty against stock nnU-Net

    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/speed.py -o WORK    # after benchmarks/hippocampus.py -o WORK

Machine: {machine}. Reduced plans. Hippocampus: the models of `hippocampus.py`, with the settings its tuning chose (start
{settings['start']:g}, {settings['steps']} steps, weight of the blind mask {settings['mask_blind']:g}). MSLesion: 182 x 218 x 182 voxels, three channels, patch
96 x 96 x 96, a short training of 120 and 50 iterations, settings not tuned. Median (range).

## The commands

`nnUNetv2_predict` against `nnUNetv2_pdddpm_predict -samples 8 --uncertainty`, otherwise with their defaults: mirroring, start of
the program, preprocessing and export included; in turn, {SUBJECTS[0].repeats} (MSLesion: {SUBJECTS[1].repeats}) times. Memory is that of the largest process.

| data (cases in a call) | stock, s/case | PDDDPM, s/case | ratio | stock, GiB | PDDDPM, GiB | ratio | calls a case: stock + denoiser |
|---|---|---|---|---|---|---|---|
{command_rows(measured)}

## The network part

One image (MSLesion: a part of it), within a process, {threads} threads. A call is one network on one tile. "of the calls" is their number times the seconds of
one, measured between the repeats; the ratio is what everything else costs: noise, fusion of tiles, updates, running sums.

| image | s a stock call | s a denoiser call | s a denoiser call in float32 | calls | s measured | s of the calls | ratio |
|---|---|---|---|---|---|---|---|
{part_rows(measured)}

| cost of an operator, share of the network part | {' | '.join(top)} |
|---|---|---|
{costs}

## Cost against the settings, hippocampus

Network part of one image; the mask from the samples. Ratio to the stock model's, with mirroring.

| | s | ratio |
|---|---|---|
{cost_rows(measured)}

![Seconds against samples, steps and size](speed.png)

## Other ways to call the denoiser

Seconds a tile, hippocampus, in turn.

| | s a tile |
|---|---|
{way_rows(measured)}

## What bfloat16 costs

The {len(measured[f'accuracy {DATASET}'].get('float32', {}).get('Dice', []))} test cases of hippocampus, denoiser in float32 and in bfloat16 (the default on CPUs that have it).
Paired difference with its 95 % bootstrap interval over cases.

| denoiser | Dice | difference | NLL | difference |
|---|---|---|---|---|
{accuracy_rows(measured)}

## Only where the stock model is unsure (`-sure`), MSLesion

n = 1 run each, without mirroring. "Other labels" are voxels of the mask that differ from the first row's; the difference is of probabilities.

What a share of the tiles costs, hippocampus, an image of four times the voxels, network part with mirroring, tiles chosen for the
purpose: {share_row(measured)}.

| `-sure` | tiles refined | denoiser calls | s | other labels | largest difference |
|---|---|---|---|---|---|
{sure_rows(measured)}

## Training

An iteration of `PDDDPMTrainer` against one of the stock trainer, hippocampus, both as in `hippocampus.py` (batch of two, bf16
autocast), out-of-fold pre-segmentation included, without the data loader, interleaved {len(ratio)} times: {spread(training['PDDDPM'])} s
against {spread(training['stock'])} s, ratio {spread(ratio)}.
""")
