"""Recipes: the paper's models, each a LightningModule and a DataModule to start from."""
