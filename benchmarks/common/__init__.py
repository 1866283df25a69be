"""What the scripts of this folder share: results, Markdown, fetched data, worker processes."""
