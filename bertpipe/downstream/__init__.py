"""What a checkpoint is good for: fine-tuning, the report, publishing."""
