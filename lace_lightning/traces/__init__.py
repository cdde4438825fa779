"""Multi-thread data: schema, spelling, reading and collation."""
