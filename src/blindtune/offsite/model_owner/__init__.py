"""What only the model owner runs: study a model, make emulators of it, plug adapters in.

The acts are `studying`, `emulation` and `plugin`. `importance`, `damage` and `mixed_network` tell
which layers matter, `harmonizers` and `calibration` what stands in for the others, `compression`
what is left of the rest; `vetting` looks at what an adapter would change.
"""
