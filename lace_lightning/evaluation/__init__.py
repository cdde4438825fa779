"""Whether threads that talk beat threads that don't: methods on the same problems at the same budget (LACE.md §7)."""
