"""The customer's second act: ask the tuned model about new texts, noised as in training.

New texts have no label, so all their tokens get full noise, contributing ones too. They are noised
once and the draw is kept in the job's directory: asking again about the same texts, after a lost
connection or next week, sends the same states and spends nothing more. The same text inside
another file is another draw, and spends. Texts are sent in an order that says nothing of their
places in the file.

Shapes: N texts, C classes, B batch, L length, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from blindtune.atomic import atomic_file
from blindtune.errors import ConfigError, DataError, OutputError
from blindtune.exchange.wire.resuming import ResumingTransport
from blindtune.kinds import check_kinds
from blindtune.places import located
from blindtune.split.bottom import Bottom, open_bottom
from blindtune.split.customer.access import (
    AccessConfig,
    Connect,
    Traffic,
    connector,
    resume_job,
    saying_what_next,
)
from blindtune.split.customer.job import CustomerJob, texts_hash
from blindtune.split.customer.privacy_statement import PrivacyStatement, state_privacy
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.private_texts import PrivateTexts, ReadingConfig, read_unseen
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, check_largest, portions
from blindtune.split.customer.requests import predict as predict_two_part
from blindtune.split.customer.ushape import Top, customers_head, each_u_shape
from blindtune.split.terms import TuningConfig

OnTexts = Callable[[int, int], None]
"""(texts that are done, texts that there are)."""


@dataclass(frozen=True, kw_only=True)
class AskingConfig:
    """How new texts are read and sent; nothing here changes privacy."""

    text_column: str | None = None
    """Column of the texts; default: as in training."""
    label_column: str | None = None
    """Column of labels, if the file has them; default: as in training."""
    batch_size: int = 16
    """Texts of one request."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        if self.batch_size < 1:
            raise ConfigError(f"expected batch_size above 0, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the tuned model says of new texts."""

    path: Path | None
    """The written file, if one was asked for."""
    texts: tuple[dict[str, Any], ...]
    """For every text its row in the file, and: the label with the probabilities of all classes by
    name; or the value; or, for a window of language modelling, its tokens and nats a token."""
    scores: dict[str, float]
    """accuracy, mean_squared_error or perplexity, where the file says what is right."""
    privacy: PrivacyStatement
    reused: bool
    """Whether these texts were asked about before: then nothing more was spent."""
    bytes_sent: int
    bytes_received: int
    seconds: float


def predict(
    vendor: str | Connect,
    job: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    bottom: str | Path | None = None,
    asking: AskingConfig | None = None,
    access: AccessConfig | None = None,
    on_statement: Callable[[PrivacyStatement], None] | None = None,
    on_progress: OnTexts = lambda _done, _total: None,
) -> Prediction:
    """Ask a tuned job about new texts.

    Args:
        vendor: its address, or a function that makes a transport.
        job: directory that `split_tune` left.
        data: texts, with labels or without; for a language model, text.
        out: file for the predictions, a JSON object a line; None: none is written.
        bottom: where the bottom package is now; None: where it was.
        asking, access: columns, and texts of one request; as for `split_tune`.
        on_statement: gets the privacy statement before anything is sent.
        on_progress: is told how far it is.

    Raises:
        DataError: no tuned job is there, or the texts cannot be read. OutputError: `out` exists.
        ConfigError, NetworkError, PolicyError: a batch is larger than the vendor takes; it cannot
            be reached; it refuses. The draw is kept.
    """
    begin, traffic, asking = time.perf_counter(), Traffic(), asking or AskingConfig()
    access = access or AccessConfig()
    connect = connector(vendor, access, traffic)
    found = CustomerJob(job)
    _check_new(out)
    with found.working():
        _check_tuned(found)
        package = open_bottom(bottom or found.record.bottom_path, id=found.record.bottom)
        texts = read_unseen(package, data, _reading(found, asking), found.record.names)
        private, statement, reused = _prepare(found, package, texts)
        if on_statement is not None:
            on_statement(statement)
        with (
            saying_what_next(),
            found.recording() as traffic.tap,
            closing(resume_job(connect, found.token, access.retries())) as transport,
        ):
            told, scores = _ask(found, package, texts, private, transport, asking, on_progress)
            told.sort(key=itemgetter("row"))
    if out is not None:
        _write(located(out), told)
    return Prediction(
        path=None if out is None else located(out),
        texts=tuple(told),
        scores=scores,
        privacy=statement,
        reused=reused,
        bytes_sent=traffic.sent,
        bytes_received=traffic.received,
        seconds=time.perf_counter() - begin,
    )


def _check_new(out: str | Path | None) -> None:
    if out is not None and located(out).exists():
        raise OutputError(f"{out}: expected a new file, something is there: choose another --out")


def _check_tuned(job: CustomerJob) -> None:
    if job.record.state == "cancelled":
        raise DataError(f"{job.path}: this job was cancelled: begin another one with another --out")
    if job.record.state != "tuned":
        raise DataError(
            f"{job.path}: expected a tuned job, this one is {job.record.state}: run the same "
            "`blindtune split-tune` again until it is done"
        )


def _write(out: Path, told: list[dict[str, Any]]) -> None:
    with atomic_file(out) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told))


