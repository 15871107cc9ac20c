"""What a curious party can learn from what it saw. No attack sees the truth.

`adversary` says what an adversary has, `observation` reads it from a transcript, `imitation` plays
the customer with the public bottom, `fitting` trains small networks; every other module is one
attack, `attack(view) -> guess`. Scores are for `evaluation.leakage` alone.
"""
