"""Opens emulators whose config holds one hostile value, with little memory to spare.

A program of its own, because a limit of memory stays: `python hostile_configs.py DIRECTORY FAMILIES
VALUES`, with VALUES a number of `VALUES` below. Prints one line a violation and then the number of
values tried.
"""

import copy
import json
import resource
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import msgspec
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from blindtune.errors import BlindtuneError
from blindtune.exchange.packages.manifest import AdapterLayer, FullModelFacts
from blindtune.exchange.packages.package import open_package
from blindtune.offsite.emulator import _load, write_emulator
from tiny_models import tiny_config, tiny_tokenizer

SPARE_BYTES = 512 << 20
GROWTH_BYTES = 32 << 20
SECONDS = 2.0
VALUES = (
    10**9, -1, 0, "x", None, 10**12, float("nan"), 1e308, 1, 3, 0.5, True, [], [1], {}, 2**63 - 1,
    -(2**63) + 1, "a" * 60000, [1e9] * 20_000,
)  # fmt: skip


def two_layers(name, directory):
    """A package with two adapter layers of a family."""
    config = tiny_config(name)
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    config.num_hidden_layers = 2
    write_emulator(
        AutoModelForCausalLM.from_config(config),
        tiny_tokenizer(),
        [AdapterLayer(), AdapterLayer()],
        directory / name,
        model_fingerprint="0" * 64,
        adapter_layers=1,
        full_model=FullModelFacts(parameters=10**6, bytes=10**6, layers=2),
    )
    return open_package(directory / name, "emulator")


def places(value, path=()):
    """The path to every value inside nested JSON."""
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict):
            yield from places(item, (*path, key))


def hostile(config, values):
    """Configs with one value changed, and what was changed."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        kinds = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial", "x")
        numbers = {
            "factor": 2.0, "partial_rotary_factor": 1.0, "attention_factor": 1.0,
            "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
        }  # fmt: skip
        for kind in kinds:
            scaled = config | {"rope_parameters": rope | numbers | {"rope_type": kind}}
            yield f"rope {kind}", scaled
            for key in numbers:
                for value in values:
                    changed = copy.deepcopy(scaled)
                    changed["rope_parameters"][key] = value
                    yield f"rope {kind} {key}={str(value)[:20]}", changed
    for path in list(places(config)):
        for value in values:
            changed = copy.deepcopy(config)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield f"{'.'.join(path)}={str(value)[:20]}", changed


def limit_memory():
    """Everything from here on may take SPARE_BYTES more address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))


def peak_bytes():
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reasons(error):
    """What is said by an error and all that led to it: an allocation that failed shows."""
    said = ""
    while error is not None:
        said += f"{type(error).__name__}: {error}; ".lower()
        error = error.__cause__ or error.__context__
    return said


def main(directory, families, count):
    """Try everything; print what goes wrong."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    packages = {name: two_layers(name, Path(directory)) for name in families}
    for package in packages.values():
        _load(package)
    limit_memory()
    tried = 0
    for name, package in packages.items():
        config = json.loads((package.path / "manifest.json").read_text())["config"]
        for what, changed in hostile(config, VALUES[:count]):
            manifest = msgspec.structs.replace(package.manifest, config=changed)
            odd = replace(package, manifest=manifest)
            tried, start, peak = tried + 1, time.perf_counter(), peak_bytes()
            try:
                _load(odd)
            except BlindtuneError as error:
                if "memory" in reasons(error):
                    print(name, what, reasons(error)[:300])
            except BaseException as error:
                print(name, what, type(error).__name__, str(error)[:200])
            if time.perf_counter() - start > SECONDS:
                print(name, what, "took", time.perf_counter() - start)
            if peak_bytes() - peak > GROWTH_BYTES:
                print(name, what, "grew by", peak_bytes() - peak)
    print(tried)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]))
