"""The model to train: where its weights come from, how it is built, its attention and its loss."""
