"""Starting programs: what has to be set before the first array."""
