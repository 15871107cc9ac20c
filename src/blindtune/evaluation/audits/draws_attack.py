"""Several draws of the same texts, read as the attacker reads draws of its own best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from blindtune.attacks.adversary import Guess, StatesView, right_tokens
from blindtune.attacks.averaging import averaged_tokens, weighed_draws
from blindtune.errors import ConfigError

KNEW = "their mean, their majority, or all by Bayes' rule, whichever it does better on its own"


def read_draws(
    view: StatesView,
    again: Sequence[Sequence[Tensor]],
    *,
    one: Callable[[StatesView], Guess],
    sent: Callable[[StatesView], Guess],
    rehearse: Callable[[], StatesView],
    known: Sequence[Tensor],
) -> Guess:
    """Read texts of which several draws were sent.

    Args:
        view: the first draw.
        again: the states of every further one.
        one: reads a draw, or the mean of several.
        sent: the tokens that went into the bottom.
        rehearse: draws the attacker's own texts once more.
        known: these texts; none: nothing was learned, and Bayes' rule has no prior.
    """
    averaged = averaged_tokens(view, again, one)
    if not known:
        return averaged
    try:
        weighed = weighed_draws(view, again, sent).first()
    except ConfigError:  # the noise of this mode, or behind this cut, has no likelihood
        return averaged
    mine, *others = (rehearse() for _ in range(1 + len(again)))
    rest = [other.states for other in others]
    of_mine = weighed_draws(mine, rest, sent).first()
    more = right_tokens(of_mine, known) > right_tokens(averaged_tokens(mine, rest, one), known)
    return weighed if more else averaged
