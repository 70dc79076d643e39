"""Studies: a grid of recipes, each run once, compared with intervals, and reported."""
