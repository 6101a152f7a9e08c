"""Runs as one self-contained HTML page: ``python -m metro_ext.report RUN [RUN...]``."""
