"""lace-lightning: reasoning threads that read each other while they are decoded (LACE, arXiv 2604.15529)."""
