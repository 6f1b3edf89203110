"""Trainers of `coherence.py`: those of the phantom, 3.5 times (stock) and ten times (the others) as long."""
from ambiguous_trainers import PDDDPMTrainerAmbiguous, nnUNetTrainerAmbiguous
from benchmark_trainers import CrossEntropyAlone, NoDiffusion, NoiseOnTruth
from candidate_trainers import Bridge8


class nnUNetTrainerCoherence(nnUNetTrainerAmbiguous):
    iterations = 700


class PDDDPMTrainerCoherence(PDDDPMTrainerAmbiguous):
    """The default."""

    iterations = 2000


class PDDDPMTrainerCoherenceDirectCE(CrossEntropyAlone, NoDiffusion, PDDDPMTrainerCoherence):
    pass


class PDDDPMTrainerCoherenceTruth(NoiseOnTruth, PDDDPMTrainerCoherence):
    """Noise on the truth in every patch; the default's levels go up with the square, these with the eighth power."""

    share, power = 0.0, 8


class PDDDPMTrainerCoherenceBridge8(Bridge8, PDDDPMTrainerCoherence):
    pass
