"""The recipe language: strict models, YAML in and out, rows and prompts. Nothing here is torch's.

file = load("recipe.yaml")           # RecipeFile: .recipe .folder .text .resolve(path)
rows = read_rows(file.recipe.data.test, seed=file.recipe.seed, beside=file.folder)
prompt = render(file.recipe.data.template, rows[0])

file = load_factory("factory.yaml")  # FactoryFile: .factory .folder .text .resolve(path)
"""

from lorahub_registry.recipes.dump import digest, to_yaml
from lorahub_registry.recipes.entries import RefEntry, Search, SearchEntry
from lorahub_registry.recipes.factory import (
    AdapterData,
    AdapterPlan,
    Factory,
    FactoryOutput,
    TrainSplit,
)
from lorahub_registry.recipes.factory_file import (
    FactoryFile,
    factory_digest,
    factory_from_mapping,
    factory_of_one,
    factory_yaml,
    load_any,
    load_factory,
    parse_factory,
)
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.recipes.load import RecipeFile, from_mapping, load, parse
from lorahub_registry.recipes.method import MethodInfo
from lorahub_registry.recipes.methods import METHODS
from lorahub_registry.recipes.model import Data, Output, Publish, Recipe, Split
from lorahub_registry.recipes.pin import pinned
from lorahub_registry.recipes.rows import Row, RowsFile, held_out, overlap, read_file, read_rows
from lorahub_registry.recipes.schema import factory_schema, json_schema
from lorahub_registry.recipes.splits import read_splits
from lorahub_registry.recipes.static import Linear
from lorahub_registry.recipes.template import render
from lorahub_registry.recipes.training import LoraOptions, TrainingOptions

__all__ = [
    "METHODS",
    "AdapterData",
    "AdapterPlan",
    "Data",
    "Factory",
    "FactoryFile",
    "FactoryOutput",
    "Learn",
    "Linear",
    "LoraHub",
    "LoraOptions",
    "MethodInfo",
    "Output",
    "OutputRank",
    "Publish",
    "Recipe",
    "RecipeFile",
    "RefEntry",
    "Row",
    "RowsFile",
    "Search",
    "SearchEntry",
    "Split",
    "TrainSplit",
    "TrainingOptions",
    "digest",
    "factory_digest",
    "factory_from_mapping",
    "factory_of_one",
    "factory_schema",
    "factory_yaml",
    "from_mapping",
    "held_out",
    "json_schema",
    "load",
    "load_any",
    "load_factory",
    "overlap",
    "parse",
    "parse_factory",
    "pinned",
    "read_file",
    "read_rows",
    "read_splits",
    "render",
    "to_yaml",
]
