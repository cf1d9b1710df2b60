"""Pages: the report of a run, two checkpoints compared, whom a word attends to."""
