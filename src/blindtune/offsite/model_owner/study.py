"""A study: what the model owner knows about a model, in memory and on disk. It stays private.

    study.json          scores, damage, options, times; where each moment is stored
    study.safetensors   stand_in.<i>.<parameter>, moment.<key>

While a study is being made (`studying`), its finished stages are kept the same way in a sibling
directory, `NAME.work`.

Shapes: N windows, L length, M middle layers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blindtune.atomic import atomic_directory, put_in_order, remove_directory
from blindtune.errors import ConfigError
from blindtune.kinds import check_kinds
from blindtune.models.blocks import Harmonizer
from blindtune.offsite.model_owner.importance import DynamicConfig, DynamicState
from blindtune.places import located

VERSION = 1
FACTS_NAME = "study.json"
TENSORS_NAME = "study.safetensors"
STATE_NAME = "dynamic.safetensors"
STAGES = ("calibrated", "measured", "learning")
"""What is kept of a study under way, by stage."""
_PLAIN_FIELDS = ("model", "fingerprint", "layer_count", "first", "seconds", "tokens", "history")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How a model is studied. Dynamic LayerReplace has its own `DynamicConfig`."""

    stand_in: Literal["harmonizer", "identity"] = "harmonizer"
    """What replaces a layer: a harmonizer, or nothing at all (Dynamic LayerDrop)."""
    harmonizer_rank: int = 128
    """R, units of a harmonizer; the regression fills them in pairs, so its linear rank is R/2. The
    paper: 64 for models of about 1B parameters, 256 for larger ones."""
    warm_start: Literal["regression", "none"] = "regression"
    """regression: harmonizers in closed form; none: the paper's start, from identity."""
    initial_scores: Literal["greedy", "measured", "zero"] = "greedy"
    """greedy: from the damage each layer does in the company of those replaced before it; measured:
    from the damage of replacing it alone; zero: the paper's start."""
    min_adapter_layers: int = 1
    """The smallest N_a an emulator of this study may have; layers within are not studied."""
    max_length: int = 128
    """Tokens of a window of public text."""
    calibration_tokens: int = 40_960
    """Tokens for the regression (one forward pass)."""
    damage_tokens: int = 2_048
    """Tokens for measuring each layer's damage (half a forward pass a middle layer)."""
    feed_forward: bool = False
    """Also keep the moments that weighted compression of feed-forward layers needs."""
    batch_size: int = 8
    """Windows of one forward pass."""
    seed: int = 0
    """Of the windows' order and of Dynamic LayerReplace."""

    def __post_init__(self) -> None:
        check_kinds(self)
        low = {"harmonizer_rank": 1, "min_adapter_layers": 1, "max_length": 2, "batch_size": 1}
        low |= {"calibration_tokens": self.max_length, "damage_tokens": self.max_length, "seed": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} >= {least}, got {getattr(self, name)}")
        choices = {
            "stand_in": ("harmonizer", "identity"),
            "warm_start": ("regression", "none"),
            "initial_scores": ("greedy", "measured", "zero"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


@dataclass(kw_only=True)
class Study:
    """The owner's private result. The index of a middle layer counts from `first`."""

    model: str
    """Where the model was loaded from."""
    fingerprint: str
    """sha256 of the model that was studied."""
    layer_count: int
    first: int
    """Index of the first middle layer in the model."""
    scores_M: Tensor
    """Importance of every middle layer; high means keep."""
    damage_M: Tensor | None
    """Nats a token by which the loss rises when that layer alone is replaced, if measured."""
    stand_ins: nn.ModuleList
    """One harmonizer (or `nn.Identity`) a middle layer."""
    explained: tuple[float, ...]
    """Share of each layer's residual that the regression explains; empty without warm start."""
    second_moments: tuple[dict[str, Tensor], ...]
    """Of the inputs of each middle layer's projections; empty without warm start."""
    config: StudyConfig
    dynamic: DynamicConfig
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of public text that each stage read."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an alternation of Dynamic LayerReplace."""

    @property
    def middle(self) -> range:
        """Indices of the middle layers in the model."""
        return range(self.first, self.first + len(self.stand_ins))


def save_study(study: Study, directory: Path, *, moments: bool = True) -> None:
    """Write a study into an existing directory, with or without its second moments."""
    tensors: dict[str, Tensor] = {}
    for i, stand_in in enumerate(study.stand_ins):
        for name, parameter in stand_in.state_dict().items():
            tensors[f"stand_in.{i}.{name}"] = parameter.cpu().contiguous()
    moment_keys = _moment_keys(study, tensors) if moments else []
    facts = {name: getattr(study, name) for name in _PLAIN_FIELDS}
    facts |= {
        "version": VERSION,
        "scores": study.scores_M.tolist(),
        "damage": None if study.damage_M is None else study.damage_M.tolist(),
        "explained": list(study.explained),
        "config": asdict(study.config),
        "dynamic": asdict(study.dynamic),
        "returns_tuple": any(getattr(s, "returns_tuple", False) for s in study.stand_ins),
        "moments": moment_keys,
    }
    (directory / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n")
    save_file(tensors, directory / TENSORS_NAME)


def _moment_keys(study: Study, tensors: dict[str, Tensor]) -> list[dict[str, str]]:
    """Add every distinct moment to `tensors`; return its key by layer and path."""
    keys: list[dict[str, str]] = []
    for i, moments in enumerate(study.second_moments):
        seen: dict[int, str] = {}
        for path, moment in moments.items():
            key = seen.setdefault(id(moment), f"moment.{i}.{path}")
            tensors[key] = moment.cpu()
        keys.append({path: seen[id(moment)] for path, moment in moments.items()})
    return keys


def open_study(directory: str | Path) -> Study:
    """Read a study back.

    Raises:
        ConfigError: the directory holds no study of this version, or a damaged one.
    """
    directory = located(directory)
    try:
        facts = json.loads((directory / FACTS_NAME).read_text())
        tensors = load_file(directory / TENSORS_NAME)
        if facts["version"] != VERSION:
            raise ConfigError(
                f"{directory}: expected a study of version {VERSION}, got {facts['version']}: "
                "make the study again with this release"
            )
        damage = facts["damage"]
        return Study(
            **{name: facts[name] for name in _PLAIN_FIELDS},
            scores_M=torch.tensor(facts["scores"], dtype=torch.float64),
            damage_M=None if damage is None else torch.tensor(damage, dtype=torch.float64),
            stand_ins=_stand_ins(facts, tensors),
            explained=tuple(facts["explained"]),
            second_moments=tuple(
                {path: tensors[key] for path, key in keys.items()} for keys in facts["moments"]
            ),
            config=StudyConfig(**facts["config"]),
            dynamic=DynamicConfig(**facts["dynamic"]),
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory}: expected a study ({FACTS_NAME}, {TENSORS_NAME}), found none: make one "
            "with `blindtune study`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{directory}: expected a readable study, got {type(error).__name__}: {error}: make "
            "the study again"
        ) from error


def _stand_ins(facts: dict[str, Any], tensors: dict[str, Tensor]) -> nn.ModuleList:
    stand_ins = nn.ModuleList()
    for i in range(len(facts["scores"])):
        prefix = f"stand_in.{i}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if own:
            rank, size = own["down.weight"].shape
            module = Harmonizer(size, rank, returns_tuple=facts["returns_tuple"])
            module.load_state_dict(own)
            stand_ins.append(module)
        else:
            stand_ins.append(nn.Identity())
    return stand_ins


class WorkDirectory:
    """The finished stages of a study under way, in `NAME.work` beside its final place.

    Args:
        out: the study's final place.
        study: the study as it starts; with the windows it decides whether old stages belong to it.
        windows_NL: the token windows of the public text.
        fresh: drop what an interrupted run left.

    Raises:
        ConfigError: an interrupted study with other options or data is there.
    """

    def __init__(self, out: Path, study: Study, windows_NL: Tensor, *, fresh: bool) -> None:
        self.path = out.absolute().parent / f"{out.absolute().name}.work"
        digest = hashlib.sha256(windows_NL.contiguous().numpy().tobytes())
        identity = [study.fingerprint, asdict(study.config), asdict(study.dynamic)]
        digest.update(json.dumps(identity, sort_keys=True).encode())
        self._identity = digest.hexdigest()
        if fresh:
            self.remove()
        for stage in STAGES:
            put_in_order(self.path / stage)
        stages = list(self.path.glob("[!.]*/" + FACTS_NAME))
        if any((p.parent / "run").read_text() != self._identity for p in stages):
            raise ConfigError(
                f"{self.path}: an interrupted study with other options or other text is there: "
                "repeat its options, or start anew with --resume never"
            )

    def save(self, study: Study, stage: str, state: dict[str, Tensor] | None = None) -> None:
        """Keep a finished stage, atomically."""
        with atomic_directory(self.path / stage, overwrite=True, mark=FACTS_NAME) as directory:
            (directory / "run").write_text(self._identity)
            save_study(study, directory, moments=stage == "calibrated")
            if state is not None:
                save_file(state, directory / STATE_NAME)

    def load(self, study: Study, stage: str) -> bool:
        """Fill `study` from a finished stage; False when there is none."""
        if not (self.path / stage / FACTS_NAME).is_file():
            return False
        found = open_study(self.path / stage)
        for name in (*_PLAIN_FIELDS, "scores_M", "damage_M", "explained"):
            setattr(study, name, getattr(found, name))
        study.stand_ins = found.stand_ins
        return True

    def second_moments(self) -> tuple[dict[str, Tensor], ...]:
        """Those of the calibrated stage, which stay on the disk while the others run."""
        return open_study(self.path / "calibrated").second_moments

    def save_dynamic(self, study: Study, state: DynamicState) -> None:
        """Keep the state of Dynamic LayerReplace."""
        tensors = {
            "generator": state.generator.get_state(),
            "step": torch.tensor(state.step),
            "scores": state.scores_M,
        }
        if state.optimizer is not None:
            for i, values in state.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": value for name, value in values.items()}
        self.save(study, "learning", tensors)

    def load_dynamic(self, study: Study, state: DynamicState) -> None:
        """Continue from the kept state, if there is one."""
        path = self.path / "learning" / STATE_NAME
        if not path.is_file():
            return
        trained = study.stand_ins
        self.load(study, "learning")
        trained.load_state_dict(study.stand_ins.state_dict())
        study.stand_ins = trained
        tensors = load_file(path)
        state.generator.set_state(tensors["generator"])
        state.step, state.scores_M = int(tensors["step"]), tensors["scores"]
        if state.optimizer is not None:
            kept: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".")
                    kept.setdefault(int(index), {})[name] = value
            groups = state.optimizer.state_dict()["param_groups"]
            state.optimizer.load_state_dict({"state": kept, "param_groups": groups})

    def remove(self) -> None:
        """The study is finished, or starts anew."""
        remove_directory(self.path)
