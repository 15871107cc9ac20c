"""Offsite-tuning: the owner ships a lossy emulator, the data owner returns a tuned adapter.

What only one of them runs is in `model_owner` and `data_owner`; `competitors` makes emulators by
other methods. Here is what crosses between them: the emulator and the adapter, as packages.
"""
