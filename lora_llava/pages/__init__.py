"""HTML pages and terminal views, rendered from plain data."""
