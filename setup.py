"""Packaging: settings.ini tells what the package is and needs; the wheel carries data/ and nbs/ inside the package."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
config = ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
EXTRA = "_requirements"


class BuildWithShipped(build_py):
    """Copies data/ and nbs/ to maskalign_lab/_shipped; an editable install uses the folders of the clone."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in ("data", "nbs"):
            target = Path(self.build_lib, settings["lib_name"], "_shipped", name)
            shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left files that are gone
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    keywords=settings["keywords"].split(),
    install_requires=settings["requirements"].split(),
    extras_require={key[: -len(EXTRA)]: settings[key].split() for key in settings if key.endswith(EXTRA)},
    cmdclass={"build_py": BuildWithShipped},
)
