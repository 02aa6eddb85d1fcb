"""Finds the packages, which pyproject.toml could only list: the root is one with others in it."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ("inner", "meta", "search", "studies", "testing", "scripts")


class Modules(build_py):
    """All modules of the packages but this file, which lies in one."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != "setup"]


found = find_packages(include=[f"{room}{rest}" for room in ROOMS for rest in ("", ".*")])
setup(
    packages=["hyperdescent", *(f"hyperdescent.{package}" for package in found)],
    cmdclass={"build_py": Modules},
)
