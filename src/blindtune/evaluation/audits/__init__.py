"""Audits: the attacks that fit what is about to leave, run one after another and judged.

`adapter`, `emulator` and `split` are the audits, one a module; `audit` is what each returns.
"""
