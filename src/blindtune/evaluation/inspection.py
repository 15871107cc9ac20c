"""What a package holds and what it reveals.

Either party inspects: the model owner before sending an emulator or a bottom, the other party
before using it; likewise with the adapter on its way back.
"""

from __future__ import annotations

from pathlib import Path

from blindtune.exchange.packages.manifest import AdapterManifest, EmulatorManifest
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.offsite.inspected_adapter import InspectedAdapter, inspect_adapter
from blindtune.offsite.inspected_emulator import InspectedEmulator, inspect_emulator
from blindtune.split.inspected_bottom import InspectedBottom, inspect_bottom

Inspection = InspectedEmulator | InspectedAdapter | InspectedBottom


def inspect(package: str | Path, *, trust: Trust | None = None) -> Inspection:
    """Tell what is in a package of either method.

    The whole package is verified; of an adapter the tensors are also read, for their norms.

    Args:
        package: its directory.
        trust: whose packages are opened, and by what names; None: anybody's.

    Raises:
        PolicyError: `trust` refuses the package.
        ConfigError: there is no such directory.
        PackageError: it is damaged or malformed, an emulator or a bottom that cannot be opened, or
            an adapter with a NaN or infinite value or a tensor of no adapter layer.
        MismatchError: its tensors are not those that its manifest describes.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, trust=trust)
    if isinstance(opened.manifest, EmulatorManifest):
        return inspect_emulator(opened, opened.manifest)
    if isinstance(opened.manifest, AdapterManifest):
        return inspect_adapter(opened, opened.manifest)
    return inspect_bottom(opened, opened.manifest)
