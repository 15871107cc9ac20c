"""What a package says about itself: three strict JSON documents, and their canonical bytes.

A manifest holds the size and hash of every other file of its package, so the hash of its own
bytes, the package id, pins the whole package. The bytes must be canonical (docs/package-format.md):
one manifest has one spelling and one id, and nothing can hide in spaces or duplicate keys.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blindtune.errors import OutputError, PackageError
from blindtune.exchange.files import printable
from blindtune.version import PROGRAM

MANIFEST_NAME = "manifest.json"
READABLE_VERSIONS = (1,)

MAX_MANIFEST_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_STRING = 1 << 16
MAX_LAYERS = 4096
MAX_RANK = 1 << 16
MAX_INTEGER = 2**63 - 1
# A model configuration may not name code to run, nor where its owner keeps the model.
FORBIDDEN_CONFIG_KEYS = frozenset({"auto_map", "custom_pipelines", "_name_or_path"})

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]
Ranks = Annotated[tuple[Rank, ...], Meta(min_length=1, max_length=8)]
LayerCount = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
PackageId = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
ModelType = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
ModuleName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.]{1,128}\Z")]
Creator = Annotated[str, Meta(pattern=r"\Ablindtune [0-9a-z.+]{1,32}\Z")]
Dtype = Literal["float32", "float16", "bfloat16"]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the package: its size in bytes and its sha256 in lower-case hex."""

    bytes: Count
    sha256: Sha256


class AdapterLayer(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="adapter"
):
    """A layer of the full model, unchanged, that the data owner tunes."""


class RawLayer(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="raw"
):
    """A frozen layer of the full model, unchanged."""


class CompressedLayer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="compressed",
):
    """A frozen layer of reduced rank.

    `ranks` names the projections that are stored as factors, by path inside the layer, with one
    rank for every part of a fused projection (query, key, value) and one for a plain one.
    """

    ranks: Annotated[dict[ModuleName, Ranks], Meta(max_length=64)]


class HarmonizerLayer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="harmonizer",
):
    """A harmonizer of the given rank, standing in for a layer of the full model."""

    rank: Rank


LayerEntry = AdapterLayer | RawLayer | CompressedLayer | HarmonizerLayer


class FullModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The full model's size, for comparison: parameters, bytes of its weights, layers."""

    parameters: Positive
    bytes: Positive
    layers: LayerCount


class LoraFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LoRA settings of an adapter package; `targets` are module names inside a layer."""

    rank: Rank
    alpha: Annotated[float, Meta(gt=0)]
    targets: Annotated[list[ModuleName], Meta(min_length=1, max_length=64)]


class PrivacyFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Differential privacy of a tuning, as the data owner states it: nobody else can check it.

    Attributes:
        epsilon, delta: for adding or removing one `unit`.
        unit: one record of the data, or a window of packed text.
    """

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]
    unit: Literal["record", "window"]


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every manifest says; each kind adds its `format`. Abstract.

    Attributes:
        files: every other file of the package; filled in by `write_package`.
        model: fingerprint of the full model: hex sha256 over its config and weights.
        model_type: the Hugging Face model type.
        dtype: of the weights in the package.
    """

    version: Literal[1] = 1
    created_by: Creator = PROGRAM
    files: dict[str, FileEntry] = {}
    model: Sha256
    model_type: ModelType
    dtype: Dtype


class EmulatorManifest(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model owner to data owner: what the emulator is made of.

    Attributes:
        config: the Hugging Face configuration as plain JSON, bounded here and judged by whoever
            builds the model.
        adapter_layers: N_a, the number of adapter layers at each end.
        layers: the emulator's layers, first to last.
        max_length: longest sequence in tokens that the emulator was made for, or None.
    """

    format: Literal["blindtune-emulator"] = "blindtune-emulator"
    config: dict[str, Any]
    adapter_layers: LayerCount
    layers: Annotated[list[LayerEntry], Meta(min_length=1, max_length=MAX_LAYERS)]
    full_model: FullModelFacts
    max_length: Positive | None

    def __post_init__(self) -> None:
        """Check that the adapter layers, and only they, stand at the two ends."""
        ends, count = self.adapter_layers, len(self.layers)
        found = [i for i, layer in enumerate(self.layers) if isinstance(layer, AdapterLayer)]
        if count < 2 * ends or found != [*range(ends), *range(count - ends, count)]:
            raise ValueError(
                f"expected exactly the first and last {ends} of {count} layers to be adapter "
                f"layers, {len(found)} are marked so"
            )
        if count > self.full_model.layers:
            raise ValueError(
                f"expected no more layers than the full model's {self.full_model.layers}, "
                f"came {count}"
            )


