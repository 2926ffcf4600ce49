"""Plan: decide which units go, as plain data. Knows nothing of graphs beyond their groups."""
