"""The files around a model: which of them count, whether to trust them, how new ones come whole."""
