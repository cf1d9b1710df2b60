"""bertpipe: from raw text to a fine-tuned BERT on the Hugging Face Hub."""

__version__ = "0.1.0"
