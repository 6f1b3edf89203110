"""Everything is in setup.cfg; this file keeps the trainers' shims out of editable installs.

An editable install would claim the name `nnunetv2` as a namespace and hide an nnunetv2 that is itself editable. There
`nnUNet_extTrainer` names the folder trainers/ instead.
"""
from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

SHIMS = 'nnunetv2.training.nnUNetTrainer.variants.pdddpm'


class EditableWithoutShims(editable_wheel):
    def run(self) -> None:
        self.distribution.packages.remove(SHIMS)
        self.distribution.package_dir.pop(SHIMS)
        super().run()


setup(cmdclass={'editable_wheel': EditableWithoutShims})
