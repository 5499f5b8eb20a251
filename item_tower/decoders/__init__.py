"""What both towers do alike with a Hugging Face decoder: packed attention, memory and compilation of its layers.

May import: torch, transformers, numpy, schemas; no other room. The user tower takes this folder, and nothing else,
from this room.
"""
