"""What nnU-Net's search for trainers finds; the classes live in the installed package nnunet_pdddpm."""
from nnunet_pdddpm.training.trainer import PDDDPMTrainer  # noqa: F401
from nnunet_pdddpm.training.variants import *  # noqa: F403
