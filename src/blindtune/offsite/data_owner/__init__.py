"""What only the data owner runs: tune the adapter of an emulator. It reaches no owner's secret."""
