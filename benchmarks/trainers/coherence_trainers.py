"""Trainers of `coherence.py`: those of the phantom, ten times as long. Stock 2,100 iterations, the others 6,000."""
from ambiguous_trainers import (
    PDDDPMTrainerAmbiguous,
    PDDDPMTrainerAmbiguousDirectCE,
    nnUNetTrainerAmbiguous,
)
from benchmark_trainers import NoiseOnTruth
from candidate_trainers import Bridge8


class nnUNetTrainerCoherence(nnUNetTrainerAmbiguous):
    iterations = 700


class PDDDPMTrainerCoherence(PDDDPMTrainerAmbiguous):
    """The default."""

    iterations = 2000


class PDDDPMTrainerCoherenceDirectCE(PDDDPMTrainerAmbiguousDirectCE):
    iterations = 2000


class PDDDPMTrainerCoherenceTruth(NoiseOnTruth, PDDDPMTrainerCoherence):
    """Noise on the truth in every patch; the default's levels go up with the square, these with the eighth power."""

    share, power = 0.0, 8


class PDDDPMTrainerCoherenceBridge8(Bridge8, PDDDPMTrainerCoherence):
    pass
