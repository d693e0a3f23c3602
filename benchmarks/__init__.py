"""Side-by-side measurements; results as JSON under results/, from which the README's table is
made."""
