"""Emulators by other methods, one a module; `methods` writes the same package from each."""
