"""The paged latent cache: storage (LatentCache) and bookkeeping (BlockPool) apart."""

from ktd.cache.block_pool import BlockPool
from ktd.cache.latent import CacheType, LatentCache
from ktd.cache.prefix import page_key

__all__ = ["BlockPool", "CacheType", "LatentCache", "page_key"]
