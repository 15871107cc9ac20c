"""Frontiers of utility and privacy: many settings on the same data, and which nothing beats.

`offsite` and `split` are the sweeps, one a protocol; `estimate` says what they will take.
"""
