"""Offsite-tuning: the owner ships a lossy emulator, the data owner returns a tuned adapter.

`harmonizers`, `importance`, `compression`, `study`, `emulation` and `plugin` run at the model
owner; `emulator` and `tuning` at the data owner.
"""
