"""Prints the recipes' folder: ``bash "$(python -m metro_ext.recipes)"/single_node.sh base``."""

from metro_ext.recipes import recipe_folder

print(recipe_folder())
