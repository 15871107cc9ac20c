"""What a package holds and what it reveals.

Either party inspects: the model owner before sending an emulator, the data owner before using it;
likewise with the adapter on its way back.
"""

from __future__ import annotations

from pathlib import Path

from blindtune.errors import MismatchError
from blindtune.exchange.manifest import AdapterManifest, EmulatorManifest
from blindtune.exchange.package import open_package
from blindtune.exchange.signing import Trust
from blindtune.offsite.inspected_adapter import InspectedAdapter, inspect_adapter
from blindtune.offsite.inspected_emulator import InspectedEmulator, inspect_emulator

Inspection = InspectedEmulator | InspectedAdapter


def inspect(package: str | Path, *, trust: Trust | None = None) -> Inspection:
    """Tell what is in an emulator or adapter package.

    The whole package is verified; of an adapter the tensors are also read, for their norms.

    Args:
        package: its directory.
        trust: whose packages are opened, and by what names; None: anybody's.

    Raises:
        PolicyError: `trust` refuses the package.
        ConfigError: there is no such directory.
        PackageError: it is damaged or malformed, an emulator that cannot be opened, or an adapter
            with a NaN or infinite value or a tensor of no adapter layer.
        MismatchError: an emulator's tensors are not those that its manifest describes, or it is a
            package of split tuning.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, trust=trust)
    if isinstance(opened.manifest, EmulatorManifest):
        return inspect_emulator(opened, opened.manifest)
    if isinstance(opened.manifest, AdapterManifest):
        return inspect_adapter(opened, opened.manifest)
    raise MismatchError(
        f"{package}: expected an emulator or an adapter package, got a {opened.manifest.format} "
        "package: give the other directory"
    )
