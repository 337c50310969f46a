"""The site's pages as plain Markdown, which any generator takes; `python -m docs.builder` writes them."""
