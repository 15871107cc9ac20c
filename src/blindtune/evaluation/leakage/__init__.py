"""The judge: what attacks got right. No attack sees the truth; guesses meet it here.

`empirical_privacy` scores guessed tokens and labels, `membership` guessed records, `exposure`
planted secrets, `misuse` healed emulators; `owners` says whose text a recorded state was.
"""
