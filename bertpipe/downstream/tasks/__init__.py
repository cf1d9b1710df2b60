"""What a fine-tuning task is: its rows, its data, its forms, its official scores."""
