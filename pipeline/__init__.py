"""What joins the towers to data: ingest, splits, the embedding cache, stage I, index, evaluation, tracking.

May import: schemas, decoders, item_tower, user_tower, polars, pyarrow, deltalake (cache.py), faiss (ann.py),
mlflow (tracking.py). No Ray: that stays in jobs.
"""
