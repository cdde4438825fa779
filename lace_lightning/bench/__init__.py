"""Measuring decoding and training: `lace bench`. Each command is a generator of finished cells, plain records."""
