"""What both towers do alike with a Hugging Face decoder: packed attention, memory and compilation of its layers.

May import: torch, transformers, numpy. Imported by the towers and by what is above them; imports no other room.
"""