def _reading(job: CustomerJob, asking: AskingConfig) -> ReadingConfig:
    reading = job.config(ReadingConfig, "reading")
    return replace(
        reading,
        text_column=asking.text_column or reading.text_column,
        label_column=asking.label_column or reading.label_column,
    )


def _prepare(
    job: CustomerJob, package: Bottom, texts: PrivateTexts
) -> tuple[PrivateStates, PrivacyStatement, bool]:
    """States of new texts and what sending them spends: drawn once, found again later."""
    privatizer = job.config(PrivatizerConfig, "privatizer")
    about = texts_hash(texts.ids)
    path, statement = job.asked_path(about), job.statements().get(about)
    drawn = path.exists()
    reused = drawn and statement is not None
    if statement is not None and not drawn:
        raise DataError(
            f"{path}: the states that were sent for these texts are gone, and another draw would "
            "spend again: put the file back, or ask about other texts"
        )
    if drawn:
        private = PrivateStates.load(path)
    else:
        private = privatize(
            package,
            texts.ids,
            mechanism=privatizer.mechanism(job.record.eta),
            groups=job.groups(),
            importance=replace(privatizer.importance(), fraction=0.0),
        )
        private.save(path)
    if statement is None:
        statement = state_privacy(
            package, private, privatizer, job.record.eta,
            groups=job.groups(), training=False, shortened=texts.shortened,
        )  # fmt: skip
        job.keep_statement(about, statement)
    return private, statement, reused


def _ask(
    job: CustomerJob,
    package: Bottom,
    texts: PrivateTexts,
    private: PrivateStates,
    transport: ResumingTransport,
    asking: AskingConfig,
    on_progress: OnTexts,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Ask about all texts, in an order that tells nothing of the file's."""
    order, batch_size = private.ordered(), asking.batch_size
    texts, private = texts.taken(order), private.taken(order)
    precision = job.config(PassConfig, "passes").precision
    check_largest(
        transport.welcome, private, portions(len(private), batch_size), precision,
        remedy="lower batch_size, or leave out texts that are longer",
    )  # fmt: skip
    language_model = job.config(ReadingConfig, "reading").task == "language-model"
    outputs = 0 if language_model else len(job.record.names) or 1
    if job.record.partition == "two-part":
        outputs_NC = predict_two_part(
            transport, private, outputs=outputs, batch_size=batch_size, precision=precision,
            on_progress=on_progress,
        )  # fmt: skip
        return _labelled(texts, outputs_NC)
    tuning = job.config(TuningConfig, "tuning")
    top = Top(package, customers_head(package, outputs, tuning), directory=job.path)
    if not (kept := top.numbers()):
        raise DataError(
            f"{job.path}: the job's head is gone: put its top-<number>.pt back, or tune another"
        )
    top.load(kept[-1])
    done, found, windows = 0, [], []
    for part in each_u_shape(transport, top, private, batch_size=batch_size, precision=precision):
        if language_model:
            windows += _nats(part, texts.ids[done : done + len(part)])
        else:
            found.append(part)
        done += len(part)
        on_progress(done, len(private))
    return _windows(texts, windows) if language_model else _labelled(texts, torch.cat(found))


def _labelled(
    texts: PrivateTexts, outputs_NC: Tensor
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Predictions of classes (with names) or values (without), and how right they are."""
    labels = texts.labels
    if not texts.names:
        value_N = outputs_NC[:, 0].float()
        told = [{"row": r, "value": v} for r, v in zip(texts.rows, value_N.tolist(), strict=True)]
        if labels is None:
            return told, {}
        return told, {"mean_squared_error": (value_N - labels).square().mean().item()}
    share_NC, best_N = outputs_NC.float().softmax(1), outputs_NC.argmax(1)
    told = [
        {
            "row": row,
            "label": texts.names[best],
            "probabilities": dict(zip(texts.names, shares, strict=True)),
        }
        for row, best, shares in zip(texts.rows, best_N.tolist(), share_NC.tolist(), strict=True)
    ]
    if labels is None:
        return told, {}
    return told, {"accuracy": (best_N == labels).float().mean().item()}


def _nats(logits_BLV: Tensor, ids: tuple[Tensor, ...]) -> list[tuple[int, float]]:
    """For every window how many tokens were predicted, and their nats in all."""
    found = []
    for logits_LV, ids_L in zip(logits_BLV, ids, strict=True):
        count = len(ids_L) - 1
        nats = cross_entropy(logits_LV[:count].float(), ids_L[1:], reduction="sum")
        found.append((count, nats.item()))
    return found


def _windows(
    texts: PrivateTexts, windows: list[tuple[int, float]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    told = [
        {"row": row, "tokens": tokens, "nats_per_token": nats / tokens}
        for row, (tokens, nats) in zip(texts.rows, windows, strict=True)
    ]
    mean = sum(nats for _, nats in windows) / sum(tokens for tokens, _ in windows)
    return told, {"nats_per_token": mean, "perplexity": math.exp(min(mean, 700.0))}
