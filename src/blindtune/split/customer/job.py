"""A customer's job on its own disk; every file whole or absent, the directory its owner's only.

    job.json             what was asked for, the classes' names, how far it is
    token                the job's secret, drawn before the vendor hears of the job
    groups.safetensors   the word groups, where words become their groups'
    private.safetensors  the states that are sent, drawn once; and the texts' ids
    privacy.json         the statement, and one for every file that was predicted
    losses.jsonl         {"request": 12, "loss": 0.69} for every batch
    top-<number>.pt      U-shape: the customer's head after request <number>
    gradients.json       U-shape with noise on gradients: how far they were noised, by which plan
    gradients/           ... the newest, by request, until the job is tuned
    asked-<hash>.safetensors  the states of a file that was predicted: never drawn twice
    transcript.bin       what crossed, where that is recorded
    lock                 held by the one process that works on the job

Nothing in it is meant for the vendor. Delete the directory when the job is no longer needed: it
holds the private texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar, final

import msgspec
from filelock import FileLock, Timeout
from torch import Tensor

from blindtune.atomic import atomic_directory, remove_left_overs, secret_file
from blindtune.errors import ConfigError, DataError, OutputError
from blindtune.exchange.wire.messages import JobToken, Partition
from blindtune.exchange.wire.transcript import Recording
from blindtune.exchange.wire.transport import Tap
from blindtune.places import located
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.customer.privacy_statement import PrivacyStatement
from blindtune.split.customer.private_gradients import GradientConfig
from blindtune.split.customer.private_states import PrivateStates

MARK = "job.json"
_Config = TypeVar("_Config")
State = Literal["begun", "opened", "tuned", "cancelled"]


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was asked for when the job was begun, and how far it is."""

    version: Literal[1] = 1
    partition: Partition
    bottom: str
    """Id of the bottom package."""
    bottom_path: str
    """Where it was."""
    data: str
    """sha256 of the training texts' ids and labels."""
    options: dict[str, dict[str, bool | int | float | str | None]]
    """Every option that decides the result, by config."""
    eta: float | None
    """What the privatizer uses: as asked for, or chosen by the share of changed tokens."""
    names: tuple[str, ...]
    """What the classes are called."""
    state: State = "begun"
    """begun: private states may be missing; opened: the vendor has the job; tuned; cancelled."""


