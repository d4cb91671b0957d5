"""The parts of the low-data benchmark: its flags, methods, cells, tuning and report."""
