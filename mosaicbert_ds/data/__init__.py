"""Text to batches: sources, tokenizer, shards, sampler, masking, loader.

Knows neither model nor process group: rank and world size arrive as integers.
"""
