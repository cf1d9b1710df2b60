"""Stage finetune: a checkpoint tried on tasks, each run kept, the scores of all of them."""
