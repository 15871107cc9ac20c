"""The manifest reader: what it accepts is canonical and equal to what was written."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import blindtune
from blindtune.errors import OutputError, PackageError
from blindtune.exchange.packages import manifest as m


def plain_of(manifest):
    return json.loads(m.encode_manifest(manifest))


def encode(plain):
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_both_kinds_survive_a_round_trip(emulator_manifest, adapter_manifest):
    for manifest in (emulator_manifest, adapter_manifest):
        data = m.encode_manifest(manifest)
        assert m.decode_manifest(data) == manifest
        assert m.encode_manifest(m.decode_manifest(data)) == data
        assert data == encode(json.loads(data))


def test_created_by_names_this_release(adapter_manifest):
    assert adapter_manifest.created_by == f"blindtune {blindtune.__version__}"


def test_an_integer_alpha_has_one_spelling(adapter_manifest):
    as_float = replace(adapter_manifest, lora=replace(adapter_manifest.lora, alpha=16.0))
    assert m.encode_manifest(adapter_manifest) == m.encode_manifest(as_float)


def change(path, value):
    """An edit of plain JSON: set, or with `...` delete, the value at a dotted path."""

    def _change(plain):
        *parents, last = path.split("/")
        for key in parents:
            plain = plain[int(key) if key.isdigit() else key]
        if value is ...:
            del plain[last]
        else:
            plain[int(last) if last.isdigit() else last] = value

    return _change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("max_lenght", 8), "did you mean `max_length`"),
        (change("layers/3/rnak", 8), "did you mean `rank`"),
        (change("max_length", ...), "missing required field `max_length`"),
        (change("created_by", ...), "canonical"),
        (change("max_length", 0), "max_length"),
        (change("max_length", True), "max_length"),
        (change("max_length", 8.0), "float"),
        (change("adapter_layers", 1.0), "canonical|float"),
        (change("adapter_layers", 2), "adapter layers"),
        (change("layers", []), "length >= 1"),
        (change("layers", [{"kind": "raw"}] * 5000), "length <= 4096"),
        (change("layers/1/kind", "adapter"), "adapter layers"),
        (change("layers/1/kind", "secret"), "secret"),
        (change("layers/2/ranks", {"q_proj": []}), "length >= 1"),
        (change("layers/2/ranks", {"q_proj": 2}), "array"),
        (change("layers/2/ranks", {"q_proj": [0]}), ">= 1"),
        (change("layers/2/ranks", {"q_proj": [10**6]}), "<= 65536"),
        (change("layers/2/ranks", {"../q": [1]}), "regex"),
        (change("full_model/layers", 4), "no more layers"),
        (change("dtype", "int8"), "int8"),
        (change("model_type", "a/b"), "regex"),
        (change("created_by", "blindtune \x1b[31m"), "printable"),
        (change("created_by", "somebody"), "regex"),
        (change("files", {"LICENSE": {"bytes": -1, "sha256": "0" * 64}}), ">= 0"),
        (change("files", {"LICENSE": {"bytes": 1, "sha256": "0" * 63}}), "regex"),
        (change("files", {"LICENSE": {"bytes": 1, "sha256": "A" * 64}}), "regex"),
        (change("files", {"LICENSE": {"bytes": 1, "sha256": "0" * 64 + "\n"}}), "printable"),
        (change("config", []), "config"),
        (change("config/auto_map", {"AutoModel": "evil.Model"}), "auto_map"),
        (change("config/rope/_name_or_path", "/home/owner/secret"), "_name_or_path"),
        (change("config/huge", 2**64), "64 bits"),
        (change("config/text", "x" * 70_000), "too long"),
        (change("format", "blindtune-study"), "`format` must be one of"),
        (change("format", []), "`format` must be one of"),
        (change("version", 2), "reads version 1: upgrade"),
        (change("version", "1"), "reads version 1"),
        (change("version", True), "reads version 1"),
        (change("version", 10**19), "reads version 1|64 bits"),
    ],
)
def test_an_emulator_manifest_is_refused(emulator_manifest, edit, message):
    plain = plain_of(emulator_manifest)
    edit(plain)
    with pytest.raises(PackageError, match=message) as caught:
        m.decode_manifest(encode(plain))
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("lora", None), "exactly when"),
        (change("kind", "full"), "exactly when"),
        (change("kind", "houlsby"), "houlsby"),
        (change("layers", 1), "do not fit"),
        (change("emulator", "0" * 64), "regex"),
        (change("lora/rank", 2_000_000), "<= 65536"),
        (change("lora/alpha", 16), "canonical"),
        (change("lora/alpha", 0.0), "> 0"),
        (change("lora/targets", [".*" * 3]), "regex"),
        (change("lora/modules_to_save", ["lm_head"]), "unknown field"),
        (change("tokens", 12), "unknown field"),
    ],
)
def test_an_adapter_manifest_is_refused(adapter_manifest, edit, message):
    plain = plain_of(adapter_manifest)
    edit(plain)
    with pytest.raises(PackageError, match=message):
        m.decode_manifest(encode(plain))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"hidden_size":8', b'"hidden_size":8,"hidden_size":8', "given twice"),
        (b'"adapter_layers":1', b'"adapter_layers":1,"adapter_layers":1', "given twice"),
        (b'"hidden_size":8', b'"hidden_size":NaN', "NaN"),
        (b'"hidden_size":8', b'"hidden_size":-Infinity', "Infinity"),
        (b'"hidden_size":8', b'"hidden_size":1e999', "infinite"),
        (b'"hidden_size":8', b'"hidden_size":' + b"9" * 100_000, "out of range"),
        (b'"hidden_size":8', b'"hidden_size":-0', "canonical"),
        (b'"hidden_size":8', b'"hidden_size":8e0', "canonical"),
        (b"1e-05", b"0.00001", "canonical"),
        (b"1e-05", b"1E-5", "canonical"),
        (b'"hidden_size"', b'"hidden\\u005fsize"', "canonical"),
        (b'"hidden_size":8', b'"hidden_size": 8', "canonical"),
        (b'"hidden_size":8', b'"hidden_size":"\\ud800"', "printable"),
        (b'"hidden_size":8', b'"hidden_size":"\xff"', "not valid JSON|decode"),
        (b'"hidden_size":8', b'"hidden_size":8/*x*/', "delimiter"),
    ],
)
def test_another_spelling_is_refused(emulator_manifest, old, new, message):
    data = m.encode_manifest(emulator_manifest)
    assert data.count(old) == 1
    with pytest.raises(PackageError, match=message):
        m.decode_manifest(data.replace(old, new))


def test_surrounding_bytes_are_refused(emulator_manifest):
    data = m.encode_manifest(emulator_manifest)
    for forged in (data + b"\n", b" " + data, b"\xef\xbb\xbf" + data, data + b"{}", b"", b"null"):
        with pytest.raises(PackageError):
            m.decode_manifest(forged)


@pytest.mark.parametrize("depth", [20, 900, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused_quickly(emulator_manifest, depth, opening, closing):
    nested = opening * depth + "1" + closing * depth
    data = m.encode_manifest(emulator_manifest).replace(
        b'"hidden_size":8', b'"x":%s' % nested.encode()
    )
    begin = time.monotonic()
    with pytest.raises(PackageError, match=r"deeper|recursion|allowed"):
        m.decode_manifest(data)
    assert time.monotonic() - begin < 2


def test_depth_is_counted_exactly(emulator_manifest):
    def nested(depth):
        return replace(emulator_manifest, config={"x": json.loads("[" * depth + "]" * depth)})

    # The manifest and `config` are two levels of the allowed number.
    assert m.decode_manifest(m.encode_manifest(nested(m.MAX_DEPTH - 2)))
    with pytest.raises(OutputError, match="deeper"):
        m.encode_manifest(nested(m.MAX_DEPTH - 1))


def test_a_manifest_too_large_is_refused_before_parsing(emulator_manifest, monkeypatch):
    text = ["x" * 60_000] * 20
    with pytest.raises(OutputError, match="at most 1048576"):
        m.encode_manifest(replace(emulator_manifest, config={"text": text}))
    monkeypatch.setattr(m.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(PackageError, match="at most 1048576"):
        m.decode_manifest(b" " * (m.MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {0: "no"}},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"dtype": object()},
        {"number": 2**64},
        {"_name_or_path": "/home/owner"},
    ],
)
def test_the_writer_refuses_what_no_reader_would_accept(emulator_manifest, config):
    with pytest.raises(OutputError, match="no reader would accept"):
        m.encode_manifest(replace(emulator_manifest, config=config))


def test_the_id_is_the_hash_of_the_file(emulator_manifest):
    first = m.package_id(m.encode_manifest(emulator_manifest))
    other = m.package_id(m.encode_manifest(replace(emulator_manifest, max_length=9)))
    assert first.startswith("sha256:")
    assert len({first, other}) == 2


json_text = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=8).filter(
    lambda text: text not in m.FORBIDDEN_CONFIG_KEYS
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-m.MAX_INTEGER, m.MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | json_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
    max_leaves=12,
)
EMULATOR = b"""{"adapter_layers":1,"config":{"eps":1e-05,"n":[1,{"a":null}]},\
"created_by":"blindtune 0.1.0","dtype":"float32","files":{},"format":"blindtune-emulator",\
"full_model":{"bytes":8,"layers":3,"parameters":2},"layers":[{"kind":"adapter"},\
{"kind":"compressed","ranks":{"q":[2]}},{"kind":"adapter"}],"max_length":null,\
"model":"5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f",\
"model_type":"llama",\
"version":1}"""


@given(st.dictionaries(json_text, json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_plain_config_survives(config):
    manifest = replace(m.decode_manifest(EMULATOR), config=config)
    assert m.decode_manifest(m.encode_manifest(manifest)) == manifest


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode) | json_values.map(encode))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused(data):
    with pytest.raises(PackageError):
        m.decode_manifest(data)


@given(
    st.integers(0, len(EMULATOR)),
    st.integers(0, 6),
    st.binary(max_size=4) | st.sampled_from([b"0", b".0", b" ", b"\\u0041", b'"', b"}", b",{}"]),
)
@example(48, 0, b".0")
@settings(max_examples=200, deadline=None)
def test_an_edited_manifest_is_refused_or_canonical(begin, length, patch):
    data = EMULATOR[:begin] + patch + EMULATOR[begin + length :]
    try:
        manifest = m.decode_manifest(data)
    except PackageError:
        return
    assert m.encode_manifest(manifest) == data
    # By what they print as: 2 and 2.0 in a config are equal to Python, and two spellings.
    assert (repr(manifest) == repr(m.decode_manifest(EMULATOR))) == (data == EMULATOR)
