"""From real problems to verified, diverse, tagged traces (LACE.md §5)."""
