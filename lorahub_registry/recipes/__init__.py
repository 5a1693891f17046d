"""The recipe language: strict models, YAML in and out, rows and prompts. Nothing here is torch's.

file = load("recipe.yaml")           # RecipeFile: .recipe .folder .text .resolve(path)
rows = read_rows(file.recipe.data.test, seed=file.recipe.seed, beside=file.folder)
prompt = render(file.recipe.data.template, rows[0])
"""

from lorahub_registry.recipes.dump import digest, to_yaml
from lorahub_registry.recipes.entries import RefEntry, Search, SearchEntry
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.recipes.load import RecipeFile, from_mapping, load, parse
from lorahub_registry.recipes.method import MethodInfo
from lorahub_registry.recipes.methods import METHODS
from lorahub_registry.recipes.model import Data, Output, Publish, Recipe, Split
from lorahub_registry.recipes.pin import pinned
from lorahub_registry.recipes.rows import Row, overlap, read_rows
from lorahub_registry.recipes.schema import json_schema
from lorahub_registry.recipes.static import Linear
from lorahub_registry.recipes.template import render

__all__ = [
    "METHODS",
    "Data",
    "Learn",
    "Linear",
    "LoraHub",
    "MethodInfo",
    "Output",
    "OutputRank",
    "Publish",
    "Recipe",
    "RecipeFile",
    "RefEntry",
    "Row",
    "Search",
    "SearchEntry",
    "Split",
    "digest",
    "from_mapping",
    "json_schema",
    "load",
    "overlap",
    "parse",
    "pinned",
    "read_rows",
    "render",
    "to_yaml",
]
