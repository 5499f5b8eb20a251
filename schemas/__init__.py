"""What every other room agrees on: column names, table schemas, records, errors, hashes.

May import: pyarrow, pydantic, the standard library. Imported by every other room; imports none of them.
"""
