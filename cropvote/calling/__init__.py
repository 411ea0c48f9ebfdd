"""One call of a voting model: what is asked of it, what it cuts, and what it returns."""
