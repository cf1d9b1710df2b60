"""bertpipe: from raw text to a fine-tuned BERT ready for the Hugging Face Hub."""

__version__ = "0.1.0"
