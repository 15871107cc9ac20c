"""What the vendor reads of the states: the nearest-neighbour attack, and its judge."""

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.evaluation.leakage.empirical_privacy import empirical_privacy


def attacked(bottom, sent, mechanism, texts) -> float:
    """Empirical privacy of the first `texts` texts: the attack sees states, the judge also ids."""
    view = StatesView(
        model=bottom.stack,
        cut=bottom.cut.cut,
        states=sent.states[:texts],
        mechanism=mechanism,
        margins=bottom.margins,
    )
    guess = nearest_tokens(view)
    return empirical_privacy(guess, sent.ids[:texts], margins=bottom.margins).content.value
