"""`ffcv-ssl monitor`: what runs have done so far, as one page that needs no network.

A run's way to the page: `find` finds its folder, `tail` reads its metrics as they grow, `table`
holds them thinned, `summary`, `activity` and `extras` say the rest, `board` gives all runs' news
since a version, `page` puts them into one HTML file, or `serve` sends them to the browser.
"""
