"""Split tuning: the customer holds the bottom and the data, the vendor holds the rest.

Source: Split-and-Privatize (arXiv 2312.15603).
"""
