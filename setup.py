"""Finds the packages, which pyproject.toml can only list: the root is one, and holds the others."""

from setuptools import find_packages, setup

ROOMS = ("inner", "meta", "search", "studies", "scripts")
found = find_packages(include=[f"{room}{rest}" for room in ROOMS for rest in ("", ".*")])
setup(packages=["hyperdescent", *(f"hyperdescent.{package}" for package in found)])
