"""One module for each recipe. Each holds a `Recipe` in the name RECIPE."""
