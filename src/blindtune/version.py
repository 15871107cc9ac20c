"""The release, as packages and messages state it."""

from __future__ import annotations

__version__ = "0.1.0"

PROGRAM = f"blindtune {__version__}"
"""Who made a package or speaks on the wire."""
