"""The User LLM: sequences of item vectors in, the vector of what comes next out; and its training loop.

May import: schemas, decoders, torch, transformers, accelerate (train.py only), numpy. Knows no storage layout, no
tracking, no metrics, and not the item tower.
"""
