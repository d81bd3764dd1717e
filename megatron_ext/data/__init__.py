"""Where batches come from: preparation, tokenizers, blends, packing, and the ledger."""
