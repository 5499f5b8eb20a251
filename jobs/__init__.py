"""The commands: thin files that join the rooms, the configuration, and Ray.

May import everything; nothing imports jobs. A job reads the store, does one step, publishes one record.
"""
