"""The version of mig that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mig-engine")
except PackageNotFoundError:
    __version__ = "0+unknown"
