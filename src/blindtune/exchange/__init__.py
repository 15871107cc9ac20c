"""Whatever leaves a party, and nothing else: packages, messages, and suspicious readers of both.

`packages` are what is handed over (docs/package-format.md), `wire` is what vendor and customer of
split tuning say to each other (docs/wire-format.md); neither knows the other.
"""
