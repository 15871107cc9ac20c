"""Whatever leaves a party, and nothing else: packages, and what reads them with suspicion."""
