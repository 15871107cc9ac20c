"""Privatizers: noise with a guarantee, what it costs, and how much of it a vocabulary needs.

Everything here runs at the customer. `metric_dp` is the mechanism, `nearest` the exact search it
needs, `word_sampling` its form that draws words, `entropy` where its randomness comes from;
`token_importance` says which tokens are noised less; `accounting` adds up what was spent;
`noise_level` and `draw_level` put eta in terms of a vocabulary.
"""
