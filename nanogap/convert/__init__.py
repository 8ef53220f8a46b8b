"""From the pieces in which a model is published to one folder that `nanogap.load` reads."""
