"""Chat models: any OpenAI-compatible endpoint, a local Hugging Face model, and a cache around either."""

from lace_lightning.synthesis.chats.cache import CachedChat
from lace_lightning.synthesis.chats.endpoint import OpenAIChat
from lace_lightning.synthesis.chats.local import HuggingFaceChat

__all__ = ["CachedChat", "HuggingFaceChat", "OpenAIChat"]
