"""The Item LLM: item rows to text, text to one vector each, and what identifies those vectors.

May import: schemas, decoders, torch, transformers, numpy, pyarrow. Knows no storage layout, no tracking, no Ray, and
not the user tower.
"""
