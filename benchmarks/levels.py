"""Figure of the tables of noise levels in trained models: share of uncertainty over log SNR."""
from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from nnunet_pdddpm.network.checkpoint import load_checkpoint
from nnunet_pdddpm.network.state import stored_table

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='+', type=Path, help='model folders (TRAINER__PLANS__CONFIGURATION)')
    parser.add_argument('-names', nargs='+', help='for the legend, one a folder')
    parser.add_argument('-o', required=True, type=Path, help='the figure')
    args = parser.parse_args()
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for number, folder in enumerate(args.models):
        files = sorted(folder.glob('fold_*/checkpoint_final.pth'))
        for file in files:
            table = stored_table(load_checkpoint(file, 'model')['network_weights'])
            name = (args.names or [folder.parent.name] * len(args.models))[number]
            axis.plot(table.log_snr, table.share, color=f'C{number}', linewidth=1,
                      label=f'{name}, {len(files)} trainings' if file == files[0] else None)
    axis.set(xlabel='log SNR', ylabel='share of uncertainty u that is left')
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.o, dpi=110)


if __name__ == '__main__':
    main()
