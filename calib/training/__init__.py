"""S2P training: one state, one update, and what its options add."""
