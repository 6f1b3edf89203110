"""Which cases a model was trained and calibrated on, and which its stock model held out: in the model, as hashes."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


def case_hash(name: str) -> str:
    """Stands for a case: names of patients do not leave with a model."""
    return hashlib.blake2s(name.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Seen:
    """Hashes of cases; None for what is not known. Its fields are keys in the metadata of a refiner's state dict."""
    trained_on: frozenset[str] | None = None
    """Those that the denoiser was trained on; not known of a model that began with other weights."""
    stock_held_out: frozenset[str] | None = None
    """Those that the stock model was validated on when it was trained; it was trained on others."""
    calibrated_on: frozenset[str] | None = None
    """Those by which volumes are calibrated."""

    @classmethod
    def from_names(cls, trained_on: Iterable[str] | None, stock_held_out: Iterable[str] | None) -> Seen:
        """Hash names of cases; None: not known."""
        return cls(*(None if names is None else frozenset(map(case_hash, names))
                     for names in (trained_on, stock_held_out)))

    def with_training_cases(self, names: Iterable[str]) -> Seen:
        """With further cases that the denoiser is trained on; what is not known stays so."""
        known = None if self.trained_on is None else self.trained_on | frozenset(map(case_hash, names))
        return replace(self, trained_on=known)

    def leaked_into_denoiser(self, validation: Iterable[str], training: Iterable[str] = ()) -> list[str]:
        """Those of the validation cases that the denoiser was trained on.

        `training`: those that the split in force trains on. Where it validates on some of them, that is on purpose.
        """
        meant = frozenset(training)
        return [name for name in sorted(validation) if self.trained_on is not None
                and case_hash(name) in self.trained_on and name not in meant]

    def leaked_into_stock(self, validation: Iterable[str]) -> list[str]:
        """Those of the validation cases that the stock model did not hold out: it was trained on them, or they were
        added since."""
        return [name for name in sorted(validation) if self.stock_held_out is not None
                and case_hash(name) not in self.stock_held_out]

    def leaks(self, validation: Iterable[str], training: Iterable[str] = ()) -> str:
        """What is wrong with cases as validation cases, a clause; empty if nothing is known to be. `training`: see
        `leaked_into_denoiser`."""
        names = sorted(validation)
        own, stock = self.leaked_into_denoiser(names, training), self.leaked_into_stock(names)
        clauses = [f'the model was trained on {_listed(own, names)}'] * bool(own)
        clauses += [f'{_listed(stock, names)} are not among the cases that its stock model held out, so that was '
                    f'trained on them, unless they were added since'] * bool(stock)
        return ', and '.join(clauses)

    def unknown(self) -> str:
        """What is not known, a sentence; empty if all is."""
        if self.trained_on is None:
            return ('It is not known which cases this model was trained on: it began with -pretrained_weights, or its '
                    'checkpoint was written by another program.')
        if self.stock_held_out is None:
            return ('It is not known which cases the stock model was trained on: it has left no complete validation '
                    '(nnUNetv2_train does one at its end).')
        return ''


def split_overlap(validation: Iterable[str], training: Iterable[str]) -> str:
    """Which validation cases of a split are among its training cases, a clause; empty if none is."""
    names, meant = sorted(validation), frozenset(training)
    both = [name for name in names if name in meant]
    return f'by splits_final.json {_listed(both, names)} are training cases as well' if both else ''


def _listed(names: list[str], cases: list[str]) -> str:
    return f'{len(names)} of {len(cases)} validation cases ({", ".join(names[:3])}{", …" if len(names) > 3 else ""})'


def stored_seen(weights: Mapping[str, Any]) -> Seen:
    """What is noted in a refiner's state dict."""
    noted = getattr(weights, '_metadata', {}).get('', {})
    return Seen(*(None if noted.get(key.name) is None else frozenset(noted[key.name]) for key in fields(Seen)))


def note_seen(module: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Hook of the refiner's `state_dict`."""
    for key in fields(Seen):
        if (cases := getattr(module.seen, key.name)) is not None:
            metadata[key.name] = sorted(cases)


def note_calibrated_on(weights: Mapping[str, Any], names: Iterable[str]) -> None:
    """Note in a refiner's state dict which cases its volumes are calibrated by."""
    getattr(weights, '_metadata', {}).get('', {})['calibrated_on'] = sorted(map(case_hash, names))
