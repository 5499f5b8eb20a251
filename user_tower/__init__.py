"""The User LLM: sequences of item vectors in, the vector of what comes next out; and its training loop.

May import: schemas, item_tower.decoders, torch, transformers, accelerate (train.py only), numpy. Knows no storage
layout, no tracking, no metrics, and nothing else of the item tower.
"""
