"""Tune a model that you may not see, on data that you may not share."""
