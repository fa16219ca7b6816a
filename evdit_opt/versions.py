"""Versions of the packages a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]

PACKAGES = ("evdit-opt", "torch", "triton", "diffusers", "transformers", "numpy")


def installed_versions() -> dict[str, str]:
    """Package name -> version, of those installed; Python's own included."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
