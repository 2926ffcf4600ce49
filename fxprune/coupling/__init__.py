"""Couple: which indices of which parameters can only be removed together. Knows nothing of importance."""
