"""Group decoding: N threads of B groups, one column at a time."""
