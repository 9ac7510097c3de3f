"""The core that the leap packages share; import the module you need, e.g. ``from leap_shared import checkpoints``."""

__version__ = "0.1.0"

__all__ = ["__version__"]