class AdapterManifest(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data owner to model owner: which emulator was tuned, and how. Nothing about the data.

    Attributes:
        emulator: package id of the emulator that the adapter was tuned on.
        kind: "full" (the adapter layers' weights) or "lora" (low-rank updates of them).
        adapter_layers, layers: N_a and the layer count of that emulator.
        lora: LoRA settings; present exactly when kind is "lora".
        privacy: present exactly when it was tuned with differential privacy.
    """

    format: Literal["blindtune-adapter"] = "blindtune-adapter"
    emulator: PackageId
    kind: Literal["full", "lora"]
    adapter_layers: LayerCount
    layers: LayerCount
    lora: LoraFacts | None
    privacy: PrivacyFacts | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Check that the fields agree with each other."""
        if (self.kind == "lora") != (self.lora is not None):
            raise ValueError(f"`lora` is given exactly when kind is lora, kind is {self.kind}")
        if self.layers < 2 * self.adapter_layers:
            raise ValueError(
                f"{self.adapter_layers} adapter layers at each end do not fit into {self.layers}"
            )


class BottomManifest(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Vendor to customer of split tuning: the layers that the customer runs.

    Attributes:
        config: as in an emulator, with the customer's number of layers.
        partition: who holds the last part and the loss.
        cut, last: layers of the customer's bottom and, in the U-shape, of its top.
        layers: of the whole model.
        max_length: longest sequence in tokens that the model was made for, or None.
    """

    format: Literal["blindtune-bottom"] = "blindtune-bottom"
    config: dict[str, Any]
    partition: Literal["two-part", "u-shape"]
    cut: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    last: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    layers: LayerCount
    max_length: Positive | None

    def __post_init__(self) -> None:
        """Check that the vendor keeps a layer, and the top in the two-part split."""
        if self.cut + self.last >= self.layers:
            raise ValueError(
                f"expected fewer than {self.layers} layers at the customer, came "
                f"{self.cut} below and {self.last} above"
            )
        if self.partition == "two-part" and self.last:
            raise ValueError(f"expected `last` 0 in the two-part split, came {self.last}")


Manifest = EmulatorManifest | AdapterManifest | BottomManifest
_TYPES: dict[str, type[Manifest]] = {
    "blindtune-emulator": EmulatorManifest,
    "blindtune-adapter": AdapterManifest,
    "blindtune-bottom": BottomManifest,
}
_STRUCTS = (
    *_TYPES.values(), FileEntry, FullModelFacts, LoraFacts, CompressedLayer, HarmonizerLayer,
)  # fmt: skip
_KNOWN_KEYS = sorted({name for kind in _STRUCTS for name in kind.__struct_fields__} | {"kind"})


def package_id(manifest_bytes: bytes) -> str:
    """The package id: "sha256:" and the hash of the manifest's canonical bytes."""
    return "sha256:" + hashlib.sha256(manifest_bytes).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest; OutputError if no reader would accept it."""
    try:
        plain = msgspec.to_builtins(manifest)
        _check_plain(plain, depth=1)
        data = canonical_bytes(msgspec.to_builtins(_convert(plain, type(manifest))))
        _check_size(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{MANIFEST_NAME}: {printable(str(error))}: no reader would accept that, correct it"
        ) from error
    return data


def decode_manifest(data: bytes) -> Manifest:
    """Read a stranger's manifest.

    Raises:
        PackageError: too large, too deep, not JSON, not canonical, of an unknown format or
            version, or any field missing, unknown, mistyped or out of range.
    """
    try:
        _check_size(data)
        plain = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
        _check_plain(plain, depth=1)
        manifest = _convert(plain, _type_of(plain))
        if canonical_bytes(msgspec.to_builtins(manifest)) != data:
            raise ValueError(
                "not in canonical form (keys sorted, no spaces, every field present, "
                "numbers in their shortest notation)"
            )
    except (ValueError, RecursionError) as error:
        raise PackageError(
            f"{MANIFEST_NAME}: {printable(str(error))}: ask for the package again"
        ) from error
    return manifest


def _check_size(data: bytes) -> None:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed")


def canonical_bytes(plain: Any) -> bytes:
    """The one spelling of plain JSON (docs/package-format.md); ValueError if it has none."""
    text = json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in pairs:
        if key in plain:
            raise ValueError(f"key `{key}` is given twice")
        plain[key] = value
    return plain


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return int(digits)


def _check_plain(value: Any, *, depth: int) -> None:
    """Refuse what is not plain bounded JSON; the depth of the outermost value is 1."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    match value:
        case None | bool():
            return
        case int():
            if abs(value) > MAX_INTEGER:
                raise ValueError("a number is outside of 64 bits")
        case float():
            if not math.isfinite(value):
                raise ValueError("a number is NaN or infinite")
        case str():
            if len(value) > MAX_STRING or not value.isprintable():
                raise ValueError(f"the string `{value[:40]}` is too long or not printable")
        case list() | tuple():
            for item in value:
                _check_plain(item, depth=depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r} is not a string")
                _check_plain(key, depth=depth)
                if key in FORBIDDEN_CONFIG_KEYS:
                    raise ValueError(f"the key `{key}` may not be in a package")
                _check_plain(item, depth=depth + 1)
        case _:
            raise ValueError(f"a value of type {type(value).__name__} is not plain JSON")


def _type_of(plain: Any) -> type[Manifest]:
    if not isinstance(plain, dict) or plain.get("format") not in list(_TYPES):
        raise ValueError(f"`format` must be one of {', '.join(_TYPES)}")
    version = plain.get("version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise PackageError(
            f"{MANIFEST_NAME}: format version {printable(str(version), limit=20)}; this release "
            f"({PROGRAM}) reads version {readable}: upgrade blindtune, or ask for a package "
            "of that version"
        )
    return _TYPES[plain["format"]]


def _convert(plain: Any, kind: type[Manifest]) -> Manifest:
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.*?)`", str(error), re.DOTALL)
        near = difflib.get_close_matches(unknown[1][:64], _KNOWN_KEYS, n=1) if unknown else []
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise ValueError(f"{error}{hint}") from error
