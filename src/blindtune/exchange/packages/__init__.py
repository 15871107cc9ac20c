"""Packages that one party hands to another: what they say, who made them, whom they are for."""
