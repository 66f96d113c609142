"""Graph passes, one file per pass, each with what it requires and what it ensures."""
