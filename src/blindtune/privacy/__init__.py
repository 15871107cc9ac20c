"""Privatizers: noise with a guarantee, what it costs, and how much of it a vocabulary needs.

Everything here runs at the customer. `metric_dp` is the mechanism, `nearest` the exact search it
needs, `entropy` where its randomness comes from; `token_importance` says which tokens are noised
less; `accounting` adds up what was spent; `noise_level` puts eta in terms of a vocabulary.
"""
