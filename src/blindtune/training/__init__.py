"""Reading text into tokens, batching it, and the one training loop.

`text` turns files into a `TokenDataset`, `batches` orders and pads it, `loop.fit` trains whatever
parameters of a causal language model require a gradient. Nothing here knows about emulators.
"""
