"""Text in, arrays out: corpus, tokenizer, shards, order, masks, batches."""
