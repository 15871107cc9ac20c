"""What a customer makes of private text before anything leaves: noised states, drawn once.

Text -> token ids -> word groups, if any -> noise (by mode) -> the bottom's blocks -> states. The
bottom is frozen, so the states of a text never change: they are drawn once, kept on the customer's
disk, and sent again in every epoch. That is also what keeps the guarantee: a fresh draw each epoch
would spend eta each time, and averaging would remove the noise (`privacy.metric_dp`,
`privacy.accounting`).

Guarantee: the mechanism's, for the states of one call of `privatize`. Calling it again for the same
text (another run, other options) spends again. Without a mechanism there is none, but that of
`privacy.word_groups` where groups are given.
In vector mode the noise is added to what the embedding module gives, in token and exponential mode
distances are those of its table's rows: where the module scales its rows (Gemma), eta means
different distances.
Not covered: lengths; labels without `label_epsilon`, which are sent or told by gradients
(`private_gradients`); that a
text's noise is smaller where CTI spares tokens (`privacy.token_importance`). The ids in
`PrivateStates` are the private text: they stay.

Shapes: B batch, L length, T tokens of all texts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blindtune.atomic import secret_file
from blindtune.errors import ConfigError, DataError
from blindtune.exchange.wire.messages import pack
from blindtune.models.given_words import begin_with
from blindtune.privacy.entropy import uniforms_from
from blindtune.privacy.metric_dp import Mechanism, Privatizer
from blindtune.privacy.randomized_response import drawn_labels
from blindtune.privacy.replacing import privatizer_of, replaced
from blindtune.privacy.token_importance import ContributingTokens, ImportanceConfig
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.bottom import Bottom
from blindtune.split.customer.private_texts import encode_texts
from blindtune.split.customer.spared_tokens import (
    check_labelled,
    contributing_tokens,
    factors_of,
)
from blindtune.split.partition import run_bottom


@final
@dataclass(frozen=True, eq=False)
class PrivateStates:
    """Texts as the vendor may see them, and what stays with the customer."""

    states: tuple[Tensor, ...]
    """[L, D] of every text, after noise and bottom: sent."""
    labels: Tensor | None
    """[N] classes (int64), those that were drawn if any were; [N] or [N, C] targets (float32); or
    None. Sent in the two-part split."""
    ids: tuple[Tensor, ...]
    """[L] of every text, without noise: never sent."""
    changed: float | None = None
    """Where words are replaced: the share of tokens (those around a text apart) that came out as
    another. Who inverts the bottom perfectly and guesses no further gets 1 - changed right."""
    sent_ids: tuple[Tensor, ...] | None = None
    """[L] of every text: the words that were sent, where a language model shall learn to predict
    these and not `ids`."""
    changed_labels: float | None = None
    """Where labels were drawn anew: the share that came out as another."""
    privatized: bool = False
    """Whether noise or word groups hide the words of `states`."""

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """[L] of every text: what a language model learns to predict."""
        return self.ids if self.sent_ids is None else self.sent_ids

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Packed states [T, D] of some texts, and their lengths."""
        chosen = [self.states[i] for i in indices]
        return torch.cat(chosen), tuple(len(state) for state in chosen)

    def ordered(self) -> list[int]:
        """The places of all texts in an order that tells nothing beside their states.

        A file is often sorted, by class or by date: sent as it is, a text's place would tell. This
        order is that of the states' hashes, so the same states always go in the same order.
        """
        hashes = [sha256(state.contiguous().numpy().tobytes()).digest() for state in self.states]
        return sorted(range(len(self)), key=hashes.__getitem__)

    def taken(self, order: Sequence[int]) -> PrivateStates:
        """The texts at these places, in this order."""
        return replace(
            self,
            states=tuple(self.states[i] for i in order),
            labels=None if self.labels is None else self.labels[list(order)],
            ids=tuple(self.ids[i] for i in order),
            sent_ids=None if self.sent_ids is None else tuple(self.sent_ids[i] for i in order),
        )

    def save(self, path: str | Path) -> None:
        """Write everything to a file that must stay with the customer: it holds the text.

        Nobody but its owner may read it.
        """
        tensors = {
            "hidden_TD": torch.cat(self.states),
            "ids_T": torch.cat(self.ids),
            "lengths_N": torch.tensor([len(state) for state in self.states]),
        }
        if self.labels is not None:
            tensors["labels"] = self.labels
        if self.sent_ids is not None:
            tensors["sent_T"] = torch.cat(self.sent_ids)
        for name in ("changed", "changed_labels"):
            if (share := getattr(self, name)) is not None:
                tensors[name] = torch.tensor(share, dtype=torch.float64)
        tensors["privatized"] = torch.tensor(self.privatized)
        with secret_file(path) as partial:
            save_file(tensors, partial)

    @staticmethod
    def load(path: str | Path) -> PrivateStates:
        """Read what `save` wrote; DataError if that is not possible."""
        try:
            found = load_file(path)
            lengths = found["lengths_N"].tolist()
            return PrivateStates(
                states=found["hidden_TD"].split(lengths),
                labels=found.get("labels"),
                ids=found["ids_T"].split(lengths),
                sent_ids=found["sent_T"].split(lengths) if "sent_T" in found else None,
                privatized=bool(found.get("privatized", "changed" in found)),
                **{n: float(found[n]) for n in ("changed", "changed_labels") if n in found},
            )
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise DataError(f"{path}: expected privatized states, cannot read them") from error


