"""What leap-@name@ is, in one sentence (paper, venue, year)."""

__version__ = "0.0.1"

__all__ = ["__version__"]
