"""The judge: what attacks got right. The only place that holds a guess beside the truth.

`empirical_privacy` scores guessed tokens and labels, `membership` guessed records, `exposure`
planted secrets, `misuse` healed emulators; `owners` says whose text a recorded state was.
"""