@torch.no_grad()
def privatize(
    bottom: Bottom,
    texts: Sequence[str] | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    mechanism: Mechanism | None,
    importance: ImportanceConfig | None = None,
    groups: WordGroups | None = None,
    classes: int = 0,
    label_epsilon: float | None = None,
    predict_sent: bool = False,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda _done, _texts: None,
    testing_seed: int | None = None,
) -> PrivateStates:
    """Tokenise what is text, noise, and run the bottom (from `open_bottom`), once.

    Args:
        texts: private, as text or as token ids [L] of the bottom's tokenizer; none without tokens.
        labels: one a text; None for texts to predict, or for language modelling.
        mechanism: the noise; None: no noise and no promise at all, for comparisons.
        importance: CTI, for labels with classes; None: only tokens around a text are spared.
        groups: public; every token is its group's representative from the start, so CTI counts
            representatives, and noise replaces them by one another. None: every word is its own.
        classes: number of classes; needed with CTI and `label_epsilon`.
        label_epsilon: labels are drawn anew (`privacy.randomized_response`); None: as they are.
        predict_sent: a language model shall learn to predict the words that are sent.
        batch_size, on_progress: texts at once, for speed; is told how many of all texts are done.
        testing_seed: for tests only: noise that anyone can repeat. Warns.

    Raises:
        DataError: no texts, an empty text, other labels than texts.
        ConfigError: options that contradict each other.
    """
    ids = _ids_of(bottom, texts)
    _check(ids, labels, mechanism, predict_sent)
    labels, changed_labels = _labels(labels, classes, label_epsilon, testing_seed)
    content = _content(bottom, groups, ids)
    check_labelled(importance, labels, classes)
    contributing = contributing_tokens(bottom, content, labels, importance, classes)
    table_VD: Any = bottom.stack.embedding.weight
    privatizer = privatizer_of(mechanism, table_VD, groups, testing_seed=testing_seed)
    states, sent = list[Tensor](), list[Tensor]()
    for begin in range(0, len(ids), batch_size):
        some = slice(begin, begin + batch_size)
        labels_B = None if labels is None else labels[some]
        made, words = _batch(bottom, privatizer, groups, contributing, ids[some], labels_B)
        states += made
        sent += words
        on_progress(len(states), len(ids))
    replaces = groups is not None or (mechanism is not None and mechanism.replaces_words)
    return PrivateStates(
        states=tuple(states),
        labels=labels,
        ids=ids,
        changed=_changed(bottom, ids, sent) if replaces else None,
        sent_ids=tuple(sent) if predict_sent else None,
        changed_labels=changed_labels,
        privatized=mechanism is not None or groups is not None,
    )


def _check(
    ids: Sequence[Tensor], labels: Tensor | None, mechanism: Mechanism | None, predict_sent: bool
) -> None:
    """Refuse what does not go together."""
    if not ids or (labels is not None and len(labels) != len(ids)):
        raise DataError(
            f"expected texts and as many labels, got {len(ids)} and "
            f"{'none' if labels is None else len(labels)}"
        )
    if predict_sent and mechanism is not None and not mechanism.replaces_words:
        raise ConfigError(f"{mechanism.mode} mode sends no words that could be predicted")