@final
class CustomerJob:
    """The directory of one job. Hold `working` while anything is changed or sent.

    Raises:
        DataError: no job is there, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = located(path)
        try:
            content = (self.path / MARK).read_bytes()
            self.record = msgspec.json.decode(content, type=JobRecord)
            # What jobs of earlier versions predict.
            self.record.options.get("privatizer", {}).setdefault("targets", "true")
            self.record.options.setdefault("dp", asdict(GradientConfig()))  # and they had none
        except OSError as error:
            raise DataError(
                f"{self.path}: expected a job's directory with {MARK}, there is none "
                f"({error.strerror or error}): make one with `blindtune split-tune`"
            ) from error
        except msgspec.MsgspecError as error:
            raise DataError(f"{self.path / MARK}: damaged ({error}): begin another job") from error

    @staticmethod
    def begin(path: str | Path, record: JobRecord, token: str) -> CustomerJob:
        """Make the directory, whole at once.

        Raises:
            OutputError: something is there, or it cannot be written.
        """
        with atomic_directory(path) as partial:
            partial.chmod(0o700)
            for name, content in ((MARK, msgspec.json.encode(record)), ("token", token.encode())):
                (partial / name).touch(mode=0o600)
                (partial / name).write_bytes(content)
        return CustomerJob(path)

    @contextmanager
    def working(self, *, record: bool = False) -> Iterator[None]:
        """Keep every other process out.

        Args:
            record: what crosses shall be kept, from the first states on.

        Raises:
            OutputError: another one works on the job.
            ConfigError: something has crossed that was not recorded.
        """
        lock = FileLock(self.path / "lock", blocking=False)
        try:
            with lock:
                self.record = CustomerJob(self.path).record  # as the one before left it
                remove_left_overs(self.path)
                if record:
                    self._record_from_start()
                yield
        except Timeout as error:
            raise OutputError(
                f"{self.path}: another process works on this job: wait until it is done"
            ) from error

    @property
    def token(self) -> str:
        """The job's secret.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return msgspec.convert((self.path / "token").read_text("ascii"), JobToken)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path / 'token'}: cannot be read, and without it the vendor does not give "
                "the job out: begin another job"
            ) from error

    def config(self, kind: type[_Config], name: str) -> _Config:
        """One of the configs that the job was begun with.

        Raises:
            DataError: it is of another version.
        """
        try:
            return kind(**self.record.options[name])
        except (KeyError, TypeError, ConfigError) as error:
            raise DataError(
                f"{self.path / MARK}: expected options of this version of blindtune, found "
                "another's: use the version that began the job"
            ) from error

    def mark(self, state: State) -> None:
        """Note how far the job is."""
        self.record = msgspec.structs.replace(self.record, state=state)
        with secret_file(self.path / MARK) as partial:
            partial.write_bytes(msgspec.json.encode(self.record))

    def check_same(self, wanted: JobRecord) -> None:
        """Raise ConfigError, naming what differs, unless the same is asked for as before."""
        before, now = _flat(self.record), _flat(wanted)
        different = sorted(key for key in before | now if before.get(key) != now.get(key))
        if different:
            changes = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}"[:80] for k in different)
            raise ConfigError(
                f"{self.path}: expected the options that this job was begun with, got others "
                f"({changes}): use them, or begin another job with another --out"
            )

    def groups(self) -> WordGroups | None:
        """The job's word groups; None where it has none, or has not made them yet.

        Raises:
            DataError: its states were drawn with groups that are gone: without them words would
                leave as they are.
        """
        path = self.path / "groups.safetensors"
        if path.exists():
            return WordGroups.load(path)
        wanted = self.record.options.get("privatizer", {}).get("privatizer") == "groups"
        if wanted and (self.record.state != "begun" or self._states_path.exists()):
            raise DataError(
                f"{self.path}: the word groups that its texts were sent with are gone: put "
                f"{path.name} back, or give the job up"
            )
        return None

    def keep_groups(self, groups: WordGroups) -> None:
        """Store the word groups: texts that are predicted get the same."""
        groups.save(self.path / "groups.safetensors")

    def states(self) -> PrivateStates | None:
        """The private states, if they were drawn."""
        path = self._states_path
        return PrivateStates.load(path) if path.exists() else None

    def keep_states(self, private: PrivateStates) -> None:
        """Store the private states before any of them is sent."""
        private.save(self._states_path)

    @property
    def _states_path(self) -> Path:
        return self.path / "private.safetensors"

    def _record_from_start(self) -> None:
        """Make the file of what crosses, unless it is there."""
        if self._transcript_path.exists():
            return
        if self.record.state != "begun":
            raise ConfigError(
                f"{self.path}: expected a job recorded from its first states on, this one is "
                f"{self.record.state}, without a transcript: leave record, or begin another job"
            )
        Recording.begin(self._transcript_path)

    @contextmanager
    def recording(self) -> Iterator[Tap | None]:
        """What notes the frames that cross; None where the job is not recorded, or no longer."""
        path = self._transcript_path
        if not path.exists() or not path.stat().st_size:
            yield None
            return
        recording = Recording(path)
        try:
            yield recording
        finally:
            recording.close()

    @property
    def _transcript_path(self) -> Path:
        return self.path / "transcript.bin"

    @property
    def gradients_path(self) -> Path:
        """Where noised gradients are kept."""
        return self.path / "gradients"

    def asked_path(self, texts: str) -> Path:
        """Where the states of texts (by their hash) that are predicted are kept."""
        return self.path / f"asked-{texts[:16]}.safetensors"

    def asked(self) -> list[PrivateStates]:
        """The states of every file that was predicted: each another draw, of the same texts too."""
        return [PrivateStates.load(path) for path in sorted(self.path.glob("asked-*.safetensors"))]

    def statements(self) -> dict[str, PrivacyStatement]:
        """What was stated, by what it is about: "tuning", or the hash of predicted texts.

        Raises:
            DataError: the file is damaged.
        """
        path = self.path / "privacy.json"
        try:
            content = path.read_bytes() if path.exists() else b"{}"
            return msgspec.json.decode(content, type=dict[str, PrivacyStatement])
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}: damaged ({error}): remove it, it is made again") from error

    def keep_statement(self, about: str, statement: PrivacyStatement) -> None:
        """Keep a statement beside the others."""
        kept = self.statements() | {about: statement}
        with secret_file(self.path / "privacy.json") as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(kept)))

    def losses(self) -> dict[int, float]:
        """Every batch's loss by its request number; a line that was cut off is left out."""
        path, found = self.path / "losses.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                found[int(entry["request"])] = float(entry["loss"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    @contextmanager
    def loss_log(self, applied: int) -> Iterator[LossLog]:
        """Go on with the losses after request `applied`; later ones are forgotten."""
        path = self.path / "losses.jsonl"
        kept = {number: loss for number, loss in self.losses().items() if number <= applied}
        with secret_file(path) as partial:
            partial.write_text("".join(_line(n, loss) for n, loss in sorted(kept.items())))
        with path.open("a") as file:
            yield LossLog(file, kept)


@final
class LossLog:
    """Losses as they come; each line is with the system before the next request is made."""

    def __init__(self, file: Any, losses: dict[int, float]) -> None:
        self.losses = losses
        self._file = file

    def add(self, number: int, loss: float) -> None:
        """Note the loss of the batch of request `number`, unless it is noted already."""
        if number not in self.losses:
            self.losses[number] = loss
            self._file.write(_line(number, loss))
            self._file.flush()


def texts_hash(ids: Sequence[Tensor], *more: bytes) -> str:
    """sha256 (hex) of texts as token ids, and of what else decides."""
    digest = hashlib.sha256()
    for text_L in ids:
        digest.update(len(text_L).to_bytes(8, "little"))
        digest.update(text_L.numpy().tobytes())
    for part in more:
        digest.update(part)
    return digest.hexdigest()


def _line(number: int, loss: float) -> str:
    return json.dumps({"request": number, "loss": loss}) + "\n"


def _flat(record: JobRecord) -> dict[str, object]:
    """What must agree, by name; where the package lies and how far the job is need not."""
    plain = {"bottom": record.bottom, "data": record.data}
    return plain | {f"{k}.{n}": v for k, some in record.options.items() for n, v in some.items()}
