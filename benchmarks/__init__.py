"""Side-by-side measurements. The results are JSON files in results/; they make the README's
table."""