def _changed(bottom: Bottom, ids: Sequence[Tensor], sent: Sequence[Tensor]) -> float | None:
    """The share of tokens, those around a text apart, that are sent as another."""
    content = [~bottom.margins.mask(text_L) for text_L in ids]
    differ = sum(
        int((content_L & (sent_L != true_L)).sum())
        for content_L, true_L, sent_L in zip(content, ids, sent, strict=True)
    )
    counted = sum(int(content_L.sum()) for content_L in content)
    return differ / counted if counted else None


def _labels(
    labels: Tensor | None, classes: int, epsilon: float | None, testing_seed: int | None
) -> tuple[Tensor | None, float | None]:
    """Labels as they may leave, and the share that changed if they were drawn."""
    if labels is None or epsilon is None:
        return labels, None
    if labels.is_floating_point():
        raise ConfigError("randomized response needs classes, got numbers: leave label_epsilon")
    drawn = drawn_labels(labels, classes, epsilon, uniforms_from(testing_seed))
    return drawn, float((drawn != labels).float().mean())


def _batch(
    bottom: Bottom,
    privatizer: Privatizer | None,
    groups: WordGroups | None,
    contributing: ContributingTokens,
    ids: Sequence[Tensor],
    labels_B: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """States [L, D] of some texts, and the words [L] that entered the bottom in their place."""
    true_BL, mask_BL = _padded(bottom, ids)
    special_BL = pad_sequence(
        [bottom.margins.mask(text) for text in ids], batch_first=True, padding_value=True
    )
    kept_BL = special_BL if contributing.config.special == "keep" else None
    coarse_BL = true_BL if groups is None else groups.apply(true_BL)
    factors_BL = factors_of(contributing, coarse_BL, labels_B, special_BL)
    sent_BL = replaced(privatizer, groups, true_BL, factors_BL, kept_BL)
    hidden_BLD = _noised(bottom, privatizer, sent_BL, mask_BL, factors_BL)
    packed_TD, lengths = pack(hidden_BLD, mask_BL)
    states = [state.clone() for state in packed_TD.float().cpu().split(lengths)]
    return states, [row[: len(text)] for row, text in zip(sent_BL, ids, strict=True)]


def _content(bottom: Bottom, groups: WordGroups | None, ids: Sequence[Tensor]) -> Sequence[Tensor]:
    """What texts say, without the tokens around it; as representatives where words have groups."""
    content = [bottom.margins.content(text) for text in ids]
    return content if groups is None else [groups.apply(text) for text in content]


def _ids_of(bottom: Bottom, texts: Sequence[str] | Sequence[Tensor]) -> tuple[Tensor, ...]:
    if texts and isinstance(texts[0], Tensor):
        return tuple(cast(Sequence[Tensor], texts))
    return encode_texts(bottom, cast(Sequence[str], texts))


@torch.no_grad()
def clean_states(bottom: Bottom, ids: Sequence[Tensor]) -> list[Tensor]:
    """States [L, D] of texts without any noise: they never leave."""
    ids_BL, mask_BL = _padded(bottom, ids)
    packed_TD, lengths = pack(_noised(bottom, None, ids_BL, mask_BL, mask_BL), mask_BL)
    return list(packed_TD.float().split(lengths))


def _padded(bottom: Bottom, some: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids [B, L] padded at the right, and their mask."""
    padding = bottom.tokenizer.pad_token_id
    ids_BL = pad_sequence(
        list(some), batch_first=True, padding_value=0 if padding is None else padding
    )
    lengths_B1 = torch.tensor([len(text) for text in some])[:, None]
    return ids_BL, (torch.arange(ids_BL.shape[1]) < lengths_B1).long()


def _noised(
    bottom: Bottom,
    privatizer: Privatizer | None,
    ids_BL: Tensor,
    mask_BL: Tensor,
    factors_BL: Tensor,
) -> Tensor:
    """States [B, L, D] after the bottom; where words are replaced, the ids have had their noise."""
    stack, cut = bottom.stack, bottom.cut
    if privatizer is None or privatizer.mechanism.replaces_words:
        return run_bottom(stack, cut, stack.begin(ids_BL, mask_BL))
    if privatizer.mechanism.mode == "vector":
        embedding_BLD = privatizer.embeddings(stack.embedding(ids_BL), factors_BL)
        return run_bottom(stack, cut, begin_with(stack, embedding_BLD, mask_BL))
    return privatizer.block_outputs(run_bottom(stack, cut, stack.begin(ids_BL, mask_BL)))
