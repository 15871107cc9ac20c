"""What a model is worth, what is leaked, and both beside each other.

`utility` measures models, `leakage` judges what attacks guessed (the only place that sees the
truth), `audits` run the attacks that fit, `frontiers` sweep settings, and `pages` show all of it.
"""
