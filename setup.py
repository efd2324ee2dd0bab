"""Puts the scripts of the root folder into the package, as tinyldm/scripts/, when a wheel is built. All else is in setup.cfg."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SCRIPTS = ("train.py", "sample.py", "prepare.py", "evaluate.py")


class WithScripts(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:                              # an editable install runs them where they are
            folder = Path(self.build_lib) / "tinyldm" / "scripts"
            self.mkpath(str(folder))
            for name in SCRIPTS:
                self.copy_file(name, str(folder / name))


setup(cmdclass={"build_py": WithScripts})
