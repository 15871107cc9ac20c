"""Privatizers: noise with a guarantee, what it costs, and how much of it a vocabulary needs.

`metric_dp` is the mechanism, `nearest` the exact search it needs, `word_sampling` its form that
draws words, `word_groups` a coarser vocabulary in the place of noise, `entropy` where randomness
comes from; `token_importance` says which tokens are noised less, `randomized_response` draws
labels anew; `replacing` says what is sent in the place of a word; `accounting` adds up what was
spent. `noise_level` and `draw_level` put eta in terms of a vocabulary, which may hold twins
(`twin_words`). All of it runs at the customer; attackers have `channel`, the chances of what may
have been sent.
"""
