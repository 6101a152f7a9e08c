"""Evaluation without training: ``python -m metro_ext.evaluate blimp|retrieval``."""
