"""Contributing-token identification (CTI): less noise on the tokens that tell the classes apart.

Source: Split-and-Privatize (arXiv 2312.15603), contributing-token identification. With f_y(w) the
count of token w in training texts of class y,

    UI_y(w) = sum over y' != y of log( f_y(w) / (f_y'(w) + smoothing) ),

and the top fraction of the vocabulary by UI_y are class y's contributing tokens: in training texts
of class y their noise is multiplied by a factor, where 0 is no noise at all. All other tokens, and
all tokens of texts without a label, get full noise.

Guarantee: none of its own. What it takes from the mechanism's (`metric_dp`):
- The formula holds between words that have the same factor, once the lists are taken as known: eta
  for two that have full noise, eta / factor for two that contribute. Between a contributing word
  and another there is no bound, however near they are: how much noise there is tells them apart.
- With factor 0 a contributing token is sent as it is. State empirical privacy for contributing and
  other tokens separately; an average hides them.
- Which tokens are spared depends on the label, so the outputs of a training text show its label,
  and the chosen tokens show what is frequent in the private texts of a class. The sets are counted
  from private data without noise: never send them, or anything chosen by them except through the
  mechanism's outputs.
- Texts to predict have no label and full noise: training and prediction see different noise.

Special tokens (start, separator, padding) are no content of a text, and never contribute. The
policy "keep" leaves them without noise: that assumes that their places, hence the length of a text,
are public. They are told by their places and never by their ids, because whoever made the tokenizer
chooses which words it calls special, and a text may spell one: `models.margins`. "noise" treats
them as any other token.

Shapes: B batch, L length, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError

SpecialPolicy = Literal["keep", "noise"]
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Which tokens get less noise, and how much less. Everything here weakens the guarantee."""

    fraction: float = 0.01
    """Share of the vocabulary that contributes to each class; 0 switches CTI off."""
    factor: float = 0.0
    """Noise factor of contributing tokens: 1 is full noise, 0 none."""
    smoothing: float = 1e-5
    """Added to the counts of the other classes, so that a count of 0 can be divided by."""
    special: SpecialPolicy = "keep"
    """Tokens that the tokenizer puts around every text: "keep" without noise, their places are
    public; "noise" like any token."""

    def __post_init__(self) -> None:
        for name in ("fraction", "factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.smoothing < 1:
            raise ConfigError(f"expected smoothing between 0 and 1, got {self.smoothing}")
        if self.special not in ("keep", "noise"):
            raise ConfigError(f"expected special 'keep' or 'noise', got {self.special!r}")


def count_tokens(
    texts: Iterable[Sequence[int] | Tensor],
    labels: Iterable[int],
    *,
    classes: int,
    vocabulary_size: int,
) -> Tensor:
    """f_y(w): how often each token occurs in the texts of each class, int64 [C, V].

    Texts labelled `NO_LABEL` are not counted.

    Raises:
        DataError: a label or a token id out of range, or more texts than labels or the reverse.
    """
    count_CV = torch.zeros(classes, vocabulary_size, dtype=torch.int64)
    try:
        for text, label in zip(texts, labels, strict=True):
            if label == NO_LABEL:
                continue
            if not 0 <= label < classes:
                raise DataError(f"expected labels 0 to {classes - 1} or {NO_LABEL}, got {label}")
            ids = torch.as_tensor(text, dtype=torch.int64).reshape(-1).cpu()
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size:
                raise DataError(
                    f"expected token ids below {vocabulary_size}, got {int(ids.min())} to "
                    f"{int(ids.max())}: use the bottom's own tokenizer"
                )
            count_CV[label] += torch.bincount(ids, minlength=vocabulary_size)
    except ValueError as error:  # zip, strict
        raise DataError(f"expected one label for each text: {error}") from error
    return count_CV


def utility_importance(count_CV: Tensor, smoothing: float = 1e-5) -> Tensor:
    """UI_y(w), float64 [C, V]; -inf where a token never occurs in the class."""
    count_CV = count_CV.double()
    others_CV = (count_CV + smoothing).log()
    return (len(count_CV) - 1) * count_CV.log() - (others_CV.sum(0) - others_CV)


@final
class ContributingTokens:
    """The contributing tokens of each class, and the noise factors that follow from them.

    Args:
        count_CV: from `count_tokens` of the content alone; None without CTI (no labels, or no wish
            for it): only the policy for special tokens remains.
        config: how many, and how much less noise.

    Attributes:
        chosen_CV: bool [C, V], True where a token contributes to a class. Private.

    Raises:
        DataError: fewer than two classes, or counts of another shape.
    """

    def __init__(self, count_CV: Tensor | None, config: ImportanceConfig | None = None) -> None:
        self.config = config or ImportanceConfig()
        self.chosen_CV: Tensor | None = None
        if count_CV is not None:
            if count_CV.ndim != 2 or len(count_CV) < 2:
                raise DataError(
                    "expected counts [classes, vocabulary] of at least 2 classes, got "
                    f"{list(count_CV.shape)}: with one class no token tells classes apart"
                )
            self.chosen_CV = self._choose(count_CV)

    def _choose(self, count_CV: Tensor) -> Tensor:
        score_CV = utility_importance(count_CV, self.config.smoothing)
        wanted = round(self.config.fraction * score_CV.shape[1])
        order_CV = score_CV.argsort(dim=1, descending=True, stable=True)
        chosen_CV = torch.zeros_like(score_CV, dtype=torch.bool)
        chosen_CV.scatter_(1, order_CV[:, :wanted], True)
        return chosen_CV & (score_CV > -torch.inf)

    def of_class(self, label: int) -> Tensor:
        """Ids of the class's contributing tokens, ascending."""
        if self.chosen_CV is None:
            return torch.empty(0, dtype=torch.int64)
        return self.chosen_CV[label].nonzero().squeeze(1)

    def factors(
        self, ids_BL: Tensor, labels_B: Tensor | None = None, special_BL: Tensor | None = None
    ) -> Tensor:
        """Noise factors in [0, 1] for `Privatizer.tokens` and `.embeddings`, float32 [B, L].

        Args:
            ids_BL: token ids, padded.
            labels_B: classes of training texts, `NO_LABEL` where there is none. None: no text has
                one, as in prediction.
            special_BL: bool, where special tokens and padding are. None: nowhere.

        Raises:
            DataError: labels out of range or of another number than texts, ids out of range.
        """
        factor_BL = torch.ones(ids_BL.shape, device=ids_BL.device)
        if self.chosen_CV is not None and labels_B is not None:
            factor_BL[self._contributing(ids_BL, labels_B)] = self.config.factor
        if special_BL is not None:
            factor_BL[special_BL] = 0.0 if self.config.special == "keep" else 1.0
        return factor_BL

    def _contributing(self, ids_BL: Tensor, labels_B: Tensor) -> Tensor:
        assert self.chosen_CV is not None
        classes, vocabulary_size = self.chosen_CV.shape
        if labels_B.shape != ids_BL.shape[:1]:
            raise DataError(f"expected {len(ids_BL)} labels, got {list(labels_B.shape)}")
        if not bool(((labels_B >= NO_LABEL) & (labels_B < classes)).all()):
            raise DataError(f"expected labels 0 to {classes - 1}, or {NO_LABEL} for none")
        if ids_BL.numel() and not 0 <= int(ids_BL.min()) <= int(ids_BL.max()) < vocabulary_size:
            raise DataError(f"expected token ids below {vocabulary_size}: another tokenizer?")
        labelled_B1 = (labels_B != NO_LABEL)[:, None]
        chosen_CV = self.chosen_CV.to(ids_BL.device)
        return chosen_CV[labels_B.clamp_min(0)[:, None], ids_BL] & labelled_B1
