"""Split tuning: the customer holds the bottom and the data, the vendor holds the rest.

What only one of them runs is in `vendor` and `customer`, and neither folder reaches the other. Here
is what both share: who holds which layers, the bottom package, and what a job may ask.

Source: Split-and-Privatize (arXiv 2312.15603).
"""
