"""Fetches a GGUF from Hugging Face or ModelScope: which files, and their bytes, resumable and checked.

The hubs' own libraries are not used: huggingface_hub throws a partial file away when it is interrupted, which
is hours of work for a shard of 50 GB, and compares no checksum; ModelScope's speaks to ModelScope alone.
"""
