"""Keep some heads dense and let the others see only the first tokens and a window (paper B)."""

from mmheads.streaming.cache import CompactLayer, cache_bytes
from mmheads.streaming.heads import Streaming, stream

__all__ = ["CompactLayer", "Streaming", "cache_bytes", "stream"]
